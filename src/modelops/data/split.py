"""Split of samples into train, val and test that keeps similar samples together.

Indivisible units are built from the manifest's `group` and from the near-duplicate pairs. Units are
then dealt to the splits by a hash of the seed. The remaining leakage is measured afterwards: every
pair of splits is searched for near neighbours again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.environment import current_environment
from modelops.base.errors import UsageError
from modelops.base.files import atomic_path, remove_leftovers, sha256_file
from modelops.base.seeding import numpy_generator
from modelops.data.dedup import report_digest, require_same_manifest
from modelops.data.embeddings import Encoder, Lite0Encoder, embed_manifest
from modelops.data.manifest import Sample, read_manifest
from modelops.data.neighbours import all_pairs, nearest_neighbours, normalize_rows
from modelops.data.rates import count_to_rate
from modelops.data.units import Units, build_units, deal_units
from modelops.records.base import InputRef, Measurement
from modelops.records.data import DedupReport, SplitReport
from modelops.records.read import read_record

SPLITS = ("train", "val", "test")
OnProgress = Callable[[int, int], None]  # (done, total)


def split_manifest(
    manifest_path: str | Path,
    dedup_path: str | Path,
    out_dir: str | Path,
    *,
    seed: int,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    encoder: Encoder | None = None,
    on_progress: OnProgress | None = None,
) -> SplitReport:
    """Deal the samples to splits; writes `splits.parquet` (id, split, group) and `split.json`.

    Quarantined samples are in no split. The same input and seed give the same bytes of
    splits.parquet. `group` there names the indivisible unit, by its first sample's group.

    Args:
        manifest_path: the manifest.
        dedup_path: the dedup report of this manifest.
        out_dir: where the two files go.
        seed: which units go where.
        fractions: shares of train, val and test; each above 0, together 1.
        encoder: the one the dedup report was made with; Lite0 if not given.
        on_progress: called with (done, total) while embeddings are read.

    Raises:
        UsageError: the report is of another manifest or encoder, the fractions make no sense, or
            there are fewer than three units.
    """
    _check_fractions(fractions)
    started, clock = datetime.now(UTC), time.perf_counter()
    report = read_record(dedup_path, DedupReport)
    manifest = read_manifest(manifest_path)
    require_same_manifest(manifest, report, dedup_path)
    chosen = encoder or Lite0Encoder()
    if chosen.weights_sha256 != report.weights_sha256:
        raise UsageError(
            f"{dedup_path}: was made with {report.extractor}, not with {chosen.name}",
            hint="make it again: modelops data dedup",
        )
    embedded = embed_manifest(manifest, chosen, on_progress=on_progress)
    usable = [i for i, sample in enumerate(embedded.samples) if sample.id not in report.quarantined]
    samples = [embedded.samples[index] for index in usable]
    unit_vectors = normalize_rows(embedded.features[usable])
    pairs = all_pairs(unit_vectors, threshold=report.threshold)
    same = _same_pixels([embedded.pixels[index] for index in usable])
    units = build_units([sample.group for sample in samples], pairs, same, fractions=fractions)
    assigned = deal_units(units, fractions, seed=seed)
    where = np.array([assigned[unit] for unit in units.unit_of])
    out = Path(out_dir)
    target = out / "splits.parquet"
    remove_leftovers(out)
    counts = {name: int((where == index).sum()) for index, name in enumerate(SPLITS)}
    leakage = measure_leakage(samples, unit_vectors, where, threshold=report.threshold, seed=seed)
    with atomic_path(target) as temporary:
        _write_splits(temporary, samples, where, units)
        result = SplitReport(
            counts=counts,
            n_groups=len(units),
            leakage=leakage,
            fractions={name: round(counts[name] / len(samples), 4) for name in SPLITS},
            group_counts={
                name: sum(1 for split in assigned if split == index)
                for index, name in enumerate(SPLITS)
            },
            strategy=units.describe(),
            warnings=units.warnings(),
            files={"splits": InputRef(path=target.name, sha256=sha256_file(temporary))},
            inputs={
                "manifest": InputRef(path=manifest.path.name, sha256=manifest.sha256),
                "dedup": report_digest(dedup_path),
            },
            seeds={"split": seed},
            environment=current_environment(),
            started_at=started,
            duration_s=round(time.perf_counter() - clock, 3),
        )
        result.write(out / "split.json")  # neither file is replaced if one cannot be written
    return result


def read_splits(path: str | Path) -> dict[str, str]:
    """{id: split} of splits.parquet.

    Raises:
        UsageError: the file is missing or malformed, or names an unknown split.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(path)
    if not source.is_file():
        raise UsageError(f"{source}: no such file", hint="make it: modelops data split")
    try:
        table = pq.read_table(source, columns=["id", "split"])
        names, splits = table["id"].to_pylist(), table["split"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UsageError(f"{source}: not a splits file: {str(error).splitlines()[0]}") from error
    unknown = sorted({str(split) for split in splits} - set(SPLITS))
    if unknown:
        raise UsageError(f"{source}: unknown split {unknown[0]!r}; splits are {', '.join(SPLITS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"{source}: an id occurs twice")
    return dict(zip(names, splits, strict=True))


def measure_leakage(
    samples: Sequence[Sample],
    unit_vectors: npt.NDArray[np.float32],
    where: npt.NDArray[np.int64],
    *,
    threshold: float,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure the share of one split's samples with a neighbour in another at the threshold.

    Keys: `val_in_train`, `test_in_train`, `test_in_val`, and `test_in_train_random`: the leakage of
    a random split of the same sizes, without regard to groups and similarity.
    """
    found: dict[str, Measurement] = {}
    for query, base in ((1, 0), (2, 0), (2, 1)):
        hits, total, worst = _count_leaks(unit_vectors, where == query, where == base, threshold)
        found[f"{SPLITS[query]}_in_{SPLITS[base]}"] = count_to_rate(
            hits, total, higher_is_better=False,
            details={"threshold": threshold, "highest_cosine": worst},
        )  # fmt: skip
    shuffled = where[numpy_generator(seed, "random split").permutation(len(where))]
    hits, total, worst = _count_leaks(unit_vectors, shuffled == 2, shuffled == 0, threshold)
    found["test_in_train_random"] = count_to_rate(
        hits, total, higher_is_better=False,
        details={"threshold": threshold, "highest_cosine": worst},
    )  # fmt: skip
    return found


def _count_leaks(
    unit_vectors: npt.NDArray[np.float32],
    queries: npt.NDArray[np.bool_],
    base: npt.NDArray[np.bool_],
    threshold: float,
) -> tuple[int, int, float | None]:
    """(queries with a neighbour in base at or above the threshold, queries, highest cosine)."""
    if not queries.any() or not base.any():
        return 0, int(queries.sum()), None
    products, _ = nearest_neighbours(unit_vectors[queries], unit_vectors[base], 1)
    nearest = products[:, 0]
    return int((nearest >= threshold).sum()), len(nearest), round(float(nearest.max()), 6)


def _same_pixels(digests: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices whose images are equal as training reads them: never to be separated."""
    first_of: dict[str, int] = {}
    pairs = [(first_of.setdefault(digest, index), index) for index, digest in enumerate(digests)]
    return [(first, second) for first, second in pairs if first != second]


def _write_splits(
    path: Path, samples: Sequence[Sample], where: npt.NDArray[np.int64], units: Units
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "id": [sample.id for sample in samples],
            "split": [SPLITS[index] for index in where.tolist()],
            "group": [units.names[unit] for unit in units.unit_of],
        }
    )
    pq.write_table(table, path)


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Three comma-separated shares.

    Raises:
        UsageError: not three numbers above 0 that sum to 1.
    """
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"fractions {text!r}: not three numbers", hint="use 0.8,0.1,0.1"
        ) from error
    _check_fractions((train, val, test))
    return train, val, test


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(
            f"fractions {', '.join(map(str, fractions))} must be three above 0 that sum to 1",
            hint="use 0.8,0.1,0.1",
        )
