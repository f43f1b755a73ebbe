"""`modelops report`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.base.errors import ModelopsError, UsageError
from modelops.cli.options import FILE
from modelops.cli.output import emit, json_option, progress, say


@click.command()
@click.argument("record", type=FILE)
@click.option("--against", type=FILE, metavar="FILE",
              help="Earlier record; the page says what got better or worse.")  # fmt: skip
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    help="Page to write.  [default: RECORD with the suffix .html]",
)
@click.option("--check", "page", type=FILE, metavar="FILE",
              help="Write nothing; check whether this page still belongs to RECORD.")  # fmt: skip
@json_option
def report(record: Path, against: Path | None, out: Path | None, page: Path | None) -> int:
    """Print an evaluation RECORD as a page to read.

    The page is one HTML file that needs no network: what was measured and how, every value with its
    interval and protocol, unselected images, the worst and best, distributions. With --check, exits
    3 if the page no longer belongs to the record.

    \b
    Examples:
      modelops report evaluations/final.json --against evaluations/early.json
      modelops report evaluations/final.json --check evaluations/final.html
    """
    if page is not None:
        if out is not None:
            raise UsageError("--check writes nothing, so --out has no meaning beside it")
        return _check(page, record, against)
    from modelops.evaluation.report.page import write_report

    with progress("writing the report"):
        written = write_report(record, out=out, against=against)
    emit({"status": "ok", "path": str(written)}, text=f"written: {written}")
    return 0


def _check(page: Path, record: Path, against: Path | None) -> int:
    from modelops.evaluation.report.page import check_report

    reasons = check_report(page, record, against=against)
    emit(
        {"status": "stale" if reasons else "ok", "path": str(page), "reasons": reasons},
        text=None if reasons else f"{page} belongs to {record}",
    )  # fmt: skip
    if reasons:
        say(f"error: {page} is stale: {'; '.join(reasons)}\n"
            f"  try: modelops report {record} --out {page}")  # fmt: skip
    return 3 if reasons else 0


def write_report_beside(record: Path) -> Path | None:
    """The report of a record that was just written; a page that cannot be written is a remark."""
    from modelops.evaluation.report.page import write_report

    try:
        return write_report(record)
    except ModelopsError as error:
        say(f"no report was written: {error.message}")
        return None
