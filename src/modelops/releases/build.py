"""Release directory with a model, its verdict, records and cards.

release/
  release.json   ReleaseRecord: every other file by sha256 and size
  model/         the checkpoint (without training_state/) or the exported artifact
  fallback/      another artifact of the same checkpoint, for processors that model/ is wrong on
  verdict.json   what the gate answered, and policy.yaml, what it was asked
  records/       evaluations and whatever else the verdict and the cards cite
  cards/         model card, dataset card and their images
  NOTICE         attribution for images and weights
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from modelops.base.environment import current_environment
from modelops.base.errors import (
    GateFailedError,
    GateUndecidedError,
    IntegrityError,
    UsageError,
)
from modelops.base.files import (
    atomic_directory,
    read_text,
    remove_leftovers,
    safe_join,
    sha256_file,
    sha256_tree,
    tree_files,
    write_text,
)
from modelops.base.locks import output_lock
from modelops.records.base import InputRef
from modelops.records.export import ArtifactRecord, ReproductionCheck
from modelops.records.read import read_any_record, read_record
from modelops.records.release import (
    LABEL,
    PreflightRecord,
    ReleaseDefaults,
    ReleaseFile,
    ReleaseRecord,
    Verdict,
)
from modelops.releases.evidence import check_evidence
from modelops.releases.verify import (
    RECORD_FILE,
    check_fallback,
    check_policy,
    is_release,
    short_digest,
)

MODEL_FOLDER, FALLBACK_FOLDER = "model", "fallback"
CARD_SIDECARS = (".sources.json", ".statistics.json")
_TRAINING_STATE = "training_state"  # as in modelops.models.sources, which imports torch
_PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img[^>]*\ssrc=[\"']([^\"']+)")


def build_release(
    out_dir: str | Path,
    *,
    model_dir: str | Path,
    verdict: str | Path,
    records: Iterable[str | Path] = (),
    cards: Iterable[str | Path] = (),
    name: str,
    version: str,
    defaults: Mapping[str, Any] | None = None,
    policy: str | Path | None = None,
    notice: str = "",
    extra_files: Mapping[str, str | Path] | None = None,
    fallback: str | Path | None = None,
    preflights: Iterable[str | Path] = (),
    allow: bool = False,
) -> ReleaseRecord:
    """Copy everything a release consists of into `out_dir` and write release.json.

    Args:
        out_dir: an empty folder, or a release and nothing else, which is replaced as a whole; a
            killed build leaves the old release or the new one, and the next build clears up.
        model_dir: a checkpoint directory or an exported artifact.
        verdict: verdict.json of the gate.
        records: record files (JSON); a name that is taken gets its folder's name in front.
        cards: Markdown files; images they show by relative path come with them.
        name, version: of the release; the served model's id is the name.
        defaults: default sampling of the model (steps, guidance, golden image, ...).
        policy: policy.yaml the verdict was made by; must have the digest the verdict names.
        notice: attribution text for images and weights, written to NOTICE.
        extra_files: {name in the release: file}.
        fallback: an artifact of the same checkpoint that equals it without INT8. A node on whose
            processor no runtime gives the model's numbers serves it instead, and reports it.
        preflights: records of `modelops serve preflight` on this model on other machines.
        allow: build although the verdict is not `pass`; the record says so.

    Raises:
        GateFailedError, GateUndecidedError: the verdict is not `pass` and `allow` is false.
        IntegrityError: the verdict is about another model or another policy, or has other numbers
            than its records; or a symbolic link lies in the model.
        UsageError: an input is missing or of another kind, or `out_dir` holds other files.
        InUseError: another process builds there.
        ModelopsError: the disk is full or the folder cannot be written.
    """
    _check_label("name", name)
    _check_label("version", version)
    out, model, verdict_path = Path(out_dir), Path(model_dir), Path(verdict)
    verdict_sha256 = sha256_file(verdict_path)
    answer, model_sha256 = check_verdict(verdict_path, model, policy=policy, allow=allow)
    if out.resolve().is_relative_to(model.resolve()):
        raise UsageError(f"{out}: lies in the model", hint="choose another directory")
    if fallback is not None:
        check_fallback(fallback, model)
    reproduced = known_reproductions(model, model_sha256, preflights)
    with output_lock(out):
        remove_leftovers(out.parent)
        _check_replaceable(out)
        with atomic_directory(out) as folder:
            _copy_tree(model, folder / MODEL_FOLDER, exclude=[_TRAINING_STATE])
            _copy(verdict_path, folder / "verdict.json")
            if policy is not None:
                _copy(Path(policy), folder / "policy.yaml")
            for path in map(Path, records):
                read_any_record(path)
                _copy(path, _free_name(folder / "records", path))
            if fallback is not None:
                _copy_tree(Path(fallback), folder / FALLBACK_FOLDER, exclude=())
            for card in map(Path, cards):
                for relative, source in _card_files(card).items():
                    _copy(source, folder / "cards" / relative)
            if notice.strip():
                write_text(folder / "NOTICE", notice.strip() + "\n")
            for relative, extra in (extra_files or {}).items():
                target = safe_join(folder, relative)
                if target.exists() or relative == RECORD_FILE:
                    raise UsageError(f"{relative}: this name is taken in a release")
                _copy(Path(extra), target)
            record = ReleaseRecord(
                name=name,
                version=version,
                model=MODEL_FOLDER,
                model_sha256=model_sha256,
                fallback=FALLBACK_FOLDER if fallback is not None else None,
                fallback_sha256=None if fallback is None else sha256_tree(folder / FALLBACK_FOLDER),
                reproduced=reproduced,
                verdict_sha256=verdict_sha256,
                verdict_answer=answer.answer,
                allowed_without_pass=answer.answer != "pass",
                policy_sha256=answer.policy_sha256,
                defaults=cast("ReleaseDefaults", dict(defaults or {})),
                inputs={
                    "model": InputRef(path=model.name, sha256=model_sha256),
                    "verdict": InputRef(path=verdict_path.name, sha256=verdict_sha256),
                },
                files={
                    relative: ReleaseFile(sha256=sha256_file(path), bytes=path.stat().st_size)
                    for relative, path in tree_files(folder).items()
                },
                environment=current_environment(),
            ).sealed()
            copied = {
                model: sha256_tree(folder / MODEL_FOLDER) == model_sha256,
                verdict_path: sha256_file(folder / "verdict.json") == verdict_sha256,
            }
            for path, is_same in copied.items():
                if not is_same:
                    raise IntegrityError(f"{path}: changed while it was copied", hint="try again")
            check_evidence(answer, [folder / relative for relative in record.files])
            record.write(folder / RECORD_FILE)
    return record


def _check_replaceable(out: Path) -> None:
    is_free = not out.exists() or (out.is_dir() and (is_release(out) or not any(out.iterdir())))
    if out.is_symlink() or not is_free:
        raise UsageError(
            f"{out}: exists and is not a release, or holds other files",
            hint="choose another directory",
        )


def known_reproductions(
    model_dir: str | Path, model_sha256: str, preflights: Iterable[str | Path] = ()
) -> list[ReproductionCheck]:
    """On which kinds of processor a model was found to give its numbers: what its own artifact
    says, and preflights on other machines.

    Raises:
        IntegrityError: a preflight is about another model.
    """
    found: list[ReproductionCheck] = []
    if (Path(model_dir) / "artifact.json").is_file():
        found += read_record(Path(model_dir) / "artifact.json", ArtifactRecord).reproduced
    for path in preflights:
        record = read_record(path, PreflightRecord)
        if record.model_sha256 != model_sha256:
            raise IntegrityError(
                f"{path}: is about {short_digest(record.model_sha256)}, "
                f"but {model_dir} is {short_digest(model_sha256)}",
                hint="run `modelops serve preflight` on the model that is to be released",
            )
        found += record.reproduced
    return [one for index, one in enumerate(found) if one not in found[:index]]


def check_verdict(
    verdict: str | Path,
    model_dir: str | Path,
    *,
    policy: str | Path | None = None,
    allow: bool = False,
) -> tuple[Verdict, str]:
    """(verdict, digest of the model) if the model may be released by it; see `build_release`.

    Raises:
        GateFailedError, GateUndecidedError: the verdict is not `pass` and `allow` is false.
        IntegrityError: the verdict is about another model or another policy.
    """
    verdict_path, model = Path(verdict), Path(model_dir)
    answer = read_record(verdict_path, Verdict)
    if answer.status != "ok":
        raise IntegrityError(
            f"{verdict_path}: its status is {answer.status}", hint="run `modelops gate` again"
        )
    if answer.answer != "pass" and not allow:
        failed = [line.name for line in answer.criteria if line.answer != "pass"]
        kind = GateFailedError if answer.answer == "fail" else GateUndecidedError
        raise kind(
            f"{verdict_path}: the gate answered {answer.answer} "
            f"({', '.join(failed) or 'no criteria'})",
            hint="mend the model or the policy and run `modelops gate` again, or allow it openly",
        )
    model_sha256 = sha256_tree(model, exclude=[_TRAINING_STATE])
    if answer.subject_sha256 != model_sha256:
        raise IntegrityError(
            f"{verdict_path}: is about {short_digest(answer.subject_sha256)}, "
            f"but {model} is {short_digest(model_sha256)}",
            hint="run the gate on the model that is to be released",
        )
    if policy is not None:
        check_policy(policy, answer)
    return answer, model_sha256


def _card_files(card: Path) -> dict[str, Path]:
    """Return a card, its images and its sources, as {path below cards/: file}.

    Raises:
        UsageError: an image is missing or outside the card's folder.
    """
    files = {card.name: card}
    for suffix in CARD_SIDECARS:  # what `modelops card check` needs
        if card.with_suffix(suffix).is_file():
            files[card.with_suffix(suffix).name] = card.with_suffix(suffix)
    for markdown, html in _PICTURE.findall(read_text(card)):
        link = unquote(markdown or html)
        if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
            continue
        picture = safe_join(card.parent, link.removeprefix("./"))
        if not picture.is_file():
            raise UsageError(f"{card}: shows {link}, which does not exist")
        files[link.removeprefix("./")] = picture
    return files


def _free_name(folder: Path, path: Path) -> Path:
    for name in (path.name, f"{path.resolve().parent.name}-{path.name}"):
        if not (folder / name).exists():
            return folder / name
    raise UsageError(f"{path}: two records with this name")


def _copy(source: Path, target: Path) -> None:
    if source.is_symlink():
        raise IntegrityError(f"{source}: symbolic links are not released", hint="copy the file")
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_tree(source: Path, target: Path, *, exclude: Iterable[str]) -> None:
    for relative, path in tree_files(source, exclude=exclude).items():
        _copy(path, target / relative)


def _check_label(what: str, value: str) -> None:
    if not re.fullmatch(LABEL, value):
        raise UsageError(
            f"{what} {value!r}: use up to 64 letters, digits, dots, dashes and underscores"
        )
