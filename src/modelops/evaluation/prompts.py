"""Which prompts are evaluated: held-out captions or a file; what cannot be used is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelops.errors import UsageError
from modelops.files import read_text, sha256_json
from modelops.seeding import derive_seed, image_seed

MAX_PROMPT = 10_000  # characters


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in order, with what was left out.

    Attributes:
        prompts: usable, distinct, in order.
        dropped: {reason: how many} of the others.
        ids: manifest ids, one per prompt, if they are captions.
    """

    prompts: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of the prompts in their order."""
        return sha256_json(list(self.prompts))


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """Replicate k of prompt p; its seed depends on (seed, prompt, k) alone."""

    prompt: str
    owner: int  # index into PromptSet.prompts
    replicate: int
    seed: int


def image_name(prompt: str, seed: int, place: int = 0) -> str:
    """File name of an image in the cache; its place counts only in a folder of ready images."""
    return f"{sha256_json([prompt, seed, place])[:32]}.png"


def clean_prompts(lines: Iterable[str], *, ids: Sequence[str] = ()) -> PromptSet:
    """Drop empty, over-long, duplicate and null-byte prompts, counting each reason."""
    prompts: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for index, line in enumerate(lines):
        text = line.strip()
        if not text:
            dropped["empty"] += 1
        elif "\0" in text:
            dropped["null byte"] += 1
        elif len(text) > MAX_PROMPT:
            dropped[f"longer than {MAX_PROMPT} characters"] += 1
        elif text in prompts:
            dropped["duplicate"] += 1
        else:
            prompts[text] = ids[index] if ids else ""
    return PromptSet(tuple(prompts), dict(dropped), tuple(prompts.values()) if ids else ())


def read_prompts(path: Path) -> PromptSet:
    """Prompts of a UTF-8 file, one a line.

    Raises:
        UsageError: the file is missing, not UTF-8, or holds no usable prompt.
    """
    text = read_text(path)
    found = clean_prompts(text.removesuffix("\n").split("\n") if text else [])
    if not found.prompts:
        raise UsageError(f"{path}: no usable prompt", hint="write one prompt a line")
    return found


def choose_prompts(found: PromptSet, n: int | None, *, seed: int) -> PromptSet:
    """n of the prompts, by a seeded order that does not depend on the others; all if n is None.

    Asking for more than there are is no error: `plan_images` then repeats them.
    """
    if n is None or n >= len(found.prompts):
        return found
    ids = found.ids or ("",) * len(found.prompts)
    ranked = sorted(
        zip(found.prompts, ids, strict=True),
        key=lambda pair: derive_seed(seed, "prompt-choice", pair[0]),
    )[:n]
    return PromptSet(
        tuple(prompt for prompt, _ in ranked),
        found.dropped,
        tuple(name for _, name in ranked) if found.ids else (),
    )


def plan_images(
    found: PromptSet, *, n: int | None, replicates: int, seed: int
) -> list[PlannedImage]:
    """The images of an evaluation: every prompt `replicates` times, or as often as n asks."""
    prompts = found.prompts
    total = n if n is not None else len(prompts) * replicates
    return [
        PlannedImage(
            prompts[index % len(prompts)],
            index % len(prompts),
            index // len(prompts),
            image_seed(seed, prompts[index % len(prompts)], index // len(prompts)),
        )
        for index in range(total)
    ]
