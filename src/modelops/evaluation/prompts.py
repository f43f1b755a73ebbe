"""Prompts of an evaluation: held-out captions or a file. An unusable prompt stays in the plan and
fails there; blank or repeated lines are skipped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.base.files import read_text, sha256_bytes, sha256_json
from modelops.base.seeding import derive_seed, image_seed
from modelops.models.request import InputImage

MAX_PROMPT = 10_000  # characters


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Distinct prompts in order, with those that cannot be used.

    Attributes:
        prompts: usable prompts.
        dropped: {reason: number} of blank and repeated lines.
        ids: manifest ids, one per usable prompt, if they are captions.
        rejected: (text to show, why it cannot be used) of the others. Images are planned for them
            as for every prompt, and fail.
        inputs: digest of each planned image's input image, where there are any.
    """

    prompts: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of the prompts in their order, and of rejected ones and inputs if any."""
        texts: list[object] = [*self.prompts, *(list(each) for each in self.rejected)]
        return sha256_json({"prompts": texts, "inputs": self.inputs} if self.inputs else texts)

    def __len__(self) -> int:
        """Number of distinct prompts, usable or not."""
        return len(self.prompts) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """Replicate k of prompt p; its seed depends on (seed, prompt, k) alone.

    Attributes:
        owner: index into `PromptSet.prompts`; rejected prompts follow after these.
        fault: reason why no image can be made of the prompt.
        image: what is to be changed, for a pipeline that changes images.
    """

    prompt: str
    owner: int
    replicate: int
    seed: int
    fault: str | None = None
    image: InputImage | None = None


def image_name(prompt: str, seed: int, place: int = 0) -> str:
    """Return the name of an image's file in the cache; `place` counts only for ready images."""
    return f"{sha256_json([prompt, seed, place])[:32]}.png"


def clean_prompts(lines: Iterable[str], *, ids: Sequence[str] = ()) -> PromptSet:
    """Return the distinct prompts of lines. Blank and repeated ones are only counted; a prompt
    with a null byte, or of more than `MAX_PROMPT` characters, is rejected."""
    prompts: dict[str, str] = {}
    rejected: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for index, line in enumerate(lines):
        text = clean_text(line)
        if not text:
            dropped["blank"] += 1
            continue
        shown, fault = _fault(text)
        if shown in prompts or shown in rejected:
            dropped["repeated"] += 1
        elif fault:
            rejected[shown] = fault
        else:
            prompts[text] = ids[index] if ids else ""
    return PromptSet(
        tuple(prompts), dict(dropped), tuple(prompts.values()) if ids else (),
        tuple(rejected.items()),
    )  # fmt: skip


def clean_text(line: str) -> str:
    """Return a line without blanks and byte-order marks (of `cat a.txt b.txt`) around it."""
    return line.strip().strip("\ufeff").strip()


def _fault(text: str) -> tuple[str, str | None]:
    """Return (the prompt as it can be shown, why it cannot be used or None)."""
    if "\0" not in text and len(text) <= MAX_PROMPT:
        return text, None
    shown = text.replace("\0", "\N{SYMBOL FOR NULL}")
    if len(text) > MAX_PROMPT:
        digest = sha256_bytes(text.encode("utf-8", "surrogatepass"))[:12]
        shown = f"{shown[:60]}... (sha256 {digest})"
        return shown, f"the prompt has {len(text)} characters, more than {MAX_PROMPT}"
    return shown, "the prompt holds a null byte"


