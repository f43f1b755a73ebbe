"""How far an export is from its source: per component, and in the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelops.errors import ExportError
from modelops.export.calibration import TrajectoryRows
from modelops.export.graphs import Array, Graph
from modelops.records import ParityCheck
from modelops.seeding import image_seed

PARITY_BATCHES = (1, 2, 8)
PARITY_STEPS = 20
_PSNR_CAP = 120.0  # dB; equal pictures have no finite PSNR


@dataclass(frozen=True)
class Bounds:
    """What counts as equal.

    Attributes:
        absolute: largest |difference| of an output value, or None where values are not bounded.
        relative: largest ||difference|| / ||reference|| (L2) of an output row.
        psnr_db: least PSNR of the pictures, pooled over all of them.
    """

    absolute: float | None
    relative: float
    psnr_db: float


BOUNDS = {
    "float32": Bounds(absolute=1e-3, relative=1e-4, psnr_db=60.0),
    "bfloat16": Bounds(absolute=None, relative=5e-2, psnr_db=28.0),
    "int8": Bounds(absolute=None, relative=2e-1, psnr_db=28.0),
}


def torch_denoiser(unet: Any, feed: dict[str, Array]) -> Array:
    """The reference: the torch UNet on a graph's feed, float32 [N, C, h, w]."""
    values = {name: torch.from_numpy(array) for name, array in feed.items()}
    with torch.no_grad():
        output = unet(
            values["sample"],
            values["timestep"],
            values.get("encoder_hidden_states"),
            class_labels=values["class_labels"],
            encoder_attention_mask=values.get("encoder_attention_mask"),
            return_dict=False,
        )[0]
    result: Array = output.numpy()
    return result


def denoiser_parity(
    unet: Any, graph: Graph, rows: TrajectoryRows, bounds: Bounds
) -> list[ParityCheck]:
    """Compare a denoiser with torch on trajectory rows, at batch sizes 1, 2 and 8.

    A batch mixes noise levels from the whole trajectory.
    """
    checks = []
    for size in PARITY_BATCHES:
        picks = np.linspace(0, len(rows) - 1, num=max(8, size)).astype(int)
        feeds = [
            rows.take(picks[start :: len(picks) // size][:size])
            for start in range(len(picks) // size)
        ]
        references = [torch_denoiser(unet, feed) for feed in feeds]
        outputs = [graph.run(feed) for feed in feeds]
        checks += _compare(f"denoiser/batch{size}/{graph.runtime}", references, outputs, bounds)
    return checks


def text_encoder_parity(pipeline: Any, graph: Graph, prompts: Sequence[str]) -> list[ParityCheck]:
    """Compare the text encoder with torch, at batch sizes 1, 2 and 8, always in float32."""
    checks = []
    texts = ([*list(prompts), "", "a", "a long line of words " * 12])[:64]
    for size in PARITY_BATCHES:
        references, outputs = [], []
        for start in range(0, max(1, min(len(texts), 8)), size):
            chunk = [texts[(start + offset) % len(texts)] for offset in range(size)]
            encoded = pipeline.tokenizer(
                chunk, padding="max_length", truncation=True, return_tensors="pt",
                max_length=pipeline.config["max_text_tokens"],
            )  # fmt: skip
            feed = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                references.append(pipeline.text_encoder(**feed)[0].numpy())
            outputs.append(graph.run({name: value.numpy() for name, value in feed.items()}))
        name = f"text_encoder/batch{size}/{graph.runtime}"
        checks += _compare(name, references, outputs, BOUNDS["float32"])
    return checks


def image_parity(
    reference: Any,
    exported: Any,
    *,
    name: str,
    prompts: Sequence[str],
    seed: int,
    bounds: Bounds,
    steps: int = PARITY_STEPS,
) -> ParityCheck:
    """Compare pictures of two pipelines from the same prompts, seeds and steps."""
    first, second = (
        sample_images(p, prompts, seed=seed, steps=steps) for p in (reference, exported)
    )
    value = psnr_db(first, second)
    return ParityCheck(
        name=name, measure="psnr_db", value=value, bound=bounds.psnr_db,
        passed=value >= bounds.psnr_db, n=len(prompts),
    )  # fmt: skip


def sample_images(pipeline: Any, prompts: Sequence[str], *, seed: int, steps: int) -> Array:
    """Pictures float32 [N, H, W, 3] in [0, 1], one for each prompt, with its default guidance."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(prompts),
        num_inference_steps=steps,
        generator=[torch.Generator("cpu").manual_seed(image_seed(seed, text)) for text in prompts],
        output_type="np",
    ).images
    result: Array = np.asarray(images)
    return result


def psnr_db(first: Array, second: Array) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1], pooled over all pixels; at most 120 dB."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    if not math.isfinite(error):
        return 0.0
    return _PSNR_CAP if error == 0 else min(_PSNR_CAP, -10.0 * math.log10(error))


def relative_errors(reference: Array, output: Array) -> Array:
    """||output - reference|| / ||reference|| of each row [N], in L2."""
    flat, other = (a.reshape(len(a), -1).astype(np.float64) for a in (reference, output))
    scale = np.maximum(np.linalg.norm(flat, axis=1), 1e-12)
    result: Array = np.linalg.norm(other - flat, axis=1) / scale
    return result


def require_parity(checks: Sequence[ParityCheck], *, allow: bool) -> str | None:
    """Fail closed.

    Returns:
        None if all passed, else what was waived by `allow`, for the record.

    Raises:
        ExportError: a check failed and `allow` is not set.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    listed = "; ".join(
        f"{check.name} {check.measure} {check.value:.3g} (bound {check.bound:.3g})"
        for check in failed
    )
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
        absolute = max(float(np.abs(a - b).max()) for a, b in pairs)
        checks.append(
            ParityCheck(
                name=name, measure="max_abs_error", value=absolute, bound=bounds.absolute,
                passed=absolute <= bounds.absolute, n=n,
            )
        )  # fmt: skip
    return checks
