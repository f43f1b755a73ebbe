"""Content of the report of one evaluation record, before layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from markupsafe import Markup

from modelops.evaluation.report.comparison import ComparisonPart, compare_part
from modelops.evaluation.report.drawings import Axis, draw_interval, ends_of, shared_axis
from modelops.evaluation.report.images import Distribution, Gallery, Tile, distributions, galleries
from modelops.evaluation.report.parts import (
    MemorizationPart,
    SlicesPart,
    SweepPart,
    memorization_part,
    slices_part,
    sweep_part,
)
from modelops.evaluation.report.samples import FileState, Pictures, _file_state, read_rows
from modelops.evaluation.report.summary import summary_sentences
from modelops.evaluation.report.text import number, plural
from modelops.evaluation.report.words import METRICS, plain_words_of
from modelops.records.base import InputRef, Measurement
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

ROWS = 1000  # of the per-image table at most

# (title, what it asks, how its keys begin), in the order of the page; the first match counts.
FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Distance to real images", "How far the images are, as a set, from held-out real images.",
     ("frechet", "fid", "fd_", "kernel", "kid", "cmmd", "gaussian_mmd", "mmd")),
    ("Fidelity and variety", "Whether single images look real, and whether all kinds are there.",
     ("precision", "recall", "density", "coverage", "inception", "is_", "diversity", "vendi")),
    ("Following the prompt", "Whether an image shows what its prompt asks for.",
     ("lit_", "clip", "siglip", "alignment", "retrieval")),
    ("Memorization", "Whether images are copies of training images.",
     ("nearest_train", "near_copy", "memor", "authenticity", "copy")),
    ("Safety", "What the filters find.",
     ("unsafe", "safety", "block", "residual", "prompt_", "image_", "benign", "nsfw",
      "false_positive", "hate")),
    ("Failures", "Images that could not be made.", ("failed",)),
)  # fmt: skip
OTHER = ("Other", "")


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One measurement of the record, ready to print."""

    key: str
    title: str
    says: str
    measured: Measurement
    arrow: str
    drawing: Markup
    other: Measurement | None
    pointer: str  # JSON pointer into the record
    as_json: str


@dataclass(frozen=True, slots=True)
class Family:
    title: str
    says: str
    rows: list[MetricRow]


@dataclass(slots=True, kw_only=True)
class Content:
    """Content of the page.

    Attributes:
        alarms: what makes the numbers doubtful or worthless, first on the page, in red.
        cautions: what a reader should know before quoting a number.
    """

    title: str
    record: EvaluationRecord
    alarms: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    grid: list[Tile] = field(default_factory=list)
    n_rows: int = 0
    galleries: list[Gallery] = field(default_factory=list)
    distributions: list[Distribution] = field(default_factory=list)
    no_images: str = ""
    unverified: int = 0
    closest: Path | None = None
    memorization: MemorizationPart | None = None
    sweep: SweepPart | None = None
    slices: SlicesPart | None = None
    comparison: ComparisonPart | None = None
    protocols: list[tuple[str, str, list[str]]] = field(default_factory=list)
    file_states: list[FileState] = field(default_factory=list)
    inputs: list[tuple[str, InputRef]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    images: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)


def page_content(path: Path, record: EvaluationRecord, *, against: Path | None) -> Content:
    """Collect what the page says from a record and the files beside it.

    Files that are gone or unreadable become sentences; only the second record must be one.

    Raises:
        UsageError: `against` is not an evaluation record.
    """
    page = Content(title=_title(record), record=record)
    other = read_record(against, EvaluationRecord) if against else None
    page.file_states = _file_states(path, record)
    rows, problem = read_rows(path, record)
    pictures = Pictures(path.with_suffix(""))
    page.n_rows = len(rows)
    page.no_images = problem
    page.families = _families(record, other)
    page.grid, page.galleries = galleries(rows, pictures)
    if rows and pictures.found == 0 and any(not row.get("failure") for row in rows):
        page.no_images = f"None of the images is in {path.with_suffix('').name}/samples any more."
        page.grid, page.galleries = [], []
    page.distributions = distributions(rows, record)
    page.columns, page.images = _image_table(rows)
    page.slices = slices_part(record)
    page.memorization = memorization_part(record)
    page.sweep = sweep_part(record)
    page.closest = next(
        (s.path for s in page.file_states if s.name == "closest" and s.state != "missing"), None
    )
    if against is not None and other is not None:
        page.comparison = compare_part(path, rows, pictures, against, other)
    page.unverified = pictures.unverified
    page.summary = summary_sentences(record, page.comparison)
    page.facts = _facts(record)
    page.protocols = _protocols(record)
    page.inputs = list(record.inputs.items())
    if record.reference:
        page.inputs.append(("reference", record.reference))
    page.alarms, page.cautions = _remarks(page, rows)
    return page


