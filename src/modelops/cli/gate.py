"""`modelops gate` and `modelops sign-off`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.base.errors import GateFailedError, GateUndecidedError, ModelopsError, UsageError
from modelops.cli.options import DIRECTORY, FILE, PATH
from modelops.cli.output import emit, is_json, json_option, say, table

if TYPE_CHECKING:
    from modelops.records.release import Criterion, Verdict


@click.command()
@click.argument("policy", type=PATH)
@click.option(
    "--root", type=DIRECTORY, metavar="DIR",
    help="Folder that the policy's paths are relative to.  [default: the policy's folder]",
)  # fmt: skip
@click.option(
    "--out", type=FILE, metavar="FILE",
    help="Verdict to write.  [default: ROOT/gate/verdict.json]",
)  # fmt: skip
@json_option
def gate(policy: Path, root: Path | None, out: Path | None) -> int:
    """Decide a release by a policy.

    Exits 0 for pass, 3 for fail, 4 for undecided. A criterion whose metric was not measured, was
    measured in another way, or belongs to another model is undecided, never passed. The verdict is
    always written.

    \b
    Examples:
      modelops gate policy.yaml
      modelops gate policy.yaml --root my-demo --out my-demo/gate/verdict.json --json
    """
    from modelops.gates.decide import decide

    top = root or policy.parent
    path = out or top / "gate" / "verdict.json"
    verdict = decide(policy, root=top, out_path=path)
    refusal = _refusal(verdict, path)
    if is_json():
        emit({"status": "ok", "path": str(path), **_as_dict(verdict)})
        if refusal:
            say(f"error: {refusal.message}")  # stdout already carries its one object
        return refusal.exit_code if refusal else 0
    table(
        ["criterion", "bound", "value [low, high]", "answer", "because"],
        [[c.name, c.bound, _value(c), c.answer, c.reason] for c in verdict.criteria],
    )
    if refusal:
        raise refusal
    emit({}, text=f"pass: {path}")
    return 0


@click.command("sign-off")
@click.argument("path", metavar="FILE", type=PATH)
@click.option("--name", metavar="NAME", help="Name of the person who signs.")
@click.option("--role", metavar="ROLE", help="Role of that person; there is one sign-off per role.")
@click.option(
    "--statement", metavar="TEXT", help="Statement of that person.  [default: an approval]"
)
@click.option(
    "--check", is_flag=True, help="Print which sign-offs still hold; exit with 1 if one lapsed."
)
@json_option
def sign_off(
    path: Path, name: str | None, role: str | None, statement: str | None, check: bool,
) -> int:  # fmt: skip
    """Sign a verdict, charter or card; the sign-off lapses when the file changes.

    A verdict that does not say pass cannot be signed.

    \b
    Examples:
      modelops sign-off gate/verdict.json --name "Ada Lovelace" --role "release approver"
      modelops sign-off gate/verdict.json --check
    """
    from modelops.gates import signoff

    if check:
        states = signoff.check_sign_offs(path)
        good = bool(states) and all(state.state == "valid" for state in states)
        rows = [[s.role, s.name, s.date, s.state, s.reason] for s in states]
        columns = ["role", "name", "date", "state", "reason"]
        found = [dict(zip(columns, row, strict=True)) for row in rows]
        emit({"status": "ok" if good else "failed", "sign_offs": found})
        if not is_json():
            table(columns, rows)
        if good:
            return 0
        missing = "no sign-off" if not states else "a sign-off no longer holds"
        if is_json():
            return 1
        raise ModelopsError(
            f"{path}: {missing}", hint=f"modelops sign-off {path} --name … --role …"
        )
    if not name or not role:
        raise UsageError("a sign-off needs --name and --role", hint="modelops sign-off --help")
    extra = {"statement": statement} if statement else {}
    earlier = signoff.check_sign_offs(path) if path.is_file() else []
    before = {state.path: state for state in earlier}
    written = signoff.sign_off(path, name=name, role=role, **extra)
    replaced = before.get(written)
    if replaced:
        say(f"replaces that of {replaced.name} of {replaced.date}, which was {replaced.state}")
    emit({"status": "ok", "path": str(written), "replaced": replaced and replaced.name},
         text=f"signed: {written}")  # fmt: skip
    return 0


def _refusal(verdict: Verdict, path: Path) -> GateFailedError | GateUndecidedError | None:
    if verdict.answer == "pass":
        return None
    named = ", ".join(c.name for c in verdict.criteria if c.answer == verdict.answer)
    if verdict.answer == "fail":
        return GateFailedError(f"the gate says no: {named}", hint=f"read {path}")
    return GateUndecidedError(f"the gate cannot decide: {named}", hint=f"read {path}")


def _value(criterion: Criterion) -> str:
    if criterion.value is None:
        return "–"
    if isinstance(criterion.value, str):
        return criterion.value
    if criterion.low is None or criterion.high is None:
        return f"{criterion.value:.4g}"
    return f"{criterion.value:.4g} [{criterion.low:.4g}, {criterion.high:.4g}]"


def _as_dict(verdict: Verdict) -> dict[str, object]:
    return verdict.model_dump(mode="json", exclude={"status", "environment"})
