"""How often `modelops monitor` cries wolf, and what it notices: real images, many windows.

    python bench/bench_drift.py my-demo --json drift.json
    python bench/bench_drift.py my-demo --repetitions 40 --pictures 395     # smaller

`my-demo` is what `modelops demo my-demo` left. Each repetition deals the evaluated prompts of the
released model out to a reference and a window, at random; nothing drifted if the window's images
are the model's own. Then the same window with other images: of another checkpoint, other
settings, other colours. A window is judged as the command judges it, at the policy's default alpha:
1.25 % of windows a false alarm at most.

"other topics" deals whole groups of prompts out (the skin tones of one emoji are a group; the
largest has a quarter of the prompts), so that the window asks for other things: that is drift, and
to be found. "margins off" judges with all margins 0: what of the rates is the tests' doing, and
what the margins'. Latencies are simulated: Poisson arrivals at one server, whose requests wait for
one another.
"""

# ruff: noqa: E402 - BLAS reads the number of its threads when it is loaded
from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from modelops.base.files import sha256_json, write_json
from modelops.base.images import read_image
from modelops.base.seeding import numpy_generator
from modelops.metrics.features import Lite0Extractor, write_arrays
from modelops.metrics.intervals import clopper_pearson
from modelops.models.request import ImageRequest
from modelops.monitoring.judge import compare_samples
from modelops.monitoring.policy import Margins, MonitoringPolicy
from modelops.monitoring.reference import FilterRate
from modelops.monitoring.rows import shares_to_vector
from modelops.monitoring.samples import Sample
from modelops.monitoring.scripts import script_shares
from modelops.monitoring.shifts import Latencies, latency_shift

Features = npt.NDArray[np.float16]
Rows = npt.NDArray[np.int64]
Choice = Callable[[Rows], Rows]
NO_MARGINS = Margins(**dict.fromkeys(Margins.model_fields, 0.0))


class Lab:
    """The evaluated prompts of a demo, and features of several sets of images of them."""

    def __init__(self, demo: Path, pictures: int, cache: Path) -> None:
        self.demo, self.cache = demo, cache
        self.rows = json.loads((demo / "evaluations/int8/per_image.json").read_text())[:pictures]
        self.prompts = [row["prompt"] for row in self.rows]
        self.scores = np.array([row["nsfw_score"] for row in self.rows])
        self.characters = np.array([len(prompt) for prompt in self.prompts])
        self.scripts = np.array([shares_to_vector(script_shares(text)) for text in self.prompts])
        splits = pq.read_table(demo / "data/splits.parquet").to_pydict()
        groups = dict(zip(splits["id"], splits["group"], strict=True))
        manifest = pq.read_table(demo / "data/manifest.parquet").to_pydict()
        captions = {
            caption: groups.get(key, key)
            for key, caption in zip(manifest["id"], manifest["caption"], strict=True)
        }
        names = [str(captions.get(prompt, prompt)) for prompt in self.prompts]
        self.groups = np.unique(names, return_inverse=True)[1]
        self.extractor = Lite0Extractor()

    def evaluated(self, name: str) -> Features:
        """Features of an evaluation of the same prompts."""
        rows = json.loads((self.demo / f"evaluations/{name}/per_image.json").read_text())
        place = {row["prompt"]: index for index, row in enumerate(rows)}
        with np.load(self.demo / f"evaluations/{name}/features.npz") as stored:
            return np.asarray(stored["features"][[place[p] for p in self.prompts]], np.float16)

    def changed(self, change: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]) -> Features:
        """Features of the model's own images, changed."""
        folder = self.demo / "evaluations/int8"
        images = (change(read_image(folder / row["image"])) for row in self.rows)
        return self.extractor.images_to_features(images).astype(np.float16)

    def made(self, **options: Any) -> Features:
        """Features of new images by the released model; kept in the cache."""
        path = self.cache / f"{sha256_json({'n': len(self.prompts), **options})[:16]}.npz"
        if path.is_file():
            with np.load(path) as stored:
                return np.asarray(stored["features"])
        from modelops.export.artifact.open import open_artifact

        source = open_artifact(self.demo / "release/model", batch_size=8)
        shift = options.pop("seed", 0)
        images: list[npt.NDArray[np.uint8]] = []
        for start in range(0, len(self.rows), 8):
            images += source.generate(
                [
                    ImageRequest(prompt=row["prompt"], seed=row["seed"] + shift, **options)
                    for row in self.rows[start : start + 8]
                ]
            )
        features = self.extractor.images_to_features(images).astype(np.float16)
        write_arrays(path, features=features)
        return features

    def sample(self, features: Features, rows: Rows) -> Sample:
        """Those prompts and images as one side of the tests."""
        return Sample(
            features=features[rows], scores=self.scores[rows], characters=self.characters[rows],
            scripts=self.scripts[rows],
            prompt_filter=FilterRate(name="words", stopped=0, n=len(rows)),
            image_filter=FilterRate(name="open_nsfw", stopped=0, n=len(rows)),
            latencies=Latencies(np.zeros(0), np.zeros(0)), missing={"latency": "not simulated"},
        )  # fmt: skip

    def deal(self, repetition: int, share: float, *, by_group: bool) -> tuple[Rows, Rows]:
        """Rows of the reference and of the window, which has `share` of them."""
        generator = numpy_generator(1, "bench-drift", repetition, str(by_group))
        n = round(share * len(self.prompts))
        if not by_group:
            order = generator.permutation(len(self.prompts))
            return order[n:], order[:n]
        order = generator.permutation(self.groups.max() + 1)[self.groups]
        place = np.argsort(order, kind="stable")
        return place[n:], place[:n]


