"""Speed of FID: the Fréchet distance, its interval, and files to FID, against the peers.

    pip install --no-deps -r bench/requirements.txt
    python bench/bench_fid.py                      # all three parts
    python bench/bench_fid.py --part files --count 256 --rounds 5

Contenders take turns in one run; ratios are medians of rounds, by the clock and by processor time
(children included), which a shared machine disturbs less. All use the same weights and cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import inception_peers as peers
from modelops.base.files import sha256_file
from modelops.base.images import read_image
from modelops.metrics.features import cached_features
from modelops.metrics.frechet import (
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_interval,
)
from modelops.metrics.inception import InceptionExtractor

Seconds = tuple[float, float]  # by the clock, of processors


def seconds_of(task: Callable[[], Any]) -> Seconds:
    before, wall = os.times(), time.perf_counter()
    task()
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(before[:4])


def interleaved(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Median seconds of each task, taken in turns after one round that does not count."""
    found: dict[str, list[Seconds]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            seconds = seconds_of(task)
            if turn:
                found[name].append(seconds)
    return {name: (median(s[0] for s in all_), median(s[1] for s in all_))
            for name, all_ in found.items()}  # fmt: skip


def report(title: str, found: dict[str, Seconds], ours: str = "ours", images: int = 0) -> None:
    print(f"\n{title}\n")
    print(f"| contender | seconds | processor seconds | ours is faster by |\n|{'---|' * 4}")
    for name, (wall, cpu) in found.items():
        speed = f" ({images / wall:.2f} images/s)" if images else ""
        factor = "" if name == ours else (
            f"{wall / found[ours][0]:.2f} x, {cpu / found[ours][1]:.2f} x of processor time"
        )  # fmt: skip
        print(f"| {name} | {wall:.3f}{speed} | {cpu:.3f} | {factor} |", flush=True)


def bench_frechet(rounds: int) -> None:
    """Statistics at D = 2048 to a distance."""
    from cleanfid.fid import frechet_distance as cleanfid_frechet

    x, y = feature_like(3000, 0), feature_like(3000, 1)
    a, b = features_to_statistics(x), features_to_statistics(y)
    few = x[:1000]
    with peers.quiet(), peers.sqrtm_with_disp() as replaced:
        theirs = cleanfid_frechet(a.mean, a.covariance, b.mean, b.covariance)
        found = interleaved(
            {
                "ours": lambda: frechet_distance(a, b),
                "ours, 1,000 images, from features": lambda: features_to_frechet_distance(few, y),
                "clean-fid": lambda: cleanfid_frechet(a.mean, a.covariance, b.mean, b.covariance),
            },
            rounds,
        )
    note = "; clean-fid's sqrtm(disp=) emulated, this scipy has dropped it" if replaced else ""
    ours = frechet_distance(a, b)
    report(f"Fréchet distance at D = 2048 (ours {ours:.8g}, theirs {theirs:.8g}{note})", found)


def bench_interval(weights: Path, folder: Path, n: int) -> None:
    """The 95 % interval at n images against extracting the features of n images."""
    files = peers.picture_files(folder)
    extractor = InceptionExtractor(weights)
    extractor.images_to_features([read_image(files[0])] * 8)
    extraction = seconds_of(lambda: extractor.images_to_features(map(read_image, files)))
    x, y = feature_like(n, 0), feature_like(n, 1)
    interval = seconds_of(lambda: frechet_interval(x, y, seed=0))
    factor = n / len(files)
    report(
        f"95 % interval at n = {n} (extraction timed on {len(files)} images, times {factor:g})",
        {"ours": interval, "extraction": (extraction[0] * factor, extraction[1] * factor)},
    )


def bench_files(
    weights: Path, archive: Path, folder: Path, rounds: int, peer_workers: list[int]
) -> None:
    """Files to features and to FID, against reference features that are there already."""
    files = peers.picture_files(folder)
    reference = feature_like(3000, 2)
    for mode, contenders in (
        ("clean", cleanfid_tasks(weights, archive, folder, peer_workers)),
        ("legacy_tensorflow", fidelity_tasks(weights, files)),
    ):
        extractor = InceptionExtractor(weights, mode=mode)

        def ours(extractor: InceptionExtractor = extractor) -> Any:
            digests = [sha256_file(path) for path in files]
            return cached_features(extractor, digests, lambda i: read_image(files[i]), None)

        tasks = {"ours": ours, **contenders}
        report(f"files to features, {mode}, {len(files)} images", interleaved(tasks, rounds),
               images=len(files))  # fmt: skip
    sample = ours()
    statistics = features_to_statistics(reference)
    print("\nto FID from those features, once:")
    mine = seconds_of(lambda: features_to_frechet_distance(sample, reference))
    print(f"ours {mine[0]:.2f} s, {mine[1]:.2f} s of processors")
    from cleanfid.fid import frechet_distance as cleanfid_frechet

    with peers.quiet(), peers.sqrtm_with_disp():
        other = seconds_of(lambda: cleanfid_frechet(
            sample.mean(axis=0), np.cov(sample, rowvar=False), statistics.mean,
            statistics.covariance))  # fmt: skip
    print(f"clean-fid {other[0]:.2f} s, {other[1]:.2f} s of processors")


def cleanfid_tasks(
    weights: Path, archive: Path, folder: Path, workers: list[int]
) -> dict[str, Callable[[], Any]]:
    model = peers.cleanfid_model("clean", weights, archive)

    def task(count: int) -> Callable[[], Any]:
        return lambda: peers.cleanfid_features(
            folder, "clean", model, batch_size=32, num_workers=count
        )

    return {f"clean-fid, {count} workers": task(count) for count in workers}


def fidelity_tasks(weights: Path, files: list[Path]) -> dict[str, Callable[[], Any]]:
    try:
        from torch_fidelity.datasets import ImagesPathDataset
        from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
    except ImportError:
        print("torch-fidelity is not installed")
        return {}
    extractor = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    dataset = ImagesPathDataset([str(path) for path in files])

    def task(save_cpu_ram: bool) -> Callable[[], Any]:
        def run() -> Any:
            with peers.quiet():
                return get_featuresdict_from_dataset(
                    dataset, extractor, 32, False, save_cpu_ram, False
                )

        return run

    return {"torch-fidelity, no workers": task(True), "torch-fidelity, its workers": task(False)}


def feature_like(n: int, seed: int, dimension: int = 2048) -> Any:
    """Features with a decaying spectrum and a shift, [n, dimension] float32."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimension, dimension)) / dimension**0.5
    scales = np.arange(1, dimension + 1) ** -0.5
    data = np.abs(generator.normal(size=(n, dimension)) * scales @ mixing) + 0.01 * seed
    return data.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("all", "frechet", "interval", "files"), default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=128, help="images of the file parts")
    parser.add_argument("--size", type=int, default=256, help="their size in pixels")
    parser.add_argument("--n", type=int, default=1000, help="images behind the interval")
    parser.add_argument("--peer-workers", type=int, nargs="+", default=[0, 2])
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{os.cpu_count()} processors, {threads} threads, load {os.getloadavg()[0]:.1f}")
    if options.part in ("all", "frechet"):
        bench_frechet(options.rounds)
    if options.part in ("all", "interval", "files"):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            folder = peers.write_pictures(root / "pictures", options.count, size=options.size)
            some = peers.picture_files(folder)[:6]
            weights = peers.random_weights(root / "weights", calibration=some)
            archive = peers.write_torchscript(weights, root / "weights")
            if options.part in ("all", "interval"):
                bench_interval(weights, folder, options.n)
            if options.part in ("all", "files"):
                bench_files(weights, archive, folder, options.rounds, options.peer_workers)


if __name__ == "__main__":
    main()
