"""A small real corpus (OpenMoji drawings, hand-made splits, an alignment model); a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Corpus:
    manifest: Path
    splits: Path
    lit: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """36 drawings at 32x32: 22 train, 4 val, 10 test; deduplication is not needed for these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from modelops.data.corpora.openmoji import build_corpus
    from modelops.data.manifest import read_manifest
    from modelops.evaluation.lit import fit_lit
    from modelops.models.lit import HeadSettings

    root = tmp_path_factory.mktemp("corpus")
    manifest = build_corpus(root / "data", resolution=32, limit=36, seed=0)
    ids = [sample.id for sample in read_manifest(manifest).rows]
    names = ["train" if i % 9 > 2 else "test" if i % 9 < 2 else "val" for i in range(len(ids))]
    splits = root / "data" / "splits.parquet"
    pq.write_table(pa.table({"id": ids, "split": names, "group": ids}), splits)
    fit_lit(
        manifest, splits, root / "lit", seed=0,
        candidates=(HeadSettings(epochs=3, embed_dim=32), HeadSettings(epochs=2, embed_dim=32)),
    )  # fmt: skip
    return Corpus(manifest, splits, root / "lit")


# Not for the session: while playwright is open, this thread can start no other event loop.
