"""Directories as the Hugging Face hub's cache holds them: links into a folder of blobs."""

from __future__ import annotations

import os
from pathlib import Path

from modelops.base.files import sha256_file

REVISION = "0123456789abcdef0123456789abcdef01234567"


def link_into_cache(directory: Path, cache: Path, *, name: str = "some/model") -> Path:
    """Copy a directory's files into a cache, and return the snapshot of links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text(REVISION)
    for path in directory.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / sha256_file(path)
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
