"""Graphs on disk: external data, what cannot be exported and why, and killed writers."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from modelops.base.errors import ExportError, IntegrityError, ModelopsError, UsageError
from modelops.export.graphs.axes import read_axes
from modelops.export.graphs.external import (
    check_data,
    check_memory,
    copy_graph,
    data_path,
    free_memory,
    load_graph,
    load_structure,
    save_graph,
)
from modelops.export.onnx.writer import FixedAxesError, write_graph
from modelops.export.runtimes.onnxruntime import OrtGraph


class Mixer(torch.nn.Module):
    """Rows and a table without a batch: scaled rows plus what the table says of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.table = torch.nn.Linear(48, 48), torch.nn.Linear(3, 48)

    def forward(
        self, rows: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table(ids)
        return self.rows(rows) * scale + table, table


EXAMPLE: Any = {
    "rows": (torch.randn(2, 5, 48), {0: "batch", 1: "tokens"}),
    "ids": (torch.randn(5, 3), {0: "tokens"}),
    "scale": (torch.tensor(2.0), {}),
}
OUTPUTS: Any = {"mixed": {0: "batch", 1: "tokens"}, "table": {0: "tokens"}}


def _feed(rows: int, tokens: int = 7) -> dict[str, Any]:
    generator = np.random.default_rng(rows)
    return {
        "rows": generator.standard_normal((rows, tokens, 48), np.float32),
        "ids": generator.standard_normal((tokens, 3), np.float32),
        "scale": np.array(0.5, np.float32),
    }


@pytest.fixture(scope="module")
def mixer(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path, Path]:
    """A module, its graph, and the same with its weights outside."""
    torch.manual_seed(0)
    module, root = Mixer().eval(), tmp_path_factory.mktemp("graphs")
    inside, outside = root / "inside" / "model.onnx", root / "outside" / "model.onnx"
    write_graph(module, EXAMPLE, inside, opset=20, outputs=OUTPUTS)
    write_graph(module, EXAMPLE, outside, opset=20, outputs=OUTPUTS, external_bytes=1000)
    return module, inside, outside


def test_weights_outside_the_graph_are_the_same_weights(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    module, inside, outside = mixer
    assert not data_path(inside).exists()
    data = check_data(outside)
    assert data is not None
    assert data.name == "model.onnx.data"
    assert outside.stat().st_size < inside.stat().st_size / 2
    one, two = load_graph(inside), load_graph(outside)
    arrays = [
        {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in m.graph.initializer}
        for m in (one, two)
    ]
    assert arrays[0] == arrays[1]
    structure = onnx.load(str(outside), load_external_data=False)
    for item in structure.graph.initializer:
        entries = {e.key: e.value for e in item.external_data}
        if entries:
            assert entries["location"] == "model.onnx.data"
            assert int(entries["offset"]) % 4096 == 0
    onnx.checker.check_model(str(outside), full_check=True)
    assert OrtGraph(outside).run(_feed(3)).tobytes() == OrtGraph(inside).run(_feed(3)).tobytes()
    # the same weights give the same bytes, and going back inside leaves no data file
    again = tmp_path / "again" / "model.onnx"
    write_graph(module, EXAMPLE, again, opset=20, outputs=OUTPUTS, external_bytes=1000)
    assert again.read_bytes() == outside.read_bytes()
    assert data_path(again).read_bytes() == data.read_bytes()
    save_graph(two, again)
    assert not data_path(again).exists()
    copy = tmp_path / "copy" / "model.onnx"
    copy_graph(outside, copy)
    assert check_data(copy) == data_path(copy)


def test_quantisation_with_weights_outside(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    target = tmp_path / "model.onnx"
    quantize_dynamic(str(mixer[2]), str(target), use_external_data_format=True)
    check_data(target)
    expected, got = OrtGraph(mixer[2]).run(_feed(2)), OrtGraph(target).run(_feed(2))
    assert np.abs(expected - got).max() < 0.05 * np.abs(expected).max()


def test_the_structure_is_the_graph_without_its_values(
    mixer: tuple[torch.nn.Module, Path, Path],
) -> None:
    for path in mixer[1:]:
        structure, whole = load_structure(path), load_graph(path)
        assert sum(len(i.raw_data) for i in structure.graph.initializer) <= 1024
        for item in (*structure.graph.initializer, *whole.graph.initializer):
            for name in ("raw_data", "external_data", "data_location"):
                item.ClearField(name)
        assert structure.SerializeToString(True) == whole.SerializeToString(True)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x3a\xff\xff\xff\x7f", bytes(64)])
def test_files_that_are_no_graphs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model.onnx: (not an ONNX graph|an empty file)"):
        load_structure(path)
    with pytest.raises(UsageError, match="No such file"):
        load_structure(tmp_path / "none.onnx")


@pytest.mark.parametrize("length", [10, 1000, 5000])
def test_a_graph_cut_short_is_refused(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path, length: int
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(mixer[1].read_bytes()[:length])
    with pytest.raises(ExportError, match="not an ONNX graph"):
        load_structure(path)


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/hostname", "other.data", "./model.onnx.data", ""]
)
def test_weights_from_elsewhere_are_refused(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path, location: str
) -> None:
    path = tmp_path / "folder" / "model.onnx"
    copy_graph(mixer[2], path)
    shutil.copyfile(data_path(path), tmp_path / "model.onnx.data")
    shutil.copyfile(data_path(path), path.with_name("other.data"))
    model = onnx.load(str(path), load_external_data=False)
    for item in model.graph.initializer:
        for entry in item.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=r"may only lie in model\.onnx\.data"):
        load_graph(path)


def test_a_constant_from_elsewhere_is_refused(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    model = load_graph(mixer[1])
    value = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    value.external_data.add(key="location", value="model.onnx.data")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=value))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="may only lie in"):
        check_data(path)


