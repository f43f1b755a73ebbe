"""Context of the model card's template, from records. Only here do numbers get their words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from markupsafe import Markup

from modelops.base.errors import UsageError
from modelops.cards.about import licence_words, parse_about
from modelops.cards.artifacts import artifact_tables
from modelops.cards.escape import markdown, number
from modelops.cards.evaluated import (
    UNSTATED,
    column,
    copying_lines,
    known_manifests,
    samplings,
    sweeps,
)
from modelops.cards.numbers import (
    Measured,
    interval,
    measurement_in,
    record_link,
    slice_table,
    small_slices,
    tables_by_part,
)
from modelops.cards.provenance import hardware, origins, packages, printed_from
from modelops.cards.sources import CardSources
from modelops.cards.training import settings, training_rows
from modelops.evaluation.report.words import words_of
from modelops.records.base import InputRef, Record
from modelops.records.data import DedupReport, SplitReport
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.read import RecordT, read_record
from modelops.records.release import Verdict
from modelops.records.train import TrainRecord

GLANCE = (  # what a reader wants to know first
    "frechet_distance_lite0", "lit_alignment_gain", "nearest_train_distance_gap", "unsafe_rate",
)  # fmt: skip
BASELINE = "early"  # an evaluation of this name is there to compare with, not to advertise


def read_input(sources: CardSources, folder: Path, role: str, kind: type[RecordT]) -> RecordT:
    """One of the records a card is rendered from.

    Raises:
        UsageError: it is missing or of another kind, or what it is about did not end well. A failed
            evaluation and a refused export are told by the card.
    """
    record = read_record(sources.place(role, folder), kind)
    if record.status != "ok" and not isinstance(record, EvaluationRecord | ArtifactRecord):
        raise UsageError(
            f"{sources.inputs[role].path}: the {record.kind} record says {record.status}: "
            f"{record.error or 'no reason given'}"
        )
    return record


def roles(sources: CardSources, group: str) -> Iterator[tuple[str, str, InputRef]]:
    """Return (role, name, file) of inputs whose role is `group:name`."""
    for role, file in sources.inputs.items():
        if role.startswith(f"{group}:"):
            yield role, role.removeprefix(f"{group}:"), file


def evaluations_of(sources: CardSources, folder: Path) -> list[Measured]:
    """The evaluations, in the order they were given."""
    return [
        Measured(name=name, record=read_input(sources, folder, role, EvaluationRecord), file=file)
        for role, name, file in roles(sources, "evaluation")
    ]


def released_evaluations(evaluations: list[Measured]) -> list[Measured]:
    """Return all evaluations but the baseline."""
    return [item for item in evaluations if item.name != BASELINE]


def known_data(sources: CardSources, folder: Path) -> set[str]:
    """Return the digests of the manifests that the card's training and data records name."""
    kinds: dict[str, type[Record]] = {
        "train": TrainRecord, "split": SplitReport, "dedup": DedupReport,
    }  # fmt: skip
    return known_manifests(
        read_input(sources, folder, role, kind) for role, kind in kinds.items()
        if role in sources.inputs
    )  # fmt: skip


