"""`modelops demo`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.cli.output import dry_run_option, emit, json_option, progress, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelops.steps import Chain, OnProgress, Step, StepResult


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("modelops-demo"))
@click.option(
    "--budget", "budget_name", default="default", show_default=True, metavar="NAME",
    help="`default` (about 20 minutes on two cores) or `smoke` (about 3).",
)  # fmt: skip
@click.option(
    "--force", multiple=True, metavar="STEP", help="Run this step again even if it is fresh."
)
@dry_run_option
@json_option
def demo(
    directory: Path, budget_name: str, force: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Run the whole chain on OpenMoji in DIRECTORY: pictures, deduplication, split, shards,
    training, evaluation, export, cards, gate, release, and one picture from the served release.

    Run again, it skips every step whose inputs and outputs have not changed; killed, it goes on
    where it was.

    \b
    Examples:
      modelops demo my-demo
      modelops demo my-demo --budget smoke
      modelops demo my-demo --force train
    """
    from modelops.demo.budgets import budget_named
    from modelops.demo.chain import demo_chain
    from modelops.demo.project import headline, prepare

    budget = budget_named(budget_name)
    if dry_run:
        steps = demo_chain(directory, budget).steps
        emit({"status": "ok", "steps": [step.name for step in steps]}, as_json=as_json)
        if not as_json:
            table(["step", "what it does"], [[step.name, step.title] for step in steps])
        return
    prepare(directory, budget_name, budget)
    results = list(_run(demo_chain(directory, budget), force, quiet=as_json))
    rows = headline(directory)
    emit(
        {
            "status": "ok",
            "directory": str(directory),
            "steps": [
                {
                    "name": r.name,
                    "state": r.state,
                    "seconds": round(r.seconds, 2),
                    "summary": r.summary,
                }
                for r in results
            ],
            "results": {name: value for name, value, _ in rows},
        },
        as_json=as_json,
    )
    if not as_json:
        table(
            ["step", "", "seconds", "result"],
            [[r.name, r.state, f"{r.seconds:.1f}", r.summary] for r in results],
            title=f"{directory}: {len(results)} steps",
        )
        table(["measure", "value", "meaning"], rows, title="What the release is")
        print(
            f"Read   {directory / 'cards/model_card.md'}\n"
            f"Look   {directory / 'evaluations/final.html'}\n"
            f"Serve  modelops serve {directory / 'release'}"
        )


def _run(chain: Chain, force: tuple[str, ...], *, quiet: bool) -> Iterator[StepResult]:
    """Run the chain with a bar for the running step and a line for each finished one."""
    total = len(chain.steps)
    numbers = {step.name: index for index, step in enumerate(chain.steps, 1)}
    with progress("starting", quiet=quiet) as shown:

        def on_start(step: Step) -> OnProgress:
            shown.stage(step.title, numbers[step.name], total)
            return shown

        for result in chain.run(force=force, on_start=on_start):
            if not quiet:
                took = f"({result.seconds:.1f} s)" if result.state == "done" else "(fresh)"
                number = numbers[result.name]
                shown.line(f"{number:>3}/{total} {result.title}: {result.summary} {took}")
            yield result
