"""A node in this process behind a real HTTP server: filters fail closed, queues push back."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from modelops.base.errors import IntegrityError, UsageError
from modelops.safety.image import ImageVerdict, OpenNsfwFilter
from modelops.safety.prompt import WordListFilter
from modelops.serving.http.app import create_app
from modelops.serving.moderation.guard import FilterError, FilterGuard
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from waiting import wait_until


class Client:
    """Plain HTTP, to see bytes and headers that the official client hides."""

    def __init__(self, url: str, node: InferenceNode) -> None:
        self.url = url
        self.node = node

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read(), _lower(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), _lower(error.headers)

    def generate(self, **body: Any) -> tuple[int, Any, dict[str, str]]:
        status, data, headers = self.ask("/v1/images/generations", {"prompt": "sun"} | body)
        return status, json.loads(data), headers

    def metric(self, name: str) -> float:
        for line in self.ask("/metrics")[1].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextlib.contextmanager
def http(node: InferenceNode) -> Iterator[Client]:
    server = uvicorn.Server(
        uvicorn.Config(create_app(node), host="127.0.0.1", port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Client(f"http://127.0.0.1:{port}", node)
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def client(tiny_release: Path) -> Iterator[Client]:
    """A healthy node with room for one running and one waiting request."""
    settings = NodeSettings(max_rows=2, queue_limit=1)
    node = InferenceNode(tiny_release, settings=settings)
    node.start()
    assert node.readiness() == []
    with http(node) as client:
        yield client
    node.close(drain=False)


@contextlib.contextmanager
def node_with(release: Path, **options: Any) -> Iterator[Client]:
    node = InferenceNode(release, **options)
    node.start()
    try:
        with http(node) as client:
            yield client
    finally:
        node.close(drain=False, timeout_s=10)


def test_a_healthy_node_answers(client: Client) -> None:
    status, answer, _ = client.generate(seed=3, n=2, steps=2, output_format="webp")
    assert status == 200 and len(answer["data"]) == 2
    for index, item in enumerate(answer["data"]):
        data = base64.b64decode(item["b64_json"])
        receipt = item["x_modelops"]
        assert receipt["output_sha256"] == hashlib.sha256(data).hexdigest()
        assert receipt["request"]["seed"] == 3 + index
        assert receipt["model_sha256"] == client.node.release.model_sha256
        assert Image.open(io.BytesIO(data)).size == (32, 32)
    _, alone, _ = client.generate(seed=4, steps=2, output_format="webp")
    one, other = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))).astype(int)
        for item in (answer["data"][1], alone["data"][0])
    )
    assert np.abs(one - other).max() <= 1
    ready = json.loads(client.ask("/readyz")[1])
    assert ready["ready"] and ready["golden_mean_difference"] <= 1


def test_prompts_that_do_not_fit_are_refused(client: Client) -> None:
    status, answer, _ = client.generate(prompt="many words " * 40)
    assert status == 400 and answer["error"]["code"] == "prompt_too_long"
    status, answer, _ = client.generate(negative_prompt="many words " * 40)
    assert answer["error"]["param"] == "negative_prompt"


def test_full_queue_is_429_with_retry_after(client: Client) -> None:
    answers: list[tuple[int, Any, dict[str, str]]] = []

    def ask() -> None:
        answers.append(client.generate(steps=40, seed=1))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in answers} == {200, 429}
    for status, answer, headers in answers:
        if status == 429:
            assert answer["error"]["code"] == "rate_limit_exceeded"
            assert int(headers["retry-after"]) >= 1
    assert client.metric('modelops_errors_total{code="rate_limit_exceeded"}') >= 1


def test_a_client_that_hangs_up_stops_its_work(client: Client) -> None:
    before = client.metric('modelops_wasted_steps_total{reason="cancelled"}')
    body = json.dumps({"prompt": "sun", "steps": 200}).encode()
    with socket.create_connection(("127.0.0.1", int(client.url.rsplit(":", 1)[1]))) as caller:
        caller.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.1\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: client.node.engine.running == 1)
    wait_until(lambda: client.node.engine.running == 0)
    wasted = client.metric('modelops_wasted_steps_total{reason="cancelled"}') - before
    assert 0 < wasted < 200


def test_unknown_routes_share_one_label(client: Client) -> None:
    for path in ("/a", "/b/c", "/v1/images/generations/x", "/%F0%9F%8E%88"):
        status, body, _ = client.ask(path)
        assert status == 404 and json.loads(body)["error"]["code"] == "not_found"
    text = client.ask("/metrics")[1].decode()
    routes = {
        line.split('route="')[1].split('"')[0]
        for line in text.splitlines()
        if line.startswith("modelops_http_requests_total{")
    }
    assert "other" in routes and not any(route.startswith(("/a", "/b")) for route in routes)
    assert client.ask("/v1/images/generations")[0] == 405


class ScoresNaN:
    """A real filter's weights can give NaN in half precision; this one always does."""

    def check(self, images: Any) -> list[ImageVerdict]:
        return [ImageVerdict(float("nan"), False) for _ in images]


