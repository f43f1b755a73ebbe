"""Splits: what is alike stays together, and what leaks is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelops.base.errors import UsageError
from modelops.data.embeddings import embed_manifest
from modelops.data.manifest import read_manifest, write_manifest
from modelops.data.split import SPLITS, parse_fractions, read_splits, split_manifest
from modelops.records.data import DedupReport, SplitReport
from modelops.records.read import read_record


def test_no_group_and_no_cluster_crosses_a_split(corpus: Path, deduped: Path, split: Path) -> None:
    where = read_splits(split)
    manifest = read_manifest(corpus / "manifest.parquet")
    assert set(where) == {row.id for row in manifest.rows}
    of_group: dict[str, set[str]] = {}
    for row in manifest.rows:
        of_group.setdefault(row.group, set()).add(where[row.id])
    assert all(len(splits) == 1 for splits in of_group.values())
    dedup = read_record(deduped, DedupReport)
    assert dedup.clusters, "there are duplicates to keep together"
    for cluster in dedup.clusters:
        assert len({where[name] for name in (cluster.keeper, *cluster.members)}) == 1


def test_leakage_is_what_brute_force_counts(corpus: Path, split: Path) -> None:
    report = read_record(corpus / "split.json", SplitReport)
    embedded = embed_manifest(read_manifest(corpus / "manifest.parquet"))
    unit = embedded.features / np.linalg.norm(embedded.features, axis=1, keepdims=True)
    where = read_splits(split)
    splits = np.array([where[sample.id] for sample in embedded.samples])
    for query, base in (("val", "train"), ("test", "train"), ("test", "val")):
        nearest = (unit[splits == query] @ unit[splits == base].T).max(axis=1)
        measured = report.leakage[f"{query}_in_{base}"]
        assert measured.details["hits"] == int((nearest >= 0.95).sum())
        assert measured.n == len(nearest)
        assert measured.details["highest_cosine"] == pytest.approx(nearest.max(), abs=1e-5)
        assert measured.value == 0 and measured.high is not None and measured.high > 0
    random = report.leakage["test_in_train_random"]
    assert random.value is not None and random.value > 0, "a random split would have leaked"


def test_fractions_hold_and_every_split_has_samples(corpus: Path, split: Path) -> None:
    report = read_record(corpus / "split.json", SplitReport)
    assert sum(report.counts.values()) == len(read_splits(split))
    assert all(report.counts[name] > 0 and report.group_counts[name] > 0 for name in SPLITS)
    assert abs(report.fractions["train"] - 0.8) < 0.06


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    corpus: Path, deduped: Path, split: Path, tmp_path: Path
) -> None:
    manifest = corpus / "manifest.parquet"
    split_manifest(manifest, deduped, tmp_path / "a", seed=0)
    split_manifest(manifest, deduped, tmp_path / "b", seed=1)
    assert (tmp_path / "a/splits.parquet").read_bytes() == split.read_bytes()
    assert read_splits(tmp_path / "b/splits.parquet") != read_splits(split)


def test_a_report_of_another_manifest_is_refused(
    corpus: Path, deduped: Path, tmp_path: Path
) -> None:
    rows = read_manifest(corpus / "manifest.parquet").rows
    other = write_manifest(corpus / "other.parquet", rows[:-1])
    with pytest.raises(UsageError, match="made from another manifest"):
        split_manifest(other, deduped, tmp_path, seed=0)
    other.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["0.8,0.2", "0.8,0.1,0.2", "1,0,0", "a,b,c", "0.5,0.6,-0.1"])
def test_fractions_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="fractions"):
        parse_fractions(text)


def test_a_splits_file_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_splits(tmp_path / "splits.parquet")
    (tmp_path / "splits.parquet").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a splits file"):
        read_splits(tmp_path / "splits.parquet")
