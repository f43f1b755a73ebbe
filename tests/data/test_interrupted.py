"""Full disks and killed processes: what was there stays, and nothing half-written is left.

A full disk is one clear line and exit code 1.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import disks
from modelops.base.files import sha256_tree, temporary_name
from modelops.cli.main import main
from modelops.data.corpora.openmoji import build_corpus


@pytest.fixture
def folder(corpus: Path, shards: Path, tmp_path: Path) -> Path:
    """A copy of the corpus with its report, splits and shards, which a test may change."""
    return Path(shutil.copytree(corpus, tmp_path / "data"))


@pytest.mark.parametrize(
    ("limit", "arguments", "file"),
    [
        (300, ["corpus", "openmoji", "{0}", "--resolution", "32", "--limit", "20"], "images"),
        (3000, ["corpus", "openmoji", "{0}", "--resolution", "32", "--limit", "40"], "manifest"),
        (300, ["dedup", "{0}/manifest.parquet"], "dedup_candidates.png"),
        (100, ["split", "{0}/manifest.parquet", "--seed", "3"], "splits.parquet"),
        (3500, ["split", "{0}/manifest.parquet", "--seed", "3"], "split.json"),
        (3000, ["shard", "{0}/manifest.parquet", "--resolution", "16"], "shards"),
        (100, ["smoke", "{0}/shard_manifest.csv"], "smoke.json"),
    ],
)
def test_a_full_disk_costs_nothing_that_was_there(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    limit: int,
    arguments: list[str],
    file: str,
) -> None:
    before = sha256_tree(folder)
    with disks.file_limit(limit):
        code = main(["data", *[word.format(folder) for word in arguments]])
    said = capsys.readouterr().err
    assert code == 1, said
    assert f"error: {folder}/{file}" in said and "File too large" in said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert sha256_tree(folder) == before


def test_a_full_disk_while_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = build_corpus(tmp_path, resolution=32, limit=4)
    before = sha256_tree(tmp_path)
    with disks.file_limit(3000):
        assert main(["data", "dedup", str(manifest)]) == 1
    assert ".npy: cannot write: File too large" in capsys.readouterr().err
    assert sha256_tree(tmp_path) == before


_KILL_ITSELF = """
import os, signal, sys
from modelops.data.shards import write_shards
def stop(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)
write_shards(*sys.argv[1:], resolution=16, samples_per_shard=10, on_progress=stop)
"""


def test_a_killed_shard_run_leaves_the_old_shards_and_can_be_made_again(folder: Path) -> None:
    before = sha256_tree(folder / "shards")
    names = [str(folder / name) for name in ("manifest.parquet", "splits.parquet", "")]
    killed = subprocess.run([sys.executable, "-c", _KILL_ITSELF, *names], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sha256_tree(folder / "shards") == before
    assert any(path.name.startswith(".shards.") for path in folder.iterdir())
    shard = ["data", "shard", names[0], "--resolution", "32", "--samples-per-shard", "50"]
    assert main(shard) == 0
    assert sha256_tree(folder / "shards") == before
    assert not [path for path in folder.rglob(".*") if "modelops" in path.name]


def test_what_a_killed_split_left_is_cleared_away(folder: Path) -> None:
    cache = next((folder / ".cache").rglob("*.npy")).parent
    for place in (folder, cache):
        prefix, suffix = temporary_name("x")
        (place / f"{prefix.replace(str(os.getpid()), '4194305')}x{suffix}").write_text("half")
    assert main(["data", "split", str(folder / "manifest.parquet")]) == 0
    assert not [path for path in folder.rglob(".*") if "modelops" in path.name]
