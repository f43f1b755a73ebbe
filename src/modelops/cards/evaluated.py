"""Evaluation records into the words of a model card: of what, on what, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from markupsafe import Markup

from modelops.cards.about import About
from modelops.cards.escape import code, markdown, number
from modelops.cards.numbers import Measured
from modelops.records.base import Record
from modelops.records.evaluation import MemorizationVerdict, OverfittingNote
from modelops.records.train import TrainRecord

UNSTATED = "unstated"  # id of a data set that nobody has named


@dataclass(frozen=True, slots=True)
class DataSet:
    """Real images that an evaluation compared with.

    Attributes:
        id: for the Hub: that of the about file, or what kind of thing it was.
        name: in words.
        split: the manifest's split; None where there is none.
    """

    id: str
    name: str
    split: str | None = None

    @property
    def words(self) -> str:
        """Name and split."""
        return f"{self.name}, split {self.split}" if self.split else self.name


def known_manifests(records: Iterable[Record]) -> set[str]:
    """Return the digests of the manifests that a card's other records were made from."""
    found = (record.inputs.get("manifest") for record in records)
    return {reference.sha256 for reference in found if reference is not None}


def measured_on(item: Measured, about: About, manifests: set[str]) -> DataSet:
    """Return the data set that an evaluation compared with.

    It is the one of the about file only if the evaluation read the very manifest that the training
    record, the split or the duplicate report of this card were made from.
    """
    reference, sampling = item.record.reference, item.record.sampling
    if reference is None:
        prompts = f", {sampling.n_prompts:,} prompts" if sampling else ""
        return DataSet("none", f"no data set{prompts}")
    path, mark, split = reference.path.rpartition("#")
    if not mark:
        kind = "file" if PurePosixPath(reference.path).suffix else "folder"
        return DataSet(kind, f"{kind} {PurePosixPath(reference.path).name}")
    manifest = item.record.inputs.get("manifest")
    if manifest is not None and manifest.sha256 in manifests and about.dataset_id != UNSTATED:
        return DataSet(about.dataset_id, about.dataset_name, split)
    return DataSet("manifest", f"manifest {PurePosixPath(path).name}", split)


def column(
    item: Measured, train: TrainRecord | None, about: About, manifests: set[str]
) -> dict[str, Any]:
    """Return an evaluation's row: the source that was measured, and what it was compared with."""
    record, source = item.record, item.record.source
    steps = {c.sha256: c.step for c in train.checkpoints} if train else {}
    if source.kind == "checkpoint" and source.sha256 in steps:
        what = Markup(f"checkpoint at step {steps[source.sha256]:,}")
    elif train and source.kind == "checkpoint":
        what = Markup("⚠ a checkpoint that the run does not list")
    else:
        what = markdown(source.kind)
    runtime = " ".join(part for part in (source.runtime, source.precision) if part)
    n_failed, n_reused = record.n_failed_images, record.n_reused_images
    counts = [
        f"**{n_failed:,} images failed**" if n_failed else "",
        f"{n_reused:,} images of an earlier run reused" if n_reused else "",
    ]
    return {
        "name": item.name,
        "file": item.file,
        "what": what + Markup(" ") + code((source.sha256 or "digest not recorded")[:12]),
        "runtime": runtime or "not recorded",
        "on": measured_on(item, about, manifests).words,
        "reference": Markup(" ") + code(record.reference.sha256[:12])
        if record.reference
        else Markup(""),
        "status": record.status,
        "error": record.error or "",
        "counts": [Markup(text) for text in counts if text],
    }


def samplings(evaluations: list[Measured]) -> list[tuple[str, str]]:
    """Return (how images were sampled, which evaluations), grouped."""
    groups: dict[str, list[str]] = {}
    for item in evaluations:
        s = item.record.sampling
        text = "sampling not recorded"
        if s:
            size = f"{s.height} × {s.width} pixels" if s.height else "each image's own size"
            inputs = item.record.inputs.get("input_images")
            text = (
                f"{s.n_prompts:,} prompts × {s.replicates}, {size}, "
                f"{s.scheduler or 'its own sampler'} with {s.steps or 'its own'} steps at "
                f"{f'guidance {s.guidance:g}' if s.guidance else 'its own guidance or none'}, "
                f"seed {s.seed}, prompts {s.prompts_sha256[:12]}"
                + (f", input images {inputs.sha256[:12]}" if inputs else "")
            )
        groups.setdefault(text, []).append(item.name)
    return [(text, ", ".join(names)) for text, names in groups.items()]


def copying_lines(evaluations: list[Measured]) -> list[Markup]:
    """Return the conclusions of each evaluation about copying and overfitting."""
    lines: list[Markup] = []
    for item in evaluations:
        verdict = item.record.memorization
        if item.record.status != "ok" or verdict is None:
            continue
        lines += [markdown(f"{item.name}: {text}") for text in _copying(verdict)]
    return lines


def _copying(verdict: MemorizationVerdict) -> list[str]:
    parts = [f"{verdict.answer}: {verdict.reason}"]
    if verdict.detectable_rate is not None:
        parts.append(f"share of copies found with 80 % power {number(verdict.detectable_rate)}")
    if verdict.known_copies:
        parts.append(f"{verdict.known_copies_found} of {verdict.known_copies} known copies found")
    lines = ["; ".join(parts)]
    for test in verdict.tests:
        counted = (
            f"{test.hits} of {test.n} samples, {test.heldout_hits} of {test.n_heldout} held-out"
            if test.hits is not None
            else f"{test.n} samples, {test.n_heldout} held-out"
        )
        lines.append(
            f"test {test.name.replace('_', ' ')!r}: {'found' if test.found else 'not found'}, "
            f"{counted}, p {number(test.p_value)}, adjusted {number(test.p_adjusted)} "
            f"({test.method})"
        )
    lines += verdict.caveats
    note = verdict.overfitting
    if note is not None:
        lines.append("; ".join([f"{note.answer}: {note.reason}", *_found_of_overfitting(note)]))
    return lines


def _found_of_overfitting(note: OverfittingNote) -> Iterator[str]:
    if note.closer_to_training is not None:
        less = "" if note.closer_to_training else "not "
        yield f"samples {less}closer to training images than held-out images"
    if note.since_step is not None:
        yield f"overfitting since step {note.since_step:,}"
    losses = {"training": note.train_loss, "validation": note.validation_loss}
    shown = ", ".join(f"{k} {number(v)}" for k, v in losses.items() if v is not None)
    at = f" at step {note.step:,}" if note.step is not None else ""
    if shown or at:
        yield f"losses{at}: {shown or 'not recorded'}"


def sweeps(evaluations: list[Measured]) -> list[dict[str, Any]]:
    """Return tables of the shares that other thresholds of the image filter would flag."""
    made = []
    for item in evaluations:
        sweep = item.record.safety_sweep
        if item.record.status != "ok" or sweep is None:
            continue
        real = {point.threshold: point for point in sweep.real}
        ends = {"generated": sweep.highest, "real": sweep.highest_real}
        made.append(
            {
                "name": item.name,
                "filter": sweep.filter,
                "method": sweep.method,
                "n": sweep.n,
                "n_real": sweep.n_real,
                "highest": ", ".join(
                    f"{name} {number(score)}" for name, score in ends.items() if score is not None
                ),
                "rows": [
                    (number(point.threshold), _rate(point), _rate(real.get(point.threshold)))
                    for point in sweep.generated
                ],
            }
        )
    return made


def _rate(point: Any) -> Markup:
    if point is None:
        return Markup("–")
    return Markup(f"{number(point.rate)} \\[{number(point.low)}, {number(point.high)}\\]")
