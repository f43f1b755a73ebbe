"""How often nominal 95 % intervals hold the truth: one fixed plan, by simulation.

    python bench/bench_coverage.py --json coverage.json
    python bench/bench_coverage.py --manifest data/manifest.parquet --only fid kid
    python bench/bench_coverage.py --seed-base 7 --repetitions 100      # while developing

Every choice in the intervals was made on other seeds than the plan's own, SEED_BASE, which is for
measuring only: once a choice has been made on it, take another. About half an hour on two cores.

The populations are Lite0 features of OpenMoji: real drawings, halved into two populations that
samples are drawn from (without replacement in all 1,280 dimensions; with it, so that images are
independent, along fewer directions), or Gaussians fitted to them. "of E" means that the interval is
for the expectation of the estimate at this n; "of the truth", for the population's value. Coverages
of single rates are not simulated but summed up exactly.
"""

# ruff: noqa: E402 - BLAS reads the number of its threads when it is loaded
from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # processes share the cores, not threads
    os.environ[name] = "1"

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, binomtest, skewnorm

from modelops.base.files import write_json
from modelops.data.corpora.openmoji import build_corpus
from modelops.data.embeddings import embed_manifest
from modelops.data.manifest import read_manifest
from modelops.metrics.clustered import clustered_rate
from modelops.metrics.frechet import (
    Statistics,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
)
from modelops.metrics.intervals import Interval, bootstrap_mean, clopper_pearson
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.paired import PairedDifference, paired_mean, paired_rate
from modelops.metrics.paired_sets import paired_frechet, paired_kernel

SEED_BASE = 60_318  # never used in development; 0 to 9, 77, 123, 555, 556, 991, 4242 were
WANTED = (0.92, 0.98)
TRUTH_DRAWS = 4  # draws behind an expectation, for each repetition
KINDS = ("fid", "infinity", "kid", "score", "rate", "paired")

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]
Made = Interval | PairedDifference


def wilson(successes: int, n: int) -> Interval:
    """Score interval of a rate (Wilson, 1927), by scipy; for comparison."""
    made = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, float(made.low), float(made.high), "Wilson")


@dataclass(frozen=True)
class Case:
    """One row of the plan.

    Attributes:
        make: from a generator and an index (a seed for the interval's own draws) to an interval.
        truth: what it should hold; or how to draw one estimate, whose mean is the truth.
        share: of the plan's repetitions, less where one takes long.
    """

    kind: str
    name: str
    make: Callable[[np.random.Generator, int], Made]
    truth: float | Callable[[np.random.Generator], float]
    share: float = 1.0


@dataclass(frozen=True)
class Pair:
    """Two populations of features, and how to draw from them."""

    name: str
    generated: Draw
    reference: Draw
    statistics: Statistics


def open_pool(manifest: Path | None) -> Floats:
    """Lite0 features [N, 1280] of OpenMoji; those of a manifest come from its cache."""
    if manifest is not None:
        return np.asarray(embed_manifest(read_manifest(manifest)).features, np.float64)
    with tempfile.TemporaryDirectory() as folder:
        found = embed_manifest(read_manifest(build_corpus(Path(folder), resolution=64)))
        return np.asarray(found.features, np.float64)


def split(pool: Floats) -> tuple[Floats, Floats]:
    order = np.random.default_rng(0).permutation(len(pool))
    return pool[order[::2]], pool[order[1::2]]


def worse(rows: Floats, amount: float) -> Floats:
    """Paler and shifted; 1 is a model of middling quality, 0 no change."""
    return np.asarray((1 - 0.15 * amount) * rows + 0.3 * amount * rows.mean(axis=0))


def halves(pool: Floats, name: str, *, amount: float = 1.0, replace: bool = False) -> Pair:
    """Real drawings: one half as the reference, the other, made worse, as generated."""
    reference, other = split(pool)
    generated = worse(other, amount)

    def draw(rows: Floats) -> Draw:
        return lambda generator, n: rows[generator.choice(len(rows), n, replace=replace)]

    return Pair(name, draw(generated), draw(reference), features_to_statistics(generated))


