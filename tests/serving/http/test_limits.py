"""Buckets let through what their rate says; a full queue says how long it will be full."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import live_node
from modelops.base.errors import UsageError
from modelops.models.request import ImageRequest
from modelops.models.sources import load_checkpoint
from modelops.serving.api import ApiError
from modelops.serving.engine import engine as engine_module
from modelops.serving.engine.engine import StepEngine
from modelops.serving.failures import QueueFullError
from modelops.serving.http.access import Access, Charge
from modelops.serving.http.keys import Caller, KeyRing, create_key
from modelops.serving.http.limits import ImageRate, RateLimitError, RateLimits, Work
from modelops.serving.settings import NodeSettings
from waiting import at_once

ALICE, BOB = Caller(name="alice"), Caller(name="bob", images_per_minute=4)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(limits: RateLimits, caller: Caller, images: int = 1) -> float | None:
    """Seconds to wait, or None when it was let in."""
    return refused_work(limits, Work(images), caller)


def refused_work(limits: RateLimits, work: Work, caller: Caller = ALICE) -> float | None:
    try:
        at_once(limits.take(caller, work))
    except RateLimitError as error:
        assert error.wait_s is not None
        return error.wait_s
    return None


def test_a_minutes_worth_then_evenly() -> None:
    clock = Clock()
    limits = RateLimits(requests_per_minute=6, clock=clock)
    assert [refused(limits, ALICE) for _ in range(6)] == [None] * 6
    assert refused(limits, ALICE) == pytest.approx(10.0)
    assert refused(limits, BOB) is None  # a bucket each
    clock.now += 4
    assert refused(limits, ALICE) == pytest.approx(6.0)  # being refused costs nothing
    clock.now += 6
    assert refused(limits, ALICE) is None
    clock.now += 3600
    assert [refused(limits, ALICE) for _ in range(7)][5:] == [None, pytest.approx(10.0)]


def test_both_buckets_or_neither() -> None:
    clock = Clock()
    limits = RateLimits(requests_per_minute=3, images_per_minute=60, clock=clock)
    assert refused(limits, BOB, images=3) is None  # bob's own rate is 4 images
    assert refused(limits, BOB, images=2) == pytest.approx(15.0)
    assert refused(limits, BOB, images=1) is None  # the refused one took no image and no request
    assert refused(limits, BOB, images=4) == pytest.approx(60.0)
    with pytest.raises(RateLimitError, match=r"4 images of 1 steps a minute .*, fewer") as error:
        at_once(limits.take(BOB, Work(5)))
    assert error.value.wait_s is None
    at_once(limits.give_back_images(BOB, 4))
    assert refused(limits, BOB, images=4) is None
    assert refused(limits, BOB) == pytest.approx(20.0)  # three requests are spent
    assert refused(RateLimits(clock=clock), ALICE, images=10**9) is None


def test_what_the_node_owes_is_given_back_once() -> None:
    """A canary fails a request, and the stable release makes it: the images count."""
    clock = Clock()
    limits = RateLimits(images_per_minute=2, clock=clock)
    access = Access(KeyRing(), limits)

    async def tried(charge: Charge, error: Exception | None) -> None:
        async with charge.attempt():
            if error is not None:
                raise error

    def fails(charge: Charge, error: Exception) -> None:
        with pytest.raises(type(error)):
            at_once(tried(charge, error))

    def taken() -> Charge:
        return at_once(access.take(ALICE, Work(2)))

    for error in (ApiError(503, "cancelled", ""), ApiError(429, "x", ""), RuntimeError("a bug")):
        fails(taken(), error)
    fails(taken(), ApiError(400, "content_policy_violation", ""))
    assert refused(limits, ALICE) == pytest.approx(30.0)
    clock.now += 60
    charge = taken()
    fails(charge, ApiError(500, "generation_failed", ""))
    at_once(tried(charge, None))
    assert refused(limits, ALICE) == pytest.approx(30.0)


def test_steps_count_as_images_do() -> None:
    """A rate of 10 images is one of 250 image-steps where a release makes 25 steps."""
    clock = Clock()
    limits = RateLimits(images_per_minute=10, clock=clock)
    for left in (225, 200):
        assert at_once(limits.take(ALICE, Work(1, 25, 25))) == ImageRate(250, left)
    assert at_once(limits.take(ALICE, Work(4, 50, 25))) == ImageRate(250, 0)
    with pytest.raises(
        RateLimitError, match=r"10 images of 25 steps a minute \(250 image-s"
    ) as wait:
        at_once(limits.take(ALICE, Work(1, 5, 25)))
    assert wait.value.wait_s == pytest.approx(60 / 50)
    clock.now += 60
    for _ in range(50):  # a fifth of an image each, without what rounding would leave out
        assert refused_work(limits, Work(1, 5, 25)) is None
    assert refused_work(limits, Work(1, 5, 25)) is not None
    with pytest.raises(ApiError, match="fewer than were asked") as never:
        at_once(Access(KeyRing(), RateLimits(images_per_minute=1)).take(ALICE, Work(1, 26, 25)))
    assert (never.value.status, never.value.param) == (400, "steps")


@given(
    rate=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=120),
)
def test_never_more_than_the_rate_and_the_wait_is_the_shortest(
    rate: int, gaps: list[float]
) -> None:
    """In any stretch of t seconds at most rate x (1 + t / 60); and Retry-After is exact."""
    clock = Clock()
    limits = RateLimits(requests_per_minute=rate, clock=clock)
    passed: list[float] = []
    for gap in gaps:
        clock.now += gap
        wait = refused(limits, ALICE)
        if wait is None:
            passed.append(clock.now)
            continue
        assert 0 < wait <= 60 / rate + 1e-6
        clock.now += wait * 0.99
        assert refused(limits, ALICE) is not None
        clock.now += wait * 0.01 + 1e-6
        assert refused(limits, ALICE) is None
        passed.append(clock.now)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            stretch = passed[last] - passed[first]
            assert last - first + 1 <= rate * (1 + stretch / 60) + 1e-6


def test_rates_from_the_environment() -> None:
    limits = RateLimits.from_settings(NodeSettings(requests_per_minute=1))
    assert refused(limits, ALICE) is None and refused(limits, ALICE) is not None
    for bad in ("0", "-1", "1.5", "many", "²", "9999999"):
        with pytest.raises(UsageError, match="MODELOPS_IMAGES_PER_MINUTE"):
            NodeSettings.from_environment({"MODELOPS_IMAGES_PER_MINUTE": bad})


@pytest.fixture
def live(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[live_node.LiveNode, dict[str, str]]]:
    keys = {
        "slow": create_key(tmp_path / "keys.json", "slow", images_per_minute=3),
        "free": create_key(tmp_path / "keys.json", "free"),
    }
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELOPS_API_KEYS_FILE", str(tmp_path / "keys.json"))
    settings = NodeSettings(max_rows=2, queue_limit=1)
    with live_node.served(tiny_release, settings) as node:
        yield node, keys


def test_the_official_client_is_told_when_to_come_back(
    live: tuple[live_node.LiveNode, dict[str, str]],
) -> None:
    node, keys = live
    with node.client(keys["slow"]) as slow, node.client(keys["free"]) as free:

        def ask(client: openai.OpenAI, n: int) -> Any:
            return client.images.with_raw_response.generate(
                prompt="sun", n=n, extra_body={"steps": 4}
            )

        with pytest.raises(openai.BadRequestError) as never:
            ask(slow, 4)
        assert never.value.param == "n" and "3 images of 4 steps a minute" in never.value.message
        answer = ask(slow, 3)
        assert answer.headers["x-ratelimit-limit-image-steps"] == "12"
        assert answer.headers["x-ratelimit-remaining-image-steps"] == "0"
        with pytest.raises(openai.RateLimitError) as later:
            ask(slow, 2)
        assert later.value.code == "rate_limit_exceeded"
        headers = later.value.response.headers
        assert 35 <= int(headers["retry-after"]) <= 40
        assert 0 <= 1000 * int(headers["retry-after"]) - int(headers["retry-after-ms"]) < 1000
        assert "x-ratelimit-limit-image-steps" not in ask(free, 4).headers
        assert node.metric('modelops_rejected_total{reason="rate_limit"}') == 1


def test_a_full_queue_does_not_cost_images(
    live: tuple[live_node.LiveNode, dict[str, str]],
) -> None:
    node, keys = live
    engine = node.node.engine
    held = engine.submit([ImageRequest(prompt="x", seed=1, steps=200) for _ in range(3)])
    while engine.running == 0:
        time.sleep(0.005)
    with node.client(keys["slow"]) as slow:
        for _ in range(5):
            with pytest.raises(openai.RateLimitError) as full:
                slow.images.generate(prompt="sun", n=3)
            assert "too many requests are waiting" in full.value.message
        for job in held:
            job.cancel()
        while engine.running or engine.waiting:
            time.sleep(0.005)
        assert slow.images.generate(prompt="sun", n=3).data


class VirtualTime:
    """The engine's clock; a network evaluation of r rows takes `base + each * r` of it."""

    def __init__(self, pipeline: Any, *, base: float, each: float) -> None:
        self.now = 0.0
        self.evaluations = 0
        self._cost = (base, each)
        self._permits = threading.Semaphore(0)
        pipeline.predict_velocity = self._evaluate

    def monotonic(self) -> float:
        return self.now

    def _evaluate(self, latents: Any, *rest: Any) -> Any:
        self._permits.acquire()
        self.now += self._cost[0] + self._cost[1] * len(latents)
        self.evaluations += 1
        return torch.zeros_like(latents)

    def let(self, evaluations: int) -> None:
        for _ in range(evaluations):
            before = self.evaluations
            self._permits.release()
            while self.evaluations == before:
                time.sleep(0.0002)


