"""How many steps a run has, and the learning rate at each of them."""

from __future__ import annotations

import math

from modelops.config import TrainingSection

OVERRUN = 1.1  # a run is stopped at this multiple of its time limit, decayed or not


def lr_factor(step: int, total: int, warmup: int, section: TrainingSection) -> float:
    """Learning rate of step `step` (from 0) of `total`, as a fraction of the peak, in (0, 1]."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if section.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if section.lr_schedule == "linear_decay":
        length = max(1.0, total * section.lr_decay_fraction)
        return min(1.0, (total - step) / length)
    return 1.0


def steps_in_time(section: TrainingSection, step: int, seconds_left: float, rate: float) -> int:
    """Total steps of a run that is at `step` and makes `rate` steps a second."""
    return max(step, 1, min(section.total_steps, step + math.floor(max(0.0, seconds_left) * rate)))


def corrected_total(
    section: TrainingSection, step: int, total: int, warmup: int, seconds_left: float, rate: float
) -> int:
    """A new total for a run with a time limit, or the old one.

    Only while the learning rate is constant under the old total and the new one, so that the
    schedule stays a function of the step; and only for a change of more than 1 %.
    """
    if section.lr_schedule == "cosine" or step <= warmup:
        return total
    decay = section.lr_decay_fraction if section.lr_schedule == "linear_decay" else 0.0
    new = steps_in_time(section, step, seconds_left, rate)
    if step > min(total, new) * (1 - decay) or abs(new - total) <= total / 100:
        return total
    return new


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after step `step`."""
    return every > 0 and step % every == 0
