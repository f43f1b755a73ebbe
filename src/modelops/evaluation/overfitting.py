"""Overfitting: a better fit to training images than to new ones, by distances and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from modelops.base.errors import UsageError
from modelops.base.files import sha256_file
from modelops.evaluation.workbench import Workbench
from modelops.metrics.memorization import CopyingVerdict
from modelops.metrics.overfitting import Losses, find_overfitting, rows_to_losses
from modelops.records.base import InputRef
from modelops.records.evaluation import OverfittingNote
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record
from modelops.records.train import TrainRecord, read_stats


def note_overfitting(bench: Workbench, copying: CopyingVerdict) -> OverfittingNote:
    """Note overfitting by the samples' distances, and by the run's losses if they are known."""
    closer = next((test for test in copying.tests if test.name == "closer"), None)
    is_closer = None if closer is None else closer.found
    words = []
    if closer is not None:
        words.append(
            f"samples {'lie' if closer.found else 'do not lie'} closer to training images than "
            f"held-out images do (adjusted p {closer.p_adjusted:.2g})"
        )
    losses, about = _losses(bench)
    trend = find_overfitting(losses) if losses else None
    last = losses[-1] if losses else None
    if trend:
        words.append(str(trend))
    elif last:
        words.append(
            f"at step {last.step} the loss is {last.training:.4f} on training and "
            f"{last.validation:.4f} on held-out images, and they fall together"
            if len(losses) > 3
            else f"at step {last.step} the loss is {last.training:.4f} on training and "
            f"{last.validation:.4f} on held-out images"
        )
    words.append(about)
    answer: Literal["overfitting", "no sign of overfitting", "cannot tell"]
    if trend or is_closer:
        answer = "overfitting"
    elif is_closer is None and not losses:
        answer = "cannot tell"
    else:
        answer = "no sign of overfitting"
    return OverfittingNote(
        answer=answer, reason="; ".join(word for word in words if word),
        closer_to_training=is_closer, since_step=trend.since.step if trend else None,
        step=last.step if last else None, train_loss=last.training if last else None,
        validation_loss=last.validation if last else None,
    )  # fmt: skip


def _losses(bench: Workbench) -> tuple[list[Losses], str]:
    """Return (checks of the run up to the step of the source, a remark)."""
    path, sure = bench.settings.train_record, False
    source = bench.record.source
    checkpoint, exported = source.sha256, ""
    made_from = _exported_from(Path(source.uri)) if source.kind == "artifact" else None
    if made_from is not None:
        checkpoint = made_from.sha256
        exported = f"losses are those of {made_from.path}, which was exported"
    if path is None:
        path = _train_record_of(source.kind, Path(source.uri), made_from)
        if path is None:
            whose = f" of {made_from.path}, which was exported" if made_from else ""
            return [], f"no train record{whose}"
        sure = True
    run = read_record(path, TrainRecord)
    steps = [each.step for each in run.checkpoints if each.sha256 == checkpoint]
    if sure and not steps:
        return [], "the train record beside it names another checkpoint"
    bench.record.inputs["train"] = InputRef(path=str(path), sha256=sha256_file(path))
    found = rows_to_losses(read_stats(path.parent / "stats.jsonl"), steps[0] if steps else None)
    remark = (
        exported if steps else "the train record does not name this source: losses are its last"
    )
    probe, held_out = run.final_train_probe_loss, run.final_validation_loss
    if not found and probe is not None and held_out is not None and steps in ([], [run.steps]):
        found = [Losses(run.steps, held_out, probe)]
    return found, remark if found else "the run measured no losses on held-out images"


def _exported_from(artifact: Path) -> InputRef | None:
    """Return the checkpoint that an artifact was exported from, as its artifact.json names it."""
    try:
        return read_record(artifact / "artifact.json", ArtifactRecord).inputs.get("checkpoint")
    except UsageError:
        return None


def _train_record_of(kind: str, source: Path, made_from: InputRef | None) -> Path | None:
    """Find train.json of the run whose checkpoint the source is, or was exported from.

    An artifact names its checkpoint relative to the place of the export. It is searched below the
    working directory and below the folders that hold the artifact.
    """
    if kind == "checkpoint":
        places = [source]
    elif made_from is not None:
        places = [root / made_from.path for root in (Path(), *source.resolve().parents)]
    else:
        return None
    for place in places:
        path = place.parent.parent / "train.json"
        if path.is_file():
            return path
    return None
