"""No change of one field turns a no into a yes, and none is an unexpected error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelops.base.errors import ModelopsError
from modelops.base.files import sha256_file, sha256_json
from modelops.gates.decide import decide
from modelops.gates.signoff import check_sign_offs, sign_off
from modelops.records.read import read_record
from modelops.records.release import ReleaseRecord
from modelops.releases.build import build_release
from modelops.releases.verify import verify_release
from mutations import Mutation, deletions, some_mutations
from project_records import FINAL, evaluation, train_record, write_artifact

FAILING: dict[str, tuple[str, Any, str]] = {
    "distance": (
        "e.json", evaluation("checkpoint", FINAL, 60.0),
        "{name: c, evidence: e, metric: frechet_distance_lite0, at_most: 30}",
    ),
    "gain": (
        "e.json", evaluation("checkpoint", FINAL, 20.0, gain=0.02),
        "{name: c, evidence: e, metric: lit_alignment_gain, above: 0, use: low}",
    ),
    "images": (
        "e.json", evaluation("checkpoint", FINAL, 20.0, n_failed_images=3),
        "{name: c, evidence: e, field: n_failed_images, at_most: 0}",
    ),
    "status": (
        "e.json", evaluation("checkpoint", FINAL, 20.0, status="failed"),
        "{name: c, evidence: e, metric: frechet_distance_lite0, at_most: 30}",
    ),
    "few": (
        "e.json", evaluation("checkpoint", FINAL, 20.0),
        "{name: c, evidence: e, metric: frechet_distance_lite0, at_most: 30, min_n: 1000}",
    ),
    "loss": (
        "t.json", train_record(loss_trend="up"),
        "{name: c, evidence: t, field: loss_trend, equals: down}",
    ),
    "other run": (
        "t.json", train_record(checkpoints=[]),
        "{name: c, evidence: t, field: loss_trend, equals: down}",
    ),
}  # fmt: skip
DECIDED = {  # fields that hold the answer: another proper value of them is another answer
    "images": ("n_failed_images",), "status": ("status",), "loss": ("loss_trend",),
    "few": ("metrics", "frechet_distance_lite0", "n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_no_mutation_of_a_record_passes_the_gate(tmp_path: Path, name: str) -> None:
    file, record, criterion = FAILING[name]
    (tmp_path / "policy.yaml").write_text(
        f"version: 1\nsubject: e\nevidence: {{e: e.json, t: t.json}}\ncriteria:\n  - {criterion}\n"
    )
    evaluation("checkpoint", FINAL, 20.0).write(tmp_path / "e.json")
    train_record().write(tmp_path / "t.json")
    record.write(tmp_path / file)
    data = json.loads((tmp_path / file).read_text())

    def answer() -> str:
        policy = tmp_path / "policy.yaml"
        return decide(policy, root=tmp_path, out_path=tmp_path / "v.json").answer

    assert answer() != "pass"
    for mutation in [*deletions(data), *some_mutations(data, 20)]:
        mutation.write(tmp_path / file, data)
        if mutation.place == DECIDED.get(name) and type(mutation.new) is type(mutation.old):
            continue
        assert answer() != "pass", mutation
    (tmp_path / file).write_text(f'{{"status": "failed", {json.dumps(data)[1:]}')
    assert answer() != "pass"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    digest = write_artifact(tmp_path / "artifact")
    evaluation("artifact", digest, 20.0).write(tmp_path / "e.json")
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nsubject: a\nevidence: {e: e.json, a: artifact/artifact.json}\n"
        "criteria:\n  - {name: good, evidence: e, metric: frechet_distance_lite0, at_most: 30}\n"
        "  - {name: equal, evidence: a, parity: all}\n"
    )
    decide(tmp_path / "policy.yaml", root=tmp_path, out_path=tmp_path / "v.json")
    build_release(
        tmp_path / "release", model_dir=tmp_path / "artifact", verdict=tmp_path / "v.json",
        policy=tmp_path / "policy.yaml", records=[tmp_path / "e.json"], name="a", version="1",
        defaults={"steps": 4, "guidance": 3.0},
    )  # fmt: skip
    return tmp_path / "release"


def passes(release: Path) -> bool:
    try:
        verify_release(release)
    except ModelopsError:
        return False
    return True


def sealed_again(release: Path, **changes: Any) -> None:
    path = release / "release.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(ReleaseRecord.model_validate(data).sealed().model_dump_json())


def test_no_mutation_of_release_json_is_verified(release: Path) -> None:
    path = release / "release.json"
    before, data = read_record(path, ReleaseRecord), json.loads(path.read_text())
    for mutation in some_mutations(data, 120):
        mutation.write(path, data)
        assert not passes(release) or read_record(path, ReleaseRecord) == before, mutation


FREE = {  # only a signature can tell what these were
    "name", "version", "seeds", "started_at", "duration_s", "defaults", "environment", "error",
    "path", "evidence", "metric", "bound", "value", "low", "high", "reason", "inputs",
}  # fmt: skip


def test_no_mutation_of_a_verdict_is_verified_although_all_was_sealed_again(release: Path) -> None:
    path = release / "verdict.json"
    data = json.loads(path.read_text())
    assert passes(release)
    for mutation in some_mutations(data, 200):
        if not mutation.place or FREE & set(mutation.place):
            continue
        mutation.write(path, data)
        digest, size = sha256_file(path), path.stat().st_size
        record = json.loads((release / "release.json").read_text())
        files = {**record["files"], "verdict.json": {"sha256": digest, "bytes": size}}
        inputs = {**record["inputs"], "verdict": {"path": "v.json", "sha256": digest}}
        sealed_again(release, files=files, inputs=inputs, verdict_sha256=digest)
        assert not passes(release), mutation


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""}, {"name": "../x"}, {"version": "a b"}, {"fallback_sha256": "f" * 64},
        {"inputs": {}}, {"duration_s": -1.0}, {"schema_version": 0}, {"defaults": {"steps": "4"}},
        {"defaults": {"steps": 0}}, {"defaults": {"guidance": True}}, {"defaults": {"golden": [1]}},
        {"defaults": {"guidance": 1e308}}, {"defaults": {"steps": 4.5}}, {"seal": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_nothing_can_be_served_with_are_refused(
    release: Path, changes: dict[str, Any]
) -> None:
    path = release / "release.json"
    data = {**json.loads(path.read_text()), **changes}
    seal = sha256_json({name: value for name, value in data.items() if name != "seal"})
    path.write_text(json.dumps({**data, "seal": seal, **changes}))
    assert not passes(release)


def drop_the_second(verdict: dict[str, Any]) -> None:
    del verdict["criteria"][1]


def swap(verdict: dict[str, Any]) -> None:
    verdict["criteria"].reverse()


def drop_all(verdict: dict[str, Any]) -> None:
    verdict["criteria"] = []


@pytest.mark.parametrize("change", [drop_the_second, swap, drop_all])
def test_a_verdict_answers_each_criterion_of_its_policy(
    tmp_path: Path, release: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "v.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ModelopsError, match=r"criteria|criterion"):
        build_release(
            tmp_path / "second", model_dir=tmp_path / "artifact", verdict=path,
            policy=tmp_path / "policy.yaml", name="a", version="1",
        )  # fmt: skip
    assert not (tmp_path / "second").exists()


def test_no_mutation_of_a_sign_off_is_valid(tmp_path: Path) -> None:
    (tmp_path / "charter.md").write_text("scope: small")
    path = sign_off(tmp_path / "charter.md", name="Ada", role="owner")
    data = json.loads(path.read_text())
    for mutation in some_mutations(data, 250):
        if not mutation.place or {"environment", "seeds"} & set(mutation.place):
            continue
        mutation.write(path, data)
        (found,) = check_sign_offs(tmp_path / "charter.md")
        assert found.state != "valid" or _says_the_same(mutation, found.name), mutation


def _says_the_same(mutation: Mutation, name: str) -> bool:
    """Other words of the person, or times, are only found by a signature."""
    place = mutation.place[0]
    return place in ("name", "statement", "duration_s", "started_at", "inputs", "error") and bool(
        name.strip()
    )
