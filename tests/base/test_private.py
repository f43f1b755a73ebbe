"""A copy that nobody else changes, and one for all the processes of a store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelops.base.errors import IntegrityError, ModelopsError
from modelops.base.files import sha256_tree
from modelops.base.private import PrivateFolder, private_copy


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/weights.bin").write_bytes(os.urandom(1 << 20))
    (tmp_path / "model/index.json").write_text("{}")
    return tmp_path / "model"


def test_what_is_written_into_the_original_does_not_reach_the_copy(
    model: Path, tmp_path: Path
) -> None:
    before = (model / "unet/weights.bin").read_bytes()
    with private_copy(model) as copy:
        assert copy.sha256 == sha256_tree(model) and copy.path.name == "model"
        assert copy.path.parent.stat().st_mode & 0o077 == 0
        with (model / "unet/weights.bin").open("r+b") as handle:
            handle.write(b"changed")
        assert (copy.path / "unet/weights.bin").read_bytes() == before
    assert not any((tmp_path / "tmp").iterdir())


def test_another_digest_is_refused_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(IntegrityError, match=r"model: changed: its sha256 is"),
        private_copy(model, sha256="0" * 64),
    ):
        pass
    assert not any((tmp_path / "tmp").iterdir())


def test_errors_name_the_original(model: Path) -> None:
    with pytest.raises(ModelopsError) as caught, private_copy(model) as copy:
        raise ModelopsError(f"{copy.path}/unet: broken", hint=f"mend {copy.path}")
    assert str(caught.value) == f"{model}/unet: broken (mend {model})"


@pytest.mark.parametrize("known", [True, False])
def test_processes_of_a_store_share_one_copy(model: Path, tmp_path: Path, known: bool) -> None:
    store = PrivateFolder.make("modelops-run-")
    digest = sha256_tree(model) if known else None

    class Pipeline: ...

    first, second = Pipeline(), Pipeline()
    with private_copy(model, sha256=digest, store=store.path) as copy:
        copy.keep_for(first)
        inode = (copy.path / "unet/weights.bin").stat().st_ino
        path = copy.path
    digest = sha256_tree(model)
    (model / "unet/weights.bin").write_bytes(b"gone by now")  # the others need not read it again
    program = (
        "import sys; from pathlib import Path; from modelops.base.private import private_copy\n"
        "with private_copy(sys.argv[1], sha256=sys.argv[2], store=Path(sys.argv[3])) as copy:\n"
        "    print((copy.path / 'unet/weights.bin').stat().st_ino)"
    )
    arguments = [str(model), digest, str(store.path)]
    printed = subprocess.check_output([sys.executable, "-c", program, *arguments], text=True)
    assert int(printed) == inode
    with private_copy(model, sha256=digest, store=store.path) as copy:
        copy.keep_for(second)
    del first
    assert path.is_dir()  # the second still needs it
    del second
    assert not path.exists()
    store.close()
    assert not any((tmp_path / "tmp").iterdir())


def test_a_damaged_shared_copy_is_not_used(model: Path) -> None:
    store = PrivateFolder.make("modelops-run-")
    digest = sha256_tree(model)

    class Pipeline: ...

    kept = Pipeline()
    with private_copy(model, sha256=digest, store=store.path) as copy:
        copy.keep_for(kept)
        (copy.path / "index.json").write_text("{ }")
    with pytest.raises(IntegrityError), private_copy(model, sha256=digest, store=store.path):
        pass
    store.close()


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from modelops.base.private import PrivateFolder\n"
        "print(PrivateFolder.make('modelops-model-', Path(sys.argv[1])).path, flush=True)\n"
        "sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    os.utime(left, (0, 0))
    PrivateFolder.make("modelops-model-", tmp_path).close()
    assert left.is_dir()
    child.kill()
    child.communicate()
    PrivateFolder.make("modelops-model-", tmp_path).close()
    assert not left.exists()


def test_no_room_is_one_line(model: Path, tmp_path: Path) -> None:
    program = (
        "import resource, sys; from modelops.base.private import private_copy\n"
        "from modelops.base.errors import ModelopsError\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    private_copy(sys.argv[1]).__enter__()\n"
        "except ModelopsError as error:\n    print(error)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    said = subprocess.check_output(
        [sys.executable, "-c", program, str(model)], text=True, env=environment
    )
    assert "model: no private copy of its 1 MB" in said and "set TMPDIR" in said
    assert not any((tmp_path / "tmp").iterdir())
