"""Build a study: a blind, randomised A/B test of two sources' images of the same prompts."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from modelops.abtest.pairs import (
    ALLOWED_DIFFERENCES,
    Planned,
    Side,
    open_side,
    sampling_differences,
)
from modelops.abtest.study import (
    IMAGES,
    KEY,
    STUDY,
    Pair,
    Study,
    StudyKey,
    Trial,
    TrialKey,
)
from modelops.base.environment import current_environment
from modelops.base.errors import EvaluationError, UsageError
from modelops.base.files import atomic_directory, sha256_bytes, sha256_file, write_bytes
from modelops.base.images import encode_png, read_image
from modelops.base.seeding import MAX_SEED, derive_seed, numpy_generator
from modelops.evaluation.samples import Image

QUESTION = "Which image shows the prompt better?"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """Settings of `build_study`.

    Attributes:
        n: pairs to show, chosen by the seed; None shows all.
        repeat: share of the pairs that is shown a second time with sides swapped, 0 to 1.
        attention: checks in which one image's pixels are shuffled; the other one is expected.
        seed: of the choice, sides and names. None draws one: anyone who knows the seed and has both
            records can find out which image is whose.
        title, question: shown to the raters.
        allow: settings of the sampling that may differ, of ALLOWED_DIFFERENCES.
    """

    n: int | None = 100
    repeat: float = 0.2
    attention: int = 0
    seed: int | None = None
    title: str = "Which is better?"
    question: str = QUESTION
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise UsageError(f"n is {self.n}; it must be at least 1")
        if not 0 <= self.repeat <= 1:
            raise UsageError(f"repeat is {self.repeat}; it must be between 0 and 1")
        if self.attention < 0:
            raise UsageError(f"attention is {self.attention}; it must be at least 0")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed is {self.seed}; it must be between 0 and {MAX_SEED}")
        for text, name in ((self.title, "title"), (self.question, "question")):
            if not text.strip():
                raise UsageError(f"the {name} is empty")
        unknown = set(self.allow) - set(ALLOWED_DIFFERENCES)
        if unknown:
            raise UsageError(
                f"{min(unknown)} may not differ; only {' and '.join(ALLOWED_DIFFERENCES)}"
            )


def build_study(
    a: str | Path,
    b: str | Path,
    directory: str | Path,
    settings: StudySettings | None = None,
    *,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Study:
    """Write a study of two evaluation records, or `modelops sample` folders, into `directory`.

    study.json and images/ are what raters get to see; key.json, which `modelops abtest score`
    needs, may be kept elsewhere. Images are decoded and encoded again, so that nothing but their
    pixels is left of the files they were. One image is held in memory at a time.

    Args:
        dry_run: write nothing; the study that is returned has no digests.

    Raises:
        UsageError: the directory is not empty, or an input cannot be used.
        EvaluationError: prompts, seeds or protocol differ (all of it is named), or two images of
            a pair differ in size.
    """
    settings = settings or StudySettings()
    out = Path(directory)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: already there and not empty", hint="choose another directory")
    sides = (open_side(a), open_side(b))
    differences = _require_alike(a, b, *sides, settings.allow)
    shown, left_out = _choose(*sides)
    seed = settings.seed if settings.seed is not None else secrets.randbelow(MAX_SEED + 1)
    order = numpy_generator(seed, "abtest-pairs").permutation(len(shown))
    chosen = [shown[i] for i in order[: settings.n]]
    if len(chosen) < len(shown):
        left_out["not among the chosen"] = len(shown) - len(chosen)

    draft = _Draft(seed)
    for done, planned in enumerate(chosen):
        draft.add_pair(planned, *sides)
        if on_progress:
            on_progress(done + 1, 2 * len(chosen))
    draft.add_again(round(settings.repeat * len(chosen)))
    draft.add_attention(settings.attention)
    key = StudyKey(
        seed=seed, sources={"A": sides[0].source, "B": sides[1].source},
        seeds={"seed": seed}, pairs=draft.pairs, trials=draft.keys,
    )  # fmt: skip
    study = Study(
        title=settings.title.strip(), question=settings.question.strip(),
        records={"A": sides[0].ref, "B": sides[1].ref},
        key_sha256="",
        order_seed=derive_seed(seed, "abtest-order"),
        environment=current_environment(),
        trials=sorted(draft.trials, key=lambda trial: trial.id),
        images=dict.fromkeys(sorted(draft.images), ""),
        n_pairs=len(chosen), left_out=dict(left_out), differences=differences,
    )  # fmt: skip
    if dry_run:
        return study
    with atomic_directory(out) as folder:
        for done, name in enumerate(study.images):  # an order that tells nothing, nor do the times
            data = encode_png(draft.images[name]())
            study.images[name] = sha256_bytes(data)
            write_bytes(folder / IMAGES / f"{name}.png", data)
            if on_progress:
                on_progress(len(chosen) + done * len(chosen) // len(study.images), 2 * len(chosen))
        key.write(folder / KEY)
        study.key_sha256 = sha256_file(folder / KEY)
        study.write(folder / STUDY)
    return study


@dataclass(slots=True)
class _Draft:
    """Trials as they are made. Pair k has A on the left when k is even, so sides are balanced; the
    pairs are in a shuffled order, and names are opaque."""

    seed: int
    pairs: list[Pair] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    keys: dict[str, TrialKey] = field(default_factory=dict)
    images: dict[str, Callable[[], Image]] = field(default_factory=dict)

    def add_pair(self, planned: Planned, a: Side, b: Side) -> None:
        pair = len(self.pairs)
        pictures = [read_image(side.files[planned]) for side in (a, b)]
        if pictures[0].shape != pictures[1].shape:
            (h, w), (height, width) = pictures[0].shape[:2], pictures[1].shape[:2]
            raise EvaluationError(
                f"{planned[0]!r}: A is {w}x{h} and B {width}x{height}; raters would see it",
                hint="evaluate both with the same --size",
            )
        names = [
            self._add_image(name, pair, partial(read_image, side.files[planned]))
            for name, side in (("A", a), ("B", b))
        ]
        self.pairs.append(
            Pair(
                prompt=planned[0],
                replicate=planned[1],
                seed=a.seeds[planned],
                a=names[0],
                b=names[1],
                identical=bool((pictures[0] == pictures[1]).all()),
            )
        )
        self._add_trial("first", pair, names[0], names[1])

    def add_again(self, count: int) -> None:
        """Show the first `count` pairs a second time."""
        firsts = {key.pair: name for name, key in self.keys.items() if key.role == "first"}
        for pair in range(count):
            again_of = firsts[pair]
            a, b = self.pairs[pair].a, self.pairs[pair].b
            self._add_trial("again", pair, b, a, again_of=again_of)

    def add_attention(self, count: int) -> None:
        """Checks of an image against itself with its pixels shuffled."""
        for index in range(count):
            pair = len(self.pairs) - 1 - index % len(self.pairs)
            name = (self.pairs[pair].a, self.pairs[pair].b)[index // 2 % 2]
            scrambled = partial(_scramble, self.images[name], self.seed, index)
            bad = self._add_image("scrambled", index, scrambled)
            self._add_trial("attention", pair, name, bad, index=index, expected=name)

    def _add_image(self, what: str, index: int, read: Callable[[], Image]) -> str:
        name = f"{derive_seed(self.seed, 'abtest-image', what, index):014x}"
        self.images[name] = read
        return name

    def _add_trial(
        self, role: str, pair: int, first: str, second: str, *,
        index: int | None = None, again_of: str | None = None, expected: str | None = None,
    ) -> None:  # fmt: skip
        count = pair if index is None else index
        name = f"{derive_seed(self.seed, 'abtest-trial', role, count):014x}"
        images = (first, second) if count % 2 == 0 else (second, first)
        prompt = self.pairs[pair].prompt
        self.trials.append(Trial(id=name, prompt=prompt, images=images, again_of=again_of))
        self.keys[name] = TrialKey.model_validate(
            {"role": role, "pair": pair, "expected": expected}
        )


def _scramble(read: Callable[[], Image], seed: int, index: int) -> Image:
    """An image with its pixels in a random order."""
    picture = read()
    pixels = picture.reshape(-1, 3)
    order = numpy_generator(seed, "abtest-scramble", index).permutation(len(pixels))
    return pixels[order].reshape(picture.shape)


def _require_alike(
    a: str | Path, b: str | Path, ours: Side, theirs: Side, allow: tuple[str, ...]
) -> list[str]:
    """The allowed differences; others are refused."""
    found = sampling_differences(ours, theirs)
    refused = [f"{key}: {what}" for key, what in found.items() if key not in allow]
    if refused:
        only_allowable = all(key in ALLOWED_DIFFERENCES for key in found if key not in allow)
        hint = " ".join(f"--allow {key}" for key in found) if only_allowable else (
            "evaluate both with the same prompts, seed and settings"
        )  # fmt: skip
        raise EvaluationError(
            f"{a} and {b} are not images of the same prompts and seeds: {'; '.join(refused)}",
            hint=hint,
        )
    return [f"{key}: {what}" for key, what in found.items()]


def _choose(a: Side, b: Side) -> tuple[list[Planned], Counter[str]]:
    """Return the planned images that both have, in order, and the number left out by reason."""
    left_out: Counter[str] = Counter()
    shown = []
    for planned in a.seeds:
        missing = [name for name, side in (("A", a), ("B", b)) if planned not in side.files]
        if missing:
            left_out[f"image of {' and '.join(missing)} failed"] += 1
        else:
            shown.append(planned)
    if not shown:
        raise EvaluationError("no prompt has an image from both sources")
    return shown, left_out
