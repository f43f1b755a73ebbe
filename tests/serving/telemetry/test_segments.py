"""Folders of lines keep to their limit, and a disk that comes and goes does not flood the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import disks
from modelops.base.errors import UsageError
from modelops.serving.telemetry.outage import Outage
from modelops.serving.telemetry.segments import LONGEST, SEGMENTS, SegmentLog

LEAST = SEGMENTS * LONGEST


YEAR_NS = 365 * 86400 * 10**9
NOW_NS = 1_900_000_000 * 10**9


def open_segments(folder: Path, max_bytes: int = LEAST, **options: Any) -> SegmentLog:
    return SegmentLog(folder, prefix="x-", max_bytes=max_bytes, what="lines", **options)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_node_that_is_started_over_and_over_leaves_no_files(tmp_path: Path) -> None:
    for _ in range(5):
        open_segments(tmp_path / "log").close()
    assert list((tmp_path / "log").iterdir()) == []
    log = open_segments(tmp_path / "log")
    assert log.write_line(b"one") and log.write_line(b"two")
    log.close()
    (file,) = (tmp_path / "log").iterdir()
    assert file.read_bytes() == b"one\ntwo\n" and file.stat().st_mode & 0o777 == 0o600


def test_a_canarys_log_is_within_the_limit_too(tmp_path: Path) -> None:
    """Two logs of one process in one folder: the stable release's and the canary's."""
    stable, canary = open_segments(tmp_path), open_segments(tmp_path)
    for _ in range(400):
        assert stable.write_line(b"s" * 999) and canary.write_line(b"c" * 999)
        assert size(tmp_path) <= LEAST
    assert size(tmp_path) > 0.8 * LEAST


def test_lines_longer_than_a_file_have_one_each_and_none_is_empty(tmp_path: Path) -> None:
    log = open_segments(tmp_path)
    for _ in range(40):
        assert log.write_line(b"x" * 2 * log.segment_bytes)
        assert all(path.stat().st_size for path in tmp_path.iterdir())
        assert size(tmp_path) <= LEAST + log.segment_bytes + 1


def test_too_small_a_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        open_segments(tmp_path, LEAST - 1)


def test_a_nearly_full_disk_takes_what_fits_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Short lines fit where long ones do not, so that it fails and works by turns."""
    with disks.small_disk(tmp_path / "disk") as place, caplog.at_level("WARNING"):
        log = open_segments(place / "log")
        assert log.write_line(b"first")
        disks.fill(place)
        long = [log.write_line(b"long" * 2000) for _ in range(20) if log.write_line(b"short")]
        log.close()
        (file,) = (place / "log").iterdir()
        lines = file.read_bytes().split(b"\n")
    assert len(long) == 20 and not any(long)
    assert lines == [b"first", *[b"short"] * 20, b""]  # none is torn
    said = [record.levelname for record in caplog.records if "lines can" in record.message]
    assert said == ["ERROR", "WARNING"]


def test_an_outage_counts_what_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage("pears")
    outage.worked()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            outage.failed("no room")
        assert outage.failing
        outage.worked()
        outage.failed("no room")
    assert [record.getMessage() for record in caplog.records] == [
        "pears cannot be written: no room (1 lost)",
        "pears can be written again (4 more were lost)",
    ]
    assert outage.failing


def lines_of(folder: Path) -> list[int]:
    files = folder.glob("x-*.jsonl")
    return [int(line) for file in files for line in file.read_bytes().split()]


def set_back() -> Iterator[int]:
    yield from (NOW_NS + YEAR_NS + number for number in range(10))
    yield from (NOW_NS + number for number in range(10**6))


def ahead_for_a_moment() -> Iterator[int]:
    yield from (NOW_NS + number + YEAR_NS * (5 <= number < 8) for number in range(10**6))


def in_1970() -> Iterator[int]:
    yield from (NOW_NS + number for number in range(10))
    yield from (number for number in range(10**6))


def still() -> Iterator[int]:
    yield from (NOW_NS for _ in range(10**6))


def without_order() -> Iterator[int]:
    yield from (int(moment) for moment in np.random.default_rng(0).uniform(0, NOW_NS, 10**5))


@pytest.mark.parametrize("moments", [set_back, ahead_for_a_moment, in_1970, still, without_order])
@pytest.mark.parametrize("logs", [1, 3])
def test_the_newest_lines_stay_whatever_the_clock_does(
    tmp_path: Path, moments: Any, logs: int
) -> None:
    clock = moments()
    made = [
        open_segments(tmp_path, LEAST * logs, writers=logs, clock=lambda: next(clock))
        for _ in range(logs)
    ]
    each = made[0].segment_bytes // 4 - 1
    for number in range(250 * logs):
        assert made[number % logs].write_line(str(number).encode().rjust(each))
    kept = sorted(lines_of(tmp_path))
    assert len(kept) >= 100 * logs
    # The oldest file of each log may hold lines that are a little older than another's.
    assert kept[4 * logs :] == list(range(250 * logs - len(kept) + 4 * logs, 250 * logs))


def test_files_that_no_log_wrote_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    names = ["x-archive.jsonl", "x-20261399T000000-000000000-1.jsonl", "x-20260101T000000-1.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"1" * LEAST)
    log = open_segments(tmp_path)
    for _ in range(400):
        assert log.write_line(b"2" * 999)
    assert all((tmp_path / name).read_bytes() == b"1" * LEAST for name in names)
    assert size(tmp_path) - len(names) * LEAST > 0.8 * LEAST
