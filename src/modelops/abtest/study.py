"""The files of a study: study.json, which raters may see, and key.json, which they may not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import sha256_file
from modelops.base.seeding import derive_seed, numpy_generator
from modelops.records.base import InputRef, Record
from modelops.records.evaluation import SourceInfo
from modelops.records.read import read_record

STUDY, KEY, VOTES, IMAGES = "study.json", "key.json", "votes.jsonl", "images"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Trial(_Model):
    """One showing of two images.

    Attributes:
        id: opaque.
        images: the images' names; which is left is decided for each rater, see `rater_order`.
        again_of: id of the trial whose pair this one shows again, sides swapped.
    """

    id: str
    prompt: str
    images: tuple[str, str]
    again_of: str | None = None


class Study(Record):
    """study.json. Nothing in it, or in the images' names and order, tells A from B.

    Attributes:
        records: files that A and B were read from; not which image is whose.
        trials: sorted by their opaque ids.
        images: {name: sha256 of its PNG}.
        left_out: {reason: pairs} of the pairs that are not shown.
        differences: settings that may differ between the samplings, as the user allowed.
    """

    kind: Literal["abtest_study"] = "abtest_study"
    title: str
    question: str
    records: dict[str, InputRef]
    key_sha256: str
    order_seed: int
    trials: list[Trial]
    images: dict[str, str]
    n_pairs: int
    left_out: dict[str, int] = Field(default_factory=dict)
    differences: list[str] = Field(default_factory=list)


class TrialKey(_Model):
    """Kind of a trial: the first or second showing of a pair, or an attention check.

    `expected` is the image that an attentive rater prefers in a check.
    """

    role: Literal["first", "again", "attention"]
    pair: int
    expected: str | None = None


class Pair(_Model):
    """Images of one planned image from both sources; `identical` when no pixel differs."""

    prompt: str
    replicate: int
    seed: int
    a: str
    b: str
    identical: bool = False


class StudyKey(Record):
    """key.json: which image is whose. The server neither reads nor serves it."""

    kind: Literal["abtest_key"] = "abtest_key"
    seed: int
    sources: dict[str, SourceInfo]
    pairs: list[Pair]
    trials: dict[str, TrialKey]


@dataclass(frozen=True, slots=True)
class Showing:
    """One trial as one rater sees it."""

    trial: str
    prompt: str
    left: str
    right: str


def read_study(directory: str | Path) -> tuple[Study, str]:
    """Read study.json; return it with its sha256.

    Raises:
        UsageError: there is no study in the directory.
    """
    path = Path(directory) / STUDY
    if not path.is_file():
        raise UsageError(
            f"{directory}: no {STUDY} there", hint="make one: modelops abtest build A B --out DIR"
        )
    return read_record(path, Study), sha256_file(path)


def read_key(path: str | Path, study: Study) -> StudyKey:
    """Read key.json of this study.

    Raises:
        UsageError: it is missing.
        IntegrityError: it belongs to another study or was changed.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file", hint="name the study's key with --key FILE")
    if sha256_file(path) != study.key_sha256:
        raise IntegrityError(f"{path}: not the key of this study, or changed since it was built")
    return read_record(path, StudyKey)


def rater_order(study: Study, rater: str) -> list[Showing]:
    """The trials in the order and with the sides that this rater sees.

    The order is a shuffle of (order_seed, rater) alone, so that a rater can go on at any time. A
    pair that is shown twice comes in the first half and again half a study later. Sides are
    balanced within a study; every other rater, by a coin of their name, sees them all swapped.
    """
    place = numpy_generator(study.order_seed, "abtest-order", rater).random(len(study.trials))
    at = {trial.id: float(x) for trial, x in zip(study.trials, place, strict=True)}
    for trial in study.trials:
        if trial.again_of is not None:
            at[trial.again_of] /= 2
            at[trial.id] = at[trial.again_of] + 0.5
    swapped = derive_seed(study.order_seed, "abtest-sides", rater) & 1
    return [
        Showing(trial.id, trial.prompt, trial.images[swapped], trial.images[1 - swapped])
        for trial in sorted(study.trials, key=lambda trial: (at[trial.id], trial.id))
    ]
