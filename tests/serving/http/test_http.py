"""`bentoml serve` in its own process, asked by OpenAI's official client."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from modelops.base.errors import ServingError
from modelops.serving.deploy.check import check_endpoint, curl_line, get
from modelops.serving.deploy.launch import (
    RunningServer,
    free_port,
    serve_command,
    serve_environment,
    start_server,
)
from waiting import wait_until


@pytest.fixture(scope="module")
def server(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    environment = {"OMP_NUM_THREADS": "1"}
    with start_server(tiny_release, log_path=log, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def decode(picture: Any) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(picture.b64_json))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def metric(server: RunningServer, name: str) -> float:
    for line in get(f"{server.url}/metrics")[1].splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def test_check_endpoint(server: RunningServer, tiny_release: Path) -> None:
    check = check_endpoint(server.url, "red heart", 5)
    assert check.model == "tiny"
    assert check.pixels.shape == (32, 32, 3)
    assert check.text_chunks["seed"] == "5" and check.text_chunks["Comment"] == "AI generated"
    assert check.text_chunks["release_sha256"] == check.receipt["release"]["sha256"]
    assert check.receipt["request"]["steps"] == 4


def test_image_is_the_offline_pipelines(client: openai.OpenAI, tiny_checkpoint: Path) -> None:
    from modelops.models.request import ImageRequest
    from modelops.models.sources import open_checkpoint

    answer = client.images.generate(
        prompt="a star", size="32x32", n=2,
        extra_body={"seed": 11, "steps": 3, "guidance": 2.0, "negative_prompt": "blue"},
    )  # fmt: skip
    assert answer.data is not None and len(answer.data) == 2
    source = open_checkpoint(tiny_checkpoint, batch_size=1)
    for index, picture in enumerate(answer.data):
        request = ImageRequest(
            prompt="a star", seed=11 + index, steps=3, guidance=2.0, negative_prompt="blue"
        )
        assert np.abs(decode(picture) - source.generate([request])[0]).max() <= 1


def test_without_a_seed_pictures_differ_and_the_receipt_names_the_seed(
    client: openai.OpenAI,
) -> None:
    one, other = (client.images.generate(prompt="sun").data for _ in range(2))
    assert one is not None and other is not None
    assert not np.array_equal(decode(one[0]), decode(other[0]))
    seed = one[0].model_extra["x_modelops"]["request"]["seed"]  # type: ignore[index]
    again = client.images.generate(prompt="sun", extra_body={"seed": seed}).data
    assert again is not None and np.abs(decode(again[0]) - decode(one[0])).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"prompt": "hardcore porn"}, "content_policy_violation"),
        ({"prompt": "h@rdcore p0rn"}, "content_policy_violation"),
        ({"prompt": "hardcore p\u03bfrn"}, "content_policy_violation"),
        ({"extra_body": {"negative_prompt": "hardcore porn"}}, "content_policy_violation"),
        ({"size": "1024x1024"}, "unsupported_value"),
        ({"size": "1x1"}, "unsupported_value"),
        ({"n": 5}, "invalid_value"),
        ({"n": 0}, "invalid_value"),
        ({"response_format": "url"}, "unsupported_value"),
        ({"quality": "best"}, "invalid_value"),
        ({"background": "transparent"}, "invalid_value"),
        ({"extra_body": {"seed": -1}}, "invalid_value"),
        ({"extra_body": {"seed": 2**53}}, "invalid_value"),
        ({"extra_body": {"guidance": -1}}, "invalid_value"),
    ],
)
def test_the_client_gets_its_own_errors(
    client: openai.OpenAI, arguments: dict[str, Any], code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"prompt": "sun", **arguments})
    assert error.value.code == code


def test_parameters_of_other_models_change_nothing_and_are_named(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> tuple[np.ndarray, str | None]:
        raw = client.images.with_raw_response.generate(
            prompt="sun", extra_body={"seed": 5, "steps": 2}, **more
        )
        data = raw.parse().data
        assert data is not None
        return decode(data[0]), raw.headers.get("x-modelops-ignored")

    (plain, none), (other, ignored) = ask(), ask(
        quality="hd", style="vivid", output_compression=80, moderation="low", user="me"
    )  # fmt: skip
    assert none is None and ignored == "quality, style, output_compression, moderation, user"
    assert np.abs(plain - other).max() <= 1


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "modelops"
    about = model.model_extra["x_modelops"]  # type: ignore[index]
    assert (about["size"], about["steps"], about["guidance"]) == ("32x32", 4, 3.0)
    with pytest.raises(openai.NotFoundError) as error:
        client.images.generate(prompt="sun", model="dall-e-3")
    assert error.value.code == "model_not_found"


def test_bad_bodies(server: RunningServer) -> None:
    for body, kind, status, code in (
        (b'{"prompt": "sun"', "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', "application/json", 413, "body_too_large"),
        (b"prompt=sun", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ):
        answered, answer = post(server.url, body, kind)
        assert (answered, answer["error"]["code"]) == (status, code)
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_length_is_bounded_too(server: RunningServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as caller:
        caller.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(9):
            caller.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        assert b" 413 " in caller.recv(4096).split(b"\r\n")[0]


def test_health_and_bounded_labels(server: RunningServer) -> None:
    for path in ("/.env", "/v1/../etc", "/v1/images", "/a" * 500):
        status, body = get(server.url + path)
        assert status == 404 and json.loads(body)["error"]["code"] == "not_found"
    assert get(f"{server.url}/livez")[0] == 200
    assert json.loads(get(f"{server.url}/readyz")[1])["problems"] == []
    text = get(f"{server.url}/metrics")[1]
    assert 'route="other",status="404"' in text and ".env" not in text
    assert "bentoml" not in text
    for name in ("modelops_phase_seconds", "modelops_batch_rows", "modelops_step_seconds"):
        assert f"# TYPE {name} histogram" in text


def test_a_client_that_hangs_up_stops_its_work(server: RunningServer) -> None:
    name = 'modelops_wasted_steps_total{reason="cancelled"}'
    before = metric(server, name)
    body = b'{"prompt": "sun", "steps": 200}'
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as caller:
        caller.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: metric(server, "modelops_running_requests") >= 1)
    wait_until(lambda: metric(server, name) > before)
    assert metric(server, name) - before < 200


def test_a_stream_comes_through_and_hanging_up_on_it_stops_its_work(
    server: RunningServer, client: openai.OpenAI
) -> None:
    plain = client.images.generate(prompt="sun", extra_body={"seed": 3, "steps": 40})
    events = list(
        client.images.generate(
            prompt="sun", stream=True, partial_images=3, extra_body={"seed": 3, "steps": 40}
        )
    )
    assert events[-1].type == "image_generation.completed"
    assert plain.data is not None and np.array_equal(decode(events[-1]), decode(plain.data[0]))
    name = 'modelops_wasted_steps_total{reason="cancelled"}'
    before = metric(server, name)
    stream = client.images.generate(
        prompt="sun", stream=True, partial_images=3, extra_body={"steps": 200}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()
    wait_until(lambda: metric(server, name) > before)
    assert metric(server, name) - before < 200
    left = 'modelops_streams_total{outcome="client_left"}'
    assert metric(server, left) == 1
    body = b'{"prompt": "sun", "steps": 200, "stream": true}'
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as caller:
        caller.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: metric(server, "modelops_running_requests") >= 1)
    wait_until(lambda: metric(server, left) == 2)  # a task that hung on would show at SIGTERM below


def test_the_page_is_ours_and_not_bentomls(server: RunningServer) -> None:
    status, text = get(f"{server.url}/")
    assert status == 200 and "modelops inference node" in text and "swagger" not in text.lower()


def test_the_printed_curl_line_works(server: RunningServer, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    subprocess.run(
        curl_line(server.url, "a dog's nose").replace("python", os.sys.executable),  # type: ignore[attr-defined]
        shell=True, cwd=tmp_path, check=True, timeout=120,
    )  # fmt: skip
    assert Image.open(tmp_path / "picture.png").size == (32, 32)


def test_port_in_use_is_said_before_anything_starts(
    server: RunningServer, tiny_release: Path
) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with (
        pytest.raises(ServingError, match="address already in use"),
        start_server(tiny_release, port),
    ):
        pass


def test_bentoml_itself_refuses_a_changed_release(tiny_release: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_release, tmp_path / "release")
    (copy / "extra.txt").write_text("was not released")
    ended = subprocess.run(
        serve_command("127.0.0.1", free_port()),
        env=serve_environment(copy, extra={"BENTOML_HOME": str(tmp_path)}),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert re.search(r"^error: .*extra\.txt: is not part of the release", ended.stderr, re.M)


def test_sigterm_finishes_the_work_in_hand(server: RunningServer, client: openai.OpenAI) -> None:
    """The last test of this file: it ends the server."""
    answers: list[Any] = []
    caller = threading.Thread(
        target=lambda: answers.append(
            client.images.generate(prompt="sun", extra_body={"steps": 100, "seed": 1})
        )
    )
    caller.start()
    wait_until(lambda: metric(server, "modelops_running_requests") >= 1)
    os.kill(server.process.pid, signal.SIGTERM)
    caller.join(120)
    assert answers and answers[0].data[0].b64_json
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(ServingError, match="no answer"):
        get(f"{server.url}/livez")
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