def gaussians(pool: Floats, name: str, *, amount: float) -> Pair:
    """Gaussians with the pool's moments, the generated one paler and shifted; 0 is twice one."""
    mean, covariance = pool.mean(axis=0), np.cov(pool.T)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    scale, shift = 1 - 0.15 * amount, 0.15 * amount

    def draw(a: float, b: float) -> Draw:
        return lambda generator, n: (
            a * (generator.normal(size=(n, len(mean))) @ root.T) + (1 + b) * mean
        )

    statistics = Statistics((1 + shift) * mean, scale**2 * covariance, len(pool))
    return Pair(name, draw(scale, shift), draw(1.0, 0.0), statistics)


def projected(pool: Floats, dimension: int) -> Floats:
    """Coordinates along the first principal directions."""
    centre = pool.mean(axis=0)
    _, _, directions = np.linalg.svd(pool - centre, full_matrices=False)
    return np.asarray(pool @ directions[:dimension].T)


def frechet(pair: Pair, n: int, m: int) -> Case:
    """The Fréchet interval, of the distance's expectation at n and m."""
    return Case(
        "fid", f"Fréchet, of E: {pair.name}, n {n}, m {m}",
        lambda generator, index: frechet_interval(
            pair.generated(generator, n), pair.reference(generator, m), seed=index
        ),
        lambda generator: features_to_frechet_distance(
            pair.generated(generator, n), pair.reference(generator, m)
        ),
    )  # fmt: skip


def infinity(pair: Pair, n: int, m: int) -> Case:
    """FD-infinity, of the distance of the whole generated population to m reference images."""
    return Case(
        "infinity", f"FD-infinity, of the truth: {pair.name}, n {n}, m {m}",
        lambda generator, index: frechet_infinity(
            pair.generated(generator, n), pair.reference(generator, m), seed=index
        ).interval,
        lambda generator: frechet_distance(
            pair.statistics, features_to_statistics(pair.reference(generator, m))
        ),
        share=0.4,
    )  # fmt: skip


def kernel(pair: Pair, n: int, m: int, *, null: bool = False) -> Case:
    """The kernel distance, of the population's value: its estimates have no bias."""
    return Case(
        "kid", f"KID, of the truth: {pair.name}, n {n}, m {m}",
        lambda generator, index: kernel_distance(
            pair.generated(generator, n), pair.reference(generator, m)
        ),
        0.0 if null else lambda generator: kernel_distance(
            pair.generated(generator, n), pair.reference(generator, m)
        ).value,
    )  # fmt: skip


def score(n: int, skew: float) -> Case:
    """CLIPScore's form: a mean over prompts of 2.5 max(0, cosine), the cosine skew-normal."""
    shape = skewnorm(skew, loc=0.2, scale=0.08)
    generator = np.random.default_rng(3)
    population = 2.5 * np.clip(shape.rvs(size=1_000_000, random_state=generator), 0, None)
    truth = float(population.mean())
    skewness = float(((population - truth) ** 3).mean() / population.std() ** 3)
    return Case(
        "score", f"CLIPScore mean, of the truth: skewness {skewness:.2f}, n {n}",
        lambda generator, index: bootstrap_mean(generator.choice(population, n), seed=index),
        truth,
    )  # fmt: skip


def clustered(rate: float, likeness: float, prompts: int = 100, images: int = 4) -> Case:
    """A rate over images of which several belong to one prompt: beta-binomial hits."""
    size = 1 / likeness - 1
    owners = np.repeat(np.arange(prompts), images)

    def make(generator: np.random.Generator, index: int) -> Interval:
        chance = generator.beta(rate * size, (1 - rate) * size, prompts)
        return clustered_rate(generator.random(len(owners)) < chance[owners], owners).interval

    name = f"clustered rate {rate}, likeness {likeness}, {prompts} prompts of {images}"
    return Case("rate", name, make, rate)


