"""Speed of this machine at the demo's main tasks, measured in some seconds."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.demo.budgets import trainer_config
from modelops.training.config import ModelSection, load_config

ROUNDS, ENOUGH_S = 5, 1.5  # timed calls of each kind; fewer, at least two, once they took this long
BATCH, ROWS, IMAGES, TEXTS = 32, 16, 8, 32  # of a training step, a sampler's call, features, texts
BUSY = 0.1  # share of the cores that others take: measured again, in the hope that they end
TRIES, PAUSE_S = 3, 10.0
HOPELESS = 3.0  # times slower than fp32 on one image: a whole batch in bf16 is not waited for
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRates:
    """Rates of one training config's network, images per second.

    Attributes:
        fp32, bf16: forward and backward; bf16 is 0 where that was not measured, because the forward
            of one image took more than three times as long as in fp32.
        forward: rows of a sampler's call; a guided image takes two at each step.
    """

    fp32: float
    bf16: float
    forward: float

    @property
    def training(self) -> float:
        """Forward and backward, in the faster precision."""
        return max(self.fp32, self.bf16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of one machine.

    Attributes:
        networks: by the name of the training config.
        features: images per second through Lite0.
        texts: captions per second through MiniLM.
        cores: that this process may use.
        capability: torch's name of the instructions it uses.
        others: share of the cores that other processes used meanwhile; 0 where that is not known.
    """

    networks: dict[str, NetworkRates]
    features: float
    texts: float
    cores: int
    capability: str
    others: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, rates to three digits."""
        return _rounded(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        """The rates that `as_dict` gave.

        Raises:
            UsageError: they are not whole.
        """
        try:
            networks = {n: NetworkRates(**found) for n, found in values["networks"].items()}
            return cls(**{**values, "networks": networks})
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"not the rates of a machine: {error}") from error


def measure_rates(configs: tuple[str, ...], on_progress: OnProgress | None = None) -> Rates:
    """Measure the networks of training configs, the image and the text encoder.

    Takes 5 to 20 seconds on two cores. Networks have random weights, which changes no time. Where
    other processes use the cores meanwhile, it is tried twice more and the least disturbed counts.

    Args:
        configs: names among the trainer's own.
        on_progress: called with (done, total) measurements.
    """
    found = _measured_once(configs, on_progress)
    for _ in range(TRIES - 1):
        if found.others <= BUSY:
            break
        time.sleep(PAUSE_S)
        found = min(found, _measured_once(configs, on_progress), key=lambda rates: rates.others)
    return found


def _measured_once(configs: tuple[str, ...], on_progress: OnProgress | None) -> Rates:
    import torch

    from modelops.models.encoders import (
        LITE0_SIZE,
        Lite0,
        load_text_encoder,
        texts_to_embeddings,
    )

    done, total = 0, len(configs) + 2

    def report() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    began = time.monotonic(), _busy_seconds(), time.process_time()
    networks = {}
    for name in configs:
        networks[name] = measure_network(load_config(trainer_config(name)).model)
        report()
    lite0, images = Lite0(), torch.rand(IMAGES, 3, LITE0_SIZE, LITE0_SIZE) * 255
    with torch.no_grad():
        features = IMAGES / seconds_of(lambda: lite0(images))
    report()
    encoder = load_text_encoder()
    captions = [f"person in suit number {number}" for number in range(TEXTS)]
    texts = TEXTS / seconds_of(lambda: texts_to_embeddings(captions, *encoder))
    report()
    return Rates(
        networks=networks, features=features, texts=texts, cores=usable_cores(),
        capability=torch.backends.cpu.get_cpu_capability(), others=_share_of_others(*began),
    )  # fmt: skip


def measure_network(model: ModelSection) -> NetworkRates:
    """Measure forward and backward of a network in fp32 and bf16, and the forward of a sampler."""
    import torch

    from modelops.models.encoders import MINILM_DIM
    from modelops.models.networks import make_unet

    network: Any = make_unet(
        resolution=model.resolution, patch_size=model.patch, channels=model.channels,
        multipliers=model.multipliers, layers_per_block=model.layers_per_block,
        attention_levels=model.attention_levels or (), cross_attention=False,
    )  # fmt: skip
    side = model.resolution // model.patch

    def forward(rows: int) -> Any:
        return network(
            torch.randn(rows, 3 * model.patch**2, side, side), torch.full((rows,), 500.0),
            encoder_hidden_states=None, class_labels=torch.randn(rows, MINILM_DIM),
        ).sample  # fmt: skip

    def step(rows: int, *, bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = forward(rows).float().square().mean()
        loss.backward()
        network.zero_grad()

    fp32 = BATCH / seconds_of(lambda: step(BATCH, bf16=False))
    with torch.no_grad():
        rows = ROWS / seconds_of(lambda: forward(ROWS))
        one = seconds_of(lambda: forward(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hopeless = seconds_of(lambda: forward(1)) > HOPELESS * one
    bf16 = 0.0 if hopeless else BATCH / seconds_of(lambda: step(BATCH, bf16=True))
    return NetworkRates(fp32=fp32, bf16=bf16, forward=rows)


def seconds_of(call: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """The median seconds of a call, after one that is not counted.

    A call that takes longer than `ENOUGH_S` is made once more only.
    """
    started = time.perf_counter()
    call()
    taken: list[float] = []
    slow = time.perf_counter() - started > ENOUGH_S
    while len(taken) < (1 if slow else rounds):
        clock = time.perf_counter()
        call()
        taken.append(time.perf_counter() - clock)
        if len(taken) >= 2 and sum(taken) > ENOUGH_S:
            break
    return statistics.median(taken)


def _share_of_others(since: float, busy: float | None, own: float) -> float:
    """Share of this process's cores that other processes have used since then."""
    now = _busy_seconds()
    if now is None or busy is None:
        return 0.0
    passed = (time.monotonic() - since) * usable_cores()
    return min(1.0, max(0.0, (now - busy - (time.process_time() - own)) / passed))


def _busy_seconds() -> float | None:
    """Seconds that the cores of this process have worked since the machine started; Linux's."""
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text("ascii").splitlines()]
        ticks = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    # user, nice, system; then idle and waiting for disks, interrupts, and time stolen by a host.
    used = [line[1:4] + line[6:9] for line in lines if line and line[0] in cores]
    return sum(int(value) for each in used for value in each) / ticks if used else None


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(found) for key, found in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, 2 - math.floor(math.log10(abs(value))))
    return value
