"""`modelops doctor`"""

from __future__ import annotations

import click

from modelops.cli.output import emit, json_option, table


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Report what this machine can do, and how to add what is missing.

    Exits 1 if something that is installed does not work.

    \b
    Example:
      modelops doctor
      modelops doctor --json | jq '.findings[] | select(.state == "problem")'
    """
    from modelops.doctor import examine

    findings = examine()
    problems = [finding for finding in findings if finding.state == "problem"]
    emit(
        {"status": "failed" if problems else "ok", "findings": [f.as_dict() for f in findings]},
        as_json=as_json,
    )
    if not as_json:
        rows = [[f.area, f.name, f.state, f.detail, f.remedy] for f in findings]
        table(["area", "name", "state", "detail", "remedy"], rows)
    return 1 if problems else 0
