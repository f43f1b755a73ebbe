"""Overfitting in loss curves: the held-out loss stops following the training loss.

Both losses are of the same weights at the same fixed times and noise. So the difference between
neighbouring values comes from learning, not from chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PATIENCE = 3  # checks in a row
WORSE = 0.01  # relative rise of the held-out loss above its lowest that counts
LEARNING = 0.01  # relative fall of the training loss, a check, from which it still falls
CARRIED_OVER = 0.25  # below this part of the training loss's fall, the held-out loss stagnates


@dataclass(frozen=True, slots=True)
class Losses:
    """One check: loss on held-out and on training images after a step."""

    step: int
    validation: float
    training: float


@dataclass(frozen=True, slots=True)
class Overfitting:
    """Since when, and how.

    Attributes:
        kind: "rises": the held-out loss is above its lowest while the training loss falls.
            "stagnates": less than a quarter of the training loss's fall reaches the held-out loss.
        since: the losses at the step from which on.
        now: the latest losses.
    """

    kind: Literal["rises", "stagnates"]
    since: Losses
    now: Losses

    def __str__(self) -> str:
        verb = "rose" if self.kind == "rises" else "stayed behind"
        return (
            f"overfitting since step {self.since.step}: the held-out loss {verb}, "
            f"{self.since.validation:.4f} → {self.now.validation:.4f}, while the loss on training "
            f"images fell, {self.since.training:.4f} → {self.now.training:.4f}"
        )


def rows_to_losses(rows: Sequence[Mapping[str, Any]], last_step: int | None = None) -> list[Losses]:
    """The checks among the rows of a stats.jsonl, up to a step; the later of two at one step."""
    found = {
        row["step"]: Losses(row["step"], row["validation_loss"], row["train_probe_loss"])
        for row in rows
        if "validation_loss" in row and "train_probe_loss" in row
        if last_step is None or row["step"] <= last_step
    }
    return [found[step] for step in sorted(found)]


def find_overfitting(losses: Sequence[Losses]) -> Overfitting | None:
    """Return the overfitting that the latest checks, in order of step, show; None without.

    Needs more than `PATIENCE` checks. It is judged anew at each check, so it may end again.
    """
    if len(losses) <= PATIENCE:
        return None
    now = losses[-1]
    lowest = min(range(len(losses)), key=lambda place: (losses[place].validation, -place))
    best = losses[lowest]
    if (
        len(losses) - 1 - lowest >= PATIENCE
        and now.validation > (1 + WORSE) * best.validation
        and now.training < (1 - WORSE) * best.training
    ):
        return Overfitting("rises", best, now)
    end = len(losses) - 1
    while end >= PATIENCE and _stagnates(losses[end - PATIENCE], losses[end]):
        end -= 1
    if end == len(losses) - 1:
        return None
    return Overfitting("stagnates", losses[end + 1 - PATIENCE], now)


def _stagnates(before: Losses, after: Losses) -> bool:
    fall = before.training - after.training
    carried = before.validation - after.validation
    return fall > PATIENCE * LEARNING * before.training and carried < CARRIED_OVER * fall
