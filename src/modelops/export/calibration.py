"""Real denoiser inputs, caught on the pipeline's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelops.errors import UsageError
from modelops.export.graphs import Array
from modelops.export.modules import denoiser_feed
from modelops.files import sha256_bytes, sha256_json
from modelops.seeding import image_seed, numpy_generator

DEFAULT_PROMPTS = (
    "red heart", "grinning face", "waving hand", "house with garden", "flag: Japan", "dog face",
    "green apple", "sun behind cloud", "bicycle", "musical note", "fish", "alarm clock",
)  # fmt: skip
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrajectoryRows:
    """Rows of denoiser calls, in the order of their noise level.

    Attributes:
        feeds: graph input name to array [R, ...]; timestep is 1000 sigma.
        sigmas: noise level of each row [R], in (0, 1].
        guided: whether a row has the prompt [R]; the others have the negative prompt.
        record: prompts, seeds, steps and digest, for the artifact.
    """

    feeds: dict[str, Array]
    sigmas: Array
    guided: Array
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.sigmas)

    def take(self, rows: Sequence[int] | Array) -> dict[str, Array]:
        """A feed of the given rows."""
        chosen = np.asarray(rows)
        return {name: array[chosen] for name, array in self.feeds.items()}

    def batches(self, size: int) -> list[dict[str, Array]]:
        """All rows in feeds of `size` rows, each across all noise levels; a rest is left out."""
        count = max(1, len(self) // size)
        return [self.take(range(start, len(self), count)[:size]) for start in range(count)]


def collect_rows(
    pipeline: Any,
    input_names: list[str],
    *,
    prompts: Sequence[str],
    seed: int,
    purpose: str = "calibration",
    steps: int = 16,
    rows: int = 128,
    on_progress: Progress | None = None,
) -> TrajectoryRows:
    """Sample every prompt once with guidance and keep an equal number of rows of every step.

    Args:
        pipeline: a PixelFlowPipeline in torch.
        input_names: inputs of the exported denoiser.
        prompts: what to sample; each gets the seed `image_seed(seed, prompt)`.
        seed: of the noise and of the choice of rows.
        purpose: separates the choices for calibration and for parity.
        steps: network evaluations of a trajectory.
        rows: how many to keep in all; half of them with the prompt and half with the negative one.

    Raises:
        UsageError: no prompts, an empty prompt, or no steps or rows.
    """
    texts = check_prompts(prompts)
    if steps < 1 or rows < 1:
        raise UsageError(f"steps and rows must be positive, got {steps} and {rows}")
    caught: list[list[dict[str, Array]]] = []  # [chunk][step] -> feed of 2B rows
    chunks = [texts[start : start + 8] for start in range(0, len(texts), 8)]
    for done, chunk in enumerate(chunks):
        caught.append(
            _record_calls(pipeline, input_names, chunk, [image_seed(seed, t) for t in chunk], steps)
        )
        if on_progress:
            on_progress(done + 1, len(chunks))
    generator = numpy_generator(seed, purpose)
    half = max(1, rows // steps // 2)  # of a step's rows, with and without the prompt
    kept: list[dict[str, Array]] = []
    guided: list[int] = []
    for step in range(steps):
        n = len(texts)
        prompted = {  # rows of this step with the prompt, then those with the negative one
            name: np.concatenate(
                [run[step][name][: len(run[step][name]) // 2] for run in caught]
                + [run[step][name][len(run[step][name]) // 2 :] for run in caught]
            )
            for name in input_names
        }
        take = [generator.choice(n, size=min(half, n), replace=False) + offset for offset in (0, n)]
        chosen = np.concatenate(take)
        kept.append({name: array[chosen] for name, array in prompted.items()})
        guided.extend((chosen < n).tolist())
    feeds = {name: np.concatenate([feed[name] for feed in kept]) for name in input_names}
    sigmas = feeds["timestep"] / 1000.0
    order = np.argsort(sigmas, kind="stable")
    feeds = {name: array[order] for name, array in feeds.items()}
    record = {
        "prompts": texts,
        "seed": seed,
        "seeds": [image_seed(seed, text) for text in texts],
        "steps": steps,
        "rows": len(sigmas),
        "rows_with_prompt": int(np.sum(guided)),
        "sigma_min": float(sigmas.min()),
        "sigma_max": float(sigmas.max()),
        "inputs_sha256": sha256_json(
            {name: sha256_bytes(array.tobytes()) for name, array in feeds.items()}
        ),
    }
    return TrajectoryRows(feeds, sigmas[order], np.asarray(guided)[order], record)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts without repeats.

    Raises:
        UsageError: there are none, or one is blank.
    """
    texts = list(dict.fromkeys(prompts))
    if not texts:
        raise UsageError("no prompts to calibrate with", hint="give --prompts a file of lines")
    for index, text in enumerate(texts):
        if not text.strip():
            raise UsageError(f"prompt {index + 1} is blank", hint="remove it")
    return texts


def _record_calls(
    pipeline: Any, input_names: list[str], prompts: list[str], seeds: list[int], steps: int
) -> list[dict[str, Array]]:
    """One guided run of the pipeline: the feed of every denoiser call, prompted rows first."""
    feeds: list[dict[str, Array]] = []
    predict = type(pipeline).predict_velocity

    def recording(
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        pooled: torch.Tensor,
        tokens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        feeds.append(denoiser_feed(input_names, latents, sigmas * 1000.0, pooled, tokens, mask))
        output: torch.Tensor = predict(pipeline, latents, sigmas, pooled, tokens, mask)
        return output

    scale = float(pipeline.config["default_guidance"])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.predict_velocity = recording  # shadows the method on this instance alone
    try:
        pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=scale if scale != 1.0 else 3.0,
            generator=[torch.Generator("cpu").manual_seed(value) for value in seeds],
            output_type="latent",
        )
    finally:
        del pipeline.predict_velocity
    return feeds
