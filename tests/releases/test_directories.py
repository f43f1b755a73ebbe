"""Folders around a release: what is replaced, what a killed build leaves, what is found in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import disks
from modelops.base.errors import IntegrityError, InUseError, ModelopsError, UsageError
from modelops.base.files import sha256_tree
from modelops.base.locks import output_lock
from modelops.cli.main import main
from modelops.releases.build import build_release
from modelops.releases.verify import verify_release
from project_records import verdict_on


def build(folder: Path, out: Path | None = None, version: str = "1") -> Path:
    model, release = folder / "model", out or folder / "release"
    if not model.is_dir():
        model.mkdir()
        (model / "weights").write_bytes(b"w" * 1000)
    verdict_on(sha256_tree(model)).write(folder / "v.json")
    build_release(release, model_dir=model, verdict=folder / "v.json", name="a", version=version)
    return release


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_release_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    build(tmp_path)
    assert verify_release(build(tmp_path, version="2")).version == "2"
    assert verify_release(build(tmp_path, version="2")).version == "2"
    assert listing(tmp_path) == {"model", "v.json", "release"}


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link(out: Path) -> None:
    other = out.with_name("other")
    other.mkdir()
    out.symlink_to(other)


def a_dangling_link(out: Path) -> None:
    out.symlink_to("nowhere")


def an_empty_folder_of_mine(out: Path) -> None:
    build(out.parent, out)
    (out / "drafts").mkdir()


def a_pipe_of_mine(out: Path) -> None:
    build(out.parent, out)
    os.mkfifo(out / "pipe")


@pytest.mark.parametrize(
    "make", [a_file, a_link, a_dangling_link, an_empty_folder_of_mine, a_pipe_of_mine]
)
def test_nothing_else_is_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    out = tmp_path / "release"
    make(out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="is not a release, or holds other files"):
        build(tmp_path, version="2")
    assert set(before) <= {str(path) for path in tmp_path.rglob("*")}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    assert verify_release(build(tmp_path)).name == "a"


def test_no_release_is_built_into_its_model(tmp_path: Path) -> None:
    digest = sha256_tree(build(tmp_path) / "model")
    for inside in (tmp_path / "model", tmp_path / "model/release"):
        with pytest.raises(UsageError, match="lies in the model"):
            build(tmp_path, inside)
    assert sha256_tree(tmp_path / "model") == digest


KILLED = """
import os, signal, sys
from pathlib import Path
from modelops.records.release import ReleaseRecord
from test_directories import build
ReleaseRecord.sealed = lambda self: os.kill(os.getpid(), signal.SIGKILL)
build(Path(sys.argv[1]), version="2")
"""


def test_a_killed_build_leaves_the_old_release_and_the_next_one_clears_up(tmp_path: Path) -> None:
    before = sha256_tree(build(tmp_path))
    path = os.pathsep.join(entry for entry in (str(Path(__file__).parent), *sys.path) if entry)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": path},
        check=False, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sha256_tree(tmp_path / "release") == before
    assert len(listing(tmp_path)) > 3, "half a release lies beside it"
    assert verify_release(build(tmp_path, version="3")).version == "3"
    assert listing(tmp_path) == {"model", "v.json", "release"}


def test_a_release_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """A build that was killed between its two renames."""
    release = build(tmp_path)
    release.rename(tmp_path / ".release.modelops-old")
    (tmp_path / "model/weights").write_bytes(b"other")
    with pytest.raises(IntegrityError):
        build_release(release, model_dir=tmp_path / "model", verdict=tmp_path / "v.json",
                      name="a", version="2")  # fmt: skip
    assert verify_release(build(tmp_path, version="3")).version == "3"
    assert listing(tmp_path) == {"model", "v.json", "release"}


def test_a_full_disk_leaves_the_old_release(tmp_path: Path) -> None:
    with disks.small_disk(tmp_path / "disk") as disk:
        release = disk / "release"
        before = sha256_tree(build(tmp_path, release))
        ballast = disks.fill(disk)
        (tmp_path / "model/weights").write_bytes(b"w" * 50_000)
        with pytest.raises(ModelopsError, match="No space left"):
            build(tmp_path, release, "2")
        assert sha256_tree(release) == before
        ballast.unlink()
        assert listing(disk) == {"release"}
        assert verify_release(build(tmp_path, release, "2")).version == "2"


def test_two_builds_of_one_folder(tmp_path: Path) -> None:
    with output_lock(tmp_path / "release"), pytest.raises(InUseError):
        build(tmp_path)
    assert verify_release(build(tmp_path)).version == "1"


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda r: os.mkfifo(r / "model/pipe"), "neither a file nor a folder"),
    "empty folder": (lambda r: (r / "model/empty").mkdir(), "an empty folder"),
    "nested empty": (lambda r: (r / "a/b").mkdir(parents=True), "an empty folder"),
    "link to a file": (lambda r: (r / "extra").symlink_to("model/weights"), "symbolic link"),
    "link to a folder": (lambda r: (r / "extra").symlink_to("model"), "symbolic link"),
    "dangling link": (lambda r: (r / "extra").symlink_to("nowhere"), "symbolic link"),
    "extra": (lambda r: (r / "model/extra").write_text("x"), "is not part of the release"),
    "hidden": (lambda r: (r / ".hidden").write_text("x"), "is not part of the release"),
    "odd name": (lambda r: (r / os.fsdecode(b"\xff\x1b[2J")).write_text("x"), "is not part"),
    "folder for a file": (
        lambda r: ((r / "verdict.json").unlink(), (r / "verdict.json").mkdir()), "folder|missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_file_of_the_release_is_found(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    release = build(tmp_path)
    put, said = STRANGE[name]
    put(release)
    with pytest.raises(IntegrityError, match=said):
        verify_release(release)
    assert main(["release", "verify", str(release)]) == 1
    written = capsys.readouterr().err
    assert "unexpected" not in written and written.replace("\n", "").isprintable()
