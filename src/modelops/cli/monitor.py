"""`modelops monitor`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.base.errors import GateFailedError, GateUndecidedError, UsageError
from modelops.cli.options import EXISTING_DIRECTORY, EXISTING_FILE, FILE, PATH
from modelops.cli.output import emit, is_json, json_option, say, show, table

if TYPE_CHECKING:
    from modelops.monitoring.reference import Reference
    from modelops.records.monitoring import DriftTest, MonitorRecord


@click.command()
@click.argument("log", type=PATH)
@click.option(
    "--release", required=True, metavar="DIR",
    type=EXISTING_DIRECTORY,
    help="Release that wrote the log.",
)  # fmt: skip
@click.option(
    "--window", metavar="FROM..TO",
    help="Rows of the log to judge, by ISO date or time in UTC.  [default: all, or all after the "
    "baseline]",
)  # fmt: skip
@click.option(
    "--baseline", metavar="FROM..TO",
    help="Rows of the log to compare with, in place of the release's evaluation.",
)  # fmt: skip
@click.option(
    "--evaluation", metavar="FILE", type=EXISTING_FILE,
    help="Evaluation record of the release, with its features beside it, if the release holds "
    "none.",
)  # fmt: skip
@click.option(
    "--policy", metavar="FILE", type=EXISTING_FILE,
    help="Policy whose `monitoring:` section is used in place of the released one's.",
)  # fmt: skip
@click.option(
    "--out", metavar="FILE", type=FILE,
    help="Record of the verdict to write.",
)  # fmt: skip
@click.option(
    "--textfile", metavar="FILE", type=FILE,
    help="File for node-exporter's textfile collector, with the verdict; the name must end in "
    ".prom.",
)  # fmt: skip
@json_option
def monitor(
    log: Path,
    release: Path,
    window: str | None,
    baseline: str | None,
    evaluation: Path | None,
    policy: Path | None,
    out: Path | None,
    textfile: Path | None,
) -> int:
    """Test whether a served release has drifted: its prompts, and its images.

    LOG is the folder that `modelops serve run --drift-log` writes. The tests cover the mean and the
    covariance of the images' features, the image filter's scores, the rate at which each filter
    blocks, the prompts' length and scripts, and with --baseline the latencies.

    Exits 0 for keep, 3 for investigate and retrain, 4 for undecided. The answer is also
    `investigate` when the release's evaluation is older than the policy allows. The answer states
    an upper bound of its false alarm rate for a window without drift (Holm over the tests, and the
    policy's alpha divided by its windows). A shift below its margin is no drift.

    \b
    Examples:
      modelops monitor drift --release release
      modelops monitor drift --release release --out monitoring/week-47.json \\
          --baseline 2026-11-01..2026-11-08 --window 2026-11-15..2026-11-22
    """
    import tempfile

    from modelops.base.errors import ConfigError
    from modelops.monitoring.judge import monitor as judge
    from modelops.monitoring.log import parse_span
    from modelops.monitoring.policy import read_monitoring
    from modelops.monitoring.textfile import write_textfile

    if textfile is not None and textfile.suffix != ".prom":
        raise UsageError(f"{textfile}: the collector reads files that end in .prom only")
    rules = read_monitoring(policy) if policy else None
    if policy and rules is None:
        raise ConfigError(f"{policy}: has no section `monitoring`")
    with tempfile.TemporaryDirectory() as folder:
        record = judge(
            log, release,
            window=parse_span(window) if window else None,
            baseline=parse_span(baseline) if baseline else None,
            reference=_reference(evaluation, Path(folder)) if evaluation else None,
            policy=rules,
        )  # fmt: skip
    if out is not None:
        record.write(out)
    if textfile is not None:
        write_textfile(textfile, record)
    code = {"keep": 0, "undecided": 4}.get(record.answer, 3)
    if is_json():
        emit(record.model_dump(mode="json"))
        if code:
            say(f"{record.answer}: {'; '.join(record.reasons)}")
        return code
    _print(record)
    message = f"{record.answer}: {'; '.join(record.reasons)}"
    if code == 0:
        emit({}, text=message)
        return 0
    raise (GateUndecidedError if code == 4 else GateFailedError)(message)


def _reference(evaluation: Path, folder: Path) -> Reference:
    from modelops.monitoring.reference import build_reference, read_reference

    build_reference(evaluation, folder)
    return read_reference(folder)


def _print(record: MonitorRecord) -> None:
    against = {
        "baseline": f"the log's own {record.baseline}",
        "evaluation": "the release's evaluation",
        "none": "nothing: there is no reference",
    }[record.reference]
    show(f"{record.release}, {record.window}: {record.n_images} images, {record.n_requests} "
          f"requests, {record.n_prompts} prompts, against {against}")  # fmt: skip
    for reason, count in sorted(record.refused.items()):
        show(f"left out: {count} rows {reason}")
    for warning in record.warnings:
        show(f"note: {warning}")
    table(
        ["test", "n", "effect [low, high]", "margin", "p, corrected", "outcome", "because"],
        [_row(test) for test in record.tests],
    )
    show(
        f"false alarms: at most {record.alpha:.2g} of such windows without drift, and "
        f"{record.period_alpha:.2g} for any of the {record.windows} until the next evaluation"
    )


def _row(test: DriftTest) -> list[str]:
    effect, p = "–", "–"
    if test.effect is not None and test.low is not None and test.high is not None:
        effect = f"{test.effect:.3g} [{test.low:.3g}, {test.high:.3g}]"
    if test.p_adjusted is not None:
        p = f"{test.p_adjusted:.2g}"
    n = f"{test.n_window} : {test.n_reference}" if test.n_window or test.n_reference else "–"
    return [test.name, n, effect, f"{test.margin:g}", p, test.outcome, test.reason]
