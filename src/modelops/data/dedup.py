"""Manifest to duplicate report: equal bytes, equal pixels, near neighbours of an image encoder.

Two groupings come out, for two uses. *Clusters* are for deletion: each member is at or above the
threshold to its keeper, so a chain of small steps never removes an unlike image, and images that
differ in transparency are unlike even where they agree on white. *Components* are for splitting:
everything that is linked as training sees it, directly or by a chain.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from modelops.base.environment import current_environment
from modelops.base.errors import UsageError
from modelops.base.files import remove_leftovers, sha256_file
from modelops.data.calibration import calibrate_threshold
from modelops.data.candidates import write_candidate_sheet
from modelops.data.embeddings import Embeddings, Encoder, Lite0Encoder, embed_manifest
from modelops.data.manifest import Manifest, Sample, read_manifest, write_manifest
from modelops.data.neighbours import (
    EXACT_BELOW,
    Pairs,
    all_pairs,
    candidate_pairs,
    connected_components,
    normalize_rows,
    star_clusters,
)
from modelops.records.base import InputRef
from modelops.records.data import DedupReport, DuplicateCluster
from modelops.records.read import read_record

CANDIDATE_SHEET = "dedup_candidates.png"
Kind = Literal["bytes", "pixels", "embedding"]
KINDS: tuple[Kind, ...] = ("bytes", "pixels", "embedding")
OnProgress = Callable[[int, int], None]  # (done, total)


def deduplicate(
    manifest_path: str | Path,
    report_path: str | Path,
    *,
    threshold: float = 0.95,
    neighbours: int = 5,
    encoder: Encoder | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> DedupReport:
    """Find exact and near duplicates; write the report, and a sheet of pairs beside it.

    Nothing is deleted: `removable` in the report lists the exact copies, and `clean_manifest`
    removes them. Embeddings are cached below the manifest's folder, so a killed run can continue.

    Args:
        manifest_path: the manifest.
        report_path: path of dedup_report.json.
        threshold: cosine at or above which two images are candidates, in (0, 1].
        neighbours: number of nearest neighbours for each image, at least 1.
        encoder: makes the embeddings; EfficientNet-Lite0 if not given.
        seed: for choosing the samples that calibrate the threshold and the pairs shown.
        on_progress: called with (done, total) images embedded.

    Raises:
        ManifestError: the manifest is malformed.
        UsageError: an argument is out of range, or no image can be read.
    """
    if not 0.0 < threshold <= 1.0:
        raise UsageError(f"threshold {threshold} is out of range", hint="use 0.95, or up to 1")
    if neighbours < 1:
        raise UsageError(f"{neighbours} neighbours", hint="use at least 1")
    started, clock = datetime.now(UTC), time.perf_counter()
    chosen = encoder or Lite0Encoder()
    manifest = read_manifest(manifest_path)
    embedded = embed_manifest(manifest, chosen, on_progress=on_progress)
    samples = embedded.samples
    if not samples:
        raise UsageError(
            f"{manifest_path}: none of its images can be read",
            hint=f"modelops data check {manifest_path}",
        )
    unit = normalize_rows(embedded.features)
    candidates = candidate_pairs(unit, threshold=threshold, neighbours=neighbours)
    complete = len(samples) <= EXACT_BELOW
    linked = all_pairs(unit, threshold=threshold) if complete else candidates
    exact = find_exact_clusters(embedded)
    copies = {name for cluster in exact for name in cluster.members}
    near = _near_clusters(samples, _alike_on_black(linked, embedded, threshold), copies)
    components = connected_components(len(samples), _with_exact(linked, exact, samples))
    report_file = Path(report_path)
    remove_leftovers(report_file.parent)
    sheet = write_candidate_sheet(
        manifest, samples, candidates, report_file.parent / CANDIDATE_SHEET, seed=seed
    )
    calibration, warnings = calibrate_threshold(
        manifest, embedded, unit, candidates, chosen, threshold=threshold, seed=seed
    )
    if blended := _count_equal_on_white_only(embedded):
        warnings.append(
            f"{blended} images are equal to another on white, where training puts them, and differ "
            "in transparency or depth only: they are no duplicates, but a model cannot tell them "
            "apart; lay them on a background that shows them"
        )
    if not complete:
        warnings.append(
            f"{len(samples)} images: components come from {neighbours} neighbours each, "
            "not from every pair"
        )
    report = DedupReport(
        extractor=chosen.name,
        weights_sha256=chosen.weights_sha256,
        threshold=threshold,
        neighbours=neighbours,
        n_images=len(samples),
        n_candidate_pairs=len(candidates),
        n_exact_duplicates=len(copies),
        clusters=[*exact, *near],
        quarantined={**manifest.quarantined, **embedded.faults},
        removable=sorted(copies),
        components=[[samples[index].id for index in nodes] for nodes in components],
        chaining=_measure_chaining(unit, components),
        calibration=calibration,
        files={CANDIDATE_SHEET: sheet} if sheet else {},
        warnings=warnings,
        inputs={"manifest": InputRef(path=manifest.path.name, sha256=manifest.sha256)},
        seeds={"seed": seed},
        environment=current_environment(),
        started_at=started,
        duration_s=round(time.perf_counter() - clock, 3),
    )
    report.write(report_file)
    return report


def clean_manifest(
    manifest_path: str | Path,
    report_path: str | Path,
    out_path: str | Path,
    *,
    kinds: Collection[str] = ("bytes", "pixels"),
) -> tuple[int, int]:
    """Write the manifest without quarantined rows and without the members of duplicate clusters.

    Args:
        kinds: of clusters whose members (not the keepers) go: bytes, pixels, embedding.

    Returns (rows kept, rows left out).

    Raises:
        UsageError: the report is of another manifest, or `out_path` is in another folder (the file
            paths would no longer hold).
    """
    manifest = read_manifest(manifest_path)
    report = read_record(report_path, DedupReport)
    require_same_manifest(manifest, report, report_path)
    if Path(out_path).resolve().parent != manifest.root.resolve():
        raise UsageError(
            f"{out_path}: must be beside {manifest_path}",
            hint="file paths in a manifest are relative to its folder",
        )
    gone = set(report.quarantined) | {
        name for cluster in report.clusters if cluster.kind in kinds for name in cluster.members
    }
    kept = [row for row in manifest.rows if row.id not in gone]
    write_manifest(out_path, kept)
    return len(kept), len(manifest.rows) + len(manifest.quarantined) - len(kept)


def require_same_manifest(manifest: Manifest, report: DedupReport, report_path: str | Path) -> None:
    """Raise UsageError unless the report was made from this very manifest."""
    if report.inputs.get("manifest", InputRef(path="", sha256="")).sha256 != manifest.sha256:
        raise UsageError(
            f"{report_path}: was made from another manifest than {manifest.path}",
            hint=f"modelops data dedup {manifest.path}",
        )


def find_exact_clusters(embedded: Embeddings) -> list[DuplicateCluster]:
    """Clusters of equal files, then of equal pixels and opacity in different files.

    The keeper says most about itself: most tags, then the longest caption, then the first id.
    """
    by_pixels: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample, digest in zip(embedded.samples, embedded.identities, strict=True):
        by_pixels[digest].append(sample)
    clusters = []
    for same in by_pixels.values():
        if len(same) < 2:
            continue
        keeper, *others = sorted(same, key=lambda s: (-len(s.tags), -len(s.caption), s.id))
        copies: dict[Kind, list[str]] = {
            "bytes": [s.id for s in others if s.sha256 == keeper.sha256],
            "pixels": [s.id for s in others if s.sha256 != keeper.sha256],
        }
        for kind, members in copies.items():
            if members:
                clusters.append(
                    DuplicateCluster(
                        keeper=keeper.id,
                        members=sorted(members),
                        kind=kind,
                        min_similarity=1.0,
                        reason=f"equal {kind}, {_compare_captions(same)}; the keeper says most "
                        f"({len(keeper.tags)} tags, {len(keeper.caption)} characters)",
                    )
                )
    return sorted(clusters, key=lambda cluster: (cluster.kind, cluster.keeper))


def _count_equal_on_white_only(embedded: Embeddings) -> int:
    """Count images that equal another one on white but are not the same image."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for white, identity in zip(embedded.pixels, embedded.identities, strict=True):
        kinds[white].add(identity)
    return sum(len(kinds[white]) > 1 for white in embedded.pixels)


