"""`modelops train`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import PATH, dry_run_option
from modelops.cli.output import emit, json_option, progress, say


@click.command()
@click.argument("config", type=PATH)
@click.option(
    "--resume", is_flag=True, help="Continue from the newest checkpoint, if there is one."
)
@click.option(
    "--processes", type=int, default=1, metavar="N", show_default=True,
    help="Number of data-parallel processes: one per GPU, or several on a CPU.",
)  # fmt: skip
@click.option(
    "--run-name", metavar="NAME", help="Name of the run.  [default: the config's, without _config]"
)
@click.option(
    "--out", type=PATH, metavar="DIR",
    help="Folder of all runs.  [default: runs/ beside the config]",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
    help="Change one value of the config. Repeatable.",
)  # fmt: skip
@dry_run_option
@json_option
def train(
    config: Path,
    resume: bool,
    processes: int,
    run_name: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
) -> int:
    """Train a model from a config (YAML).

    Paths in CONFIG are relative to its folder. The run directory gets config.json, stats.jsonl,
    tensorboard/, checkpoints/step-N/ (diffusers directories), grids/, train.json and report.md.
    Ctrl-C saves a checkpoint first.

    \b
    Examples:
      modelops train pilot_config.yaml
      modelops train pilot_config.yaml --resume
      modelops train pilot_config.yaml --run-name low-lr --set training.lr=2e-4
      modelops train pilot_config.yaml --processes 4 --dry-run
    """
    from modelops.training.launch import default_run_dir, execute_run, plan_run

    plan = plan_run(
        config,
        run_dir=default_run_dir(config, out=out, name=run_name),
        overrides=overrides,
        resume=resume,
        processes=processes,
    )
    result = {
        "run_dir": str(plan.run_dir),
        "config_sha256": plan.spec.config_sha256,
        "effective_batch": plan.spec.effective_batch,
    }
    if dry_run:
        emit(
            {"status": "ok", **result, "command": plan.command},
            text=plan.shell_line,
        )
        return 0
    with progress("training") as on_progress:
        code = execute_run(plan, on_line=say, on_progress=on_progress)
    status = "ok" if code == 0 else "failed"
    emit(
        {"status": status, "exit_code": code, **result},
        text=f"{plan.run_dir / 'report.md'}\n{plan.run_dir / 'checkpoints'}" if code == 0 else None,
    )
    if code == 0:
        say(f"curves: tensorboard --logdir {plan.run_dir / 'tensorboard'}")
    else:
        say(f"{plan.run_dir / 'train.json'} says how it ended; go on with --resume")
    return code
