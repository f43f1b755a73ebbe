"""`modelops demo`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.cli.options import PATH, dry_run_option
from modelops.cli.output import emit, is_json, json_option, progress, show, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modelops.base.steps import Chain, OnProgress, Step, StepResult
    from modelops.demo.plan import Plan


@click.command()
@click.argument("directory", type=PATH, default=Path("modelops-demo"))
@click.option(
    "--budget", "budget_name", default="default", show_default=True, metavar="NAME",
    help="`default` (about 15 minutes on two cores with bf16 instructions, 25 with AVX2 only) or "
    "`smoke` (about 3).",
)  # fmt: skip
@click.option(
    "--force",
    multiple=True,
    metavar="STEP",
    help="Run this step again even if nothing changed. Repeatable.",
)
@dry_run_option
@json_option
def demo(directory: Path, budget_name: str, force: tuple[str, ...], dry_run: bool) -> None:
    """Run the whole chain on OpenMoji in DIRECTORY: images, deduplication, split, shards,
    training, evaluation, export, cards, gate, release, and one image from the served release.

    The default budget first measures this machine for some seconds, then prints what it will do and
    how long each step should take. --dry-run prints this and stops. A second run keeps the plan and
    skips every step whose inputs and outputs have not changed. A killed run continues where it was.

    \b
    Examples:
      modelops demo my-demo
      modelops demo my-demo --budget smoke
      modelops demo my-demo --force train
    """
    from modelops.demo.budgets import budget_named
    from modelops.demo.chain import demo_chain
    from modelops.demo.project import check_place, headline, prepare

    budget = budget_named(budget_name)
    if not dry_run:
        check_place(directory, budget_name)
    plan = _plan(directory, budget_name) if budget.planned else None
    if plan:
        budget = plan.apply(budget)
    if dry_run:
        steps = demo_chain(directory, budget).steps
        result = {"status": "ok", "steps": [step.name for step in steps]}
        emit(result | ({"plan": plan.as_dict()} if plan else {}))
        if not is_json():
            _show(plan, steps)
        return
    prepare(directory, budget_name, budget, plan)
    if plan and not is_json():
        _show(plan, demo_chain(directory, budget).steps)
    results = list(_run(demo_chain(directory, budget), force))
    rows = headline(directory)
    emit(
        {
            "status": "ok",
            "directory": str(directory),
            "plan": plan.as_dict() if plan else None,
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
    )
    if not is_json():
        table(
            ["step", "", "seconds", "result"],
            [[r.name, r.state, f"{r.seconds:.1f}", r.summary] for r in results],
            title=f"{directory}: {len(results)} steps",
        )
        table(["measure", "value", "meaning"], rows, title="What the release is")
        show(
            f"Read   {directory / 'cards/model_card.md'}\n"
            f"Look   {directory / 'evaluations/final.html'}\n"
            f"Serve  modelops serve {directory / 'release'}"
        )


def _plan(directory: Path, budget_name: str) -> Plan | None:
    """The plan that the directory keeps, or a new one for this machine; None for a demo that was
    made before there were plans."""
    from modelops.demo.machine import measure_rates
    from modelops.demo.plan import CONFIGS, make_plan
    from modelops.demo.project import is_made, kept_plan

    if is_made(directory, budget_name):
        return kept_plan(directory, budget_name)
    with progress("measuring this machine") as shown:
        return make_plan(measure_rates(CONFIGS, shown))


def _show(plan: Plan | None, steps: Sequence[Step]) -> None:
    """Print what will be done, and where it is planned, how long it takes."""
    if plan is None:
        table(["step", "what it does"], [[step.name, step.title] for step in steps])
        return
    seconds = dict(plan.stages)
    table(
        ["step", "what it does", "minutes"],
        [[step.name, step.title, f"{seconds.get(step.name, 0) / 60:.1f}"] for step in steps],
        title=f"About {plan.seconds / 60:.0f} minutes here: {plan.reason}",
    )


def _run(chain: Chain, force: tuple[str, ...]) -> Iterator[StepResult]:
    """Run the chain with a bar for the running step and a line for each finished one."""
    total = len(chain.steps)
    numbers = {step.name: index for index, step in enumerate(chain.steps, 1)}
    with progress("starting") as shown:

        def on_start(step: Step) -> OnProgress:
            shown.stage(step.title, numbers[step.name], total)
            return shown

        for result in chain.run(force=force, on_start=on_start):
            if not is_json():
                took = f"({result.seconds:.1f} s)" if result.state == "done" else "(fresh)"
                number = numbers[result.name]
                shown.line(f"{number:>3}/{total} {result.title}: {result.summary} {took}")
            yield result