def _title(record: EvaluationRecord) -> str:
    name = record.source.uri.rstrip("/")
    return name if "://" in name else PurePosixPath(name).name or name


def _families(record: EvaluationRecord, other: EvaluationRecord | None) -> list[Family]:
    places: dict[str, list[str]] = {}
    for key in record.metrics:
        places.setdefault(_family_of(key)[0], []).append(key)
    found = []
    for title, says in [*((f[0], f[1]) for f in FAMILIES), OTHER]:
        if keys := places.get(title):
            found.append(Family(title, says, _metric_rows(keys, record, other)))
    return found


def _family_of(key: str) -> tuple[str, str]:
    for title, says, starts in FAMILIES:
        if key.startswith(starts):
            return title, says
    return OTHER


def _metric_rows(
    keys: Sequence[str],
    record: EvaluationRecord,
    other: EvaluationRecord | None,
) -> list[MetricRow]:
    """Rows of one family: what was measured first, each beside what it is to be read against."""
    ordered = sorted(keys, key=lambda k: (record.metrics[k].value is None, *_order(k)))
    groups: dict[tuple[str, str], list[float]] = {}
    theirs: dict[str, Measurement] = {}
    for key in ordered:
        measured = record.metrics[key]
        found = other.metrics.get(key) if other else None
        if found and found.value is not None and found.protocol == measured.protocol:
            theirs[key] = found
        for item in (measured, theirs.get(key)):
            if item is not None and item.value is not None:
                ends = [v for v in (item.low, item.value, item.high) if v is not None]
                groups.setdefault(_scale(key, measured), []).extend(ends)
    axes = {group: shared_axis(values) for group, values in groups.items()}
    rows = []
    for key in ordered:
        measured = record.metrics[key]
        words = plain_words_of(key)
        rows.append(
            MetricRow(
                key, _words(key) if words.title == key else words.title,
                " ".join(filter(None, (words.says, _mode(measured)))), measured,
                {True: "↑", False: "↓", None: ""}[measured.higher_is_better],
                _draw(measured, axes.get(_scale(key, measured)), theirs.get(key)),
                theirs.get(key), f"/metrics/{key.replace('~', '~0').replace('/', '~1')}",
                json.dumps(measured.model_dump(mode="json"), indent=2, ensure_ascii=False),
            )
        )  # fmt: skip
    return rows


def _mode(measured: Measurement) -> str:
    """Return the mode in which a metric was measured, if it has modes."""
    mode = measured.details.get("mode")
    return f"Measured in mode {mode}." if mode else ""


def _draw(measured: Measurement, axis: Axis | None, other: Measurement | None) -> Markup:
    ours = ends_of(measured)
    if ours is None or axis is None:
        return Markup("")
    return draw_interval(*ours, axis, other=ends_of(other))


def _words(key: str) -> str:
    words = key.replace("_", " ").replace(".", " › ")
    return words[:1].upper() + words[1:]


def _base(key: str) -> str:
    for end in ("_floor", "_heldout", "_real", "_shuffled", "_gain", "_gap"):
        key = key.removesuffix(end)
    return key.replace("_heldout_", "_")


def _order(key: str) -> tuple[int, int, str, str]:
    """Sort as the family lists them, and by their words, which refer to the row before."""
    starts = next((f[2] for f in FAMILIES if key.startswith(f[2])), ())
    place = next((i for i, start in enumerate(starts) if key.startswith(start)), 0)
    known = list(METRICS)
    return place, known.index(key) if key in METRICS else len(known), _base(key), key


def _scale(key: str, measured: Measurement) -> tuple[str, str]:
    """Rows with the same of these are drawn on one axis."""
    return _base(key), measured.unit


def _file_states(path: Path, record: EvaluationRecord) -> list[FileState]:
    return [_file_state(path, name, entry) for name, entry in record.files.items()]