def model_context(sources: CardSources, folder: Path) -> dict[str, Any]:
    """Return every value that model_card.md.j2 uses.

    Raises:
        UsageError: a record is missing or of another kind.
    """
    about = parse_about(sources.about, source="about")
    train = optional_input(sources, folder, "train", TrainRecord)
    evaluations = evaluations_of(sources, folder)
    artifacts = [
        (name, file, read_input(sources, folder, role, ArtifactRecord))
        for role, name, file in roles(sources, "artifact")
    ]
    verdict = optional_input(sources, folder, "verdict", Verdict)
    split = optional_input(sources, folder, "split", SplitReport)
    dedup = optional_input(sources, folder, "dedup", DedupReport)
    by_role: dict[str, Record | None] = {
        "train": train,
        **{f"evaluation:{item.name}": item.record for item in evaluations},
        **{f"artifact:{name}": record for name, _, record in artifacts},
        "split": split, "dedup": dedup, "verdict": verdict,
    }  # fmt: skip
    manifests = known_data(sources, folder)
    released = released_evaluations(evaluations)
    parts = tables_by_part(evaluations)
    made = [record for record in by_role.values() if record is not None]
    return {
        "about": about,
        "licence": licence_words(about, "license"),
        "data_licence": licence_words(about, "dataset_license"),
        "data_stated": about.dataset_id != UNSTATED,
        "train": train,
        "train_file": sources.inputs.get("train"),
        "training": training_rows(train) if train else [],
        "hardware": hardware(train.environment) if train else "",
        "settings": settings(sources, folder, train) if train else [],
        "evaluations": [column(item, train, about, manifests) for item in evaluations],
        "parts": parts,
        "all_rows": [row for table in parts.values() for row in table.rows],
        "unlike": [row for table in parts.values() for row in table.rows if not row.alike],
        "samplings": samplings(evaluations),
        "glance": _glance(evaluations),
        "slices": slice_table(released),
        "small_slices": small_slices(released),
        "copying": copying_lines(released),
        "sweeps": sweeps(released),
        "artifacts": [artifact_tables(name, file, record) for name, file, record in artifacts],
        "verdict": _verdict(verdict, sources) if verdict else None,
        "verdict_file": sources.inputs.get("verdict"),
        "split": split,
        "split_file": sources.inputs.get("split"),
        "dedup": dedup,
        "dedup_file": sources.inputs.get("dedup"),
        "pictures": sources.pictures,
        "dataset_card": sources.options.get("dataset_card", ""),
        "checkpoint": _checkpoint(evaluations, train, sources),
        "printed": printed_from(sources, by_role),
        "watched": sources.watched,
        "sources_sha256": sources.digest,
        "origins": origins(made),
        "packages": packages(made),
    }


def optional_input(
    sources: CardSources, folder: Path, role: str, kind: type[RecordT]
) -> RecordT | None:
    """One of the records a card is rendered from; None if the card has none in this role."""
    return read_input(sources, folder, role, kind) if role in sources.inputs else None


def _glance(evaluations: list[Measured]) -> list[tuple[Markup, Markup, Markup]]:
    """Return (metric, value [low, high], record) of the last released evaluation that has it."""
    rows = []
    for key in GLANCE:
        for item in reversed(released_evaluations(evaluations)):
            measured = measurement_in(item, key)
            if measured.value is not None:
                title = Markup(words_of(key).title)
                rows.append((title, interval(measured), record_link(item.file)))
                break
    return rows


def _verdict(verdict: Verdict, sources: CardSources) -> dict[str, Any]:
    seen = {reference.sha256 for reference in verdict.inputs.values()}
    printed = {
        role: file.sha256
        for role, file in sources.inputs.items()
        if role.startswith(("evaluation:", "artifact:"))
    }
    others = [role for role, digest in printed.items() if digest not in seen]
    return {
        "answer": verdict.answer,
        "subject": (verdict.subject_sha256 or "unknown")[:12],
        "policy": verdict.policy_sha256[:12],
        "not_judged": ", ".join(role.replace(":", " ") for role in others),
        "criteria": [
            {
                "name": c.name, "bound": c.bound, "answer": c.answer,
                "value": _criterion_value(c.value, c.low, c.high),
                "reason": c.reason if c.answer != "pass" else "",
                "evidence": c.evidence, "metric": c.metric.replace("_", " "),
            }
            for c in verdict.criteria
        ],
    }  # fmt: skip


def _criterion_value(value: float | str | None, low: float | None, high: float | None) -> Markup:
    if value is None:
        return Markup("–")
    if isinstance(value, str):
        return markdown(value)
    if low is None or high is None:
        return Markup(number(value))
    return Markup(f"{number(value)} \\[{number(low)}, {number(high)}\\]")


def _checkpoint(
    evaluations: list[Measured], train: TrainRecord | None, sources: CardSources
) -> str | None:
    """Path of the released checkpoint for a snippet, from the project; never of one machine."""
    listed: dict[str, str] = {}
    if train is not None:
        parts = PurePosixPath(sources.inputs["train"].path).parent.parts
        run = PurePosixPath(*(part for part in parts if part != ".."))
        listed = {c.sha256: str(run / c.path) for c in train.checkpoints}
    for item in released_evaluations(evaluations):
        source = item.record.source
        if source.kind == "checkpoint":
            path = listed.get(source.sha256 or "", source.uri)
            return PurePosixPath(path).name if PurePosixPath(path).is_absolute() else path
    return next(reversed(listed.values()), "path/to/checkpoint") if train is not None else None
