"""The requests that every server gets: the same list, in the same order, from fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelops.base.seeding import numpy_generator
from modelops.safety.prompt import WordListFilter

STEPS = range(8, 31)
GUIDANCE = (1.0, 3.0)
BLOCK = len(STEPS) * len(GUIDANCE)  # requests in which each kind occurs once


@dataclass(frozen=True, slots=True)
class Wanted:
    """One image to be made; guidance 1 takes one row of a forward pass, else two."""

    prompt: str
    seed: int
    steps: int
    guidance: float

    @property
    def row_steps(self) -> int:
        """Rows that pass through the network, over all steps."""
        return self.steps * (1 if self.guidance == 1.0 else 2)

    @property
    def fields(self) -> dict[str, Any]:
        """As a request's JSON."""
        return asdict(self)


def read_prompts(manifest: Path) -> list[str]:
    """Captions of the held-out split (splits.parquet beside the manifest), in the manifest's order.

    Captions that the node's word list blocks are left out: the other servers have no such list.
    """
    from pyarrow.parquet import read_table

    splits = read_table(manifest.with_name("splits.parquet"), columns=["id", "split"]).to_pylist()
    held_out = {row["id"] for row in splits if row["split"] == "test"}
    rows = read_table(manifest, columns=["id", "caption"]).to_pylist()
    captions = dict.fromkeys(row["caption"] for row in rows if row["id"] in held_out)
    words = WordListFilter()
    return [caption for caption in captions if not words.check(caption).blocked]


def make_mix(prompts: Sequence[str], count: int, *, steps: Sequence[int] = STEPS,
             guidance: Sequence[float] = GUIDANCE, seed: int = 0) -> list[Wanted]:  # fmt: skip
    """Requests of uniform step counts, guided and unguided in equal numbers.

    Shuffled in blocks in which every kind occurs once, so that a short window of the list costs
    what a long one does.
    """
    generator = numpy_generator(seed, "serving mix")
    kinds = [(n, scale) for n in steps for scale in guidance]
    mix: list[Wanted] = []
    while len(mix) < count:
        for pick in generator.permutation(len(kinds)):
            prompt = prompts[int(generator.integers(len(prompts)))]
            mix.append(Wanted(prompt, len(mix), kinds[pick][0], kinds[pick][1]))
    return mix[:count]


def poisson_times(rate: float, seconds: float, *, seed: int) -> list[float]:
    """Arrivals in [0, seconds) of a Poisson process of `rate` per second."""
    generator = numpy_generator(seed, "serving arrivals")
    times, now = [], 0.0
    while (now := now + float(generator.exponential(1.0 / rate))) < seconds:
        times.append(now)
    return times
