"""Which batch widths pay, and how long a backlog takes."""

from __future__ import annotations

import time

import pytest

from modelops.serving.engine.batch_profile import (
    RowRate,
    measure_profile,
    profile_from_seconds,
    widths,
)


def test_widths_are_those_that_runtimes_compile() -> None:
    from modelops.export.runtimes.openvino import batch_bucket

    assert list(widths(16)) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert list(widths(2)) == [1, 2]
    assert list(widths(10)) == [1, 2, 3, 4, 6, 8, 10]
    assert set(widths(16)) == {batch_bucket(rows) for rows in range(1, 17)}


def test_caps_follow_the_measured_rates() -> None:
    # rates 100, 160, 190, 200 rows/s: 4 rows are within 10 % of the best, only 8 within 3 %
    profile = profile_from_seconds({1: 1 / 100, 2: 2 / 160, 4: 4 / 190, 8: 8 / 200}, widest=8)
    assert profile.pays and profile.complete
    assert (profile.narrow, profile.wide) == (4, 8)
    assert profile.rows_per_second(8) == pytest.approx(200)
    assert profile.rows_per_second(7) == pytest.approx(190)


def test_batching_that_does_not_pay_is_off() -> None:
    level = profile_from_seconds({rows: 0.1 * rows for rows in (1, 2, 4, 8)}, widest=8)
    assert not level.pays
    assert (level.narrow, level.wide) == (2, 2)
    assert not profile_from_seconds({1: 0.1, 2: 0.19, 4: 0.5}, widest=4).pays


def test_wider_is_not_taken_where_it_is_slower() -> None:
    profile = profile_from_seconds({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.4}, widest=8)
    assert (profile.narrow, profile.wide) == (4, 4)


def test_a_slow_start_does_not_turn_batching_off() -> None:
    """What was not measured is open, and neither a first run nor a disturbed one is a speed."""
    asked: list[int] = []

    def evaluate(rows: int) -> None:
        asked.append(rows)
        time.sleep(0.05 if asked.count(rows) in (1, 3) else 0.01)

    profile = measure_profile(evaluate, 64, budget_s=0.15)
    assert not profile.complete
    assert 2 <= max(profile.seconds) == max(asked) < 64
    assert profile.pays
    assert profile.wide == 64
    assert max(profile.seconds.values()) < 0.05


def test_a_network_slower_than_the_budget_runs_four_times() -> None:
    asked = []

    def evaluate(rows: int) -> None:
        asked.append(rows)
        time.sleep(0.02)

    profile = measure_profile(evaluate, 16, budget_s=0.01)
    assert asked == [1, 1, 2, 2]
    assert sorted(profile.seconds) == [1, 2]


def test_where_the_measured_widths_got_worse_wider_ones_are_not_tried() -> None:
    profile = profile_from_seconds({1: 0.1, 2: 0.1, 3: 0.1, 4: 0.3}, widest=16)
    assert not profile.complete
    assert (profile.narrow, profile.wide) == (3, 3)


def test_every_width_is_warmed_before_it_is_timed() -> None:
    seen: dict[int, int] = {}

    def evaluate(rows: int) -> None:
        seen[rows] = seen.get(rows, 0) + 1
        if seen[rows] == 1:
            time.sleep(0.05)  # what compiling is like

    profile = measure_profile(evaluate, 4, budget_s=60.0)
    assert profile.complete
    assert set(seen) == {1, 2, 3, 4}
    assert max(profile.seconds.values()) < 0.05


def test_pace_follows_a_change_and_no_idle_time() -> None:
    pace = RowRate(half_life_s=1.0)
    assert pace.seconds_for(10) == 0.0
    pace.expect(50.0)
    assert pace.seconds_for(100) == pytest.approx(2.0)
    for _ in range(100):
        pace.add(8, 0.1)
    assert pace.seconds_for(80) == pytest.approx(1.0)
    pace.expect(50.0)  # a promise does not overrule a measurement
    assert pace.seconds_for(80) == pytest.approx(1.0)
    for _ in range(5):
        pace.add(8, 0.2)  # one second at half the speed: half known
    assert pace.seconds_for(60) == pytest.approx(1.0)
    pace.add(8, 0.0)
    assert pace.seconds_for(60) == pytest.approx(1.0)
