"""How often nominal 95 % intervals hold the truth, by simulation from populations that are known.

    python bench/bench_coverage.py
    python bench/bench_coverage.py --manifest data/manifest.parquet --repetitions 400

The populations are Lite0 features of OpenMoji: real drawings, halved into two populations that
samples are drawn from without replacement (along 64 directions with replacement, because a limit of
infinitely many images needs independent ones), or Gaussians fitted to them. "of E" means that the
interval is for the expectation of the estimate at this n; "of the truth", for the population value.
Coverages of rates are not simulated but summed up exactly.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, skewnorm

from modelops.data.corpora.openmoji import build_corpus
from modelops.data.embeddings import embed_manifest
from modelops.data.manifest import read_manifest
from modelops.metrics.frechet import (
    Statistics,
    features_to_frechet_distance,
    features_to_statistics,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
)
from modelops.metrics.intervals import (
    Interval,
    bootstrap_mean,
    clopper_pearson,
    normal_interval,
    wilson,
)
from modelops.metrics.kernel import kernel_distance, kernel_variance

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]


@dataclass(frozen=True)
class Pair:
    """Two populations of features, and how to draw from them."""

    name: str
    generated: Draw
    reference: Draw
    dimension: int
    generated_statistics: Statistics | None = None


def open_pool(manifest: Path | None) -> Floats:
    """Lite0 features [N, 1280] of OpenMoji; those of a manifest come from its cache."""
    if manifest is not None:
        return np.asarray(embed_manifest(read_manifest(manifest)).features, np.float64)
    with tempfile.TemporaryDirectory() as folder:
        found = embed_manifest(read_manifest(build_corpus(Path(folder), resolution=64)))
        return np.asarray(found.features, np.float64)


def halves(pool: Floats, name: str, *, replace: bool = False) -> Pair:
    """Real drawings: one half as the reference, the other, paler and shifted, as generated."""
    order = np.random.default_rng(0).permutation(len(pool))
    reference, other = pool[order[::2]], pool[order[1::2]]
    generated = 0.85 * other + 0.3 * other.mean(axis=0)

    def draw(rows: Floats) -> Draw:
        return lambda generator, n: rows[generator.choice(len(rows), n, replace=replace)]

    statistics = features_to_statistics(generated)
    return Pair(name, draw(generated), draw(reference), pool.shape[1], statistics)


def gaussians(pool: Floats, name: str, *, same: bool) -> Pair:
    """Gaussians with the pool's moments, the generated one as above; or twice the same."""
    mean, covariance = pool.mean(axis=0), np.cov(pool.T)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    scale, shift = (1.0, 0.0) if same else (0.85, 0.15)

    def draw(a: float, b: float) -> Draw:
        return lambda generator, n: (
            a * (generator.normal(size=(n, len(mean))) @ root.T) + (1 + b) * mean
        )

    statistics = Statistics((1 + shift) * mean, scale**2 * covariance, len(pool))
    return Pair(name, draw(scale, shift), draw(1.0, 0.0), len(mean), statistics)


def projected(pool: Floats, dimension: int) -> Floats:
    """Coordinates along the first principal directions."""
    centre = pool.mean(axis=0)
    _, _, directions = np.linalg.svd(pool - centre, full_matrices=False)
    return np.asarray(pool @ directions[:dimension].T)


def coverage(
    label: str, truth: float, make: Callable[[np.random.Generator, int], Interval], count: int
) -> None:
    """Print how many of `count` intervals hold the truth, with a Wilson interval of that."""
    start, below, above, width = time.process_time(), 0, 0, 0.0
    for index in range(count):
        found = make(np.random.default_rng([7, index]), index)
        below += found.high < truth
        above += found.low > truth
        width += (found.high - found.low) / count
    rate = wilson(count - below - above, count)
    seconds = (time.process_time() - start) / count
    print(
        f"{label:66}{100 * rate.value:6.1f} %  ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        f"  too low {below:3d}, too high {above:3d} of {count}; width {width:.3g}, "
        f"{seconds:.2f} s each",
        flush=True,
    )


def frechet(pair: Pair, n: int, m: int, count: int) -> None:
    """The Fréchet interval, of the distance's expectation at n and m."""
    generator = np.random.default_rng(1)
    truth = np.mean(
        [
            features_to_frechet_distance(pair.generated(generator, n), pair.reference(generator, m))
            for _ in range(max(200, count))
        ]
    )

    def make(generator: np.random.Generator, index: int) -> Interval:
        x, y = pair.generated(generator, n), pair.reference(generator, m)
        return frechet_interval(x, y, seed=index)

    coverage(f"Fréchet, of E: {pair.name}, n {n}, m {m}", float(truth), make, count)


