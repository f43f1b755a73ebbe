"""An artifact's directory: what its record promises, with weights beside the graph."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import onnx
import pytest
import torch

from modelops.base.environment import current_environment
from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import sha256_file, sha256_tree
from modelops.export.artifact.directory import (
    RECORD,
    check_destination,
    count_quantized,
    describe_graph,
    other_files,
    read_artifact,
    verify_artifact,
)
from modelops.export.graphs.external import load_structure
from modelops.export.onnx.writer import write_graph
from modelops.records.export import ArtifactRecord

GRAPH = "denoiser/model.onnx"
DATA = "denoiser/model.onnx.data"


def _record(root: Path) -> ArtifactRecord:
    components = [describe_graph(root, "denoiser", precision="float32")]
    record = ArtifactRecord(
        format="onnx", precision="float32", runtime="onnxruntime", components=components,
        environment=current_environment(), started_at=datetime.now(UTC),
        files=other_files(root, components),
    )  # fmt: skip
    record.write(root / RECORD)
    return record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with one component whose weights lie beside it. Read only."""
    root = tmp_path_factory.mktemp("artifact")
    torch.manual_seed(0)
    write_graph(
        torch.nn.Linear(40, 40), {"x": (torch.randn(2, 40), {0: "batch"})}, root / GRAPH, opset=20,
        outputs={"y": {0: "batch"}}, external_bytes=1000,
    )  # fmt: skip
    (root / "denoiser" / "config.json").write_text("{}")
    _record(root)
    return root


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


@pytest.mark.parametrize("name", ["thesis.tex", "denoiser/notes.txt", ".hidden", "mine/a/b.txt"])
def test_an_artifact_that_holds_a_file_of_its_users_is_not_overwritten(
    artifact: Path, name: str
) -> None:
    check_destination(artifact, overwrite=True)
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_text("years of work")
    with pytest.raises(UsageError, match=f"{name}: not a file of the artifact"):
        check_destination(artifact, overwrite=True)


def test_the_data_file_is_part_of_its_component(artifact: Path) -> None:
    record, digest = verify_artifact(artifact)
    component = record.components[0]
    assert component.data is not None
    assert component.data.path == DATA
    assert component.data.sha256 == sha256_file(artifact / DATA)
    assert component.bytes == sum((artifact / name).stat().st_size for name in (GRAPH, DATA))
    assert component.bytes > 40 * 40 * 4
    assert component.dynamic_axes == ["x[0]=batch"]
    assert component.axis_multiples == {}
    assert set(record.files) == {"denoiser/config.json"}
    assert digest == sha256_tree(artifact)  # the data file changes it
    # without its weights at hand, a graph can still be described
    assert count_quantized(load_structure(artifact / GRAPH)) == 0


@pytest.mark.parametrize("name", [GRAPH, DATA, "denoiser/config.json"])
def test_one_byte_is_noticed(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[-1] ^= 1
    (artifact / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name}: differs from its digest"):
        verify_artifact(artifact)
    (artifact / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name}: is missing"):
        verify_artifact(artifact)


def test_files_that_nobody_promised(artifact: Path) -> None:
    (artifact / "denoiser" / "extra.data").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"extra\.data: is not in artifact\.json"):
        verify_artifact(artifact)
    (artifact / "denoiser" / "extra.data").unlink()
    shutil.move(artifact / DATA, artifact.parent / "weights")
    (artifact / DATA).symlink_to(artifact.parent / "weights")
    with pytest.raises(UsageError, match="a symbolic link leads outside"):
        verify_artifact(artifact)


def test_a_record_that_agrees_with_a_graph_that_climbs(artifact: Path) -> None:
    """Whoever can write the record can make every digest right: the location is checked too."""
    record = read_artifact(artifact)
    shutil.copyfile(artifact / DATA, artifact.parent / "secret")
    model = onnx.load(str(artifact / GRAPH), load_external_data=False)
    for item in model.graph.initializer:
        for entry in item.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    (artifact / GRAPH).write_bytes(model.SerializeToString())
    component = record.components[0].model_copy(update={"sha256": sha256_file(artifact / GRAPH)})
    record.model_copy(update={"components": [component]}).write(artifact / RECORD)
    with pytest.raises(IntegrityError, match=r"may only lie in model\.onnx\.data"):
        verify_artifact(artifact)
    with pytest.raises(IntegrityError, match=r"may only lie in model\.onnx\.data"):
        describe_graph(artifact, "denoiser", precision="float32")


def test_a_promised_path_may_not_climb(artifact: Path) -> None:
    record = read_artifact(artifact)
    component = record.components[0]
    assert component.data is not None
    climbing = component.data.model_copy(update={"path": "../secret"})
    record.model_copy(
        update={"components": [component.model_copy(update={"data": climbing})]}
    ).write(artifact / RECORD)
    with pytest.raises(UsageError, match="leads outside"):
        verify_artifact(artifact)


def test_an_unfinished_artifact_is_not_one(artifact: Path) -> None:
    (artifact / RECORD).unlink()
    with pytest.raises(UsageError, match="an unfinished one"):
        verify_artifact(artifact)
