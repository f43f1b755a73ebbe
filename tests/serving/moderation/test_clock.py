"""A clock that jumps neither empties a quarantine nor makes its newest entries the oldest."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from modelops.cli.main import main
from modelops.models.request import ImageRequest
from modelops.serving.moderation.clock import FolderClock
from modelops.serving.moderation.quarantine import Quarantine
from modelops.serving.moderation.store import list_files, read_entry, tidy_folder
from modelops.serving.provenance.seal import Origin

NOW, HOUR, DAY = 1_900_000_000.0, 3600.0, 86400.0
AGE_DAYS = 30


class Machine:
    """A machine's clock, and the quarantine of a node that is started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.time = folder, NOW
        self.quarantine: Any = None

    def start(self, max_bytes: int = 10_000_000) -> None:
        origin = Origin(
            release=SimpleNamespace(name="tiny", version="0.1"),  # type: ignore[arg-type]
            release_sha256="a" * 64, model_sha256="b" * 64,
            source=SimpleNamespace(runtime="pytorch", precision="fp32"),  # type: ignore[arg-type]
            filters={},
        )  # fmt: skip
        self.quarantine = Quarantine(
            self.folder, origin, max_bytes=max_bytes, max_age_s=AGE_DAYS * DAY,
            registry=CollectorRegistry(), wall=lambda: self.time,
        )  # fmt: skip
        self.quarantine.close()  # its thread looks once an hour of this test's own time

    def block(self, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        image = (pixels, ImageRequest(prompt="x", seed=seed), (1,))
        assert self.quarantine.keep_pictures("r", [image], [0.9], [True], "f", {})

    def days(self, *days: int) -> None:
        """One blocked request a day, with that day's number as its seed."""
        for day in days:
            self.time = NOW + day * DAY
            self.block(day)

    @property
    def seeds(self) -> list[int]:
        return [read_entry(file).pictures[0].seed for file in list_files(self.folder)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "q")
    machine.start()
    return machine


def test_entries_expire_by_a_clock_that_goes_right(machine: Machine) -> None:
    machine.days(*range(40))
    assert machine.seeds == list(range(10, 40))  # as old as 29 days


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_ahead_for_a_moment_costs_a_days_entries_at_most(
    machine: Machine, restarted: bool
) -> None:
    machine.days(*range(25))
    machine.time += 400 * DAY
    for seed in range(100, 150):  # as under an attack, or while one who tests the filter is at it
        if restarted:
            machine.start()
        machine.block(seed)
    assert machine.seeds == [*range(25), *range(100, 150)]  # none was 29 days old
    machine.days(*range(25, 32))
    assert machine.seeds == [*range(2, 25), *range(100, 150), *range(25, 32)]
    # What was written in that moment is kept no longer than a day more than the rest.
    machine.days(*range(32, 25 + AGE_DAYS))
    assert set(range(100, 150)) <= set(machine.seeds)
    machine.days(25 + AGE_DAYS, 26 + AGE_DAYS)
    assert set(machine.seeds) & {*range(100, 150), 24} == set()


def test_a_clock_set_back_makes_no_new_entry_the_oldest(machine: Machine) -> None:
    machine.days(0, 1, 2)
    each = list_files(machine.folder)[0].size
    machine.start(max_bytes=4 * each + each // 2)
    for number, moment in enumerate((NOW - 365 * DAY, 0.0, NOW - DAY, NOW + 2 * DAY + 1)):
        machine.time = moment
        machine.block(10 + number)
        assert machine.seeds[-1] == 10 + number
    assert machine.seeds == [10, 11, 12, 13]
    machine.days(20)  # and none of them has the age of 1970
    assert machine.seeds == [11, 12, 13, 20]


def test_a_node_that_starts_in_1970_and_is_corrected_loses_nothing(machine: Machine) -> None:
    machine.days(*range(10))
    machine.time = 60.0
    machine.start()
    machine.block(100)
    machine.days(10)
    assert machine.seeds == [*range(10), 100, 10]


def test_after_a_long_rest_entries_expire_a_day_an_hour(machine: Machine) -> None:
    machine.days(*range(28))
    machine.time = NOW + 90 * DAY
    left = []
    for _ in range(40):
        machine.start()
        left.append(len(machine.seeds))
        machine.time += HOUR
    assert left[:4] == [28, 28, 27, 26] and left[-1] == 0
    assert all(before - after <= 1 for before, after in itertools.pairwise(left))


def test_a_folder_of_an_older_version_or_a_lost_clock_starts_at_its_newest_entry(
    machine: Machine,
) -> None:
    machine.days(*range(25))
    for lost in (b"", b"1 2 3", b"nan", None):
        path = machine.folder / ".clock"
        path.write_bytes(lost) if lost is not None else path.unlink()
        machine.time = NOW + 400 * DAY
        machine.start()
        assert len(machine.seeds) == 25
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_person_who_purges_is_obeyed(machine: Machine) -> None:
    machine.days(*range(5))
    machine.time += 400 * DAY
    machine.block(100)  # dated up to a day ahead
    assert tidy_folder(machine.folder, max_age_s=0) == (6, 0)


def test_a_purge_on_a_clock_that_jumped_ahead_takes_a_days_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine's clock is 76 days ahead of the newest entry."""
    machine = Machine(tmp_path / "q")
    machine.time = time.time() - 100 * DAY
    machine.start()
    for day in range(25):
        machine.block(day)
        machine.time += DAY
    purge = ["serve", "review", str(machine.folder), "--purge-older", "19.5"]
    assert main(purge) == 0
    assert "6 entries deleted" in capsys.readouterr().out  # five are as old, and one in a day
    assert main(purge) == 0
    assert "0 entries deleted" in capsys.readouterr().out
    assert len(machine.seeds) == 19
    assert main([*purge[:-1], "0"]) == 0
    assert machine.seeds == []


def test_a_clock_without_any_order_is_followed_for_a_day_at_most(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    moments = iter([NOW, *(NOW + random.normal(0, 100 * DAY, 500))])
    clock = FolderClock(tmp_path, lambda: None, lambda: float(next(moments)))
    read = [clock.now() for _ in range(500)]
    assert read == sorted(read) and read[-1] <= NOW + 3 * DAY
