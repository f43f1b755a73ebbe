"""`modelops doctor`"""

from __future__ import annotations

import click

from modelops.cli.output import emit, is_json, json_option, table


@click.command()
@click.option("--pipeline", metavar="PATH",
              help="Checkpoint directory or hub id to watch at work, in place of this machine: its "
              "networks, what its call takes, and what can be done with it.")  # fmt: skip
@json_option
def doctor(pipeline: str | None) -> int:
    """Say what this machine can do, and what to do about what it cannot.

    Exits 1 if something that is installed does not work.

    \b
    Example:
      modelops doctor
      modelops doctor --pipeline runs/pilot/checkpoints/step-1000
      modelops doctor --json | jq '.findings[] | select(.state == "problem")'
    """
    if pipeline is None:
        from modelops.doctor.machine import examine

        findings = examine()
    else:
        from modelops.doctor.pipeline import examine_pipeline

        findings = list(examine_pipeline(pipeline))
    problems = [finding for finding in findings if finding.state == "problem"]
    emit(
        {"status": "failed" if problems else "ok", "findings": [f.as_dict() for f in findings]},
    )
    if not is_json():
        rows = [[f.area, f.name, f.state, f.detail, f.remedy] for f in findings]
        table(["area", "name", "state", "detail", "remedy"], rows)
    return 1 if problems else 0
