"""Choice of the fastest of fp32, bf16 and fp16, by a few steps of the real network and batch.

The steps are made on a copy of the network with its own optimizer and a learning rate of 0. So a
run whose precision was measured learns the same as a run whose config names that precision.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from modelops.base.errors import TrainingError
from modelops.training.config import TrainConfig

from .batches import Batch
from .memory import is_out_of_memory
from .optimizers import make_optimizer
from .stepper import Stepper

GAIN = 1.1  # below it a narrower format is not worth its rounding
# Times slower than fp32 at which a format is given up: on one image, where what does not depend on
# the number of images weighs most, and on more.
HOPELESS, WORSE = 4.0, 2.0
GROWTH = 4  # times as many images in the next pass, as long as passes are short
SETTING_UP_S = 2.0  # a first pass that takes longer is not dominated by setting up: it counts
PASS_S = 3.0  # no pass is made that is expected to take longer
PASS_SHARE = 0.02  # of a time limit, if that is less
ROUNDS, LEAST, ENOUGH_S = 5, 3, 4.0  # timed passes of each; LEAST once they have taken so long


class Steps(Protocol):
    """Parts of optimizer steps, timed in seconds."""

    def gradient(self, precision: str, images: int) -> float:
        """Make gradients of so many images."""

    def update(self) -> float:
        """Update the weights by the last gradients; it is float32 in every precision."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Result of measuring one precision.

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
    """Precision of a run.

    Attributes:
        reason: for the record.
        warning: one line for a person if the requested precision is slow here.
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


class StepsOnACopy:
    """Parts of steps of a copy of a network on a real batch; the network stays as it is."""

    def __init__(
        self, network: torch.nn.Module, batch: Batch, config: TrainConfig, device: torch.device
    ) -> None:
        self.network = copy.deepcopy(network)
        self.batch = batch
        self.config = config
        self.device = device
        self.optimizer = make_optimizer(self.network, config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # all steps are alike, and none can diverge
        self._steppers: dict[str, Stepper] = {}

    def gradient(self, precision: str, images: int) -> float:
        """Make gradients of so many images."""
        if precision not in self._steppers:
            self._steppers[precision] = Stepper(
                self.network, self.network, self.optimizer, self.config,
                device=self.device, precision=precision,
            )  # fmt: skip
        self.optimizer.zero_grad()
        began = self._now()
        self._steppers[precision].backward(self.batch, 0, images, of=images)
        return self._now() - began

    def update(self) -> float:
        """Clip the gradients and update the weights by nothing."""
        began = self._now()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.training.grad_clip)
        self.optimizer.step()
        return self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def measure(
    steps: Steps,
    names: Sequence[str],
    *,
    asked: str,
    microbatch: int,
    per_step: int,
    limit: float | None = None,
    whole: bool = False,
) -> dict[str, Trial]:
    """Measure the seconds of an optimizer step in each precision.

    Passes grow from one image to the whole microbatch, or to a size that is measured quickly. A
    format that is much slower on the way is given up and estimated, unless it is `asked` for. The
    others then take turns, and medians count.

    Args:
        steps: makes and times the parts of a step.
        names: fp32 first.
        microbatch: images of a pass, at most.
        per_step: images of an optimizer step, on this process.
        limit: seconds of the whole run, or None.
        whole: reach the whole microbatch however long that takes, to see that it fits into memory.
    """
    longest = PASS_S if limit is None else min(PASS_S, PASS_SHARE * limit)
    trials: dict[str, Trial] = {}
    slower: dict[str, tuple[float, int]] = {}  # given up: times slower than fp32, on so many images
    updates: list[float] = []
    left, size = list(names), 1

    def timed(name: str, *, update: bool) -> float:
        try:
            seconds = steps.gradient(name, size)
            if update:
                updates.append(steps.update())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            trials[name] = Trial(math.inf, "runs out of memory", given_up=True)
            return math.inf
        return seconds

    while True:
        passes: dict[str, list[float]] = {}
        for name in left:
            update = size == 1 and name == left[0]
            first = timed(name, update=update)
            settled = first if first > SETTING_UP_S else min(first, timed(name, update=update))
            passes[name] = [settled]
            worst = (HOPELESS if size == 1 else WORSE) * passes.get("fp32", [math.inf])[0]
            if name not in ("fp32", asked, *trials) and settled > worst:
                slower[name] = settled / passes["fp32"][0], size
        left = [name for name in left if name not in trials and name not in slower]
        bigger = min(microbatch, size * GROWTH)
        expected = max((passes[name][0] for name in left), default=0.0) * bigger / size
        if bigger == size or (expected > longest and not whole) or not left:
            break
        size = bigger
    spent = sum(passes[name][0] for name in left)
    for turn in range(ROUNDS if len(left) > 1 or limit is not None else 0):
        enough = spent > ENOUGH_S and (len(left) == 1 or turn >= LEAST - 1)
        if not left or enough or passes[left[0]][0] > longest:
            break
        for name in left:
            passes[name].append(timed(name, update=name == left[0]))
            spent += passes[name][-1]
        left = [name for name in left if name not in trials]
    for name in left:
        seconds = statistics.median(passes[name]) * per_step / size
        note = "" if size == microbatch else f"on {size} of {microbatch} images"
        trials[name] = Trial(seconds + min(updates), note)
    for name, (ratio, images) in slower.items():
        on = "one image" if images == 1 else f"{images} images"
        note = f"was given up: {ratio:.1f} times slower than fp32 on {on}"
        trials[name] = Trial(trials["fp32"].seconds * ratio, note, given_up=True)
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
