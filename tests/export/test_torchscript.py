"""What torch alone loads: equal to its source, the same bytes again, and no trace of modelops."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelops.base.errors import ExportError, UsageError
from modelops.export.runtimes.torchscript import (
    TorchGraph,
    write_exported_program,
    write_torchscript,
)
from modelops.models.pipelines.signatures import Example

WRITERS = [("model.pt", write_torchscript), ("model.pt2", write_exported_program)]
Writer = Callable[..., list[str]]


class Denoiser(nn.Module):
    """Two convolutions, a timestep, a masked mean over tokens; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)
        self.text = nn.Linear(6, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = mask[:, :, None].to(tokens.dtype)
        pooled = self.text((tokens * weights).sum(1) / weights.sum(1))
        hidden = self.first(sample) + pooled[:, :, None, None]
        return self.second(hidden * torch.sin(timestep / 100)[:, None, None, None]), pooled


def make_example() -> Example:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "sample": (
            torch.randn(2, 4, 8, 8, generator=generator), {0: "batch", 2: "height", 3: "width"}
        ),
        "timestep": (torch.tensor([250.0, 750.0]), {0: "batch"}),
        "tokens": (torch.randn(2, 5, 6, generator=generator), {0: "batch", 1: "length"}),
        "mask": (mask, {0: "batch", 1: "length"}),
    }  # fmt: skip


AXES = [
    "sample[0]=batch", "sample[2]=height", "sample[3]=width", "timestep[0]=batch",
    "tokens[0]=batch", "tokens[1]=length", "mask[0]=batch", "mask[1]=length",
]  # fmt: skip


@pytest.fixture(scope="module")
def module() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


