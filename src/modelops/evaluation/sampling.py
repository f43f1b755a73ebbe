"""Images for a person to look at: PNG files, a grid and samples.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import sha256_bytes, write_bytes, write_json
from modelops.base.images import encode_png
from modelops.base.seeding import image_seed
from modelops.evaluation.grids import write_grid
from modelops.evaluation.inputs import InputImages, require_takes_images
from modelops.evaluation.prompts import PlannedImage, plan_with_inputs
from modelops.models.request import Image, ImageRequest
from modelops.models.sources import ModelSource


def sample_images(
    source: ModelSource,
    prompts: Sequence[str],
    out_dir: Path,
    *,
    seed: int = 0,
    per_prompt: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    inputs: InputImages | None = None,
    columns: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write NNNN-K.png for each prompt and replicate, grid.png, and samples.json; return the path
    of samples.json. `modelops eval` makes the same images of the same prompts and seed.

    With input images NNNN counts the pairs of a prompt and an image; see
    `prompts.plan_with_inputs`.

    Raises:
        UsageError: there are no prompts, or the source takes no input images.
        ModelopsError: no image could be made.
    """
    if not prompts:
        raise UsageError("no prompts", hint="give --prompt or --prompt-file")
    if inputs is not None:
        require_takes_images(source)
        if inputs.folder.resolve() == out_dir.resolve():
            raise UsageError(
                f"{out_dir}: the folder of the input images", hint="give another with --out"
            )
    defaults = source.defaults
    # An image's size may be that of its input.
    height, width = (defaults.height, defaults.width) if inputs is None else (None, None)
    plan = plan_samples(prompts, inputs, per_prompt, seed)
    requests = [
        ImageRequest(
            prompt=planned.prompt, seed=planned.seed, image=planned.image,
            steps=steps if steps is not None else defaults.steps,
            guidance=guidance if guidance is not None else defaults.guidance,
            height=size or height, width=size or width,
        )
        for planned in plan
    ]  # fmt: skip
    for request in requests:
        source.check(request)
    images: list[Image | None] = []
    entries: list[dict[str, Any]] = []
    chunk = source.batch_size
    for start in range(0, len(requests), chunk):
        part = requests[start : start + chunk]
        for offset, made in enumerate(source.generate_each(part)):
            index, request = start + offset, part[offset]
            entry: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed}
            if request.image is not None:
                entry |= {"input": Path(request.image.path).name}
            if isinstance(made, ModelopsError):
                entry |= {"file": None, "failure": made.message}
                images.append(None)
            else:
                data = encode_png(made)
                name = f"{index // per_prompt:04d}-{index % per_prompt}.png"
                write_bytes(out_dir / name, data)
                entry |= {"file": name, "sha256": sha256_bytes(data)}
                entry |= {"height": made.shape[0], "width": made.shape[1]}
                images.append(made)
            entries.append(entry)
        if on_progress:
            on_progress(len(entries), len(requests))
    if all(image is None for image in images):
        raise ModelopsError(f"no image could be made: {entries[0]['failure']}")
    write_grid(
        out_dir / "grid.png", images, [e["prompt"] for e in entries],
        columns=columns or (per_prompt if per_prompt > 1 else None),
    )  # fmt: skip
    first = requests[0]
    result = {
        "source": source.info.model_dump(mode="json"), "scheduler": source.scheduler_name,
        "seed": seed, "steps": first.steps, "guidance": first.guidance,
        "height": first.height, "width": first.width, "grid": "grid.png", "images": entries,
    }  # fmt: skip
    if inputs is not None:
        result["input_images"] = {"path": str(inputs.folder), "sha256": inputs.sha256}
    write_json(out_dir / "samples.json", result)
    return result


def plan_samples(
    prompts: Sequence[str], inputs: InputImages | None, per_prompt: int, seed: int
) -> list[PlannedImage]:
    """Plan `per_prompt` images of each prompt, or of each pair of prompt and input image."""
    if inputs is None:
        return [
            PlannedImage(prompt, owner, replicate, image_seed(seed, prompt, replicate))
            for owner, prompt in enumerate(prompts)
            for replicate in range(per_prompt)
        ]
    _, plan = plan_with_inputs(prompts, inputs.images, n=None, replicates=per_prompt, seed=seed)
    pairs = len(plan) // per_prompt
    ordered = [plan[pair + k * pairs] for pair in range(pairs) for k in range(per_prompt)]
    return [planned for planned in ordered if planned.fault is None]