@pytest.mark.parametrize(("base", "each"), [(0.02, 0.001), (0.001, 0.02)])
def test_retry_after_is_right_within_a_factor_of_two(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, base: float, each: float
) -> None:
    """In virtual time, with mixed steps and guidance, whether batching pays or not.

    What it says is when the work in progress will have been done; that is measured by draining it.
    """
    pipeline = load_checkpoint(tiny_checkpoint)
    clock = VirtualTime(pipeline, base=base, each=each)
    monkeypatch.setattr(engine_module, "time", clock)
    engine = StepEngine(pipeline, max_rows=8, queue_limit=12)
    random_state, ratios = random.Random(0), []

    def fill() -> tuple[list[Any], float]:
        jobs: list[Any] = []
        while True:
            request = ImageRequest(
                prompt="x", seed=1, steps=random_state.randint(8, 30),
                guidance=random_state.choice([1.0, 3.0]),
            )  # fmt: skip
            try:
                jobs += engine.submit([request])
            except QueueFullError as error:
                return jobs, error.wait_s

    def drain(jobs: list[Any]) -> None:
        while not all(job.future.done() for job in jobs):
            before, evaluations = time.monotonic(), clock.evaluations
            clock._permits.release()
            while clock.evaluations == evaluations and time.monotonic() - before < 0.05:
                time.sleep(0.0002)
            time.sleep(0.0005)  # the engine finishes rows after the evaluation

    try:
        jobs, _ = fill()
        drain(jobs)  # it has seen full batches now
        for round_number in range(10):
            while clock._permits.acquire(blocking=False):
                pass
            jobs, _ = fill()
            clock.let(1 + 3 * round_number)
            time.sleep(0.002)
            more, wait_s = fill()
            refused_at = clock.now
            drain(jobs + more)
            ratios.append(wait_s / (clock.now - refused_at))
    finally:
        for _ in range(10_000):
            clock._permits.release()
        engine.close(drain=False, timeout_s=10)
    right = [ratio for ratio in ratios if 0.5 <= ratio <= 2.0]
    assert len(right) >= 9, ratios
