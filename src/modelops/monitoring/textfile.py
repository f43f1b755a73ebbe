"""A verdict to a Prometheus textfile, which node-exporter's textfile collector reads."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from modelops.base.files import write_text
from modelops.records.monitoring import MonitorAnswer, MonitorRecord


def textfile(record: MonitorRecord) -> str:
    """The exposition. Its labels are the release's name and version, answers and tests' names."""
    name, _, version = record.release.partition(" ")
    of = f'release="{name}",version="{version}"'
    ended = record.started_at.timestamp() + record.duration_s
    interval = record.evaluate_every_days / record.windows * 86400
    found = sum(test.outcome == "found" for test in record.tests)
    lines: list[str] = []

    def family(metric: str, text: str, *samples: tuple[str, float]) -> None:
        lines.extend((f"# HELP modelops_monitor_{metric} {text}",
                      f"# TYPE modelops_monitor_{metric} gauge"))  # fmt: skip
        lines.extend(
            f"modelops_monitor_{metric}{{{of}{labels}}} {value!r}" for labels, value in samples
        )

    family("verdict", "1 for the answer of the last look at the drift log",
           *((f',answer="{answer}"', float(answer == record.answer))
             for answer in get_args(MonitorAnswer)))  # fmt: skip
    family("tests_found", "Tests of the last look that found a shift", ("", float(found)))
    family("test_found", "1 where a test found a shift, by test",
           *((f',test="{test.name}"', float(test.outcome == "found")) for test in record.tests),
           )  # fmt: skip
    family("window_images", "Images in the window of the last look", ("", float(record.n_images)))
    family("timestamp_seconds", "When the drift log was looked at last, in Unix seconds",
           ("", round(ended, 3)))  # fmt: skip
    family("interval_seconds", "The drift log is to be looked at this often", ("", interval))
    return "\n".join(lines) + "\n"


def write_textfile(path: str | Path, record: MonitorRecord) -> None:
    """Write it atomically, as the collector asks for."""
    write_text(path, textfile(record))