def test_a_data_file_that_is_not_whole(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    copy_graph(mixer[2], path)
    data = data_path(path)
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="does not lie within it"):
        read_axes(path)
    data.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        read_axes(path)
    (tmp_path / "elsewhere").write_bytes(whole)
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="is a symbolic link"):
        read_axes(path)


def _write(
    module: torch.nn.Module, shape: tuple[int, ...], axes: dict[int, str], path: Path
) -> Path:
    write_graph(module, {"x": (torch.randn(shape), axes)}, path, opset=20, outputs={"y": {}})
    return path


def test_what_torch_cannot_export_is_one_line(tmp_path: Path) -> None:
    class NoOperator(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real.sum()

    class Tiles(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, height = x.shape
            if height % 8:
                raise ValueError("height must be divisible by 8")
            return x.reshape(n, height // 8, 8)

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = torch.nn.Parameter(torch.zeros(1, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.positions

    path = tmp_path / "unet" / "model.onnx"
    with pytest.raises(
        ExportError, match=r"^unet cannot be exported: aten.linalg_eig\w* has no ONNX"
    ):
        _write(NoOperator(), (2, 3, 3), {0: "batch"}, path)
    with pytest.raises(ExportError, match="height must be divisible by 8"):
        _write(Tiles(), (2, 12), {0: "batch", 1: "height"}, path)
    with pytest.raises(FixedAxesError, match=r"height \(always 16\)") as caught:
        _write(Bound(), (2, 16), {0: "batch", 1: "height"}, path)
    assert caught.value.axes == {"height": 16}
    assert "\n" not in str(caught.value)
    assert not path.exists()
    # a divisor that the example happens to fulfil is noted, and asked of every feed
    axes = read_axes(_write(Tiles(), (2, 16), {0: "batch", 1: "height"}, path))
    assert axes.multiples == {"height": 8}
    assert axes.rows({"x": np.zeros((3, 24))}) == 3
    with pytest.raises(UsageError, match="height is 20, and this network takes multiples of 8"):
        axes.rows({"x": np.zeros((3, 20))})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (float("nan"), "a weight that is not finite: rows.weight"),
        (float("inf"), "a weight that is not finite: rows.weight"),
        (None, "the weight table.weight is missing"),
    ],
)
def test_bad_weights(tmp_path: Path, fault: float | None, message: str) -> None:
    module = Mixer()
    if fault is None:
        module.table = torch.nn.Linear(3, 48, device="meta")
    else:
        module.rows.weight.data[3, 4] = fault
    with pytest.raises(ExportError, match=message):
        write_graph(module, EXAMPLE, tmp_path / "unet" / "model.onnx", opset=20, outputs=OUTPUTS)


def test_not_enough_room(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_memory()
    if sys.platform == "linux":
        assert free is not None
        assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with pytest.raises(ExportError, match=r"exporting unet needs about 1000000.0 GB of memory"):
            check_memory(10**15, doing="exporting unet")
    path = tmp_path / "unet" / "model.onnx"
    copy_graph(mixer[2], path)
    model = load_graph(mixer[2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # as if the disk were full
    try:
        with pytest.raises(ModelopsError, match="cannot write"):
            save_graph(model, path, external_bytes=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.parent.iterdir()) == []  # the old graph did not outlive its data
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelopsError, match=r"MB free, .* MB needed"):
        write_graph(mixer[0], EXAMPLE, path, opset=20, outputs=OUTPUTS)


_KILLED = """
import sys, torch
from pathlib import Path
from modelops.export.onnx.writer import write_graph

module = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(24)))
example = {"x": (torch.randn(2, 2048), {0: "batch"})}
write_graph(module, example, Path(sys.argv[1]), opset=20, outputs={"y": {0: "batch"}},
            external_bytes=1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("had_one", [False, True])
def test_a_killed_writer_leaves_nothing_that_loads(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path, had_one: bool
) -> None:
    path = tmp_path / "unet" / "model.onnx"
    path.parent.mkdir()
    if had_one:
        copy_graph(mixer[2], path)
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)])
    while process.poll() is None:
        partial = [p for p in path.parent.glob(".model.onnx.data.*") if p.stat().st_size]
        if partial:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert list(path.parent.glob(".model.onnx.data.*"))  # it was in the middle
    assert not path.exists()
    assert not data_path(path).exists()


def test_openvino_fills_up_batches_and_nothing_else(
    mixer: tuple[torch.nn.Module, Path, Path],
) -> None:
    pytest.importorskip("openvino")
    from modelops.export.runtimes.openvino import OpenVinoGraph

    reference = OrtGraph(mixer[1])
    graph = OpenVinoGraph(mixer[2], threads=1)
    for rows in (1, 5, 3):  # 5 rows are filled up to 6; the table has as many rows as tokens
        feed = _feed(rows)
        for got, expected in zip(graph.run_all(feed), reference.run_all(feed), strict=True):
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() < 1e-5
    with pytest.raises(UsageError, match="ids is not given"):
        graph.run({"rows": feed["rows"], "scale": feed["scale"]})
    with pytest.raises(UsageError, match="rows: has 2 axes"):
        graph.run(feed | {"rows": feed["rows"][0]})


def test_a_shape_outside_the_graph_names_the_limit(
    mixer: tuple[torch.nn.Module, Path, Path],
) -> None:
    graph, feed = OrtGraph(mixer[1]), _feed(2)
    with pytest.raises(UsageError, match="the graph's input ids is not given"):
        graph.run({name: value for name, value in feed.items() if name != "ids"})
    with pytest.raises(UsageError, match=r"rows has the shape \[.*\], and the graph takes \[batch"):
        graph.run(feed | {"rows": feed["rows"][..., :-1]})


def test_openvino_refuses_what_it_cannot_do(
    mixer: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    from modelops.export.runtimes.openvino import OpenVinoGraph

    path = tmp_path / "model.onnx"
    model = load_graph(mixer[1])
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="opset 99 is too new for openvino"):
        OpenVinoGraph(path)
    copy_graph(mixer[2], path)
    data_path(path).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        OpenVinoGraph(path)
    if "FP16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="does not compute in float16"):
            OpenVinoGraph(mixer[1], precision="float16")
