"""fp32, bf16 or fp16: the fastest here, found by a few steps of the real network and batch.

The steps are made on a copy of the network with an optimizer of its own and a learning rate of 0,
so that a run whose precision was measured learns what a run with that precision named learns.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from modelops.config import TrainConfig
from modelops.errors import TrainingError

from .batches import Batch
from .memory import is_out_of_memory
from .optimizers import make_optimizer
from .stepper import Stepper

GAIN = 1.1  # below it a narrower format is not worth its rounding
HOPELESS = 4.0  # times slower than fp32 on one image: no whole microbatch is spent on it
SETTING_UP_S = 2.0  # a first call that takes longer is not dominated by setting up: it counts
CALL_S = 5.0  # calls are made with as many images as take about this long, or all
ROUNDS, ENOUGH_S = 5, 4.0  # timed calls of each candidate, fewer once they have taken this long

# (precision, images) -> seconds of forward and backward, seconds of the update
Call = Callable[[str, int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What measuring one precision gave.

    Attributes:
        seconds: of one optimizer step; inf where memory ran out.
        note: why that is an estimate, or why it was given up.
        given_up: no whole microbatch was measured.
    """

    seconds: float
    note: str = ""
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The precision a run takes.

    Attributes:
        reason: for the record.
        warning: one line for a person if what was asked for is slow here.
    """

    precision: str
    reason: str
    warning: str = ""


def candidates(asked: str, device: torch.device) -> list[str]:
    """The precisions to measure for auto, or for the one that is asked for; fp32 first.

    Raises:
        TrainingError: this machine cannot train in the one that is asked for.
    """
    has_cuda = device.type == "cuda"
    if asked == "fp16" and not has_cuda:
        raise TrainingError("precision fp16 needs a GPU", hint="set training.precision: auto")
    if asked != "auto":
        return list(dict.fromkeys(["fp32", asked]))
    has_bf16 = not has_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    return ["fp32", *(["bf16"] if has_bf16 else []), *(["fp16"] if has_cuda else [])]


def make_call(
    network: torch.nn.Module, batch: Batch, config: TrainConfig, device: torch.device
) -> Call:
    """Steps on a copy of a network, timed."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network, config.training)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # all steps are alike, and none can diverge
    steppers: dict[str, Stepper] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    def call(precision: str, images: int) -> tuple[float, float]:
        if precision not in steppers:
            steppers[precision] = Stepper(
                network, network, optimizer, config, device=device, precision=precision
            )
        stepper = steppers[precision]
        began = now()
        try:
            stepper.backward(batch, 0, images, of=images)
        except BaseException:
            optimizer.zero_grad()
            raise
        middle = now()
        stepper.update(stepper.clip())
        return middle - began, now() - middle

    return call


def measure(
    call: Call, names: Sequence[str], *, asked: str, microbatch: int, per_step: int
) -> dict[str, Trial]:
    """Seconds of an optimizer step in each precision.

    One image first: what is hopeless there is given up and estimated from it, unless it is `asked`
    for. The others take turns with the whole microbatch, or as much of it as is measured quickly;
    medians count.

    Args:
        call: makes and times one pass and update.
        names: fp32 first.
        microbatch: images of a call, at most.
        per_step: images of an optimizer step, on this process.
    """
    trials: dict[str, Trial] = {}
    short: dict[str, float] = {}
    for name in names:
        try:
            first, _ = call(name, 1)
            short[name] = first if first > SETTING_UP_S else min(first, call(name, 1)[0])
        except (RuntimeError, MemoryError) as error:
            trials[name] = _failed(error)
    fp32 = short.get("fp32", math.inf)
    slow = {n for n in short if n not in ("fp32", asked) and short[n] > HOPELESS * fp32}
    left = [name for name in names if name in short and name not in slow]
    size = microbatch
    if left and (dearest := max(short[name] for name in left)) * size > CALL_S:
        size = max(1, min(size, int(CALL_S / dearest)))
    passes: dict[str, list[float]] = {name: [] for name in left}
    updates: dict[str, list[float]] = {name: [] for name in left}
    spent = 0.0
    for turn in range(1 + ROUNDS):
        for name in left:
            try:
                seconds, update = call(name, size)
            except (RuntimeError, MemoryError) as error:
                trials[name] = _failed(error)
                continue
            spent += seconds + update
            if turn or seconds > SETTING_UP_S:
                passes[name].append(seconds)
                updates[name].append(update)
        left = [name for name in left if name not in trials]
        if spent > ENOUGH_S and all(passes[name] for name in left):
            break
    part = "" if size == microbatch else f"measured on {size} of {microbatch} images"
    for name in left:
        seconds = statistics.median(passes[name]) * per_step / size
        trials[name] = Trial(seconds + statistics.median(updates[name]), part)
    for name in slow:
        ratio = short[name] / fp32
        base = trials["fp32"].seconds
        note = f"was given up: {ratio:.0f} times slower than fp32 on one image"
        trials[name] = Trial(base * ratio, note, given_up=True)
    return {name: trials[name] for name in names}


def choose(asked: str, trials: Mapping[str, Trial]) -> Choice:
    """The precision to take.

    For auto: fp32, unless bf16 is faster by a tenth, unless fp16 is faster than that by a tenth.
    """
    seconds = {name: trial.seconds for name, trial in trials.items()}
    fp32 = seconds.get("fp32", math.inf)
    if asked != "auto":
        ratio = seconds[asked] / fp32
        warning = (
            f"precision {asked} is {ratio:.1f} times slower than fp32 here; "
            "precision: auto would not take it"
            if math.isfinite(seconds[asked]) and ratio > GAIN
            else ""
        )
        return Choice(asked, "asked for", warning)
    best = "fp32"
    for name, value in seconds.items():
        if value * GAIN < seconds[best]:
            best = name
    others = []
    for name, trial in trials.items():
        ratio = trial.seconds / seconds[best]
        if trial.given_up:
            others.append(f"{name} {trial.note}")
        elif name != best:
            gain = ", too small a gain" if ratio < 1 else ""
            others.append(f"{name} takes {ratio:.2f} times as long{gain}")
    return Choice(best, "; ".join(others) or "nothing else to measure here")


def _failed(error: BaseException) -> Trial:
    if not is_out_of_memory(error):
        raise error
    return Trial(math.inf, "runs out of memory", given_up=True)
