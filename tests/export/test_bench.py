"""What a row of the bench says was done is what was done: rows, threads, requests, references."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modelops.base.environment import Environment
from modelops.base.errors import UsageError
from modelops.base.files import sha256_tree
from modelops.evaluation.sources.endpoint import EndpointSource
from modelops.evaluation.sources.folder import FolderSource
from modelops.evaluation.sources.open import open_source
from modelops.export.bench import (
    Contender,
    bench_sources,
    compiled_source,
    find_checkpoint,
    make_contenders,
)
from modelops.export.timing import interleaved_seconds
from modelops.models.request import ImageRequest
from modelops.models.sources import ModelSource, PipelineSource, open_checkpoint
from modelops.records.base import InputRef
from modelops.records.evaluation import SourceInfo
from modelops.records.export import ArtifactRecord


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small unconditional DDPM pipeline, 8 px. Read only."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("ddpm") / "checkpoint"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(directory)
    return directory


class Still(ModelSource):
    """A source without a network: an image at once."""

    scheduler_name = "none"

    def __init__(self, name: str, kind: Any = "artifact", fails: str = "") -> None:
        self.info = SourceInfo(kind=kind, uri=name, runtime="still-cpu", precision="uint8")
        self.fails = fails
        self.seeds: list[list[int]] = []

    @property
    def defaults(self) -> ImageRequest:
        return ImageRequest(prompt="", seed=0)

    def generate(self, requests: Sequence[ImageRequest]) -> list[Any]:
        if self.fails:
            raise RuntimeError(self.fails)
        self.seeds.append([request.seed for request in requests])
        return [np.zeros((2, 2, 3), np.uint8) for _ in requests]


def contender(source: Any, **options: Any) -> Contender:
    return Contender(lambda threads: source, **options)


def test_a_batch_is_one_call_of_so_many_rows_on_so_many_threads(unconditional: Path) -> None:
    source = open_checkpoint(unconditional)
    assert source.traits.fixed_size  # measured by calls of its own
    calls: list[tuple[int, int]] = []
    source.pipeline.unet.register_forward_pre_hook(
        lambda module, inputs: calls.append((torch.get_num_threads(), len(inputs[0])))
    )
    before = torch.get_num_threads()
    result = bench_sources(
        [contender(source)], batch_sizes=(1, 3), threads=(1, 2), steps=2, rounds=2
    )
    assert torch.get_num_threads() == before
    # two calls that warm up and two rounds, each of two steps; the second round runs backwards
    assert [call for call in calls if call[1] == 1] == [
        *[(1, 1)] * 4, *[(2, 1)] * 4, (1, 1), (1, 1), *[(2, 1)] * 4, (1, 1), (1, 1)
    ]  # fmt: skip
    assert len([call for call in calls if call[1] == 3]) == 16
    assert {rows for _, rows in calls} == {1, 3}
    assert [(row.batch_size, row.threads) for row in result.rows] == [
        (1, 1),
        (1, 2),
        (3, 1),
        (3, 2),
    ]
    for row in result.rows:
        assert row.n == 2
        assert row.speedup is None
        assert row.p50_s <= row.p95_s
        assert row.images_per_second == pytest.approx(row.batch_size / row.p50_s)


def test_rounds_are_as_many_as_fit_but_not_too_few() -> None:
    calls: list[int] = []
    runs = {"a": lambda: calls.append(0), "b": lambda: calls.append(1)}
    seconds = interleaved_seconds(runs, rounds=9, warmup=0, limit_s=0.0, least_rounds=4)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    assert (calls.count(0), calls.count(1)) == (4, 4)
    assert len(interleaved_seconds(runs, rounds=3, limit_s=0.0)["a"]) == 3
    assert len(interleaved_seconds(runs, rounds=6)["a"]) == 6


def test_every_round_has_its_own_seeds() -> None:
    source = Still("a")
    bench_sources([contender(source)], batch_sizes=(2,), rounds=3)
    assert source.seeds == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_speed_is_over_eager_torch_and_a_failed_compile_is_left_out() -> None:
    sources = [Still("artifact"), Still("eager", "checkpoint"), Still("service", "endpoint")]
    broken = Still("eager", "checkpoint", fails="no compiler\nand a long story")
    result = bench_sources(
        [
            contender(sources[0]), contender(sources[1]), contender(broken, compiled=True),
            contender(sources[2], has_threads=False),
        ],
        batch_sizes=(2, 4), threads=(1, 2), rounds=3,
    )  # fmt: skip
    names = ["artifact", "eager", "artifact", "eager", "service"] * 2
    assert [row.name for row in result.rows] == names
    assert [row.threads for row in result.rows[:5]] == [1, 1, 2, 2, None]
    assert [row.speedup is None for row in result.rows[:5]] == [False, True, False, True, False]
    over = [row.speedup.details["over"] for row in result.rows[:5] if row.speedup]
    assert over == ["1:eager:1", "1:eager:2", "1:eager:2"]
    assert result.notes == [
        f"torch.compile of eager is left out at batch 2, {threads} threads: no compiler"
        for threads in (1, 2)
    ]
    with pytest.raises(RuntimeError, match="no compiler"):
        bench_sources([contender(broken)])


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source"):
        bench_sources([])
    for wrong in ({"batch_sizes": ()}, {"threads": (0,)}, {"rounds": 0}, {"steps": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            bench_sources([contender(Still("a"))], **wrong)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="a folder of images makes none"):
        bench_sources([contender(FolderSource(tmp_path), has_threads=False)])


@pytest.fixture
def service() -> Iterator[str]:
    """Answers only when three requests are waiting at once."""
    together = threading.Barrier(3, timeout=20)
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    answer = json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send("{}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait()
            self._send(answer)

        def _send(self, text: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_gets_a_batch_as_requests_at_once(service: str) -> None:
    contenders, notes = make_contenders([service], open_source=open_source)
    result = bench_sources(contenders, batch_sizes=(3,), threads=(1, 2), rounds=2)
    assert [(row.threads, row.n) for row in result.rows] == [(None, 2)]
    assert notes == [f"{service}: no baseline: a service names no checkpoint; --baseline CHECKPOINT names one"]  # noqa: E501  # fmt: skip
    source = contenders[0].open(1)
    assert isinstance(source, EndpointSource)
    source.close()


def artifact_of(checkpoint: Path, folder: Path, *, path: str) -> Path:
    """A directory that says it was exported from a checkpoint."""
    folder.mkdir(parents=True)
    inputs = {"checkpoint": InputRef(path=path, sha256=sha256_tree(checkpoint))}
    record = ArtifactRecord(
        format="onnx", precision="float32", runtime="onnxruntime", inputs=inputs,
        environment=Environment(modelops="", python="", platform=""),
    )  # fmt: skip
    record.write(folder / "artifact.json")
    return folder


def test_an_artifact_brings_the_checkpoint_it_was_made_from(
    unconditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "demo" / "runs" / "step-1"
    shutil.copytree(unconditional, checkpoint)
    artifact = artifact_of(checkpoint, tmp_path / "demo" / "artifacts" / "onnx", path="runs/step-1")
    assert find_checkpoint(artifact) == (checkpoint, None)
    monkeypatch.chdir(tmp_path / "demo")
    assert find_checkpoint("artifacts/onnx") == (Path("runs/step-1"), None)
    for named in ([str(artifact)], [str(artifact), "runs/step-1"]):
        contenders, notes = make_contenders(named, open_source=open_source)
        assert notes == []
        # eager and compiled beside the artifact, once, whether it was named or found
        assert sorted(c.compiled for c in contenders) == [False, False, True]
    (checkpoint / "model_index.json").write_text("{}")
    assert find_checkpoint(artifact)[1] == (
        f"{artifact}: no baseline: runs/step-1 has changed since; --baseline CHECKPOINT names one"
    )
    shutil.rmtree(checkpoint)
    contenders, notes = make_contenders([str(artifact)], open_source=open_source)
    assert notes == [
        f"{artifact}: no baseline: runs/step-1 is not here; --baseline CHECKPOINT names one"
    ]
    assert len(contenders) == 1
    # one that is given stands in for what is not found, and is not compiled where that is unwanted
    contenders, notes = make_contenders(
        [str(artifact)], open_source=open_source, baseline=str(unconditional), with_compile=False
    )
    assert notes == []
    assert contenders[0].open(1).info.uri == str(unconditional)
    assert len(contenders) == 2


def test_without_a_compiler_one_line_says_so(
    unconditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    contenders, notes = make_contenders([str(unconditional)], open_source=open_source)
    assert len(contenders) == 1
    assert len(notes) == 1
    assert "needs a C++ compiler" in notes[0]


def test_the_compiled_twin_shares_weights_and_leaves_the_original_eager(
    unconditional: Path,
) -> None:
    from diffusers import AutoencoderKL

    source = open_checkpoint(unconditional)
    twin = compiled_source(source)
    eager, compiled = source.pipeline.unet, twin.pipeline.unet
    assert twin.info.runtime == "torch-compile-cpu"
    assert eager._compiled_call_impl is None
    assert compiled._compiled_call_impl is not None
    assert compiled.conv_in.weight.data_ptr() == eager.conv_in.weight.data_ptr()
    # of an autoencoder (here in the unet's place) the decoder alone is compiled
    original = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    source.pipeline.unet = original
    vae = compiled_source(source).pipeline.unet
    assert vae is not original
    assert vae._compiled_call_impl is None
    assert vae.decoder._compiled_call_impl is not None
    assert original.decoder._compiled_call_impl is None


@pytest.mark.slow
def test_torch_compile_makes_the_same_pictures_at_every_size(unconditional: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    contenders, notes = make_contenders([str(unconditional)], open_source=open_source)
    result = bench_sources(contenders, batch_sizes=(1, 2), threads=(1,), steps=2, rounds=1)
    assert notes + result.notes == []
    assert [row.runtime for row in result.rows] == ["torch-cpu", "torch-compile-cpu"] * 2
    eager, compiled = (item.open(1) for item in contenders)
    assert isinstance(eager, PipelineSource)
    request = [ImageRequest(prompt="", seed=1, steps=2)]
    first, second = (np.array(item.generate(request), np.int16) for item in (eager, compiled))
    assert np.abs(first - second).max() <= 1