class Hangs:
    """Answers once the test is over."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def check(self, images: Any) -> list[ImageVerdict]:
        self.release.wait(30)
        return [ImageVerdict(0.0, False) for _ in images]


class Constant:
    """Calls every image safe."""

    def check(self, images: Any) -> list[ImageVerdict]:
        return [ImageVerdict(0.0, False) for _ in images]


class Forgets:
    """Leaves an image out."""

    def check(self, images: Any) -> list[ImageVerdict]:
        return []


def broken_weights(tmp_path: Path) -> Callable[[], Any]:
    path = tmp_path / "open-nsfw.onnx"
    path.write_bytes(b"not a network")
    return lambda: OpenNsfwFilter(weights=path)


@pytest.mark.parametrize("fault", ["weights", "missing", "nan", "hang", "forget", "constant"])
def test_a_broken_image_filter_gives_no_pixels(
    tiny_release: Path, tmp_path: Path, fault: str
) -> None:
    hanging = Hangs()
    load: Callable[[], Any] = {
        "weights": broken_weights(tmp_path),
        "missing": lambda: OpenNsfwFilter(weights=tmp_path / "nowhere.onnx"),
        "nan": ScoresNaN,
        "hang": lambda: hanging,
        "forget": Forgets,
        "constant": Constant,
    }[fault]
    settings = NodeSettings(filter_timeout_s=0.2)
    with node_with(tiny_release, settings=settings, image_filter=load) as client:
        status, body, _ = client.ask("/readyz")
        assert status == 503 and "image filter" in json.loads(body)["problems"][0]
        status, answer, headers = client.generate(seed=1)
        assert status == 503 and "data" not in answer and answer["error"]["code"] == "not_ready"
        assert int(headers["retry-after"]) >= 1
        assert client.metric("modelops_ready") == 0
        assert client.ask("/livez")[0] == 200
    hanging.release.set()


def test_a_filter_that_breaks_later_gives_no_pixels_and_can_recover(tiny_release: Path) -> None:
    image_filter = OpenNsfwFilter(threads=1)
    with node_with(tiny_release, image_filter=lambda: image_filter) as client:
        assert client.generate(seed=1, steps=1)[0] == 200
        classifier, image_filter._classifier = image_filter._classifier, None
        status, answer, _ = client.generate(seed=1, steps=1)
        assert status == 503 and answer["error"]["code"] == "safety_filter_unavailable"
        assert "data" not in answer
        assert client.ask("/readyz")[0] == 503
        assert client.metric('modelops_filter_failures_total{filter="image",name="custom"}') >= 1
        image_filter._classifier = classifier
        wait_until(lambda: client.ask("/readyz")[0] == 200)
        assert client.generate(seed=1, steps=1)[0] == 200


def test_a_flagged_picture_is_withheld(tiny_release: Path) -> None:
    class Strict(OpenNsfwFilter):
        """The real scores against a threshold that only the golden image stays below."""

        calls = 0

        def check(self, images: Any, **options: Any) -> list[ImageVerdict]:
            verdicts = super().check(images, **options)
            self.calls += 1
            if self.calls == 1:
                return verdicts
            return [ImageVerdict(verdict.score, True) for verdict in verdicts]

    with node_with(tiny_release, image_filter=Strict) as client:
        status, answer, _ = client.generate(seed=1, steps=1)
        assert status == 400 and answer["error"]["code"] == "content_policy_violation"
        assert client.metric('modelops_filter_triggers_total{filter="image",name="custom"}') == 1


@pytest.mark.parametrize("fault", ["open", "closed", "raises"])
def test_a_prompt_filter_that_fails_its_probe_is_red(tiny_release: Path, fault: str) -> None:
    def load() -> Any:
        if fault == "open":
            return WordListFilter({"none": ["zzzzzz"]})
        if fault == "closed":
            return WordListFilter({"all": ["sun", "smiling"]})
        raise OSError("disk is gone")

    with node_with(tiny_release, prompt_filter=load) as client:
        assert client.ask("/readyz")[0] == 503
        assert client.generate(seed=1)[0] == 503


def test_a_changed_release_is_not_opened(tiny_release: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_release, tmp_path / "release")
    weights = copy / "model/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed"):
        InferenceNode(copy)


def test_another_models_golden_image_is_red(tiny_release: Path, tmp_path: Path) -> None:
    from modelops.releases.build import build_release
    from modelops.releases.verify import verify_release

    record = verify_release(tiny_release)
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(tmp_path / "golden.png")
    build_release(
        tmp_path / "release",
        model_dir=tiny_release / "model",
        verdict=tiny_release / "verdict.json",
        name="tiny",
        version="0.2",
        defaults=record.defaults,
        extra_files={"golden.png": tmp_path / "golden.png"},
    )
    with node_with(tmp_path / "release") as client:
        status, body, _ = client.ask("/readyz")
        assert status == 503 and "grey levels" in json.loads(body)["problems"][0]
        assert client.generate()[0] == 503


def test_api_keys(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = ",".join(hashlib.sha256(key).hexdigest() for key in (b"old-key", b"new-key"))
    monkeypatch.setenv("MODELOPS_API_KEYS", digests)
    with http(client.node) as guarded:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "new-key"}):
            status, body, _ = guarded.ask("/v1/models", headers=header)
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        for key in ("old-key", "new-key"):
            assert guarded.ask("/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert guarded.ask("/livez")[0] == 200
    monkeypatch.setenv("MODELOPS_API_KEYS", "not-a-digest")
    with pytest.raises(UsageError, match="MODELOPS_API_KEYS"):
        create_app(client.node)


def test_settings_come_from_the_environment() -> None:
    settings = NodeSettings.from_environment(
        {"MODELOPS_MAX_ROWS": "4", "MODELOPS_DEADLINE_S": "1.5", "MODELOPS_RUNTIME": "openvino"}
    )
    assert (settings.max_rows, settings.deadline_s, settings.runtime) == (4, 1.5, "openvino")
    for name, value in (("QUEUE_LIMIT", "many"), ("QUEUE_LIMIT", "0"), ("DEADLINE_S", "nan")):
        with pytest.raises(UsageError, match=name):
            NodeSettings.from_environment({f"MODELOPS_{name}": value})


def test_filters_are_chosen_by_name(tiny_release: Path, tmp_path: Path) -> None:
    """Own lists reach the guard; a name that is not known stops the node before it is made."""
    (tmp_path / "own.txt").write_text("zebra\nporn*\n")
    chosen = NodeSettings.from_environment({"MODELOPS_PROMPT_FILTER": f"words:{tmp_path}"})
    node = InferenceNode(tiny_release, settings=chosen)
    try:
        node.prompt_guard.load()
        assert node.prompt_guard.check_prompt("a zebra") == (True, ["own: zebra"])
        assert not node.prompt_guard.check_prompt("a nude")[0]
    finally:
        node.close(drain=False)
    for name in ("PROMPT_FILTER", "IMAGE_FILTER"):
        unknown = NodeSettings.from_environment({f"MODELOPS_{name}": "none"})
        with pytest.raises(UsageError, match="filter 'none'"):
            InferenceNode(tiny_release, settings=unknown)


def test_a_guard_that_hung_refuses_at_once() -> None:
    hanging = Hangs()
    guard = FilterGuard("image", lambda: hanging, timeout_s=0.05)
    guard.load()
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(FilterError, match="no answer"):
        guard.check_images([image])
    with pytest.raises(FilterError, match="still hangs"):
        guard.check_images([image])
    assert guard.reason
    hanging.release.set()

    def probe() -> None:
        guard.check_images([image])

    wait_until(lambda: guard.probe(probe))
    assert guard.reason is None
    guard.close()
