"""A folder of real releases, and a rollout of them behind a real HTTP server."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from modelops.serving.http.app import create_app
from modelops.serving.node.node import InferenceNode
from modelops.serving.rollout.rollout import Rollout, open_rollout
from modelops.serving.settings import NodeSettings
from project_records import verdict_on
from waiting import wait_until

EVERY = ("stable", "next", "twin", "golden", "torn")


def build_releases(
    folder: Path, checkpoint: Path, other_checkpoint: Path, names: Sequence[str] = EVERY
) -> None:
    """stable (tiny 0.1), next (tiny 0.2, other weights), twin (0.3, the stable one's weights),
    golden (0.4, whose golden image is another model's) and torn (0.5, changed after its release).
    """
    from modelops.base.files import sha256_tree
    from modelops.releases.build import build_release
    from modelops.serving.node.golden import make_golden

    pictures = {"own": folder.parent / "own.png", "other": folder.parent / "other.png"}
    golden = make_golden(checkpoint, pictures["own"])
    make_golden(other_checkpoint, pictures["other"])
    for name, version, model, picture in (
        ("stable", "0.1", checkpoint, "own"), ("next", "0.2", other_checkpoint, "other"),
        ("twin", "0.3", checkpoint, "own"), ("golden", "0.4", checkpoint, "other"),
        ("torn", "0.5", checkpoint, "own"),
    ):  # fmt: skip
        if name not in names:
            continue
        verdict = folder.parent / f"{name}.json"
        verdict_on(sha256_tree(model)).write(verdict)
        build_release(
            folder / name, model_dir=model, verdict=verdict, name="tiny", version=version,
            defaults={"golden": golden, "steps": 4, "guidance": 3.0},
            extra_files={"golden.png": pictures[picture]}, notice="Made for a test.",
        )  # fmt: skip
    if "torn" not in names:
        return
    weights = next((folder / "torn").rglob("unet/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


def second_checkpoint(checkpoint: Path, directory: Path) -> Path:
    """The same pipeline with other weights."""
    import torch

    from modelops.models.sources import load_checkpoint

    shutil.copytree(checkpoint, directory)
    pipeline = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    pipeline.unet.save_pretrained(directory / "unet")
    return directory


@dataclass
class Caller:
    """Somebody with keys to a server that swaps releases."""

    url: str
    admin: str = ""
    user: str = ""

    def post(
        self, path: str, body: Any = None, *, key: str | None = None, request_id: str | None = None
    ) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        key = self.admin if key is None else key
        if key:
            headers["Authorization"] = f"Bearer {key}"
        if request_id:
            headers["X-Request-Id"] = request_id
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def swap(self, action: str = "", body: Any = None) -> tuple[int, Any]:
        return self.post(f"/admin/swap{'/' + action if action else ''}", body)

    def text(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return str(answer.read().decode())


@dataclass
class LiveFleet(Caller):
    """A server of this process, so that its rollout can be looked into."""

    rollout: Rollout = field(kw_only=True)


@dataclass
class Load:
    """Clients that ask without a pause; every answer is kept."""

    live: Caller
    answers: list[tuple[str, int, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self, clients: int = 3, **body: Any) -> Iterator[Load]:
        stop = threading.Event()

        def ask(client: int) -> None:
            number = 0
            while not stop.is_set():
                name = f"{client}-{number}"
                wanted = {"prompt": "red heart", "seed": 7, "steps": 2, "guidance": 1.0, **body}
                status, answer = self.live.post(
                    "/v1/images/generations", wanted, key=self.live.user or "", request_id=name
                )
                self.answers.append((name, status, answer))
                number += 1

        threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)

    def more(self, count: int) -> None:
        """Wait until so many more answers have come."""
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal)

    def releases(self) -> dict[str, str]:
        """Release digest by request; every answer was an image."""
        bad = [(name, status, answer) for name, status, answer in self.answers if status != 200]
        assert not bad, bad[:3]
        return {
            name: answer["data"][0]["x_modelops"]["release"]["sha256"]
            for name, _, answer in self.answers
        }


@contextlib.contextmanager
def live(
    releases: Path,
    keys: Path | None = None,
    *,
    rollout: Rollout | None = None,
    settings: NodeSettings | None = None,
    monkeypatch: Any = None,
) -> Iterator[LiveFleet]:
    """A rollout whose stable release is `releases/stable`."""
    admin = user = ""
    if keys is not None:
        from modelops.serving.http.keys import create_key

        admin, user = create_key(keys, "ops", admin=True), create_key(keys, "alice")
        monkeypatch.setenv("MODELOPS_API_KEYS_FILE", str(keys))
    settings = settings or NodeSettings(max_rows=4, profile_s=0, releases=str(releases))
    rollout = rollout or open_rollout(
        releases / "stable", settings, lambda path: InferenceNode(path, settings=settings)
    )
    rollout.stable.start()
    server = uvicorn.Server(
        uvicorn.Config(create_app(rollout=rollout), host="127.0.0.1", port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield LiveFleet(f"http://127.0.0.1:{port}", admin, user, rollout=rollout)
    finally:
        server.should_exit = True
        thread.join(20)
        rollout.close(drain=False, timeout_s=10)


def pixels(answer: Any) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)