def infinity(pair: Pair, n: int, m: int, count: int) -> None:
    """FD-infinity, of the distance of the whole generated population to m reference pictures."""
    assert pair.generated_statistics is not None
    generator = np.random.default_rng(2)
    truth = np.mean(
        [
            frechet_distance(
                pair.generated_statistics, features_to_statistics(pair.reference(generator, m))
            )
            for _ in range(max(200, count))
        ]
    )
    values = []

    def make(generator: np.random.Generator, index: int) -> Interval:
        x, y = pair.generated(generator, n), pair.reference(generator, m)
        values.append(frechet_infinity(x, y, seed=index).interval)
        return values[-1]

    coverage(f"FD-infinity, of the truth: {pair.name}, n {n}, m {m}", float(truth), make, count)
    print(f"{'':6}mean {np.mean([v.value for v in values]):.4g}, truth {truth:.4g}")


def kernel(pair: Pair, pool: tuple[Floats, Floats] | None, n: int, m: int, count: int) -> None:
    """The kernel distance, of the population's value, by its variance and by the jackknife."""
    truth = kernel_distance(*pool).value if pool else 0.0

    def analytic(generator: np.random.Generator, index: int) -> Interval:
        x, y = pair.generated(generator, n), pair.reference(generator, m)
        variance = max(kernel_variance(x, y), 0.0)
        value = kernel_distance(x, y).value
        return normal_interval(value, variance, freedom=min(n, m) - 1, method="")

    def jackknife(generator: np.random.Generator, index: int) -> Interval:
        return kernel_distance(pair.generated(generator, n), pair.reference(generator, m))

    name = f"of the truth: {pair.name}, n {n}, m {m}"
    coverage(f"KID, {name}", truth, jackknife, count)
    coverage(f"  by its unbiased variance, {name}", truth, analytic, count)


def scores(n: int, skew: float, count: int) -> None:
    """A mean over prompts of 2.5 max(0, cosine), the cosine skew-normal."""
    shape = skewnorm(skew, loc=0.2, scale=0.08)
    population = 2.5 * np.clip(
        shape.rvs(size=2_000_000, random_state=np.random.default_rng(3)), 0, None
    )
    truth = float(population.mean())
    skewness = float(((population - truth) ** 3).mean() / population.std() ** 3)

    def make(generator: np.random.Generator, index: int) -> Interval:
        return bootstrap_mean(generator.choice(population, n), seed=index, resamples=1000)

    coverage(f"mean score, of the truth: skewness {skewness:.2f}, n {n}", truth, make, count)


def rates() -> None:
    """Exact coverage of intervals of rates: the binomial weights of the counts that hold p."""
    for n in (200, 1000):
        for p in (0.005, 0.02, 0.1, 0.5):
            counts = np.arange(n + 1)
            weights = binom.pmf(counts, n, p)
            found = []
            for interval in (clopper_pearson, wilson):
                held = np.zeros(n + 1, bool)
                for k in counts[weights > 1e-9]:
                    made = interval(int(k), n)
                    held[k] = made.low <= p <= made.high
                found.append(100 * float(weights[held].sum()))
            print(
                f"{f'rate {p}, n {n}':66}{found[0]:6.1f} %  Clopper-Pearson  {found[1]:6.1f} % "
                f"Wilson"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manifest", type=Path, help="OpenMoji with cached features")
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--only", choices=["frechet", "infinity", "kernel", "scores", "rates"])
    options = parser.parse_args()
    count, only = options.repetitions, options.only
    if only in (None, "rates"):
        rates()
    if only in (None, "scores"):
        for n in (50, 395):
            for skew in (0.0, 10.0, -10.0):
                scores(n, skew, count)
    if only in ("scores", "rates"):
        return
    pool = open_pool(options.manifest)
    small = projected(pool, 64)
    few = halves(small, "drawings, 64 of 1280 directions", replace=True)
    if only in (None, "kernel"):
        drawings, gaussian = halves(pool, "drawings"), gaussians(small, "one Gaussian", same=True)
        order = np.random.default_rng(0).permutation(len(pool))
        other = pool[order[1::2]]
        populations = (0.85 * other + 0.3 * other.mean(axis=0), pool[order[::2]])
        kernel(drawings, populations, 100, 150, count)
        kernel(gaussian, None, 100, 150, count)
    if only in (None, "infinity"):
        infinity(few, 400, 400, count)
        infinity(gaussians(small, "Gaussians, 64 directions", same=False), 1000, 1000, count)
    if only in (None, "frechet"):
        frechet(few, 300, 300, count)
        frechet(halves(pool, "drawings"), 150, 200, count)
        frechet(gaussians(pool, "Gaussians", same=False), 150, 200, count)


if __name__ == "__main__":
    main()
