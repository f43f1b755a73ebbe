"""Small studies for the tests: two folders as `modelops sample` writes them, A blue and B red."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modelops.abtest.build import StudySettings, build_study
from modelops.abtest.study import Study
from modelops.base.files import sha256_file
from modelops.base.seeding import image_seed

BLUE, RED = (30, 60, 200), (200, 50, 40)
PROMPTS = tuple(f"{colour} {thing}" for colour in ("warm", "cold") for thing in
                ("heart", "sun", "face", "flag", "crab", "ship"))  # fmt: skip


def write_samples(
    folder: Path,
    colour: tuple[int, int, int],
    *,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    steps: int = 4,
    size: int = 16,
    failed: Sequence[str] = (),
) -> Path:
    """Flat images with a little noise; each PNG says in its metadata where it comes from."""
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        entry: dict[str, Any] = {"prompt": prompt, "seed": image_seed(seed, prompt)}
        if prompt in failed:
            entries.append(entry | {"file": None, "failure": "blocked"})
            continue
        noise = np.random.default_rng(index).integers(0, 20, (size, size, 3))
        told = PngInfo()
        told.add_text("Source", folder.name)
        path = folder / f"{index:04d}-0.png"
        pixels = (np.array(colour) + noise).astype(np.uint8)
        Image.fromarray(pixels).save(path, pnginfo=told)
        entries.append(entry | {"file": path.name, "sha256": sha256_file(path)})
    listing = {
        "source": {"kind": "checkpoint", "uri": folder.name}, "seed": seed, "steps": steps,
        "guidance": 3.0, "height": size, "width": size, "images": entries,
    }  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(listing))
    return folder


def make_study(root: Path, **settings: Any) -> Study:
    """A study in root/study of A (blue) and B (red)."""
    a = write_samples(root / "a", BLUE)
    b = write_samples(root / "b", RED)
    return build_study(a, b, root / "study", StudySettings(**{"seed": 7, **settings}))
