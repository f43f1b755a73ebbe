"""What is verified is what is served, whatever happens to the released files later."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelops.base.errors import IntegrityError, ModelopsError
from modelops.base.files import sha256_tree
from modelops.models.request import ImageRequest
from modelops.models.sources import open_checkpoint
from modelops.serving.node.load import open_model
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from modelops.serving.workers import Worker
from waiting import wait_until

REQUEST = ImageRequest(prompt="sun", seed=3, steps=2, guidance=3.0, height=32, width=32)


@pytest.fixture
def release(tiny_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_release, tmp_path / "release"))


@pytest.fixture
def node(release: Path) -> Iterator[InferenceNode]:
    node = InferenceNode(release, settings=NodeSettings(profile_s=0, golden_every_s=1e-9))
    node.start()
    yield node
    node.close(drain=False, timeout_s=10)


def drawn(node: InferenceNode) -> bytes:
    return node.engine.submit([REQUEST])[0].future.result(60).pixels.tobytes()


def mapped(pid: int | str = "self") -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(None, 5)[5] for line in lines if "safetensors" in line}


def weights_of(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def test_weights_that_are_overwritten_in_place_change_no_image(
    release: Path, node: InferenceNode
) -> None:
    before = drawn(node)
    for path in weights_of(release / "model"):
        with path.open("r+b") as handle:
            handle.seek(path.stat().st_size // 4)
            handle.write(b"\xff" * (path.stat().st_size // 2))
    assert drawn(node) == before and not node.readiness()
    assert not any(str(release) in name for name in mapped())
    with pytest.raises(IntegrityError):
        InferenceNode(release, settings=NodeSettings(profile_s=0))


def test_weights_that_are_cut_off_kill_no_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    program = (
        "import os, sys; from pathlib import Path\n"
        "from modelops.models.request import ImageRequest\n"
        "from modelops.models.sources import open_checkpoint\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "[os.truncate(path, 64) for path in Path(sys.argv[1]).rglob('*.safetensors')]\n"
        "wanted = ImageRequest(prompt='sun', seed=3, steps=2, guidance=3.0, height=32, width=32)\n"
        "print(source.generate([wanted])[0].shape)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "(32, 32, 3)"


def test_a_source_says_the_digest_of_what_it_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    digest = sha256_tree(model)
    source = open_checkpoint(model)
    before = source.generate([REQUEST])[0]
    weights_of(model)[0].write_bytes(b"")
    assert source.info.sha256 == digest and source.info.uri == str(model)
    np.testing.assert_array_equal(source.generate([REQUEST])[0], before)
    with pytest.raises(ModelopsError, match=r"model: cannot be loaded"):
        open_checkpoint(model)


def test_a_model_that_changed_after_it_was_verified_is_refused(release: Path) -> None:
    with (release / "model/model_index.json").open("a") as handle:
        handle.write("\n")
    with pytest.raises(IntegrityError, match="changed: its sha256 is"):
        open_model(release / "model", sha256=sha256_tree(release))


def test_the_workers_of_a_node_map_one_copy(tiny_checkpoint: Path, tmp_path: Path) -> None:
    digest = sha256_tree(tiny_checkpoint)
    opened, files = [], []
    for index in (1, 2):
        worker = Worker(index=index, count=2, directory=tmp_path)
        before = mapped()
        opened.append(open_model(tiny_checkpoint, worker=worker, sha256=digest))
        files.append(mapped() - before)
    assert files[0] and not files[1]  # the same files again
    assert all(name.startswith(str(tmp_path)) for name in files[0])
    del opened
    assert not list(tmp_path.glob("modelops-model-*"))


def test_a_node_whose_weights_change_in_memory_is_no_longer_ready(node: InferenceNode) -> None:
    assert node.readiness() == []
    for weights in node.opened.pipeline.unet.parameters():
        weights.data.add_(0.5)
    node.readiness()
    wait_until(lambda: bool(node.problems()))
    assert "that of the start; restart the node" in node.problems()[0]
    assert not node.golden_ok
