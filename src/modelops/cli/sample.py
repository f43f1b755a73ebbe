"""`modelops sample`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import (
    DIRECTORY,
    FILE,
    dry_run_option,
    input_images_option,
    read_guidance,
    seed_option,
    trust_code_option,
)
from modelops.cli.output import emit, json_option, progress, say


@click.command()
@click.argument("source")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Prompt to make images of. Repeatable.",
)
@click.option("--prompt-file", type=FILE, metavar="FILE",
              help="File of prompts, one a line, UTF-8.")  # fmt: skip
@input_images_option
@click.option("-n", "per_prompt", type=click.IntRange(1), default=1, show_default=True,
              help="Number of images per prompt.")  # fmt: skip
@seed_option("Seed of the images; each image also depends on its prompt and number.")
@click.option(
    "--steps", type=click.IntRange(1), help="Number of sampling steps.  [default: the source's own]"
)
@click.option(
    "--guidance",
    type=click.FloatRange(0),
    callback=read_guidance,
    help="Classifier-free guidance scale; 0 or 1 is off.  [default: the source's own]",
)
@click.option(
    "--size",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Height and width of each image, in pixels.  [default: the source's own]",
)
@click.option("--columns", type=click.IntRange(1), help="Number of columns of the grid.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images per call; does not change the images.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Device of a checkpoint: cpu, cuda, cuda:1."
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="Runtime of an exported artifact: auto, or a name such as openvino.",
)
@click.option("--out", type=DIRECTORY, required=True,
              metavar="DIR", help="Folder for PNG files, grid.png and samples.json.")  # fmt: skip
@dry_run_option
@trust_code_option
@json_option
def sample(
    source: str,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    input_images: Path | None,
    per_prompt: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    size: int | None,
    columns: int | None,
    batch_size: int,
    device: str,
    runtime: str,
    out: Path,
    dry_run: bool,
) -> int:
    """Make images with SOURCE from fixed seeds.

    Image k of a prompt is the one that `modelops eval` makes with the same seed.

    \b
    Example:
      modelops sample runs/pilot/checkpoints/step-1000 --prompt "red heart" --prompt sun \\
          -n 4 --seed 0 --out samples/
      modelops sample inpainting/ --prompt "red heart" --input-images photos/ --out samples/
    """
    from modelops.evaluation.inputs import read_input_images
    from modelops.evaluation.prompts import clean_prompts, read_lines, read_prompts
    from modelops.evaluation.sampling import plan_samples, sample_images

    sets = [clean_prompts(prompts), *([read_prompts(prompt_file)] if prompt_file else [])]
    texts = [prompt for found in sets for prompt in found.prompts]
    unusable = {shown: fault for found in sets for shown, fault in found.rejected}
    inputs = read_input_images(input_images) if input_images else None
    n_images = len(texts) * per_prompt
    if inputs and texts:  # a repeated prompt belongs to another image
        texts = [*prompts, *(read_lines(prompt_file) if prompt_file else [])]
        n_images = len(plan_samples(texts, inputs, per_prompt, seed))
    if not texts:
        raise click.UsageError("No usable prompt: give --prompt TEXT or --prompt-file FILE.")
    for shown, fault in unusable.items():
        say(f"left out: {shown}: {fault}")
    if dry_run:
        emit({"status": "ok", "dry_run": True, "source": source, "prompts": texts,
              "unusable": unusable, "images": n_images, "out": str(out)},
             text=f"would make {n_images} images in {out}")  # fmt: skip
        return 0
    from modelops.evaluation.sources.open import open_source

    opened = open_source(source, batch_size=batch_size, device=device, runtime=runtime)
    cut = opened.cut(texts)
    for prompt in cut:
        say(f"cut: {prompt[:60]!r}...: longer than the model reads")
    with progress("Sampling") as report:
        result = sample_images(
            opened, texts, out, seed=seed, per_prompt=per_prompt, steps=steps,
            guidance=guidance, size=size, inputs=inputs, columns=columns, on_progress=report,
        )  # fmt: skip
    failed = sum(image["file"] is None for image in result["images"])
    emit({"status": "ok", "out": str(out), "failed": failed, "unusable": unusable, "cut": cut,
          **result},
         text=f"{len(result['images']) - failed} images and grid.png in {out}"
         + (f"; {failed} failed, see samples.json" if failed else ""))  # fmt: skip
    return 0