def _alike_on_black(linked: Pairs, embedded: Embeddings, threshold: float) -> Pairs:
    """Return the pairs whose images are also alike on black; opaque ones look the same there."""
    black = embedded.on_black
    if not black:
        return linked
    keep = np.ones(len(linked), bool)
    cosine = linked.cosine.copy()
    for place, (one, two) in enumerate(
        zip(linked.first.tolist(), linked.second.tolist(), strict=True)
    ):
        if one in black or two in black:
            rows = [black.get(index, embedded.features[index]) for index in (one, two)]
            first, second = normalize_rows(np.stack(rows)).astype(np.float64)
            cosine[place] = min(cosine[place], float(first @ second))
            keep[place] = cosine[place] >= threshold
    return Pairs(linked.first[keep], linked.second[keep], cosine[keep])


def _compare_captions(samples: Sequence[Sample]) -> str:
    count = len({sample.caption for sample in samples})
    return "one caption" if count == 1 else f"{count} different captions"


def _near_clusters(
    samples: Sequence[Sample], linked: Pairs, copies: Collection[str]
) -> list[DuplicateCluster]:
    """Star clusters over the images that are not exact copies of another."""
    distinct = np.array([sample.id not in copies for sample in samples], bool)
    keep = distinct[linked.first] & distinct[linked.second] if len(linked) else np.zeros(0, bool)
    pairs = Pairs(linked.first[keep], linked.second[keep], linked.cosine[keep])
    cosine = {
        (first, second): value
        for first, second, value in zip(
            pairs.first.tolist(), pairs.second.tolist(), pairs.cosine.tolist(), strict=True
        )
    }
    clusters = []
    for keeper, *members in star_clusters(len(samples), pairs):
        least = min(cosine[min(keeper, other), max(keeper, other)] for other in members)
        group = samples[keeper].group
        variants = sum(samples[other].group == group for other in members)
        clusters.append(
            DuplicateCluster(
                keeper=samples[keeper].id,
                members=[samples[other].id for other in members],
                kind="embedding",
                min_similarity=round(least, 6),
                reason=f"the keeper has the most near neighbours left ({len(members)}); "
                f"{variants} of them are variants of its own group",
            )
        )
    return clusters