def paired_sets(pool: Floats, name: str, n: int, m: int, *, equal: bool) -> Iterator[Case]:
    """Two sources on the same prompts: drawings made worse, each with noise of its own."""
    reference, other = split(pool)
    spread = 0.4 * other.std(axis=0)
    amounts = (1.0, 1.0) if equal else (1.0, 1.5)
    owner = np.arange(n)
    label = f"{name}, {'equal' if equal else 'unequal'} sources, n {n}, m {m}"

    def draw(generator: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        rows = generator.choice(len(other), n, replace=False)
        first, second = (
            worse(other, amount)[rows] + spread * generator.normal(size=(n, len(spread)))
            for amount in amounts
        )
        return first, second, reference[generator.choice(len(reference), m, replace=False)]

    def frechet_truth(generator: np.random.Generator) -> float:
        first, second, real = draw(generator)
        return features_to_frechet_distance(second, real) - features_to_frechet_distance(
            first, real
        )

    def kernel_truth(generator: np.random.Generator) -> float:
        first, second, real = draw(generator)
        return kernel_distance(second, real).value - kernel_distance(first, real).value

    yield Case(
        "paired", f"paired Fréchet, of E: {label}",
        lambda generator, index: paired_frechet(
            *draw(generator), owner_first=owner, owner_second=owner, seed=index
        ),
        0.0 if equal else frechet_truth,
        share=0.3,
    )  # fmt: skip
    yield Case(
        "paired", f"paired KID, of the truth: {label}",
        lambda generator, index: paired_kernel(
            *draw(generator), owner_first=owner, owner_second=owner
        ),
        0.0 if equal else kernel_truth,
    )  # fmt: skip


def paired_values(n: int, difference: float) -> Iterator[Case]:
    """Scores and hits of two sources on the same prompts, four images each."""

    def means(generator: np.random.Generator, index: int) -> PairedDifference:
        common = generator.gamma(2.0, 0.1, n)
        first, second = (common + 0.05 * generator.exponential(size=n) for _ in range(2))
        return paired_mean(first, second + difference, seed=index)

    def hits(generator: np.random.Generator, index: int) -> PairedDifference:
        common = generator.beta(0.3, 2.0, n)
        first, second = (generator.binomial(4, chance) for chance in (
            common, (1 - difference) * common
        ))  # fmt: skip
        return paired_rate(first, second, np.full(n, 4))

    yield Case("paired", f"paired mean score, of the truth: {difference}, n {n}", means, difference)
    yield Case("paired", f"paired rate, of the truth: {difference}, {n} prompts of 4", hits,
               -difference * 0.3 / 2.3)  # fmt: skip


def simulated(pool: Floats) -> Iterator[Case]:
    """The plan."""
    small, middle = projected(pool, 64), projected(pool, 256)
    drawings = halves(pool, "drawings, D 1280")
    few = halves(small, "drawings, D 64", replace=True)
    gauss = gaussians(small, "Gaussians, D 64", amount=1)
    yield frechet(few, 300, 300)
    yield frechet(few, 1000, 1000)
    yield frechet(gauss, 1000, 1000)
    yield frechet(halves(middle, "drawings, D 256", replace=True), 400, 400)
    yield frechet(drawings, 150, 200)
    yield frechet(gaussians(pool, "Gaussians, D 1280", amount=1), 150, 200)
    yield infinity(few, 400, 400)
    yield infinity(gauss, 1000, 1000)
    none = gaussians(small, "one Gaussian, D 64", amount=0)
    yield kernel(none, 100, 150, null=True)
    yield kernel(none, 400, 400, null=True)
    yield kernel(gaussians(small, "near Gaussians, D 64", amount=0.5), 100, 150)
    yield kernel(halves(pool, "drawings, no change, D 1280", amount=0), 100, 150)
    yield kernel(halves(pool, "drawings, near, D 1280", amount=0.4), 100, 150)
    yield kernel(drawings, 100, 150)
    yield kernel(drawings, 60, 300)
    yield kernel(halves(pool, "drawings, far, D 1280", amount=3), 100, 150)
    for n in (50, 395):
        for skew in (0.0, 10.0, -10.0):
            yield score(n, skew)
    for rate in (0.02, 0.1, 0.5):
        for likeness in (0.05, 0.4):
            yield clustered(rate, likeness)
    for equal in (True, False):
        yield from paired_sets(small, "drawings, D 64", 300, 300, equal=equal)
        yield from paired_sets(pool, "drawings, D 1280", 150, 200, equal=equal)
    yield from paired_values(100, 0.0)
    yield from paired_values(100, 0.02)


PLAN: list[Case] = []  # what the worker processes inherit


def estimates(task: tuple[int, int, int, int]) -> list[float]:
    """Estimates `start` to `stop` of a case, for its truth."""
    base, place, start, stop = task
    truth = PLAN[place].truth
    assert callable(truth)
    return [truth(np.random.default_rng([base, place, 1, i])) for i in range(start, stop)]


def intervals(task: tuple[int, int, int, int]) -> list[tuple[float, float, float, float]]:
    """(value, low, high, processor seconds) of repetitions `start` to `stop` of a case."""
    base, place, start, stop = task
    found = []
    for index in range(start, stop):
        began = time.process_time()
        made = PLAN[place].make(np.random.default_rng([base, place, 0, index]), index)
        found.append((made.value, made.low, made.high, time.process_time() - began))
    return found


def measure(pool: ProcessPoolExecutor, base: int, place: int, count: int) -> dict[str, Any]:
    """Coverage of one case with its Wilson interval, printed as it is found."""
    case = PLAN[place]

    def blocks(total: int) -> list[tuple[int, int, int, int]]:
        return [(base, place, i, min(i + 10, total)) for i in range(0, total, 10)]

    drawn = np.zeros(0)
    if callable(case.truth):
        draws = blocks(TRUTH_DRAWS * count)
        drawn = np.array([v for part in pool.map(estimates, draws) for v in part])
        truth = float(drawn.mean())
    else:
        truth = case.truth
    made = np.array([row for part in pool.map(intervals, blocks(count)) for row in part])
    below, above = int((made[:, 2] < truth).sum()), int((made[:, 1] > truth).sum())
    rate = wilson(count - below - above, count)
    row = {
        "kind": case.kind, "case": case.name, "repetitions": count, "coverage": rate.value,
        "coverage_low": rate.low, "coverage_high": rate.high,
        "monte_carlo_error": float(np.sqrt(rate.value * (1 - rate.value) / count)),
        "ends_below": below, "starts_above": above, "truth": truth,
        "truth_error": float(drawn.std() / np.sqrt(len(drawn))) if len(drawn) else 0.0,
        "standard_deviation": float(made[:, 0].std(ddof=1)),
        "mean_width": float((made[:, 2] - made[:, 1]).mean()),
        "processor_seconds_each": float(made[:, 3].mean()),
        "within_wanted": WANTED[0] <= rate.value <= WANTED[1],
    }  # fmt: skip
    print(
        f"{case.name:72}{100 * rate.value:6.1f} %  ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        f"  ends below {below:3d}, starts above {above:3d} of {count}; "
        f"width {row['mean_width']:.3g}",
        flush=True,
    )
    return row


def exact_rates() -> Iterator[dict[str, Any]]:
    """Exact coverage of intervals of rates: the binomial weights of the counts that hold p."""
    for n in (200, 1000):
        for p in (0.005, 0.02, 0.1, 0.5):
            counts = np.arange(n + 1)
            weights = binom.pmf(counts, n, p)
            for name, interval in (("Clopper-Pearson", clopper_pearson), ("Wilson", wilson)):
                held = np.zeros(n + 1, bool)
                for k in counts[weights > 1e-9]:
                    made = interval(int(k), n)
                    held[k] = made.low <= p <= made.high
                found = float(weights[held].sum())
                case = f"{name}, rate {p}, n {n}"
                print(f"{case:72}{100 * found:6.1f} %  exact", flush=True)
                yield {
                    "kind": "rate", "case": case, "coverage": found, "exact": True,
                    "within_wanted": WANTED[0] <= found <= WANTED[1],
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", type=Path, help="OpenMoji with cached features")
    parser.add_argument("--repetitions", type=int, default=1000, help="slow cases take a share")
    parser.add_argument("--seed-base", type=int, default=SEED_BASE)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where to write every row")
    options = parser.parse_args()
    began = time.time()
    rows = list(exact_rates()) if "rate" in options.only else []
    PLAN.extend(simulated(open_pool(options.manifest)))
    with ProcessPoolExecutor(options.processes, mp_context=get_context("fork")) as pool:
        for place, case in enumerate(PLAN):  # a case's seeds do not depend on --only
            if case.kind in options.only:
                count = max(10, round(options.repetitions * case.share))
                rows.append(measure(pool, options.seed_base, place, count))
    outside = [row["case"] for row in rows if not row["within_wanted"]]
    print(f"\n{len(rows) - len(outside)} of {len(rows)} within {WANTED}; outside: {outside}")
    if options.json:
        write_json(
            options.json,
            {"seed_base": options.seed_base, "nominal": 0.95, "wanted": list(WANTED),
             "seconds": time.time() - began, "rows": rows},
        )  # fmt: skip


if __name__ == "__main__":
    main()
