"""Does the memory of an evaluation grow with the number of its images? Peak resident memory, by n.

    python bench/bench_memory.py
    python bench/bench_memory.py --counts 500 2000 8000 --modes stream memory

Each evaluation of a folder of small images (OpenMoji drawings with noise, made here) against the
same reference runs in a process of its own, in full: sampling, features, Fréchet, kernel and
extrapolated distance, precision and recall, memorization, diversity, the record. Peak is what the
kernel says of the process (VmHWM), counted from where imports, the network and one batch have left
it (`start`), because these had a higher peak of their own; pages of mapped feature files are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZE = 32
REFERENCE = 400  # images, of which a quarter is the reference and the rest training images


def resident_mb(which: str) -> float:
    """Resident memory of this process in MB: "VmRSS" now, "VmHWM" its peak since the reset."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not say how much memory a process has used")


def make_pictures(root: Path, count: int) -> tuple[Path, Path]:
    """(manifest, splits) of the reference; root/images gets `count` images to evaluate."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from modelops.base.images import encode_png, read_image
    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest

    manifest = build_corpus(root / "data", resolution=SIZE, limit=REFERENCE, seed=0)
    samples = read_manifest(manifest)
    ids = [sample.id for sample in samples.rows]
    names = ["test" if i % 4 == 0 else "train" for i in range(len(ids))]
    splits = root / "data" / "splits.parquet"
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), splits)
    pictures = [read_image(samples.image_path(sample)) for sample in samples.rows]
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for index in range(count):
        noise = generator.normal(scale=25.0, size=(SIZE, SIZE, 3))
        pixels = np.clip(np.rint(pictures[index % len(pictures)] + noise), 0, 255)
        path = root / "images" / f"{index:06}.png"
        path.write_bytes(encode_png(pixels.astype(np.uint8)))
    return manifest, splits


def measure(root: Path, count: int, stream: bool) -> None:
    """In a process of its own: evaluate `count` images and print what it took as JSON."""
    from modelops.evaluation.evaluate import evaluate
    from modelops.evaluation.settings import EvaluationSettings
    from modelops.evaluation.sources.folder import FolderSource
    from modelops.metrics.features import Lite0Extractor

    extractor = Lite0Extractor()
    extractor.images_to_features([np.zeros((SIZE, SIZE, 3), np.uint8)] * extractor.batch_size)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak counts from here
    start, clock = resident_mb("VmRSS"), time.monotonic()
    settings = EvaluationSettings(
        manifest=root / "data" / "manifest.parquet", splits=root / "data" / "splits.parquet",
        prompts_file=root / "prompts.txt", n=count, stream=stream, safety="none",
        jackknife_groups=8, resamples=200,  # time, not memory
    )  # fmt: skip
    name = f"{'stream' if stream else 'memory'}-{count}.json"
    record = evaluate(FolderSource(root / "images"), settings, out_path=root / name)
    found = record.metrics["frechet_distance_lite0"]
    print(json.dumps({
        "count": count, "mode": "stream" if stream else "memory", "start_mb": start,
        "peak_mb": resident_mb("VmHWM"), "seconds": time.monotonic() - clock,
        "frechet": [found.value, found.low, found.high],
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--modes", nargs="+", choices=("stream", "memory"),
                        default=["stream", "memory"])  # fmt: skip
    parser.add_argument("--child", nargs=3, metavar=("DIR", "COUNT", "MODE"))
    options = parser.parse_args()
    if options.child:
        directory, count, mode = options.child
        measure(Path(directory), int(count), mode == "stream")
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_pictures(root, max(options.counts))
        (root / "prompts.txt").write_text("".join(f"a drawing, {i}\n" for i in range(250)))
        for mode in options.modes:
            rows = []
            for count in options.counts:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", directory, str(count), mode],
                    capture_output=True, text=True, check=False, env={**os.environ},
                )  # fmt: skip
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                row = rows[-1]
                low, high = row["frechet"][1:]
                print(
                    f"{mode:7} n = {count:6}: start {row['start_mb']:6.0f} MB, peak "
                    f"{row['peak_mb']:6.0f} MB, {row['seconds']:5.0f} s, Frechet "
                    f"{row['frechet'][0]:.4f} [{low:.4f}, {high:.4f}]",
                    flush=True,
                )
            first, last = rows[0], rows[-1]
            more = (last["peak_mb"] - first["peak_mb"]) / (last["count"] - first["count"]) * 1024
            print(
                f"{mode:7} peak at n = {last['count']} / peak at n = {first['count']}: "
                f"{last['peak_mb'] / first['peak_mb']:.3f} ({more:.1f} kB an image)",
                flush=True,
            )


if __name__ == "__main__":
    main()