def _with_exact(
    linked: Pairs, exact: Sequence[DuplicateCluster], samples: Sequence[Sample]
) -> Pairs:
    """The linked pairs and those of exact copies (whose embeddings should agree anyway)."""
    place = {sample.id: index for index, sample in enumerate(samples)}
    pairs = [(place[c.keeper], place[member]) for c in exact for member in c.members]
    if not pairs:
        return linked
    extra: npt.NDArray[np.int64] = np.array(pairs, np.int64)
    return Pairs(
        np.concatenate([linked.first, extra[:, 0]]),
        np.concatenate([linked.second, extra[:, 1]]),
        np.concatenate([linked.cosine, np.ones(len(extra))]),
    )


def _measure_chaining(
    unit: npt.NDArray[np.float32], components: Sequence[Sequence[int]]
) -> dict[str, float | int]:
    """Measure how far linking goes: sizes, and the least cosine inside the largest component."""
    if not components:
        return {"components": 0, "largest": 0}
    largest = list(components[0])
    part = unit[largest]
    least = min(
        float((part[start : start + 1024] @ part.T).min()) for start in range(0, len(part), 1024)
    )
    return {
        "components": len(components),
        "linked_samples": sum(map(len, components)),
        "largest": len(largest),
        "least_cosine_in_largest": round(least, 6),
    }


def parse_kinds(text: str) -> frozenset[str]:
    """Comma-separated kinds of clusters.

    Raises:
        UsageError: an unknown kind.
    """
    kinds = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(kinds - set(KINDS)):
        raise UsageError(f"unknown kind {unknown[0]!r}", hint=f"kinds: {', '.join(KINDS)}")
    return kinds


def report_digest(path: str | Path) -> InputRef:
    """A report file as an input of another record."""
    return InputRef(path=Path(path).name, sha256=sha256_file(path))