def rates(
    lab: Lab, own: Features, window: Features, repetitions: int, share: float, rules:
    MonitoringPolicy, *, by_group: bool, choose: Callable[[Rows], Rows] = lambda rows: rows,
) -> dict[str, float]:  # fmt: skip
    """Share of windows in which each test, and any, found drift; mean effects as `effect/NAME`."""
    found: Counter[str] = Counter()
    effects: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        old, new = lab.deal(repetition, share, by_group=by_group)
        tests = compare_samples(
            lab.sample(window, choose(new)), lab.sample(own, old), rules, seed=repetition
        )
        hits = [test.name for test in tests if test.outcome == "found"]
        found.update([*hits, *(["any"] if hits else [])])
        for test in tests:
            if test.effect is not None:
                effects.setdefault(f"effect/{test.name}", []).append(abs(test.effect))
    made = {name: found[name] / repetitions for name in ("any", *NO_MARGINS.model_dump())}
    return made | {name: float(np.mean(values)) for name, values in effects.items()}


def grey(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.repeat(image.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)


def dimmer(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return (image * 0.95).astype(np.uint8)


def latencies(generator: np.random.Generator, days: float, slower: float) -> Latencies:
    """Answers of one server at 70 % load, a fifth of them of three times the work."""
    n = int(days * 4000)
    gaps = generator.exponential(86400 / 4000, n)
    work = np.where(generator.random(n) < 0.2, 3.0, 1.0) * 86400 / 4000 * 0.5 * slower
    arrived, free, took = np.cumsum(gaps), 0.0, np.zeros(n)
    for i in range(n):
        free = max(free, float(arrived[i])) + work[i]
        took[i] = free - arrived[i]
    return Latencies(arrived, took)


def latency_rates(repetitions: int, alpha: float) -> dict[str, float]:
    """Share of windows found slower at p50 and p95, by how much slower the server was."""
    made = {}
    for slower in (1.0, 1.2):
        for q in (0.5, 0.95):
            hits = 0
            for repetition in range(repetitions):
                generator = numpy_generator(2, "bench-latency", repetition)
                found = latency_shift(
                    latencies(generator, 1, 1.0), latencies(generator, 1, slower), q,
                    seed=repetition, permutations=1999,
                )  # fmt: skip
                margin = 0.25 if q == 0.5 else 0.5
                hits += found is not None and found.p <= alpha and found.effect >= margin
            made[f"p{100 * q:.0f} of a server {slower:g} times as slow"] = hits / repetitions
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.4, help="of the prompts in the window")
    parser.add_argument("--cache", type=Path, default=Path("bench-drift-cache"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lab = Lab(options.demo, options.pictures, options.cache)
    own = lab.evaluated("int8")
    rules = MonitoringPolicy()
    loose = rules.model_copy(update={"margins": NO_MARGINS})
    small = rules.model_copy(update={"min_n": 20})
    few = max(10, options.repetitions // 10)
    fewer_letters = np.argsort(lab.characters)[: len(lab.prompts) // 2]

    def whole(rows: Rows) -> Rows:
        return rows

    def short(rows: Rows) -> Rows:
        return rows[np.isin(rows, fewer_letters)]

    early, fp32 = lab.evaluated("early"), lab.evaluated("final")
    plan: list[tuple[str, Callable[[], Features], MonitoringPolicy, bool, int, Choice]] = [
        ("no drift", lambda: own, rules, False, options.repetitions, whole),
        ("no drift, margins off", lambda: own, loose, False, options.repetitions, whole),
        ("fp32 for INT8", lambda: fp32, rules, False, few, whole),
        ("5 % darker", lambda: lab.changed(dimmer), rules, False, few, whole),
        ("grey images", lambda: lab.changed(grey), rules, False, few, whole),
        ("checkpoint at 6 % of training", lambda: early, rules, False, few, whole),
        ("the shorter half of the prompts", lambda: own, small, False, few, short),
        ("other topics", lambda: own, rules, True, few, whole),
        ("4 steps for 24", lambda: lab.made(steps=4), rules, False, few, whole),
        ("guidance 1 for 3", lambda: lab.made(guidance=1.0), rules, False, few, whole),
        ("new seeds", lambda: lab.made(seed=1), rules, False, few, whole),
    ]
    n = round(options.share * len(lab.prompts))
    print(f"reference {len(lab.prompts) - n} images, window {n}; alpha of a window "
          f"{rules.window_alpha:.4f}; {lab.groups.max() + 1} groups")  # fmt: skip
    print(f"{'window':34} {'found':>6} {'95 % interval':>15}   mean   cov length   effects")
    results = {}
    for name, features, policy, by_group, repetitions, choose in plan:
        made = rates(
            lab, own, features(), repetitions, options.share, policy, by_group=by_group,
            choose=choose,
        )  # fmt: skip
        interval = clopper_pearson(round(made["any"] * repetitions), repetitions)
        results[name] = {**made, "n": repetitions, "low": interval.low, "high": interval.high}
        print(f"{name:34} {made['any']:6.3f} [{interval.low:.3f}, {interval.high:.3f}] "
              f"{made['feature_mean']:6.2f} {made['feature_covariance']:5.2f} "
              f"{made['prompt_length']:6.2f}    {made['effect/feature_mean']:.2f} "
              f"{made['effect/feature_covariance']:.2f}", flush=True)  # fmt: skip
    waits = latency_rates(few, rules.window_alpha / 2)
    for name, rate in waits.items():
        print(f"{name:34} {rate:6.3f} found, of {few}")
    if options.json:
        write_json(options.json, {"windows": results, "latencies": waits})


if __name__ == "__main__":
    main()
