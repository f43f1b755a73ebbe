"""The record of a training run into the tables of a model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modelops.base.errors import UsageError
from modelops.base.files import read_json
from modelops.cards.escape import code, markdown, number, seconds
from modelops.cards.provenance import hardware
from modelops.cards.sources import CardSources
from modelops.records.train import TrainRecord

_NOT_MEASURED = Markup("*not measured*")


def training_rows(train: TrainRecord) -> list[tuple[str, Markup]]:
    """Return (what, value) of everything that a run recorded of itself."""
    planned = f" of {train.planned_steps:,} planned" if train.planned_steps else ""
    losses = {
        "training": train.final_train_loss,
        "validation": train.final_validation_loss,
        "training images, the same weights": train.final_train_probe_loss,
    }
    shown = Markup("; ").join(Markup(f"{name} ") + _number(loss) for name, loss in losses.items())
    since = train.overfitting_since_step
    rows: list[tuple[str, Markup | str]] = [
        ("Steps, effective batch", f"{train.steps:,}{planned}, {train.effective_batch:,}"),
        ("Images seen", f"{train.images_seen:,} ({_rate(train)})"),
        ("Images to learn from, to validate on",
         f"{_count(train.n_train_images)}, {_count(train.n_validation_images)}"),
        ("Loss", Markup(f"trend {train.loss_trend}; final values, without interval: ") + shown),
        ("Overfitting", f"since step {since:,}" if since else "not found by the run itself"),
        ("Precision", _precision(train)),
        ("Hardware", f"{hardware(train.environment)}; {train.processes} process"
         f"{'es' if train.processes > 1 else ''} on {train.device or 'a device not recorded'}"),
        ("Peak memory", _number(train.peak_memory_gb, " GB")),
        ("Time", _time(train)),
        ("Ended because", train.stop_reason or "not recorded"),
        ("Energy, emissions", Markup("*not measured: this machine has no meter that modelops "
                                     "reads*")),
    ]  # fmt: skip
    if train.quarantined:
        rows.append(("Left out as unreadable", f"{len(train.quarantined):,} images"))
    if train.inputs:
        named = (
            markdown(name) + Markup(" ") + code(reference.sha256[:12])
            for name, reference in train.inputs.items()
        )
        rows.append(("Read", Markup(", ").join(named)))
    rows.append(("Seeds", ", ".join(f"{k} {v}" for k, v in train.seeds.items()) or "not recorded"))
    rows.append(("Config", code(train.config_sha256[:12])))
    return [(what, said if isinstance(said, Markup) else markdown(said)) for what, said in rows]


def settings(sources: CardSources, folder: Path, train: TrainRecord) -> list[tuple[str, Markup]]:
    """The frozen config as (section.key, value), in its own order.

    Raises:
        UsageError: it is another run's config.
    """
    if "config" not in sources.inputs:
        return []
    path = sources.place("config", folder)
    data = read_json(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a frozen config")
    stated = data.get("config_sha256", train.config_sha256)
    if stated != train.config_sha256:
        raise UsageError(f"{path}: not the config of the run that {train.run_name} recorded")
    return list(_flat(data["config"] if isinstance(data.get("config"), dict) else data))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Markup]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        elif inner is not None and inner != []:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{prefix}{key}", code(text)


def _rate(train: TrainRecord) -> str:
    parts = []
    if train.training_seconds > 0:
        parts.append(f"{number(train.images_seen / train.training_seconds)} images/s")
    if train.images_per_second is not None:
        parts.append(f"{number(train.images_per_second)} images/s over the last steps")
    return "; ".join(parts) or "rate not recorded"


def _precision(train: TrainRecord) -> str:
    tried = ", ".join(
        f"{name} {'failed' if rate is None else f'{number(rate)} images/s'}"
        for name, rate in train.precision_images_per_second.items()
    )
    parts = [train.precision or "not recorded", train.precision_reason, tried]
    return "; ".join(part for part in parts if part)


def _time(train: TrainRecord) -> str:
    text = seconds(train.training_seconds)
    if train.setup_seconds is not None:
        text += f", after {seconds(train.setup_seconds)} to set up"
    if train.time_limit_seconds is not None:
        text += f", of {seconds(train.time_limit_seconds)} allowed"
    return text + (f", in {train.sessions} sessions" if train.sessions > 1 else "")


def _number(value: float | None, unit: str = "") -> Markup:
    return _NOT_MEASURED if value is None else number(value) + Markup(unit)


def _count(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"
