"""The engine makes the pipeline's own images, whatever else is in the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelops.base.errors import ServingError, UsageError
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource, load_checkpoint
from modelops.records.evaluation import SourceInfo
from modelops.serving.engine.batch_profile import profile_from_seconds
from modelops.serving.engine.engine import StepEngine
from modelops.serving.engine.jobs import StepReport
from modelops.serving.engine.queue import MAX_OVERTAKEN
from modelops.serving.failures import CancelledError, DeadlineError, EngineError, QueueFullError
from waiting import wait_until

MIXED = [
    ImageRequest(prompt="red heart", seed=1, steps=5, guidance=3.0),
    ImageRequest(prompt="flag", seed=2, steps=2, guidance=1.0),
    ImageRequest(prompt="a yellow sun", seed=3, steps=7, guidance=1.5, negative_prompt="blue"),
    ImageRequest(prompt="red heart", seed=2**53 - 1, steps=1, guidance=7.0),
    ImageRequest(prompt="star", seed=0, steps=3, guidance=1.0),
]


class Gate:
    """Lets a pipeline's network evaluations through one at a time, or all of them."""

    def __init__(self, pipeline: Any) -> None:
        self._inner = pipeline.predict_velocity
        self._permits = threading.Semaphore(0)
        self._open = threading.Event()
        self.widths: list[int] = []
        pipeline.predict_velocity = self

    def __call__(self, latents: Any, *rest: Any) -> Any:
        self.widths.append(len(latents))
        while not self._open.is_set() and not self._permits.acquire(timeout=0.01):
            pass
        return self._inner(latents, *rest)

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def pipeline(tiny_checkpoint: Path) -> Any:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture
def make(pipeline: Any) -> Iterator[Callable[..., StepEngine]]:
    engines: list[StepEngine] = []

    def make(**options: Any) -> StepEngine:
        engines.append(StepEngine(pipeline, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(drain=False, timeout_s=10)


def test_image_is_the_pipelines_alone_and_in_company(
    tiny_checkpoint: Path, make: Callable[..., StepEngine]
) -> None:
    info = SourceInfo(kind="checkpoint", uri="tiny")
    source = PipelineSource(load_checkpoint(tiny_checkpoint), info, batch_size=2)
    expected = [source.generate([request])[0].astype(int) for request in MIXED]
    engine = make(max_rows=16)
    for request, picture in zip(MIXED, expected, strict=True):
        image = engine.submit([request])[0].future.result(120)
        assert np.abs(image.pixels - picture).max() <= 1
    together = engine.submit(MIXED)
    for job, request, picture in zip(together, MIXED, expected, strict=True):
        image = job.future.result(120)
        assert image.request.seed == request.seed
        assert np.abs(image.pixels - picture).max() <= 1
    assert together[0].future.result().mean_rows > 2
    assert len({picture.tobytes() for picture in expected}) == len(MIXED)


def test_defaults_are_the_pipelines(make: Callable[..., StepEngine]) -> None:
    image = make().submit([ImageRequest(prompt="x", seed=1)])[0].future.result(60)
    assert (image.request.steps, image.request.guidance) == (4, 3.0)
    assert image.pixels.shape == (32, 32, 3) and image.pixels.dtype == np.uint8


def test_requests_join_and_leave_between_steps(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=4)
    long = engine.submit([ImageRequest(prompt="long", seed=1, steps=8, guidance=3.0)])[0]
    gate.let(2)
    wait_until(lambda: len(gate.widths) == 3)
    short = engine.submit([ImageRequest(prompt="short", seed=2, steps=2, guidance=1.0)])[0]
    gate.let(3)  # the one in progress, then two with both
    image = short.future.result(60)
    assert not long.future.done()
    gate.open()
    long.future.result(60)
    assert gate.widths == [2, 2, 2, 3, 3, 2, 2, 2]
    assert image.mean_rows == 3


def test_first_in_first_out_and_never_wider_than_the_cap(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    gate = Gate(pipeline)
    reports: list[StepReport] = []
    engine = make(max_rows=3, on_step=reports.append)
    guided = ImageRequest(prompt="a", seed=1, steps=2, guidance=2.0)
    plain = ImageRequest(prompt="b", seed=1, steps=2, guidance=1.0)
    jobs = engine.submit([guided, plain, guided, plain])
    gate.open()
    ends = [job.future.result(60) for job in jobs]
    assert max(gate.widths) <= 3
    starts = [{name: end for name, _, end in image.phases}["text"] for image in ends]
    assert starts == sorted(starts)
    assert sum(report.requests for report in reports) == 8


def test_a_row_that_the_head_cannot_use_goes_to_a_later_request(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=3)

    def request(seed: int, guidance: float, steps: int = 1) -> ImageRequest:
        return ImageRequest(prompt="x", seed=seed, steps=steps, guidance=guidance)

    long = engine.submit([request(0, 3.0, steps=30)])[0]
    wait_until(lambda: engine.running == 1)
    head = engine.submit([request(1, 3.0)])[0]
    narrow = engine.submit([request(seed, 1.0) for seed in range(2, 9)])
    gate.open()
    for job in (long, head, *narrow):
        job.future.result(60)
    assert long.future.result().mean_rows > 2  # it shared batches, though the head had to wait
    assert head.overtaken == MAX_OVERTAKEN
    admitted = sorted((long, head, *narrow), key=lambda job: job.admitted)
    assert admitted.index(head) == 1 + MAX_OVERTAKEN


def test_cancel_stops_between_steps(pipeline: Any, make: Callable[..., StepEngine]) -> None:
    gate = Gate(pipeline)
    wasted: list[tuple[int, str]] = []
    engine = make(on_wasted=lambda steps, reason: wasted.append((steps, reason)))
    job = engine.submit([ImageRequest(prompt="x", seed=1, steps=50)])[0]
    gate.let(3)
    wait_until(lambda: len(gate.widths) == 4)
    job.cancel()
    gate.open()
    with pytest.raises(CancelledError):
        job.future.result(60)
    assert wasted == [(4, "cancelled")]
    assert len(gate.widths) == 4


def test_deadline(pipeline: Any, make: Callable[..., StepEngine]) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=2)
    running = engine.submit([ImageRequest(prompt="x", seed=1, steps=9)], timeout_s=0.05)[0]
    waiting = engine.submit([ImageRequest(prompt="x", seed=1, steps=9)], timeout_s=0.05)[0]
    wait_until(lambda: running.reason_to_stop() is not None)
    gate.open()
    for job in (running, waiting):
        with pytest.raises(DeadlineError):
            job.future.result(60)


def test_full_queue_takes_all_or_nothing(pipeline: Any, make: Callable[..., StepEngine]) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=2, queue_limit=2)
    request = ImageRequest(prompt="x", seed=1, steps=3)
    gate.let(3)
    engine.submit([request])[0].future.result(60)  # now the engine knows its speed
    running = engine.submit([request])[0]
    wait_until(lambda: engine.running == 1)
    engine.submit([request])
    with pytest.raises(QueueFullError) as error:
        engine.submit([request, request])
    assert error.value.wait_s > 0
    assert engine.waiting == 1
    last = engine.submit([request])[0]
    gate.open()
    assert np.array_equal(last.future.result(60).pixels, running.future.result(60).pixels)


def test_a_failing_network_fails_its_batch_only(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    weights = pipeline.unet.conv_out.weight.data
    good = weights.clone()
    weights.fill_(float("nan"))
    engine = make()
    request = ImageRequest(prompt="x", seed=1, steps=1)
    with pytest.raises(EngineError, match="NaN"):
        engine.submit([request])[0].future.result(60)
    weights.copy_(good)
    assert engine.submit([request])[0].future.result(60).pixels.std() > 0


def test_an_engine_that_only_fails_calls_itself_dead(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    engine = make()
    pipeline.unet.conv_in.weight.data = pipeline.unet.conv_in.weight.data[:, :1]
    for _ in range(3):
        assert engine.alive
        with pytest.raises(EngineError, match="network failed"):
            engine.submit([ImageRequest(prompt="x", seed=1)])[0].future.result(60)
    wait_until(lambda: not engine.alive)
    with pytest.raises(ServingError, match="not running"):
        engine.submit([ImageRequest(prompt="x", seed=1)])


def test_close_finishes_what_is_in_hand(make: Callable[..., StepEngine]) -> None:
    engine = make(max_rows=2)
    jobs = engine.submit([ImageRequest(prompt="x", seed=k, steps=2) for k in range(3)])
    engine.close()
    assert all(job.future.result(0).pixels.shape == (32, 32, 3) for job in jobs)
    with pytest.raises(ServingError, match="not running"):
        engine.submit([ImageRequest(prompt="x", seed=1)])


def test_texts_are_encoded_once(pipeline: Any, make: Callable[..., StepEngine]) -> None:
    encoded: list[int] = []
    pipeline.text_encoder.register_forward_hook(
        lambda module, args, output: encoded.append(len(output[0]))
    )
    engine = make()
    engine.model.text_cache = 2
    for seed, prompt in enumerate(["a", "a", "b", "c"]):
        request = ImageRequest(prompt=prompt, seed=seed, steps=1, guidance=1.0)
        engine.submit([request])[0].future.result(60)
    assert sum(encoded) == 3
    engine.submit([ImageRequest(prompt="a", seed=9, steps=1, guidance=1.0)])[0].future.result(60)
    assert sum(encoded) == 4  # "a" had made room


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"guidance": float("nan")},
        {"height": 33, "width": 33},
        {"height": -8, "width": 32},
    ],
)
def test_what_the_model_cannot_do_is_said_at_once(
    make: Callable[..., StepEngine], bad: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        make().submit([ImageRequest(prompt="x", seed=1, **bad)])


def test_previews_come_in_order_and_change_nothing(make: Callable[..., StepEngine]) -> None:
    request = ImageRequest(prompt="star", seed=5, steps=8, guidance=2.0)
    engine = make()
    plain = engine.submit([request])[0].future.result(60)
    seen: list[tuple[int, int, np.ndarray[Any, Any]]] = []
    job = engine.submit(
        [request],
        previews=3,
        on_preview=lambda job, index, pixels: seen.append((index, job.step, pixels)),
    )[0]
    image = job.future.result(60)
    assert np.array_equal(image.pixels, plain.pixels)
    assert [(index, step) for index, step, _ in seen] == [(0, 1), (1, 3), (2, 5)]
    errors = [np.abs(pixels.astype(int) - image.pixels).mean() for _, _, pixels in seen]
    assert errors[0] > errors[1] > errors[2] > 0
    assert {pixels.shape for _, _, pixels in seen} == {image.pixels.shape}


def test_a_preview_is_where_the_straight_way_on_ends(make: Callable[..., StepEngine]) -> None:
    """The estimate is the very image when a single Euler step is left."""
    seen: list[Any] = []
    job = make().submit(
        [ImageRequest(prompt="star", seed=5, steps=2, guidance=1.0)],
        previews=1,
        on_preview=lambda job, index, pixels: seen.append(pixels),
    )[0]
    image = job.future.result(60)
    one_step = make().submit([ImageRequest(prompt="star", seed=5, steps=1, guidance=1.0)])[0]
    # After the first of two steps the straight way on is where one step alone would have gone.
    assert np.array_equal(seen[0], one_step.future.result(60).pixels)
    assert not np.array_equal(seen[0], image.pixels)


def test_a_preview_that_fails_costs_no_picture(make: Callable[..., StepEngine]) -> None:
    def fails(*ignored: Any) -> None:
        raise RuntimeError("no")

    job = make().submit([ImageRequest(prompt="star", seed=5)], previews=2, on_preview=fails)[0]
    assert job.future.result(60).pixels.size
    with pytest.raises(UsageError, match="0 to 3"):
        make().submit([ImageRequest(prompt="star", seed=5)], previews=4, on_preview=fails)


def test_profile_is_measured_before_the_first_request(make: Callable[..., StepEngine]) -> None:
    engine = make(max_rows=4, profile_s=30.0)
    engine.submit([ImageRequest(prompt="star", seed=5)])[0].future.result(60)
    assert set(engine.profile.seconds) == {1, 2, 3, 4}
    assert engine.profile.complete


def test_where_batching_does_not_pay_requests_run_one_by_one(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=8)
    engine.profile = profile_from_seconds({rows: 0.1 * rows for rows in (1, 2, 4, 8)}, widest=8)
    jobs = engine.submit(
        [
            ImageRequest(prompt="star", seed=seed, steps=2, guidance=guidance)
            for seed, guidance in ((1, 3.0), (2, 1.0), (3, 1.0))
        ]
    )
    gate.open()
    done = [job.future.result(60) for job in jobs]
    assert gate.widths == [2, 2, 1, 1, 1, 1]
    assert [image.mean_rows for image in done] == [2, 1, 1]


def test_wide_batches_only_while_the_queue_fills_them(
    pipeline: Any, make: Callable[..., StepEngine]
) -> None:
    gate = Gate(pipeline)
    engine = make(max_rows=8)
    engine.profile = profile_from_seconds(
        {1: 1 / 100, 2: 2 / 160, 4: 4 / 190, 8: 8 / 200}, widest=8
    )
    assert (engine.profile.narrow, engine.profile.wide) == (4, 8)

    def requests(count: int) -> list[ImageRequest]:
        return [ImageRequest(prompt="x", seed=i, steps=2, guidance=1.0) for i in range(count)]

    few = engine.submit(requests(6))
    gate.let(4)
    for job in few:
        job.future.result(60)
    assert gate.widths == [4, 4, 2, 2]
    gate.widths.clear()
    many = engine.submit(requests(12))
    gate.open()
    for job in many:
        job.future.result(60)
    assert gate.widths == [8, 8, 4, 4]
