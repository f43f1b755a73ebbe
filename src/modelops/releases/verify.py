"""Verify a release: every file by digest, and the verdict and fallback that it was built on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.files import read_yaml, safe_join, sha256_file, sha256_tree, tree_files
from modelops.records.bounds import SIGNS, bound_text
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record
from modelops.records.release import ReleaseRecord, Verdict
from modelops.releases.evidence import check_evidence

RECORD_FILE = "release.json"


def check_fallback(fallback: str | Path, model_dir: str | Path) -> None:
    """Check a fallback, an artifact that replaces a release's model where its numbers are wrong.

    Raises:
        UsageError: it, or the model, is not an artifact, or it is INT8 itself.
        IntegrityError: it was made from another checkpoint, or was kept although not equal to it.
    """
    other = read_record(Path(fallback) / "artifact.json", ArtifactRecord)
    model = read_record(Path(model_dir) / "artifact.json", ArtifactRecord)
    if other.format != "onnx":
        raise UsageError(f"{fallback}: {other.format} is no fallback", hint="name an onnx artifact")
    if other.inputs.get("checkpoint") is None or model.inputs.get("checkpoint") is None:
        raise IntegrityError(f"{fallback}: does not say which checkpoint it was made from")
    if other.inputs["checkpoint"].sha256 != model.inputs["checkpoint"].sha256:
        raise IntegrityError(
            f"{fallback}: was not made from the checkpoint of {model_dir}",
            hint="export the checkpoint to onnx again",
        )
    failed = [check for check in other.parity if not check.holds]
    if failed or other.error or other.status != "ok" or not other.parity:
        state = "it was not compared" if not other.parity else f"its status is {other.status}"
        reason = other.error or (f"{failed[0].name}: {failed[0].distance}" if failed else state)
        raise IntegrityError(
            f"{fallback}: is not equal to its checkpoint ({reason})",
            hint="export it again without --allow",
        )


def check_policy(policy: str | Path, verdict: Verdict) -> None:
    """Check that a verdict was made by a policy, and answers each of its criteria as it asks.

    Raises:
        IntegrityError: it was made by another one, or its criteria, or the metric, evidence or
            bound of one, are others.
        ConfigError: the policy is not YAML.
    """
    if sha256_file(policy) != verdict.policy_sha256:
        raise IntegrityError(
            f"{policy}: is not the policy the verdict was made by",
            hint="run `modelops gate` again after a change of policy",
        )
    data = read_yaml(policy)
    listed = data.get("criteria")
    lines = listed if isinstance(listed, list) else []
    asked = [line.get("name") for line in lines if isinstance(line, dict)]
    answered = [line.name for line in verdict.criteria]
    if asked != answered:
        other = next((name for name in answered if name not in asked), None)
        missing = next((name for name in asked if name not in answered), None)
        raise IntegrityError(
            f"{policy}: the verdict "
            + (f"leaves out its criterion {missing!r}" if missing else
               f"has another criterion, {other!r}" if other else
               "has its criteria in another order or number"),
            hint="run `modelops gate` again",
        )  # fmt: skip
    for wanted, line in zip(lines, verdict.criteria, strict=True):
        try:
            expected = {
                "evidence": data["evidence"][wanted["evidence"]],
                "metric": wanted.get("metric") or wanted.get("field") or "parity",
                "bound": bound_text(wanted),
            }
            relative = any(isinstance(wanted.get(key), dict) for key in SIGNS)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{policy}: its criterion {line.name!r} cannot be read", hint="run `modelops gate`"
            ) from error
        found = {"evidence": line.evidence, "metric": line.metric, "bound": line.bound}
        if relative and line.bound != expected["bound"]:  # the number that it came to follows
            found["bound"] = re.sub(r" = [^\s=]+\Z", "", line.bound)
        for key, text in expected.items():
            if found[key] != text:
                raise IntegrityError(
                    f"{policy}: the verdict's criterion {line.name!r} has another {key}, "
                    f"{found[key]!r} instead of {text!r}",
                    hint="run `modelops gate` again",
                )
        cited = verdict.inputs.get(wanted["evidence"])
        if line.answer == "pass" and (cited is None or cited.path != line.evidence):
            raise IntegrityError(
                f"{policy}: the verdict's inputs do not name {wanted['evidence']}, the evidence of "
                f"its criterion {line.name!r}",
                hint="run `modelops gate` again",
            )


def verify_release(directory: str | Path) -> ReleaseRecord:
    """Read a release and make sure that every byte is the one that was released.

    Raises:
        UsageError: no release there, or a release.json that cannot be read.
        IntegrityError: names the first missing, changed, additional or linked file, pipe, empty or
            unreadable folder, or says that verdict and model do not belong together.
    """
    root = Path(directory)
    if not (root / RECORD_FILE).is_file():
        raise UsageError(
            f"{root}: not a release (no {RECORD_FILE})",
            hint="make one with `modelops release build`",
        )
    record = read_record(root / RECORD_FILE, ReleaseRecord)
    if record.status != "ok":
        raise IntegrityError(f"{root / RECORD_FILE}: its status is {record.status}", hint=_REBUILD)
    present = tree_files(root, empty_folders=False)
    for relative, expected in sorted(record.files.items()):
        path = safe_join(root, relative)
        if relative not in present:
            raise IntegrityError(f"{path}: missing from the release", hint=_REBUILD)
        size = path.stat().st_size
        if size != expected.bytes:
            raise IntegrityError(
                f"{path}: changed, {size} bytes instead of {expected.bytes}", hint=_REBUILD
            )
        if sha256_file(path) != expected.sha256:
            raise IntegrityError(f"{path}: changed, its sha256 is another", hint=_REBUILD)
    for relative, path in present.items():
        if relative not in record.files and relative != RECORD_FILE:
            raise IntegrityError(f"{path}: is not part of the release", hint="remove the file")
    verdict = root / "verdict.json"
    if "verdict.json" not in record.files or sha256_file(verdict) != record.verdict_sha256:
        raise IntegrityError(f"{verdict}: not the verdict this release was built on", hint=_REBUILD)
    answer = read_record(verdict, Verdict)
    if answer.subject_sha256 != record.model_sha256:
        raise IntegrityError(f"{verdict}: is about another model", hint=_REBUILD)
    if answer.status != "ok":
        raise IntegrityError(f"{verdict}: its status is {answer.status}", hint=_REBUILD)
    if answer.answer != "pass" and not record.allowed_without_pass:
        raise IntegrityError(f"{verdict}: answers {answer.answer}", hint=_REBUILD)
    stated = {
        "verdict_answer": (record.verdict_answer, answer.answer),
        "policy_sha256": (record.policy_sha256, answer.policy_sha256),
        "allowed_without_pass": (record.allowed_without_pass, answer.answer != "pass"),
    }
    for field, (said, found) in stated.items():
        if said != found:
            raise IntegrityError(
                f"{root / RECORD_FILE}: says {field} {said}, the verdict {found}", hint=_REBUILD
            )
    own = {"model": record.model_sha256, "verdict": record.verdict_sha256}
    for name, digest in own.items():
        if name not in record.inputs or record.inputs[name].sha256 != digest:
            raise IntegrityError(
                f"{root / RECORD_FILE}: its inputs name another {name}", hint=_REBUILD
            )
    check_evidence(answer, (safe_join(root, relative) for relative in record.files))
    if "policy.yaml" in record.files:
        check_policy(root / "policy.yaml", answer)
    if sha256_tree(safe_join(root, record.model)) != record.model_sha256:
        raise IntegrityError(f"{root / record.model}: not the model the verdict is about")
    if (record.fallback is None) != (record.fallback_sha256 is None):
        raise IntegrityError(f"{root / RECORD_FILE}: names half a fallback", hint=_REBUILD)
    if record.fallback is not None:
        fallback = safe_join(root, record.fallback)
        if sha256_tree(fallback) != record.fallback_sha256:
            raise IntegrityError(f"{fallback}: not the fallback that was released", hint=_REBUILD)
        check_fallback(fallback, safe_join(root, record.model))
    if record.seal != record.expected_seal:
        raise IntegrityError(f"{root / RECORD_FILE}: was edited after it was built", hint=_REBUILD)
    return record


def released_evaluations(
    release_dir: str | Path, record: ReleaseRecord
) -> dict[str, EvaluationRecord]:
    """Return a release's successful evaluations of exactly its model, by their path in it; the
    newest last."""
    found: dict[str, EvaluationRecord] = {}
    for relative in record.files:
        if not relative.endswith(".json") or relative.startswith(f"{record.model}/"):
            continue
        path = Path(release_dir) / relative
        try:
            if json.loads(path.read_text("utf-8")).get("kind") != "evaluation":
                continue
            evaluation = read_record(path, EvaluationRecord)
        except (AttributeError, OSError, ValueError, RecursionError, ModelopsError):
            continue
        if evaluation.status == "ok" and evaluation.source.sha256 == record.model_sha256:
            found[relative] = evaluation
    return dict(sorted(found.items(), key=lambda item: evaluation_end(item[1])))


def evaluation_end(evaluation: EvaluationRecord) -> float:
    """Return the end of an evaluation, in Unix seconds."""
    return evaluation.started_at.timestamp() + evaluation.duration_s


_REBUILD = "copy the release again, or rebuild it with `modelops release build`"


def is_release(directory: Path) -> bool:
    """Return whether a directory is a release and nothing else, so that it may be replaced."""
    try:
        record = read_record(directory / RECORD_FILE, ReleaseRecord)
        return tree_files(directory, empty_folders=False).keys() <= {*record.files, RECORD_FILE}
    except ModelopsError:
        return False


def short_digest(digest: str | None) -> str:
    return f"model {digest[:12]}" if digest else "no model"