def _facts(record: EvaluationRecord) -> list[tuple[str, str]]:
    source, sampling, machine = record.source, record.sampling, record.environment
    runs = " ".join(part for part in (source.runtime, source.precision) if part)
    facts = [("Source", f"{source.kind} {source.uri}")]
    facts.append(("Source's digest", source.sha256 or "none: it may have changed since"))
    if runs:
        facts.append(("Runtime", runs))
    facts += [(f"Source's {key}", str(value)) for key, value in source.details.items()]
    if sampling:
        facts += [
            ("Prompts", f"{plural(sampling.n_prompts, 'prompt')}, {sampling.replicates} each, "
             f"digest {sampling.prompts_sha256}"),
            ("Sampling", f"{sampling.steps or 'own'} steps, guidance {number(sampling.guidance)}, "
             f"{sampling.width or 'own'} × {sampling.height or 'own'} pixels, "
             f"{sampling.scheduler or 'no scheduler named'}"),
        ]  # fmt: skip
    facts.append(("Seeds", ", ".join(f"{k} {v}" for k, v in record.seeds.items()) or "none named"))
    if record.reference:
        facts.append(("Real images", record.reference.path))
    facts.append(("When", f"{record.started_at:%Y-%m-%d %H:%M:%S %Z}".strip()))
    if machine:
        cores = f"{machine.cores} cores" if machine.cores else ""
        memory = f"{machine.memory_gb:.0f} GB" if machine.memory_gb else ""
        parts = (machine.cpu, cores, memory, *machine.accelerators, machine.platform)
        facts.append(("Where", ", ".join(part for part in parts if part)))
        dirty = {True: ", with changes that are not committed", False: ", clean", None: ""}
        commit = f"{machine.commit}{dirty[machine.dirty]}" if machine.commit else "not known"
        facts.append(("Commit", commit))
        facts.append(("Versions", f"modelops {machine.modelops}, Python {machine.python}"))
    return facts


def _protocols(record: EvaluationRecord) -> list[tuple[str, str, list[str]]]:
    """Return (id, JSON, keys measured under it) of each protocol, in the order of the metrics."""
    users: dict[str, list[str]] = {identity: [] for identity in record.protocols}
    for key, measured in record.metrics.items():
        if measured.protocol in users:
            users[measured.protocol].append(key)
    return [
        (identity, json.dumps(record.protocols[identity], indent=2, ensure_ascii=False), keys)
        for identity, keys in users.items()
    ]


def _remarks(page: Content, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    record = page.record
    alarms, cautions = [], []
    if record.status != "ok":
        alarms.append(f"The evaluation {record.status}: {record.error or 'no reason recorded'}")
    if not record.metrics:
        alarms.append("This record holds no measurements.")
    if record.n_failed_images:
        reasons = Counter(str(row["failure"]) for row in rows if row.get("failure"))
        told = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        count = plural(record.n_failed_images, "image")
        alarms.append(f"{count} could not be made" + (f": {told}" if told else "."))
    if page.memorization and page.memorization.tone == "bad":
        alarms.append(f"Memorization: {page.memorization.answer}: {page.memorization.reason}")
    for state in page.file_states:
        if state.state == "changed":
            alarms.append(f"{state.path.name} is not the file that was recorded.")
    if page.memorization and page.memorization.overfitting.startswith("overfitting"):
        cautions.append(f"{page.memorization.overfitting.capitalize()}.")
    gone = [state.path.name for state in page.file_states if state.state == "missing"]
    if gone:
        cautions.append(f"No longer beside the record: {', '.join(gone)}.")
    if page.no_images:
        cautions.append(f"{page.no_images} So the report cannot show what it should.")
    if record.environment and record.environment.dirty:
        cautions.append(
            "Measured with code that is not committed: the commit alone does not repeat it."
        )
    if record.source.sha256 is None:
        cautions.append("The source has no digest: nothing says that it is still the same one.")
    warned: dict[str, list[str]] = {}
    for key, measured in record.metrics.items():
        for warning in measured.warnings:
            warned.setdefault(warning, []).append(key)
    cautions += [f"{', '.join(keys)}: {warning}" for warning, keys in warned.items()]
    return alarms, cautions


def _image_table(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[tuple[dict[str, Any], list[str]]]]:
    """Columns of numbers, and each row with their text."""
    hidden = ("prompt", "replicate", "seed", "failure", "image", "image_sha256")
    columns = [k for k in dict.fromkeys(key for row in rows for key in row) if k not in hidden]
    table = []
    for row in rows[:ROWS]:
        cells = []
        for column in columns:
            value = row.get(column)
            if isinstance(value, bool):
                cells.append("yes" if value else "no")
            elif isinstance(value, int | float):
                cells.append(number(value))
            else:
                cells.append("–" if value is None else str(value))
        known = {name: str(row.get(name, "–")) for name in ("prompt", "replicate", "seed")}
        known["failure"] = str(row.get("failure") or "")
        table.append((known, cells))
    return columns, table
