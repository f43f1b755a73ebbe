"""Do batch size, number of processes or a kill change an image? Counts images that are identical.

    python bench/bench_seeds.py
    python bench/bench_seeds.py --checkpoint runs/pilot/checkpoints/step-1000 --images 24

Ten batch sizes with one and with two processes, each killed after some images and started again,
against one uninterrupted run. Then, to show why calls are filled up to a fixed number of rows, the
same images with as many rows in each call as the batch size says. Exits 1 if an image differs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelops.base.files import sha256_file
from modelops.base.images import read_image
from modelops.evaluation.prompts import PlannedImage, PromptSet, image_name, plan_images
from modelops.evaluation.samples import draw_samples
from modelops.evaluation.sources.open import open_source
from modelops.evaluation.workers.open import open_with_workers
from modelops.evaluation.workers.tasks import Workers
from modelops.models.request import ImageRequest

BATCHES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 32)
WORDS = ("red heart", "dog face", "flag: Japan", "grinning face", "house", "bicycle", "apple")


class StoppedError(Exception):
    """In place of a kill, after some images."""


def draw(
    source: Any,
    plan: Sequence[PlannedImage],
    request: ImageRequest,
    folder: Path,
    workers: Workers | None = None,
    *,
    stop_after: int | None = None,
) -> dict[str, str]:
    """{name: sha256} of the images in a folder after drawing."""

    def watch(done: int, total: int) -> None:
        here = threading.current_thread() is threading.main_thread()
        if here and stop_after is not None and done >= stop_after:
            raise StoppedError

    with contextlib.suppress(StoppedError):
        draw_samples(source, plan, request, folder, workers=workers, on_progress=watch)
    return {path.name: sha256_file(path) for path in folder.rglob("*.png")}


def make_checkpoint(directory: Path) -> Path:
    """A small random network around the real text encoder."""
    import torch

    from modelops.models.checkpoints import save_pipeline
    from modelops.models.encoders import load_text_encoder
    from modelops.models.networks import make_pipeline, make_unet

    torch.manual_seed(0)
    tokenizer, text_encoder = load_text_encoder()
    unet = make_unet(resolution=32, patch_size=2, channels=32, multipliers=(1, 2))
    directory.mkdir(parents=True)
    save_pipeline(make_pipeline(unet, tokenizer, text_encoder, patch_size=2), directory)
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint = options.checkpoint or make_checkpoint(root / "checkpoint")
        return compare(checkpoint, root, images=options.images, steps=options.steps)


def compare(checkpoint: Path, root: Path, *, images: int, steps: int) -> int:
    """Print how many images are identical in each way of making them."""
    plan = plan_images(PromptSet(WORDS), n=images, replicates=1, seed=0)
    source: Any = open_source(str(checkpoint), batch_size=16)
    request = ImageRequest(
        prompt="", seed=0, steps=steps, guidance=3.0,
        height=source.defaults.height, width=source.defaults.width,
    )  # fmt: skip
    expected = draw(source, plan, request, root / "whole")
    assert len(expected) == images
    different = 0
    for processes in (1, 2):
        for batch in BATCHES:
            opening: dict[str, Any] = {
                "uri": str(checkpoint), "batch_size": batch, "device": "cpu", "runtime": "auto",
            }  # fmt: skip
            cache = root / f"{processes}-{batch}"
            opened, workers = open_with_workers(opening, processes)
            early = draw(opened, plan, request, cache, workers, stop_after=images // 3)
            found = draw(opened, plan, request, cache, workers)
            if workers:
                workers.close()
            same = sum(found.get(name) == digest for name, digest in expected.items())
            different += images - same
            print(
                f"processes {processes}, batch {batch:2d}: stopped with {len(early):2d} images, "
                f"then {same} of {images} identical",
                flush=True,
            )
    pictures = {path.name: read_image(path) for path in (root / "whole").rglob("*.png")}
    ordered = [pictures[path.name] for path in _in_order(plan, root / "whole")]
    for batch in BATCHES:
        source.rows_per_call = lambda _request, rows=batch: rows
        made = source.generate(
            [
                ImageRequest(
                    prompt=planned.prompt, seed=planned.seed, steps=steps, guidance=3.0,
                    height=request.height, width=request.width,
                )
                for planned in plan
            ]
        )  # fmt: skip
        gaps = [int(np.abs(a.astype(int) - b).max()) for a, b in zip(made, ordered, strict=True)]
        print(
            f"without fixed rows, batch {batch:2d}: {gaps.count(0)} of {images} identical, "
            f"largest difference {max(gaps)} grey levels",
            flush=True,
        )
    print("all identical" if different == 0 else f"{different} images differ")
    return 1 if different else 0


def _in_order(plan: Sequence[PlannedImage], folder: Path) -> list[Path]:
    """The PNG of each planned image, by the name that the cache gives it."""

    (cache,) = {path.parent for path in folder.rglob("*.png")}
    return [cache / image_name(planned.prompt, planned.seed) for planned in plan]


if __name__ == "__main__":
    sys.exit(main())
