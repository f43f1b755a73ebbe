"""`modelops compare`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.output import emit, json_option, table


@click.command()
@click.argument("first", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("second", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resampling."
)
@click.option(
    "--resamples",
    type=click.IntRange(20),
    default=2000,
    show_default=True,
    help="Bootstrap resamples.",
)
@json_option
def compare(first: Path, second: Path, seed: int, resamples: int, as_json: bool) -> int:
    """Say what of evaluation SECOND is better or worse than in FIRST.

    Values of different protocols are refused, with what differs. Exits 3 if any metric is worse, 4
    if nothing could be compared.

    \b
    Example:
      modelops compare evaluations/early.json evaluations/final.json
    """
    from modelops.evaluation.compare import compare_records

    found = compare_records(first, second, seed=seed, resamples=resamples)
    emit({"status": "ok", "comparisons": [item.as_dict() for item in found]}, as_json=as_json)
    if not as_json:
        rows = [
            [c.metric, c.verdict, _number(c.first), _number(c.second),
             f"{_number(c.difference)} [{_number(c.low)}, {_number(c.high)}]"
             if c.difference is not None else c.reason]
            for c in found
        ]  # fmt: skip
        table(["metric", "second is", "first", "second", "difference, 95 % interval"], rows)
    verdicts = {item.verdict for item in found}
    if "worse" in verdicts:
        return 3
    return 0 if verdicts - {"not comparable"} else 4


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
