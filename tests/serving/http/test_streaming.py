"""Streamed images over a real server: OpenAI's client, hang-ups, slow readers, filters that stop.

The network's evaluations pass a gate, so that a test decides how far an image has come.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from live_node import http
from modelops.serving.http import streaming
from modelops.serving.http.answers import MAX_BODY_BYTES
from modelops.serving.provenance.manifests import read_mark
from modelops.serving.settings import NodeSettings
from stage import Stage, cleared, staged
from waiting import wait_until


@pytest.fixture(scope="module")
def stage_of_module(tiny_release: Path) -> Iterator[Stage]:
    with staged(tiny_release, NodeSettings(stream_write_timeout_s=0.5)) as stage:
        yield stage


@pytest.fixture
def stage(stage_of_module: Stage) -> Iterator[Stage]:
    with cleared(stage_of_module) as stage:
        yield stage


def pixels(picture: str) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        return np.asarray(image.convert("RGB"))


def read_until(caller: socket.socket, text: bytes) -> bytes:
    got = b""
    while text not in got:
        piece = caller.recv(65536)
        assert piece, f"ended before {text!r}: {got[-300:]!r}"
        got += piece
    return got


def test_openais_client_sees_the_picture_come(stage: Stage) -> None:
    plain = stage.live.client().images.generate(
        prompt="a red heart", extra_body={"seed": 7, "steps": 6}
    )
    sent = stage.live.metric("modelops_partial_images_total")
    stage.gate.close()
    stage.gate.allow(2)
    events = iter(stage.stream())
    first = next(events)
    assert stage.node.engine.running == 1  # it is not made yet, but here is what there is of it
    stage.gate.allow(2)
    second = next(events)
    stage.gate.open()
    (last,) = list(events)
    for index, event in enumerate((first, second)):
        assert isinstance(event, ImageGenPartialImageEvent)
        ImageGenPartialImageEvent.model_validate(event.model_dump())
        assert event.partial_image_index == index and event.size == "32x32"
        assert pixels(event.b64_json).shape == (32, 32, 3)
    assert isinstance(last, ImageGenCompletedEvent)
    ImageGenCompletedEvent.model_validate(last.model_dump())
    assert last.usage.input_tokens > 2 and last.usage.output_tokens == 0
    assert plain.data is not None and plain.data[0].b64_json is not None
    assert np.array_equal(pixels(last.b64_json), pixels(plain.data[0].b64_json))
    assert not np.array_equal(pixels(second.b64_json), pixels(last.b64_json))
    difference = [
        np.abs(pixels(event.b64_json).astype(int) - pixels(last.b64_json)).mean()
        for event in (first, second)
    ]
    assert difference[0] > difference[1]
    receipt = last.model_extra["x_modelops"]  # type: ignore[index]
    assert receipt["request"]["seed"] == 7 and receipt["signature"]
    assert stage.live.metric("modelops_partial_images_total") == sent + 2


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_a_partial_picture_is_marked_and_has_no_receipt(stage: Stage, output_format: str) -> None:
    stage.gate.close()
    stage.gate.allow(3)
    events = iter(stage.stream(partial_images=1, output_format=output_format))
    event = next(events)
    stage.gate.open()
    list(events)
    assert event.output_format == output_format
    assert "x_modelops" not in event.model_dump()
    mark = read_mark(base64.b64decode(event.b64_json), output_format)
    assert mark.generation["partial_image_index"] == 0 and mark.generation["seed"] == 7
    assert mark.source_type.endswith("trainedAlgorithmicMedia")
    assert "receipt" not in mark.generation and "heart" not in json.dumps(mark.generation)


@pytest.mark.parametrize("partial_images", [None, 0])
def test_without_partial_images_there_is_one_event(
    stage: Stage, partial_images: int | None
) -> None:
    (event,) = list(stage.stream(partial_images=partial_images))
    assert event.type == "image_generation.completed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True, "n": 2}, "n"),
        ({"partial_images": 1}, "partial_images"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"stream": True, "partial_images": True}, "partial_images"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "prompt": "hardcore porn"}, "prompt"),
        ({"stream": True, "prompt": "sun " * 240}, "prompt"),
    ],
)
def test_what_fails_before_the_first_event_is_an_ordinary_status(
    stage: Stage, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        stage.live.client().images.generate(prompt="sun", extra_body=body)
    assert error.value.param == param and error.value.status_code == 400


def test_keys_and_rates_hold_for_streams(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_IMAGES_PER_MINUTE", "3")  # of 4 steps: two of 6
    with http(stage.node) as live:
        limited = Stage(live, stage.gate, stage.filter)
        limited.gate.fails = True
        for _ in range(2):  # what the node owes is given back
            with pytest.raises(openai.InternalServerError):
                list(limited.stream())
        limited.gate.fails = False
        for _ in range(2):
            assert list(limited.stream())
        with pytest.raises(openai.RateLimitError) as error:
            limited.stream()
        assert float(error.value.response.headers["retry-after"]) >= 1
    monkeypatch.setenv("MODELOPS_API_KEYS", hashlib.sha256(b"the key").hexdigest())
    with http(stage.node) as live, pytest.raises(openai.AuthenticationError):
        Stage(live, stage.gate, stage.filter).stream()


@pytest.mark.parametrize(
    ("fault", "code", "outcome"),
    [
        ("blocks", "content_policy_violation", "blocked"),
        ("raises", "safety_filter_unavailable", "failed"),
    ],
)
def test_a_filter_that_stops_a_partial_picture_ends_the_stream_and_the_work(
    stage: Stage, fault: str, code: str, outcome: str
) -> None:
    before, cancelled = stage.streams(outcome), 'modelops_wasted_steps_total{reason="cancelled"}'
    wasted = stage.live.metric(cancelled)
    stage.gate.close()
    stage.gate.allow(2)
    events = iter(stage.stream())
    assert next(events).partial_image_index == 0
    setattr(stage.filter, fault, True)
    stage.gate.allow(2)
    with pytest.raises(openai.APIError) as error:
        next(events)
    assert error.value.code == code
    setattr(stage.filter, fault, False)
    done = stage.gate.evaluations
    stage.gate.open()
    wait_until(lambda: stage.node.engine.running == 0)
    assert stage.gate.evaluations - done <= 1
    assert stage.streams(outcome) == before + 1 and stage.live.metric(cancelled) > wasted
    stage.node.filters.probe(stage.node._golden.pixels)
    assert stage.node.problems() == []


def test_a_first_partial_picture_that_is_withheld_is_an_ordinary_400(stage: Stage) -> None:
    stage.filter.blocks = True
    with stage.post(b'{"prompt": "sun", "stream": true, "partial_images": 3}') as caller:
        head, body = read_until(caller, b"}}").split(b"\r\n\r\n", 1)
    assert b" 400 " in head.splitlines()[0] and b"content_policy_violation" in body
    assert b"b64_json" not in body


def test_a_client_that_hangs_up_mid_stream_stops_its_work(stage: Stage) -> None:
    before = stage.streams("client_left")
    stage.gate.close()
    stage.gate.allow(50)
    stream = stage.stream(steps=200, partial_images=3)
    assert next(iter(stream)).partial_image_index == 0
    stream.close()
    wait_until(lambda: stage.streams("client_left") == before + 1)
    done = stage.gate.evaluations
    stage.gate.open()
    wait_until(lambda: stage.node.engine.running == 0)
    assert stage.gate.evaluations - done <= 1  # the one that was under way


def test_a_client_that_hangs_up_before_the_first_event_is_answered_all_the_same(
    stage: Stage,
) -> None:
    """BentoML keeps a task for minutes for a request that nothing was answered to."""
    before = stage.streams("client_left")
    answered = 'modelops_http_requests_total{route="/v1/images/generations",status="499"}'
    stage.gate.close()
    with stage.post(b'{"prompt": "sun", "steps": 100, "stream": true}'):
        wait_until(lambda: stage.node.engine.running == 1)
    wait_until(lambda: stage.streams("client_left") == before + 1)
    stage.gate.open()
    wait_until(lambda: stage.node.engine.running == 0)
    assert stage.gate.evaluations <= 1
    assert stage.live.metric(answered) == 1


def test_an_unforeseen_failure_is_an_error_event_without_its_words(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.gate.close()
    stage.gate.allow(2)
    events = iter(stage.stream())
    next(events)
    monkeypatch.setattr(stage.node, "finish", lambda *_: 1 / 0)
    stage.gate.open()
    with pytest.raises(openai.APIError) as error:
        list(events)
    assert error.value.code == "internal_error" and "zero" not in error.value.message


def test_a_hanging_filter_holds_up_neither_the_engine_nor_memory(stage: Stage) -> None:
    stage.filter.held.clear()
    events: list[Any] = []
    reader = threading.Thread(target=lambda: events.extend(stage.stream(partial_images=3)))
    reader.start()
    wait_until(lambda: stage.filter.checks == 1)
    wait_until(lambda: stage.gate.evaluations == 6)  # to its end; the first partial is in progress
    stage.filter.held.set()
    reader.join(30)
    assert events[-1].type == "image_generation.completed"
    assert 1 not in [getattr(event, "partial_image_index", None) for event in events]  # replaced


def test_streams_that_wait_for_the_filter_keep_nobody_from_being_answered(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.node.image_guard, "timeout_s", 60.0)
    stage.filter.held.clear()
    readers = [
        threading.Thread(target=lambda: list(stage.stream(steps=1, partial_images=0)))
        for _ in range(20)  # more than the threads that requests are let in by
    ]
    for reader in readers:
        reader.start()
    wait_until(lambda: stage.gate.evaluations >= 1 and stage.filter.checks == 1)
    wait_until(lambda: stage.node.engine.running == stage.node.engine.waiting == 0)
    with stage.post(b'{"prompt": "sun", "size": "1x1"}') as caller:
        caller.settimeout(20)  # the filter lets go after 30 s
        assert b" 400 " in caller.recv(4096).splitlines()[0]
    stage.filter.held.set()
    for reader in readers:
        reader.join(30)


def test_a_slow_reader_is_dropped_and_nobody_waits_for_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.node.sealer.seal_partial
    # As large as a partial image of a large model can be, so that no buffer takes it all.
    monkeypatch.setattr(stage.node.sealer, "seal_partial", lambda *a: real(*a) + bytes(12_000_000))
    before = stage.streams("slow_reader")
    stage.gate.close()
    stage.gate.allow(3)
    body = b'{"prompt": "sun", "steps": 6, "stream": true, "partial_images": 1}'
    with stage.post(body, receive_buffer=4096) as caller:
        assert caller.recv(1)  # and no more
        stage.gate.open()
        (other,) = list(stage.stream(partial_images=0))
        assert other.type == "image_generation.completed"
        wait_until(lambda: stage.streams("slow_reader") == before + 1)
        got = b""
        with pytest.raises(ConnectionResetError):
            while piece := caller.recv(1 << 20):
                got += piece
        assert 0 < len(got) < 16_000_000 and b"image_generation.completed" not in got


def test_a_reader_that_is_a_little_slow_gets_everything(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.node.sealer.seal_partial
    monkeypatch.setattr(stage.node.sealer, "seal_partial", lambda *a: real(*a) + bytes(3_000_000))
    body = b'{"prompt": "sun", "steps": 6, "stream": true, "partial_images": 1}'
    stage.gate.close()
    stage.gate.allow(3)
    with stage.post(body, receive_buffer=65536) as caller:
        read_until(caller, b"partial_image_index")
        stage.gate.open()
        assert b"x_modelops" in read_until(caller, b"0\r\n\r\n")


def test_comments_keep_a_waiting_stream_alive(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)
    stage.gate.close()
    events = stage.stream(partial_images=0)  # returns with the first comment
    with stage.post(b'{"prompt": "sun", "stream": true}') as caller:
        got = read_until(caller, b": still at it\n\n")
        head = got.split(b"\r\n\r\n")[0].lower()
        assert b" 200 " in head and b"content-type: text/event-stream" in head
        assert b"no-store" in head and b"x-request-id" in head
    stage.gate.open()
    assert [event.type for event in events] == ["image_generation.completed"]


def test_comments_keep_a_stream_alive_while_its_picture_is_judged(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)
    stage.filter.held.clear()
    with stage.post(b'{"prompt": "sun", "stream": true}') as caller:
        wait_until(lambda: stage.filter.checks == 1)
        for _ in range(3):
            read_until(caller, b": still at it\n\n")
        stage.filter.blocks = True
        stage.filter.held.set()
        assert b"content_policy_violation" in read_until(caller, b"0\r\n\r\n")


def test_a_failure_after_the_first_comment_is_an_error_event(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)
    stage.gate.close()
    stage.gate.fails = True
    with stage.post(b'{"prompt": "sun", "stream": true}') as caller:
        read_until(caller, b": still at it\n\n")
        stage.gate.open()
        got = read_until(caller, b"0\r\n\r\n").decode()
    data = json.loads(re.search(r"event: error\ndata: (.*)\n\n", got).group(1))  # type: ignore[union-attr]
    assert data["type"] == "error" and data["error"]["code"] == "generation_failed"
    assert set(data["error"]) == {"message", "type", "param", "code"}


def test_the_newest_preview_wins_and_putting_never_waits() -> None:
    async def exchange() -> list[int]:
        place = streaming.NewestPreview(asyncio.get_running_loop())
        picture = np.zeros((2, 2, 3), np.uint8)

        def engine() -> None:
            for index in range(3):
                place.put(None, index, picture)  # type: ignore[arg-type]

        await asyncio.to_thread(engine)
        await place.arrived()
        taken = [place.take()[0]]
        with pytest.raises(IndexError):
            place.take()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(place.arrived(), 0.01)
        waiting = asyncio.ensure_future(place.arrived())
        await asyncio.to_thread(place.put, None, 5, picture)  # type: ignore[arg-type]
        await waiting
        return [*taken, place.take()[0]]

    assert asyncio.run(exchange()) == [2, 5]


def test_putting_after_the_loop_has_ended_is_harmless() -> None:
    loop = asyncio.new_event_loop()
    place = streaming.NewestPreview(loop)
    loop.close()
    place.put(None, 0, np.zeros((2, 2, 3), np.uint8))  # type: ignore[arg-type]


def test_the_document_names_event_streams(stage: Stage) -> None:
    with urllib.request.urlopen(f"{stage.live.url}/openapi.json", timeout=30) as answer:
        document = json.loads(answer.read(32 * MAX_BODY_BYTES))
    operation = document["paths"]["/v1/images/generations"]["post"]
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json", "text/event-stream",
    }  # fmt: skip
    asked = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"stream", "partial_images"} <= set(asked)
