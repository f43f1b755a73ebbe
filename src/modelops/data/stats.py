"""Counts of a manifest: the numbers of a dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from modelops.data.manifest import Sample, read_manifest
from modelops.data.split import SPLITS, read_splits
from modelops.records.data import DedupReport
from modelops.records.read import read_record


def manifest_statistics(
    manifest_path: str | Path,
    splits_path: str | Path | None = None,
    dedup_path: str | Path | None = None,
) -> dict[str, Any]:
    """Count a manifest; return JSON-able values.

    Keys: samples, groups, quarantined, manifest_sha256, licenses, sources, tags, nsfw, dates,
    caption_characters, caption_words, distinct_captions, resolutions (of the stored files, from
    their headers), bytes; with splits also splits and split_groups and tags_by_split; with a dedup
    report also duplicates.

    Raises:
        ManifestError, UsageError: a file is missing or malformed.
    """
    manifest = read_manifest(manifest_path)
    rows = manifest.rows
    result: dict[str, Any] = {
        "samples": len(rows),
        "groups": len({row.group for row in rows}),
        "quarantined": manifest.quarantined,
        "manifest_sha256": manifest.sha256,
        "licenses": _count(row.license for row in rows),
        "sources": _count(row.source or "unknown" for row in rows),
        "tags": _count_tags(rows),
        "nsfw": {"flagged": sum(row.nsfw_flag for row in rows), "samples": len(rows)},
        "dates": {
            "first": min((row.date_collected for row in rows), default=None),
            "last": max((row.date_collected for row in rows), default=None),
        },
        "caption_characters": _summary([len(row.caption) for row in rows]),
        "caption_words": _summary([len(row.caption.split()) for row in rows]),
        "distinct_captions": len({row.caption for row in rows}),
        "resolutions": _count(_size(manifest.image_path(row)) for row in rows),
        "bytes": sum(manifest.image_path(row).stat().st_size for row in rows),
    }
    if splits_path is not None:
        splits = read_splits(splits_path)
        parts = {split: [row for row in rows if splits.get(row.id) == split] for split in SPLITS}
        result["splits"] = {split: len(part) for split, part in parts.items()}
        result["split_groups"] = {
            split: len({row.group for row in part}) for split, part in parts.items()
        }
        result["tags_by_split"] = {split: _count_tags(part) for split, part in parts.items()}
    if dedup_path is not None:
        report = read_record(dedup_path, DedupReport)
        result["duplicates"] = {
            "extractor": report.extractor,
            "threshold": report.threshold,
            "exact": report.n_exact_duplicates,
            "candidate_pairs": report.n_candidate_pairs,
            "clusters": _count(cluster.kind for cluster in report.clusters),
            "components": len(report.components),
            "largest_component": max(map(len, report.components), default=0),
        }
    return result


def _count(values: Iterable[str]) -> dict[str, int]:
    """{value: count}, most frequent first."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _count_tags(rows: Iterable[Sample]) -> dict[str, int]:
    return _count(tag for row in rows for tag in row.tags)


def _summary(values: list[int]) -> dict[str, float]:
    """Least, median, mean, 95th percentile and greatest; empty for no values."""
    if not values:
        return {}
    array = np.array(values)
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": round(float(array.mean()), 2),
        "p95": float(np.quantile(array, 0.95)),
        "max": int(array.max()),
    }


def _size(path: Path) -> str:
    """WIDTHxHEIGHT from a file's header, or 'unreadable'."""
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return f"{picture.width}x{picture.height}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable"
