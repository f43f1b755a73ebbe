"""Sources, prompts and sampling: real HTTP servers, real folders, hostile inputs."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelops.errors import EvaluationError, ImageError, MissingWeightsError, UsageError
from modelops.evaluation.prompts import choose_prompts, clean_prompts, plan_images, read_prompts
from modelops.evaluation.sources import (
    EndpointSource,
    FolderSource,
    ImageBlockedError,
    open_source,
)
from modelops.models.sources import ImageRequest
from modelops.seeding import image_seed


def png(color: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


class _Service(BaseHTTPRequestHandler):
    """Speaks the Images API; the prompt says how it should behave."""

    busy = 0
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        about = {"release_sha256": "ab" * 32, "size": "32x32", "runtime": "torch-cpu"}
        self.answer(200, {"data": [{"id": "pilot", "x_modelops": about}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        prompt = body["prompt"]
        if prompt == "busy" and type(self).busy < 2:
            type(self).busy += 1
            return self.answer(429, {"error": {"code": "rate"}}, {"Retry-After": "0"})
        if prompt == "always busy":
            return self.answer(503, {"error": {"code": "full", "message": "full"}})
        if prompt == "blocked":
            error = {"code": "content_policy_violation", "message": "the prompt is not allowed"}
            return self.answer(400, {"error": error})
        if prompt == "broken":
            return self.answer(200, b"<html>")
        if prompt == "no image":
            return self.answer(200, {"data": []})
        size = (16, 16) if prompt == "another size" else (32, 32)
        shade = body["seed"] % 200
        data = base64.b64encode(png((shade, shade, shade), size)).decode()
        return self.answer(200, {"created": 0, "data": [{"b64_json": data}]})


@pytest.fixture
def service() -> Iterator[str]:
    _Service.busy, _Service.bodies = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def request(prompt: str, seed: int = 7, **more: Any) -> ImageRequest:
    return ImageRequest(prompt=prompt, seed=seed, height=32, width=32, **more)


def test_an_endpoint_gets_seed_steps_and_guidance_and_gives_pixels(service: str) -> None:
    source = open_source(service + "/v1", batch_size=2)
    made = source.generate([request("sun", seed=3, steps=5, guidance=2.0), request("sun", seed=4)])
    assert [int(image[0, 0, 0]) for image in made] == [3, 4]
    first = next(body for body in _Service.bodies if body["seed"] == 3)
    assert first == {
        "prompt": "sun", "n": 1, "seed": 3, "steps": 5, "guidance": 2.0, "size": "32x32",
        "response_format": "b64_json", "output_format": "png",
    }  # fmt: skip
    assert source.info.sha256 == "ab" * 32
    assert source.defaults.height == 32


def test_a_busy_service_is_asked_again(service: str) -> None:
    source = EndpointSource(service, max_wait_s=0.01)
    assert source.generate([request("busy")])[0].shape == (32, 32, 3)
    assert len(_Service.bodies) == 3


@pytest.mark.parametrize(
    ("prompt", "message", "asked"),
    [
        ("always busy", "HTTP 503 full", 3),
        ("broken", "not JSON", 1),
        ("no image", "without an image", 1),
        ("another size", "16x16", 1),
    ],
)
def test_an_answer_that_is_no_image_is_an_error(
    service: str, prompt: str, message: str, asked: int
) -> None:
    source = EndpointSource(service, max_wait_s=0.01, attempts=3)
    with pytest.raises(EvaluationError, match=message):
        source.generate([request(prompt)])
    assert len(_Service.bodies) == asked


def test_a_blocked_image_is_told_apart(service: str) -> None:
    with pytest.raises(ImageBlockedError, match="not allowed"):
        EndpointSource(service).generate([request("blocked")])


def test_nobody_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        open_source("http://127.0.0.1:9")


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name, shade in (("b.png", 20), ("a.png", 10)):
        (tmp_path / name).write_bytes(png((shade, shade, shade)))
    (tmp_path / "c.png").write_bytes(b"\x89PNG broken")
    source = open_source(str(tmp_path))
    assert isinstance(source, FolderSource)
    assert [int(source.read(index)[0, 0, 0]) for index in (0, 1)] == [10, 20]
    with pytest.raises(ImageError):
        source.read(2)
    with pytest.raises(EvaluationError, match="only 3 images"):
        source.read(3)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for uri in (str(tmp_path), str(tmp_path / "none"), "./none/here"):
        with pytest.raises(UsageError):
            open_source(uri)


def test_a_hub_id_that_cannot_be_had_says_so_in_one_line() -> None:
    with pytest.raises(MissingWeightsError, match="not in the local Hugging Face cache") as caught:
        open_source("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


def test_unusable_prompts_are_counted(tmp_path: Path) -> None:
    found = clean_prompts(["sun", " sun ", "", "a\0b", "x" * 10_001, "red heart"])
    assert found.prompts == ("sun", "red heart")
    assert found.dropped == {
        "duplicate": 1, "empty": 1, "null byte": 1, "longer than 10000 characters": 1
    }  # fmt: skip
    file = tmp_path / "prompts.txt"
    file.write_bytes("sun\r\nhéart\n".encode())
    assert read_prompts(file).prompts == ("sun", "héart")
    file.write_bytes(b"\n\n")
    with pytest.raises(UsageError, match="no usable prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read_prompts(file)


def test_the_choice_of_a_prompt_does_not_depend_on_the_others() -> None:
    whole = clean_prompts([f"prompt {i}" for i in range(50)])
    ten = choose_prompts(whole, 10, seed=1).prompts
    without = clean_prompts([p for p in whole.prompts if p != ten[0]])
    assert set(choose_prompts(without, 10, seed=1).prompts) >= set(ten[1:])
    assert choose_prompts(whole, None, seed=1).prompts == whole.prompts


def test_a_plan_repeats_prompts_with_other_seeds() -> None:
    plan = plan_images(clean_prompts(["a", "b"]), n=5, replicates=1, seed=9)
    assert [(p.prompt, p.replicate) for p in plan] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)
    ]  # fmt: skip
    assert len({p.seed for p in plan}) == 5
    assert plan[2].seed == image_seed(9, "a", 1)


def test_shades_are_real(service: str) -> None:
    made = EndpointSource(service).generate([request("sun", seed=150)])[0]
    assert np.unique(made).tolist() == [150]
