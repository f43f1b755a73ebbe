"""A release with a reference; its model is a file, since nothing here makes an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import drift_lab
from modelops.base.files import sha256_file, sha256_tree
from modelops.monitoring.reference import release_files
from modelops.releases.build import build_release
from modelops.releases.verify import RECORD_FILE
from project_records import CRITERIA, verdict_on


@dataclass(frozen=True)
class Released:
    path: Path
    sha256: str
    model: str
    evaluation: Path


def make_release(
    folder: Path, *, reference: bool = True, days_old: float = 0.0, policy: str | None = None,
    evaluated: bool = True,
) -> Released:  # fmt: skip
    model = folder / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"weights")
    digest = sha256_tree(model)
    evaluation = drift_lab.write_evaluation(folder, model=digest, days_old=days_old)
    rules = folder / "policy.yaml"
    rules.write_text((policy or "version: 1\n") + CRITERIA)
    verdict_on(digest, policy_sha256=sha256_file(rules)).write(folder / "v.json")
    files, _ = release_files([evaluation], model_sha256=digest, folder=folder / "reference")
    assert set(files) == {"monitoring/reference.json", "monitoring/reference.npz"}
    build_release(
        folder / "release", model_dir=model, verdict=folder / "v.json",
        records=[evaluation] if evaluated else [],
        policy=rules, name="tiny", version="0.1", extra_files=files if reference else {},
    )  # fmt: skip
    sha256 = sha256_file(folder / "release" / RECORD_FILE)
    return Released(folder / "release", sha256, digest, evaluation)