def read_prompts(path: Path) -> PromptSet:
    """Read the prompts of a UTF-8 file, one a line.

    Raises:
        UsageError: the file is missing, not UTF-8, or holds no usable prompt.
    """
    found = clean_prompts(read_lines(path))
    if not found.prompts:
        raise UsageError(f"{path}: no usable prompt", hint="write one prompt a line")
    return found


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file, blank ones too.

    Raises:
        UsageError: the file is missing or not UTF-8.
    """
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def choose_prompts(found: PromptSet, n: int | None, *, seed: int) -> PromptSet:
    """Choose n prompts, by a seeded order that does not depend on the others; all if n is None.

    Rejected ones are chosen like any other. n may be larger than their number: `plan_images` then
    repeats them.
    """
    if n is None or n >= len(found):
        return found
    ids = found.ids or ("",) * len(found.prompts)
    everything = [(prompt, name, "") for prompt, name in zip(found.prompts, ids, strict=True)]
    everything += [(shown, "", fault) for shown, fault in found.rejected]
    ranked = sorted(everything, key=lambda each: derive_seed(seed, "prompt-choice", each[0]))[:n]
    usable = [(prompt, name) for prompt, name, fault in ranked if not fault]
    return PromptSet(
        tuple(prompt for prompt, _ in usable),
        found.dropped,
        tuple(name for _, name in usable) if found.ids else (),
        tuple((shown, fault) for shown, _, fault in ranked if fault),
    )


def plan_images(
    found: PromptSet, *, n: int | None, replicates: int, seed: int
) -> list[PlannedImage]:
    """Plan the images of an evaluation: every prompt `replicates` times, or as often as n asks."""
    texts = [*((prompt, None) for prompt in found.prompts), *found.rejected]
    total = n if n is not None else len(texts) * replicates
    plan = []
    for index in range(total):
        owner, replicate = index % len(texts), index // len(texts)
        prompt, fault = texts[owner]
        seed_of = image_seed(seed, prompt, replicate)
        plan.append(PlannedImage(prompt, owner, replicate, seed_of, fault))
    return plan


def plan_with_inputs(
    lines: Sequence[str],
    images: Sequence[InputImage],
    *,
    n: int | None,
    replicates: int,
    seed: int,
) -> tuple[PromptSet, list[PlannedImage]]:
    """Plan one image for each pair of a line and an input image.

    Line k, blank ones not counted, belongs to image k; a single line belongs to all images, and a
    single image to all lines. A repeated line is one prompt with several images. If n is less than
    the number of pairs, they are chosen by a seeded order; if it is more, they are repeated.

    Raises:
        UsageError: no line can be used, or there are other numbers of lines and images.
    """
    texts = [line for line in lines if clean_text(line)]
    if not texts:
        raise UsageError("no usable prompt", hint="write one prompt a line")
    if len(texts) != len(images) and 1 not in (len(texts), len(images)):
        raise UsageError(
            f"{len(texts)} prompts for {len(images)} input images",
            hint="give one prompt for each image, or one for all of them",
        )
    places = range(max(len(texts), len(images)))
    used = [(texts[place % len(texts)], images[place % len(images)]) for place in places]
    dropped = {"blank": len(lines) - len(texts)} if len(texts) < len(lines) else {}
    total = n if n is not None else len(used) * replicates
    if total < len(used):
        order = sorted(range(len(used)), key=lambda k: derive_seed(seed, "pair-choice", str(k)))
        used = [used[place] for place in sorted(order[:total])]
    chosen = [used[place % len(used)] for place in range(total)]
    found, plan = plan_ready_images([line for line, _ in chosen], total, seed=seed)
    with_images = [
        replace(planned, image=image) for planned, (_, image) in zip(plan, chosen, strict=True)
    ]
    inputs = tuple(image.sha256 for _, image in chosen)
    return replace(found, dropped=dropped, inputs=inputs), with_images


def plan_ready_images(
    lines: Sequence[str], count: int, *, seed: int
) -> tuple[PromptSet, list[PlannedImage]]:
    """Plan `count` ready-made images: line k is the prompt of image k, and with fewer lines they
    begin again. A repeated line is one prompt with several images."""
    used = [lines[place % len(lines)] for place in range(count)]
    found = clean_prompts(used)
    faults = {**dict(found.rejected), "": "its line of the prompts is blank"}
    owners = {prompt: owner for owner, prompt in enumerate([*found.prompts, *faults])}
    seen: Counter[str] = Counter()
    plan = []
    for line in used:
        prompt = _fault(clean_text(line))[0]
        replicate = seen[prompt]
        seen[prompt] += 1
        plan.append(
            PlannedImage(
                prompt, owners[prompt], replicate, image_seed(seed, prompt, replicate),
                faults.get(prompt),
            )
        )  # fmt: skip
    return PromptSet(found.prompts, {}, (), found.rejected), plan
