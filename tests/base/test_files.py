from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub_cache
from modelops.base import files
from modelops.base.errors import ConfigError, IntegrityError, ModelopsError, UsageError


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(path) == files.sha256_bytes(b"abc") == expected


def test_tree_digest_sees_names_and_bytes_and_ignores_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for root, names in ((one, "ab"), (two, "ba")):
        root.mkdir()
        for name in names:
            (root / name).write_text(name)
    assert files.sha256_tree(one) == files.sha256_tree(two)
    (two / "a").rename(two / "c")
    assert files.sha256_tree(one) != files.sha256_tree(two)


def test_tree_digest_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(IntegrityError, match="symbolic links"):
        files.sha256_tree(tmp_path)


@pytest.mark.parametrize("folder", ["", "sub"])
def test_a_hub_snapshots_links_are_read(tmp_path: Path, folder: str) -> None:
    plain = tmp_path / "plain"
    (plain / "sub").mkdir(parents=True)
    (plain / "sub/a.bin").write_bytes(b"a")
    (plain / "sub/b.json").write_text("{}")
    snapshot = hub_cache.link_into_cache(plain, tmp_path / "hub")
    assert (snapshot / "sub/a.bin").is_symlink()
    assert files.sha256_tree(snapshot / folder) == files.sha256_tree(plain / folder)
    assert not any(path.is_symlink() for path in files.tree_files(snapshot / folder).values())
    assert files.safe_join(snapshot, "sub/a.bin").read_bytes() == b"a"


@pytest.mark.parametrize(
    "target", ["/etc/hostname", "../../refs/main", "../../../other/blobs/x", "../x/file"]
)
def test_a_hub_snapshots_link_to_another_place_is_refused(tmp_path: Path, target: str) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    snapshot = hub_cache.link_into_cache(plain, tmp_path / "hub")
    for name in (snapshot.parent / "x/file", snapshot.parents[2] / "other/blobs/x"):
        name.parent.mkdir(parents=True)
        name.write_text("secret")
    (snapshot / "link").symlink_to(target)
    with pytest.raises(IntegrityError, match="symbolic links"):
        files.sha256_tree(snapshot)
    with pytest.raises(UsageError, match="symbolic link"):
        files.safe_join(snapshot, "link")


def test_a_hub_snapshots_missing_blob_is_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.bin").write_bytes(b"a")
    snapshot = hub_cache.link_into_cache(plain, tmp_path / "hub")
    files.tree_files(snapshot)["a.bin"].unlink()
    with pytest.raises(IntegrityError, match=r"a\.bin: a link to \w+, which the hub's cache lacks"):
        files.sha256_tree(snapshot)


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Without root's rights, if the tests have them."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o311, 0o444, 0o000])
def test_a_folder_that_hides_its_files_is_refused(mode: int) -> None:
    """Neither a digest nor a verification speaks for what it cannot see."""
    top = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        top.chmod(0o755)
        for name in ("seen/a", "hidden/b/c"):
            (top / name).parent.mkdir(parents=True)
            (top / name).write_text("x")
        assert list(files.tree_files(top)) == ["hidden/b/c", "seen/a"]
        (top / "hidden").chmod(mode)
        with as_somebody_else(), pytest.raises(IntegrityError, match=r"hidden.*Permission denied"):
            files.tree_files(top)
        assert list(files.tree_files(top, exclude=["hidden"])) == ["seen/a"]
    finally:
        (top / "hidden").chmod(0o755)
        shutil.rmtree(top)


def test_a_pipe_is_no_part_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe")
    with pytest.raises(IntegrityError, match="pipe: neither a file nor a folder"):
        files.sha256_tree(tmp_path)


def test_empty_folders_can_be_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert files.tree_files(tmp_path) == {}
    with pytest.raises(IntegrityError, match="b: an empty folder"):
        files.tree_files(tmp_path, empty_folders=False)
    assert files.tree_files(tmp_path, exclude=["a"], empty_folders=False) == {}
    assert files.tree_files(tmp_path / "none") == {}


