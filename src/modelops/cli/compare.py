"""`modelops compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.cli.options import FILE, seed_option
from modelops.cli.output import emit, is_json, json_option, progress, say, show, table

if TYPE_CHECKING:
    from modelops.records.comparison import ComparedMetric, ComparisonRecord

EXIT_CODES = {"pass": 0, "fail": 3, "undecided": 4}


@click.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--margin", "margins", multiple=True, metavar="METRIC=VALUE",
              help="Loss that is accepted: 0.01 in the metric's unit, or 5% of FIRST's value. "
              "Repeatable.")  # fmt: skip
@click.option("--default-margins", is_flag=True,
              help="Let the default margins decide where no --margin is given.")  # fmt: skip
@click.option("--adjust", type=click.Choice(["holm", "none"]), default="holm", show_default=True,
              help="Adjustment of p-values for the number of metrics.")  # fmt: skip
@click.option("--manifest", type=FILE, metavar="FILE",
              help="Manifest of the real images, if it is not where the records say.")  # fmt: skip
@click.option(
    "--splits",
    type=FILE,
    metavar="FILE",
    help="Splits of the real images, if they are not where the records say.",
)
@click.option("--lpips-weights", type=FILE, metavar="FILE",
              help="torchvision's weights of the LPIPS backbone. With them, LPIPS measures how "
              "different the images of the same prompts and seeds look.")  # fmt: skip
@click.option("--lpips-net", type=click.Choice(["alex", "vgg", "squeeze"]), default="alex",
              show_default=True, help="Backbone that --lpips-weights belongs to.")  # fmt: skip
@seed_option("Seed of the bootstrap resampling.")
@click.option(
    "--resamples",
    type=click.IntRange(20),
    default=2000,
    show_default=True,
    help="Number of bootstrap resamples.",
)
@click.option("--out", type=FILE, metavar="FILE", help="Comparison record to write.")
@json_option
def compare(
    first: Path,
    second: Path,
    margins: tuple[str, ...],
    default_margins: bool,
    adjust: str,
    manifest: Path | None,
    splits: Path | None,
    lpips_weights: Path | None,
    lpips_net: str,
    seed: int,
    resamples: int,
    out: Path | None,
) -> int:
    """Compare evaluation SECOND with FIRST: which metrics are better or worse?

    Both must have used the same prompts and seeds; all metrics are compared prompt by prompt.
    Values of different protocols are refused, with their differences.

    "better" and "worse" mean that there is a difference, however small. "within noise" means that
    none was shown, which does not prove that there is none. With many metrics one could be "worse"
    by chance, so p-values are adjusted by Holm's method: all verdicts together err in at most 5 %
    of comparisons of equal sources. A margin asks the opposite question: how much worse is
    accepted? "within margin" is yes when the whole 95 % interval is within it, no when the whole
    interval is beyond it, else undecided. All margins must be met at once, so they need no
    adjustment. With --margin, the margin decides about that metric in place of the verdict.
    "detectable" is the smallest difference that is found with 80 % power at this n. "prompts
    needed" is the number of prompts that show an equal source to be within the margin with 80 %
    power.

    Default margins (shown with a *, deciding with --default-margins): 0.01 for unsafe_rate,
    near_copy_rate and failed_image_rate, 0.05 for other rates, precision, recall and coverage, and
    5% for everything else.

    \b
    Exits 0  nothing is worse and every margin is met
          3  something is worse, or beyond its margin
          4  undecided: a margin, or nothing could be compared

    \b
    Examples:
      modelops compare evaluations/early.json evaluations/final.json
      modelops compare evaluations/fp32.json evaluations/int8.json \\
          --margin frechet_distance_lite0=5% --margin unsafe_rate=0.01 --out comparisons/int8.json
    """
    from modelops.evaluation.compare.compare import compare_records
    from modelops.evaluation.compare.margins import parse_margins

    with progress("Comparing") as report:
        record = compare_records(
            first, second, margins=parse_margins(margins), default_margins=default_margins,
            adjust=adjust == "holm", manifest=manifest, splits=splits,
            lpips_weights=lpips_weights, lpips_net=lpips_net, seed=seed, resamples=resamples,
            on_progress=lambda _, done, total: report(done, total),
        )  # fmt: skip
    if out is not None:
        record.write(out)
    found = record.model_dump(mode="json", exclude={"status", "kind", "environment"})
    emit({"status": "ok", "exit_code": EXIT_CODES[record.answer], **found})
    if not is_json():
        _show(record)
        if out is not None:
            say(f"{out} ({record.duration_s:.0f} s)")
    return EXIT_CODES[record.answer]


def _show(record: ComparisonRecord) -> None:
    compared = [row for row in record.comparisons if row.verdict != "not comparable"]
    if compared:
        table(
            [
                "metric",
                "first",
                "second",
                "difference, 95 % interval",
                "second is",
                "within margin",
            ],
            [_cells(row) for row in compared],
        )
        table(
            ["metric", "margin", "detectable", "prompts", "prompts needed for the margin"],
            [_power_cells(row) for row in compared],
            title="What this many prompts can show, with 80 % power",
        )
    refused = [row for row in record.comparisons if row.verdict == "not comparable"]
    neither = [row.metric for row in refused if row.first is None and row.second is None]
    if told := [row for row in refused if row.metric not in neither]:
        table(["not comparable", "because"], [[row.metric, row.reason] for row in told])
    if record.images:
        from modelops.evaluation.report.rows import metric_rows

        title = "image by image, second against first"
        table([title, "value", "95 % interval", "n", "method"], metric_rows(record.images))
    if neither:
        say(f"measured in neither: {', '.join(neither)}")
    for note, metrics in _notes(compared).items():
        say(f"note: {', '.join(metrics)}: {note}")
    for warning in record.warnings:
        say(f"warning: {warning}")
    if record.adjustment == "holm" and compared:
        say(f"verdicts are adjusted for {len(compared)} metrics (Holm); * is a default margin")
    counts = (
        f"{record.n_better} better, {record.n_worse} worse, {record.n_within_noise} within noise, "
        f"{record.n_not_comparable} not comparable"
    )
    show(f"{record.answer}: {'; '.join([*record.reasons, counts])}")


def _cells(row: ComparedMetric) -> list[str]:
    star = "*" if row.margin_source == "default" else ""
    return [
        row.metric, _number(row.first), _number(row.second),
        f"{_number(row.difference)} [{_number(row.low)}, {_number(row.high)}]", row.verdict,
        f"{row.within_margin}{star}" if row.within_margin else "",
    ]  # fmt: skip


def _power_cells(row: ComparedMetric) -> list[str]:
    star = "*" if row.margin_source == "default" else ""
    return [
        row.metric, _number(row.margin) + star, _number(row.detectable), str(row.n),
        "" if row.prompts_needed is None else f"{row.prompts_needed:,}",
    ]  # fmt: skip


def _notes(rows: list[ComparedMetric]) -> dict[str, list[str]]:
    """{remark: metrics}; and why what looks clear is called noise."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        remarks = list(row.notes)
        if row.verdict == "within noise" and "is clear of zero" in row.reason:
            remarks.append(row.reason)
        for remark in remarks:
            notes.setdefault(remark, []).append(row.metric)
    return notes


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
