"""The demo's steps from the corpus to the data loader; each calls the function behind a command."""

from __future__ import annotations

from pathlib import Path

from modelops.base.steps import OnProgress
from modelops.demo.budgets import Budget
from modelops.demo.project import DEDUP, MANIFEST, SEED, SHARDS, SPLITS


class DataStages:
    """Steps on the data; each returns one line about its result."""

    def __init__(self, root: Path, budget: Budget, resolution: int) -> None:
        self.root = root
        self.budget = budget
        self.resolution = resolution

    def corpus(self, report: OnProgress) -> str:
        from modelops.data.corpora.openmoji import build_corpus
        from modelops.data.manifest import read_manifest

        manifest = read_manifest(
            build_corpus(
                self.root / "data",
                resolution=self.resolution,
                limit=self.budget.pictures,
                seed=SEED,
                on_progress=report,
            )
        )
        groups = len({row.group for row in manifest.rows})
        return f"{len(manifest.rows)} images of {groups} emoji at {self.resolution} px"

    def dedup(self, report: OnProgress) -> str:
        from modelops.data.dedup import deduplicate

        found = deduplicate(
            self.root / MANIFEST, self.root / DEDUP, threshold=0.95, on_progress=report
        )
        return (
            f"{len(found.clusters)} clusters at cosine {found.threshold}, "
            f"{found.n_exact_duplicates} exact duplicates"
        )

    def split(self, report: OnProgress) -> str:
        from modelops.data.split import split_manifest

        made = split_manifest(
            self.root / MANIFEST, self.root / DEDUP, self.root / "data", seed=SEED
        )
        return ", ".join(f"{count} {name}" for name, count in made.counts.items())

    def shards(self, report: OnProgress) -> str:
        from modelops.data.shards import read_shard_manifest, write_shards

        path = write_shards(
            self.root / MANIFEST,
            self.root / SPLITS,
            self.root / "data",
            resolution=self.resolution,
            samples_per_shard=1000,
            on_progress=report,
        )
        rows = read_shard_manifest(path)
        return f"{len(rows)} tars, {sum(row.bytes for row in rows) / 1e6:.1f} MB"

    def loader(self, report: OnProgress) -> str:
        from modelops.data.smoke import smoke_test

        found = smoke_test(self.root / SHARDS, self.root / "data/smoke.json", on_progress=report)
        reasons = f": {'; '.join(found.reasons)}" if found.reasons else ""
        return f"{found.verdict}, {found.images_per_second:.0f} images/s{reasons}"
