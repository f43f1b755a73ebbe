"""Do these records belong together? Answered by digests alone, never by file names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import safe_join, sha256_file, sha256_tree
from modelops.export.artifact.directory import verify_artifact
from modelops.gates.policy import Policy
from modelops.metrics.protocol import protocol_differences
from modelops.records.base import Measurement, Record
from modelops.records.comparison import AbTestRecord, ComparisonRecord
from modelops.records.data import DedupReport, SmokeReport, SplitReport
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.measurements import measurement_of
from modelops.records.read import read_any_record
from modelops.records.train import TrainRecord

# Names of inputs that mean one file per project; a training record calls shard_manifest.csv shards.
SHARED_INPUTS = {
    "manifest": "manifest", "shard_manifest": "shards", "shards": "shards", "splits": "splits",
    "dedup": "dedup",
}  # fmt: skip
TRAINING_STATE = "training_state"  # lies in a checkpoint, not part of its digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One record that a policy names.

    Attributes:
        name: the policy's name for it.
        path: relative to the project's root.
        sha256: digest of the file; None when it is missing.
        record: the record; None when it is missing, unreadable or not `ok`.
        problem: why it cannot decide anything; None when it can.
    """

    name: str
    path: str
    sha256: str | None = None
    record: Record | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Subject of the verdict.

    Attributes:
        sha256: digest of the artifact's directory or of the checkpoint; None if unknown.
        made_from: digests of what it was exported from.
        problem: reason why it cannot be released; None if there is none.
    """

    sha256: str | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def read_evidence(policy: Policy, root: Path) -> dict[str, Evidence]:
    """Read every record that the policy names; an unreadable one gets the reason, no decision."""
    return {name: _read_one(name, path, root) for name, path in policy.evidence.items()}


def _read_one(name: str, relative: str, root: Path) -> Evidence:
    try:
        path = safe_join(root, relative)
        if not path.is_file():
            return Evidence(name=name, path=relative, problem=f"{relative} is missing")
        digest = sha256_file(path)
    except ModelopsError as error:
        return Evidence(name=name, path=relative, problem=error.message)
    try:
        record = read_any_record(path)
    except UsageError as error:
        reason = error.message.replace(str(path), relative)
        return Evidence(name=name, path=relative, sha256=digest, problem=reason)
    if record.status != "ok":
        reason = f"{relative} says {record.status}: {record.error or 'no reason given'}"
        return Evidence(name=name, path=relative, sha256=digest, problem=reason)
    return Evidence(name=name, path=relative, sha256=digest, record=record)


def find_subject(policy: Policy, evidence: dict[str, Evidence], root: Path) -> Subject:
    """Return the digest of the subject, computed again from its bytes if they are here."""
    chosen = evidence[policy.subject]
    record = chosen.record
    if record is None:
        return Subject(problem=f"the subject is unknown: {chosen.problem}")
    if isinstance(record, ArtifactRecord):
        made_from = {name: ref.sha256 for name, ref in record.inputs.items()}
        try:
            _, tree = verify_artifact((root / chosen.path).parent)
        except ModelopsError as error:
            return Subject(made_from=made_from, problem=error.message)
        return Subject(sha256=tree, made_from=made_from)
    if isinstance(record, EvaluationRecord):
        digest = record.source.sha256
        if digest is None:
            return Subject(problem=f"{chosen.path} gives no digest of the source it measured")
        here = root / record.source.uri
        if record.source.kind in ("checkpoint", "artifact") and here.is_dir():
            exclude = [TRAINING_STATE] if record.source.kind == "checkpoint" else []
            if sha256_tree(here, exclude=exclude) != digest:
                return Subject(sha256=digest, problem=f"{record.source.uri} changed since measured")
        return Subject(sha256=digest)
    return Subject(problem=f"{chosen.path} is a {record.kind} record; a subject is an artifact or "
                   "an evaluation")  # fmt: skip


def misfit(
    name: str, policy: Policy, evidence: dict[str, Evidence], subject: Subject
) -> str | None:
    """Return the reason why the record does not belong with the subject; None if it does.

    An evaluation must be of the subject or of what the subject was made from; a baseline marked
    `run` must be of another checkpoint of the same run; a training record must list what the
    subject was made from; the second of a comparison and B of a blind test are measured like an
    evaluation; other artifacts must share the subject's checkpoint; records that name the same
    manifest, shards, splits or dedup report must mean the same bytes; and records of the data must
    name one of these.
    """
    record = evidence[name].record
    if record is None or subject.sha256 is None:
        return None
    family = {subject.sha256, *subject.made_from.values()}
    if isinstance(record, EvaluationRecord):
        return _evaluation_misfit(name, record, policy, evidence, family)
    if isinstance(record, TrainRecord):
        listed = {checkpoint.sha256 for checkpoint in record.checkpoints}
        if not listed & family:
            return "does not belong together: the run has no checkpoint that the subject is made of"
    if isinstance(record, ArtifactRecord) and name != policy.subject:
        own = {reference.sha256 for reference in record.inputs.values()}
        if not own & family:
            return "does not belong together: the artifact was exported from something else"
    if isinstance(record, ComparisonRecord) and record.second.sha256 not in family:
        return "does not belong together: the second of the comparison is not what is released"
    if isinstance(record, AbTestRecord):
        newer = record.sources.get("B")
        if newer is None or newer.sha256 not in family:
            return "does not belong together: B of the blind test is not what is released"
    return _shared_input_misfit(name, record, evidence)


def _evaluation_misfit(
    name: str,
    record: EvaluationRecord,
    policy: Policy,
    evidence: dict[str, Evidence],
    family: set[str],
) -> str | None:
    digest = record.source.sha256
    if digest is None:
        return "does not belong together: the evaluation gives no digest of what it measured"
    role = policy.baselines.get(name)
    if role is None:
        if digest not in family:
            return (
                f"does not belong together: measured {digest[:12]}, which is neither the subject "
                "nor what it was made from (name it under baselines if it is one)"
            )
        return None
    if role == "run":
        runs = [item.record for item in evidence.values() if isinstance(item.record, TrainRecord)]
        listed = {checkpoint.sha256 for run in runs for checkpoint in run.checkpoints}
        if digest not in listed:
            return "does not belong together: not a checkpoint that the training record lists"
    if digest in family:
        return "does not belong together: the baseline is the released model itself"
    return None


def _shared_input_misfit(name: str, record: Record, evidence: dict[str, Evidence]) -> str | None:
    own = _shared_inputs(record)
    if isinstance(record, DedupReport | SplitReport | SmokeReport) and not own:
        return "does not belong together: the record does not say which data it is about"
    for other in evidence.values():
        if other.record is None or other.name == name:
            continue
        theirs = _shared_inputs(other.record)
        for key, digest in own.items():
            if theirs.get(key, digest) != digest:
                return f"does not belong together: {key}: not the same file as in {other.name}"
        if isinstance(other.record, DedupReport) and own.get("dedup", other.sha256) != other.sha256:
            return f"does not belong together: another dedup report than {other.name}"
    return None


def _shared_inputs(record: Record) -> dict[str, str]:
    return {
        SHARED_INPUTS[key]: reference.sha256
        for key, reference in record.inputs.items()
        if key in SHARED_INPUTS
    }


def unlike(left: EvaluationRecord, right: EvaluationRecord, metric: str) -> list[str]:
    """Return the differences in how two records measured a metric; empty if they are comparable.

    The scheduler may differ: it belongs to the source, as its runtime and precision do.
    """
    mine, theirs = measurement_of(left, metric), measurement_of(right, metric)
    if mine is None or theirs is None:
        return [f"{metric} is not in both"]
    differences = protocol_differences(_protocol(left, mine), _protocol(right, theirs))
    if mine.protocol is None or theirs.protocol is None:
        differences.insert(0, "protocol: not recorded")
    elif mine.protocol != theirs.protocol and not differences:
        differences.append(f"protocol: {mine.protocol[:12]} against {theirs.protocol[:12]}")
    return list(dict.fromkeys(differences))


def _protocol(record: EvaluationRecord, measured: Measurement) -> dict[str, Any]:
    """The stored protocol, completed from the record where it leaves something out."""
    stored = record.protocols.get(measured.protocol or "", {})
    sampling = record.sampling.model_dump(exclude={"scheduler"}) if record.sampling else {}
    inner = stored.get("sampling")
    return {
        **stored,
        "n": measured.n,
        "reference digest": record.reference.sha256 if record.reference else None,
        "sampling": {**sampling, **(inner if isinstance(inner, dict) else {})},
    }