def test_the_order_of_a_tree_is_that_of_its_paths(tmp_path: Path) -> None:
    for name in ("a.b/x", "a/x", "a-b", "a/x.y", "b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    expected = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert list(files.tree_files(tmp_path)) == [path.as_posix() for path in expected]


def test_tree_digest_can_leave_out_a_top_entry(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("k")
    before = files.sha256_tree(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x").write_text("x")
    assert files.sha256_tree(tmp_path, exclude=["state"]) == before


@pytest.mark.parametrize("relative", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "..\\x"])
def test_paths_that_climb_out_are_refused(tmp_path: Path, relative: str) -> None:
    with pytest.raises(UsageError):
        files.safe_join(tmp_path, relative)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "root"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    (inside / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="symbolic link"):
        files.safe_join(inside, "link")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "f.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(target, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with files.atomic_directory(target) as new:
        (new / "one").write_text("1")
    with pytest.raises(RuntimeError), files.atomic_directory(target) as new:
        (new / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["one"]
    with files.atomic_directory(target) as new:
        (new / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_nested_directory_is_on_the_disk_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with files.atomic_directory(tmp_path / "d") as new:
        (new / "a" / "b").mkdir(parents=True)
        (new / "a" / "b" / "file").write_text("x")
        made = {str(path) for path in (new, *new.rglob("*"))}
    assert made < set(synced) and synced[-1] == str(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_process_wants(tmp_path: Path, mask: int) -> None:
    """In a process of its own: the umask belongs to all threads, and nothing may set it."""
    code = f"""
import os, sys
os.umask({mask})
def refuse(mask): raise AssertionError("umask was set")
os.umask = refuse
from pathlib import Path
from modelops.base import files
top = Path(sys.argv[1])
files.write_text(top / "open", "x")
files.write_bytes(top / "secret", b"x", private=True)
with files.atomic_directory(top / "folder") as new:
    (new / "x").write_text("x")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"open": 0o666 & ~mask, "secret": 0o600, "folder": 0o777 & ~mask}


_WRITE_FOR_EVER = """
import itertools, sys
from modelops.base import files
for count in itertools.count(1):
    files.write_text(sys.argv[1], f"{count}\\n" * 20_000)
"""


@pytest.mark.parametrize("round_", range(3))
def test_killed_writer_leaves_a_whole_file(tmp_path: Path, round_: int) -> None:
    target = tmp_path / "f"
    writer = subprocess.Popen([sys.executable, "-c", _WRITE_FOR_EVER, str(target)])
    deadline = time.monotonic() + 60
    while not target.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05 + 0.03 * round_)
    writer.kill()
    writer.wait()
    lines = target.read_text().splitlines()
    assert len(lines) == 20_000
    assert len(set(lines)) == 1
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_put_back_a_directory_caught_between_two_renames(tmp_path: Path) -> None:
    old = tmp_path / ".d.modelops-old"
    old.mkdir()
    (old / "one").write_text("1")
    files.remove_leftovers(tmp_path)
    assert (tmp_path / "d" / "one").read_text() == "1"


def test_leftovers_of_others_and_of_running_processes_stay(tmp_path: Path) -> None:
    for name in (".keep.tmp", ".d.old", ".x.old.tmp", "y.tmp"):
        (tmp_path / name).write_text("not ours")
    (tmp_path / ".images.old").mkdir()
    (tmp_path / ".images.old" / "originals.txt").write_text("not ours")
    (tmp_path / "images").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert files.remove_leftovers(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with files.atomic_path(tmp_path / "a") as mine, files.atomic_directory(tmp_path / "b") as own:
        assert files.remove_leftovers(tmp_path) == 0  # this process still writes them
        mine.write_text("a")
        (own / "c").write_text("c")
    assert (tmp_path / "a").read_text() == "a" and (tmp_path / "b" / "c").read_text() == "c"
    prefix, suffix = files.temporary_name("e")
    ended = tmp_path / f"{prefix.replace(str(os.getpid()), '4194305')}x{suffix}"
    ended.write_text("left by a process that was killed")
    assert files.remove_leftovers(tmp_path) == 1 and not ended.exists()
    machine = prefix.split(".")[2].partition("-")[0]
    foreign = tmp_path / f"{prefix.replace(machine, '0' * 8)}x{suffix}"
    foreign.write_text("written on another machine, now")
    assert files.remove_leftovers(tmp_path) == 0
    os.utime(foreign, (1, 1))
    assert files.remove_leftovers(tmp_path) == 1


def test_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(ModelopsError, match="cannot write"):
        files.check_writable(blocked / "below")
    with pytest.raises(ModelopsError, match="cannot write"):
        files.write_text(blocked / "below" / "x", "y")
    with pytest.raises(ModelopsError, match="MB needed"):
        files.check_writable(tmp_path, need_bytes=10**18)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with open("/dev/full", "wb", buffering=0) as device:  # noqa: PTH123
            return device.write(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelopsError, match="No space left"):
        files.write_text(tmp_path / "x", "y")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_utf8_and_json_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ok\xff")
    with pytest.raises(UsageError, match=r"bad\.txt: not UTF-8 text \(byte 2\)"):
        files.read_text(tmp_path / "bad.txt")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON: line 1"):
        files.read_json(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="No such file"):
        files.read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("9" * 5000, "5000 digits"),
        ('{"a": NaN}', "not a finite number"),
        ('{"a": 1, "a": 2}', "twice"),
    ],
)
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UsageError, match=rf"odd\.json: .*{said}") as caught:
        files.read_json(tmp_path / "odd.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 10_000, ""),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 2024-13-45", "month"),
        ("a: !!python/name:os.system", "line 1"),
        ("a: 1\na: 2", "line 2"),
        ("- a", "mapping"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"odd\.yaml: ?.*{said}") as caught:
        files.read_yaml(tmp_path / "odd.yaml")
    assert "\n" not in str(caught.value)
