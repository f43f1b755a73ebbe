"""A small real corpus with its dedup report, made once, and rows for manifests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelops.data.manifest import Sample

LIMIT = 120


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 120 real OpenMoji images at 32 pixels. Read only."""
    from modelops.data.corpora.openmoji import build_corpus

    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder, resolution=32, limit=LIMIT)
    return folder


@pytest.fixture(scope="session")
def deduped(corpus: Path) -> Path:
    """The dedup report of `corpus`, with Lite0 embeddings cached beside it."""
    from modelops.data.dedup import deduplicate

    deduplicate(corpus / "manifest.parquet", corpus / "dedup_report.json")
    return corpus / "dedup_report.json"


@pytest.fixture(scope="session")
def split(corpus: Path, deduped: Path) -> Path:
    from modelops.data.split import split_manifest

    split_manifest(corpus / "manifest.parquet", deduped, corpus, seed=0)
    return corpus / "splits.parquet"


@pytest.fixture(scope="session")
def shards(corpus: Path, split: Path) -> Path:
    from modelops.data.shards import write_shards

    return write_shards(
        corpus / "manifest.parquet", split, corpus, resolution=32, samples_per_shard=50
    )


@pytest.fixture
def add_picture(tmp_path: Path) -> Callable[..., Sample]:
    """Writes an image of random pixels below tmp_path and returns its row; `data` replaces it."""

    def make(name: str, *, data: bytes | None = None, seed: int = 0, **changes: Any) -> Sample:
        path = tmp_path / changes.get("filepath", f"images/{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(data)
        row = {
            "id": name,
            "filepath": f"images/{name}.png",
            "caption": f"image {name}",
            "license": "CC0-1.0",
            "source": "made here",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "date_collected": "2026-01-31",
        }
        return Sample(**{**row, **changes})

    return make
