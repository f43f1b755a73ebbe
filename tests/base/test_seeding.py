from __future__ import annotations

import subprocess
import sys

import torch

from modelops.base.seeding import (
    MAX_SEED,
    derive_seed,
    image_seed,
    numpy_generator,
    torch_generator,
)


def test_seeds_are_the_same_in_every_process_and_for_ever() -> None:
    # A literal: a change of the derivation would change every image of every release.
    assert derive_seed(0, "image", "red heart", 0) == 5130108849500540
    code = "from modelops.base.seeding import *; print(image_seed(0, 'red heart'))"
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        assert int(done.stdout) == image_seed(0, "red heart")


def test_streams_differ_by_seed_purpose_and_every_part_of_the_index() -> None:
    seeds = {
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", "1"),
        derive_seed(0, "a", 1, 2),
        derive_seed(0, "a", 12),
        derive_seed(0, "a", 2, 1),
    }
    assert len(seeds) == 8
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_generators_repeat() -> None:
    assert torch.equal(
        torch.randn(8, generator=torch_generator(3, "noise", 5)),
        torch.randn(8, generator=torch_generator(3, "noise", 5)),
    )
    assert (
        numpy_generator(3, "bootstrap", 1).integers(1 << 30)
        == numpy_generator(3, "bootstrap", 1).integers(1 << 30)
        != numpy_generator(3, "bootstrap", 2).integers(1 << 30)
    )
