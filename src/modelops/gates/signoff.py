"""A person's word on a file. It is bound to the file's digest and lapses when the file changes."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelops.base.environment import current_environment
from modelops.base.errors import GateFailedError, GateUndecidedError, ModelopsError, UsageError
from modelops.base.files import sha256_file
from modelops.gates.written import verdicts_in
from modelops.records.base import InputRef
from modelops.records.read import read_record
from modelops.records.release import SignOff, Verdict

MARK = ".signoff-"
_OBJECT = re.compile(rb"[^\x21-\x7e]*[\[{]")  # after a byte-order mark, perhaps
_VERDICT = re.compile(rb"[\"']kind[\"']\s*:\s*[\"']verdict[\"']", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignOffState:
    """State of a sign-off today: `valid`, `lapsed` (the file changed) or `broken`."""

    path: Path
    state: Literal["valid", "lapsed", "broken"]
    name: str
    role: str
    date: str
    reason: str


def sign_off(
    path: str | Path, *, name: str, role: str, statement: str = "I have read this and approve it."
) -> Path:
    """Sign a file; the sign-off is written beside it, one per role.

    Args:
        path: a verdict, a charter, a card.
        name: name of the person who signs.
        role: role of that person, such as "release approver".
        statement: statement of that person.

    Returns:
        The sign-off: PATH.signoff-ROLE.json.

    Raises:
        UsageError: the file does not exist, or a name or role is empty or not printable.
        GateFailedError, GateUndecidedError: the file is, or has in it, a verdict that does not say
            `pass`, in JSON or YAML.
    """
    target = Path(path)
    if not target.is_file():
        raise UsageError(f"{path}: no such file", hint="sign a file, such as gate/verdict.json")
    words = {"name": name, "role": role, "statement": statement}
    for what, text in words.items():
        if not text.strip() or any(unicodedata.category(sign)[0] == "C" for sign in text):
            raise UsageError(f"--{what}: should be one line of readable text")
    slug = _slug(role)
    if not slug:
        raise UsageError(f"--role {role}: should hold letters or digits")
    digest = sha256_file(target)
    _refuse_without_pass(target)
    signed = SignOff(
        subject=InputRef(path=target.name, sha256=digest),
        name=name.strip(), role=role.strip(), statement=statement.strip(),
        environment=current_environment(),
    )  # fmt: skip
    out = target.with_name(f"{target.name}{MARK}{slug}.json")
    if out.exists():
        state = _state(out, target.name, digest)
        if state.state == "valid" and state.name != signed.name:
            raise UsageError(
                f"{out}: {state.name} has signed as {state.role} on {state.date}, and it holds",
                hint="sign in another role, or remove that sign-off first",
            )
        if state.state == "broken":
            raise UsageError(f"{out}: {state.reason}", hint="look at it, then remove it")
    signed.write(out)
    return out


def _slug(role: str) -> str:
    """Return a role as a file name has it: `Release Approver` -> `release-approver`."""
    return re.sub(r"[^a-z0-9]+", "-", role.lower()).strip("-")


def _refuse_without_pass(target: Path) -> None:
    data = target.read_bytes()
    # Also one that is no record any more, in UTF-16 or with text after it: whatever its name.
    bare = data.replace(b"\0", b"")
    text = data.decode("utf-8-sig", "replace")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    is_record = isinstance(whole, dict) and whole.get("kind") == "verdict"
    if is_record or (_VERDICT.search(bare) and _OBJECT.match(bare)):
        verdict = read_record(target, Verdict)
        _refuse(target, verdict.status, [verdict.answer])
    try:
        for found in verdicts_in(text):
            lines = found.get("criteria")
            lines = lines if isinstance(lines, list) else []
            answers = [one.get("answer") for one in [found, *lines] if isinstance(one, dict)]
            _refuse(target, found.get("status", "ok"), answers)
    except RecursionError as error:
        raise UsageError(f"{target}: nested too deeply") from error


def _refuse(target: Path, status: object, answers: list[Any]) -> None:
    """Refuse a verdict that did not end well or has an answer other than `pass`."""
    hint = "a sign-off approves; mend what the verdict names and run the gate again"
    said = [str(answer).strip().casefold() for answer in answers]
    if status != "ok":
        raise GateUndecidedError(f"{target}: its status is {status}", hint="run the gate")
    if "fail" in said:
        raise GateFailedError(f"{target}: the verdict is fail", hint=hint)
    if set(said) != {"pass"}:
        raise GateUndecidedError(f"{target}: the verdict is undecided", hint=hint)


def check_sign_offs(path: str | Path) -> list[SignOffState]:
    """Check every sign-off beside a file: does it still hold?"""
    target = Path(path)
    digest = sha256_file(target)
    return [
        _state(found, target.name, digest)
        for found in sorted(target.parent.glob("*.json"))
        if found.name.startswith(f"{target.name}{MARK}")
    ]


def _state(path: Path, name: str, digest: str) -> SignOffState:
    try:
        signed = read_record(path, SignOff)
    except ModelopsError as error:
        return SignOffState(
            path=path, state="broken", name="", role="", date="", reason=error.message
        )
    if path.name != f"{name}{MARK}{_slug(signed.role)}.json":
        return SignOffState(
            path=path, state="broken", name=signed.name, role=signed.role, date="",
            reason=f"its name is not that of a sign-off as {signed.role}",
        )  # fmt: skip
    holds = signed.subject.sha256 == digest and signed.subject.path == name
    if signed.status != "ok":
        return SignOffState(
            path=path, state="broken", name=signed.name, role=signed.role, date="",
            reason=f"its status is {signed.status}",
        )  # fmt: skip
    return SignOffState(
        path=path,
        state="valid" if holds else "lapsed",
        name=signed.name,
        role=signed.role,
        date=signed.started_at.date().isoformat(),
        reason=signed.statement if holds else f"{name} is not the file that was signed",
    )