@pytest.fixture(scope="module")
def files(module: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torch") / "denoiser"
    for name, write in WRITERS:
        axes = write(module, make_example(), folder / name, outputs=("velocity", "pooled"))
        assert axes == AXES
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "model.pt2"]
    return {name: folder / name for name, _ in WRITERS}


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
@pytest.mark.parametrize(("rows", "height", "width", "length"), [(1, 8, 8, 5), (7, 12, 20, 9)])
def test_the_file_is_its_source_at_other_sizes(
    files: dict[str, Path], module: Denoiser, name: str, rows: int, height: int, width: int,
    length: int,
) -> None:  # fmt: skip
    generator = np.random.default_rng(rows)
    feed: dict[str, Any] = {
        "sample": generator.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": np.linspace(1, 999, rows, dtype=np.float32),
        "tokens": generator.standard_normal((rows, length, 6)).astype(np.float32),
        "mask": np.ones((rows, length), np.int64),
    }
    graph = TorchGraph(files[name], threads=1)
    assert graph.input_names == ["sample", "timestep", "tokens", "mask"]
    assert graph.output_names == ["velocity", "pooled"]
    assert (graph.runtime, graph.precision) == (
        {"model.pt": "torchscript", "model.pt2": "torch-export"}[name], "float32",
    )  # fmt: skip
    with torch.no_grad():
        expected = module(*(torch.from_numpy(feed[key]) for key in graph.input_names))
    for output, reference in zip(graph.run_all(feed), expected, strict=True):
        np.testing.assert_allclose(output, reference.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(graph.run(feed), graph.run_all(feed)[0])


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_the_same_weights_give_the_same_bytes(
    files: dict[str, Path], tmp_path: Path, name: str, write: Writer
) -> None:
    torch.manual_seed(0)
    again = tmp_path / "elsewhere" / name
    write(Denoiser(), make_example(), again, outputs=("velocity", "pooled"))
    assert again.read_bytes() == files[name].read_bytes()
    here = Path(torch.__file__).parents[2]
    with zipfile.ZipFile(again) as archive:
        for record in archive.namelist():
            data = archive.read(record)
            assert str(here).encode() not in data, record
            assert str(Path(__file__).parent).encode() not in data, record


def test_torch_loads_them_without_modelops(
    files: dict[str, Path], module: Denoiser, tmp_path: Path
) -> None:
    script = """
import json, sys
sys.modules["modelops"] = None  # importing it raises ImportError
sys.modules["diffusers"] = None
import torch
import warnings
warnings.simplefilter("ignore")
extra = {"interface.json": ""}
traced = torch.jit.load(sys.argv[1], _extra_files=extra)
program = torch.export.load(sys.argv[2]).module()
generator = torch.Generator().manual_seed(1)
inputs = [torch.randn(3, 4, 6, 10, generator=generator), torch.tensor([1.0, 400.0, 999.0]),
          torch.randn(3, 4, 6, generator=generator), torch.ones(3, 4, dtype=torch.int64)]
with torch.no_grad():
    sums = [[value.double().sum().item() for value in run(*inputs)] for run in (traced, program)]
print(json.dumps([sums, json.loads(extra["interface.json"])]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(files["model.pt"]), str(files["model.pt2"])],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sums, interface = json.loads(done.stdout)
    generator = torch.Generator().manual_seed(1)
    inputs = (
        torch.randn(3, 4, 6, 10, generator=generator), torch.tensor([1.0, 400.0, 999.0]),
        torch.randn(3, 4, 6, generator=generator), torch.ones(3, 4, dtype=torch.int64),
    )  # fmt: skip
    with torch.no_grad():
        expected = [value.double().sum().item() for value in module(*inputs)]
    assert sums == [pytest.approx(expected, rel=1e-5)] * 2
    assert interface["inputs"][3] == {"name": "mask", "dtype": "int64"}
    assert interface["outputs"] == ["velocity", "pooled"]


class Branching(nn.Module):
    """Python decides by what a trace does not see."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if self.by == "batch":
            return sample * (3.0 if sample.shape[0] == 1 else 2.0)
        if self.by == "value":
            return sample * (2.0 if float(sample.flatten()[0]) > 1.5 else 0.5)
        return sample * float(sample.shape[2])


def test_a_trace_that_follows_the_example_is_refused(tmp_path: Path) -> None:
    sample = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sample[0, 0, 0, 0] = 2.0
    example: Example = {"sample": (sample, {0: "batch", 2: "height"})}
    with pytest.raises(ExportError, match=r"differs from its source at \{'batch': 1\}"):
        write_torchscript(Branching("batch"), example, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="differs from its source: relative error"):
        write_torchscript(Branching("value"), example, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
    # a length that is built in is no error: it is not among the axes
    axes = write_torchscript(Branching("height"), example, tmp_path / "model.pt")
    assert axes == ["sample[0]=batch"]


def test_an_axis_that_the_module_fixes_is_no_dynamic_axis(tmp_path: Path) -> None:
    example: Example = {"sample": (torch.randn(2, 6), {0: "batch", 1: "width"})}
    assert write_torchscript(nn.Linear(6, 2), example, tmp_path / "model.pt") == ["sample[0]=batch"]
    with pytest.raises(ExportError, match="cannot be captured"):
        write_exported_program(nn.Linear(6, 2), example, tmp_path / "model.pt2")


def test_half_precision_comes_back_as_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    half = nn.Linear(6, 3).to(torch.bfloat16)
    example: Example = {"x": (torch.randn(2, 6).to(torch.bfloat16), {0: "batch"})}
    rows = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    with torch.no_grad():
        expected = half(torch.from_numpy(rows).to(torch.bfloat16)).float().numpy()
    for name, write in WRITERS:
        write(half, example, tmp_path / name)
        graph = TorchGraph(tmp_path / name)
        assert graph.precision == "bfloat16"
        output = graph.run({"x": rows})
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, expected, rtol=2e-2, atol=2e-2)
    assert all(parameter.requires_grad for parameter in half.parameters())


def test_what_is_no_such_file_is_refused_in_a_line(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither model\.pt nor model\.pt2"):
        TorchGraph(tmp_path / "model.onnx")
    for name in ("model.pt", "model.pt2"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(ExportError, match="torch cannot load it"):
            TorchGraph(tmp_path / name)
    feed: dict[str, Any] = {
        "sample": np.zeros((2, 4, 8, 8), np.float32), "timestep": np.zeros(3, np.float32),
        "tokens": np.zeros((2, 5, 6), np.float32), "mask": np.ones((2, 5), np.int64),
    }  # fmt: skip
    for path in files.values():
        with pytest.raises(ExportError, match="refuses"):
            TorchGraph(path).run(feed)


def test_a_pickle_inside_is_not_read(files: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(files["model.pt2"]) as source:
        records = {name: source.read(name) for name in source.namelist()}
    assert records["model/data/sample_inputs/model.pt"] == b""
    config = "model/data/weights/model_weights_config.json"
    about = json.loads(records[config])
    about["config"]["text.bias"]["use_pickle"] = True
    for name, data in (
        (config, json.dumps(about).encode()),
        ("model/data/sample_inputs/model.pt", b"cos\nsystem\n(S'true'\ntR."),
    ):
        path = tmp_path / "model.pt2"
        with zipfile.ZipFile(path, "w") as target:
            for key, value in (records | {name: data}).items():
                target.writestr(key, value)
        with pytest.raises(ExportError, match="pickle"):
            TorchGraph(path)
