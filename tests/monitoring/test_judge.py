"""From a log and a release to a verdict, as the command says it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import drift_lab
from drift_lab import START, features, prompts, rows, write_log
from modelops.base.errors import ConfigError, EvaluationError, IntegrityError, UsageError
from modelops.cli.main import cli, main
from modelops.monitoring.judge import monitor
from modelops.monitoring.log import Span, parse_span, read_log
from modelops.monitoring.policy import Margins, MonitoringPolicy, read_monitoring
from modelops.monitoring.reference import build_reference, read_reference
from modelops.monitoring.textfile import textfile
from modelops.records.monitoring import MonitorRecord
from modelops.records.read import read_record
from monitored_release import Released, make_release

DAY = 86400.0


def log_of(folder: Path, released: Released, n: int = 200, seed: int = 2, **options: Any) -> Path:
    shift, scale = options.pop("shift", 0.0), options.pop("scale", 1.0)
    texts = options.pop("texts", None) or prompts(seed, n)
    made = rows(
        released.sha256, released.model, features(seed, n, shift=shift, scale=scale), texts,
        seed=seed, **options,
    )  # fmt: skip
    return write_log(folder, made)


def outcomes(record: MonitorRecord) -> dict[str, str]:
    return {test.name: test.outcome for test in record.tests}


def test_a_window_like_the_evaluation_is_kept(tmp_path: Path, released: Released) -> None:
    record = monitor(log_of(tmp_path / "log", released), released.path)
    assert record.answer == "keep" and record.reference == "evaluation", record.reasons
    assert record.alpha == pytest.approx(0.0125) and record.period_alpha == 0.05
    assert set(outcomes(record).values()) <= {"not found", "not measured", "below margin"}
    assert outcomes(record)["latency_p50"] == "not measured"
    assert (record.n_images, record.n_requests, record.n_prompts) == (200, 200, 200)
    assert {"log", "release", "evaluation", "reference", "policy"} == set(record.inputs)
    for test in record.tests:
        if test.p is not None:
            assert test.p_adjusted is not None and test.threshold == record.alpha
            assert test.low <= test.effect <= test.high  # type: ignore[operator]


def test_moved_pictures_of_the_same_prompts_are_investigated(
    tmp_path: Path, released: Released
) -> None:
    record = monitor(log_of(tmp_path / "log", released, shift=1.0), released.path)
    assert record.answer == "investigate" and "runtime" in record.reasons[0]
    assert outcomes(record)["feature_mean"] == "found"


def test_moved_pictures_of_other_prompts_call_for_training(
    tmp_path: Path, released: Released
) -> None:
    texts = prompts(2, 200, words=2, alphabet="日本語絵文字")
    record = monitor(log_of(tmp_path / "log", released, shift=1.0, texts=texts), released.path)
    assert record.answer == "retrain"
    assert {"feature_mean", "script_mix"} <= {
        name for name, outcome in outcomes(record).items() if outcome == "found"
    }


def test_since_an_earlier_window_both_may_move_without_a_call_for_training(
    tmp_path: Path, released: Released
) -> None:
    """The earlier window was never gated: whether the use is still what was, it cannot say."""
    texts = prompts(3, 200, words=2, alphabet="日本語絵文字")
    log = write_log(
        tmp_path / "log",
        rows(released.sha256, released.model, features(2, 200), prompts(2, 200), seed=2),
        rows(released.sha256, released.model, features(3, 200, shift=1.0), texts, seed=3,
             start=START + DAY),
    )  # fmt: skip
    later = Span(START + DAY)
    record = monitor(log, released.path, baseline=Span(START, START + DAY), window=later)
    assert record.answer == "investigate" and "against the evaluation" in record.reasons[0]
    found = {name for name, outcome in outcomes(record).items() if outcome == "found"}
    assert {"feature_mean", "script_mix"} <= found
    assert monitor(log, released.path, window=later).answer == "retrain"


def test_what_was_not_tested_is_not_called_the_same(tmp_path: Path, released: Released) -> None:
    texts = prompts(2, 200, words=2, alphabet="日本語絵文字")
    log = log_of(tmp_path / "log", released, texts=texts, extractor=None)
    record = monitor(log, released.path)
    assert record.answer == "investigate" and outcomes(record)["feature_mean"] == "undecided"
    assert "whether the images are the same could not be tested" in record.reasons[0]


@pytest.mark.parametrize(
    ("baseline", "window"),
    [
        (Span(START, START + DAY), Span(START + DAY / 2, START + 2 * DAY)),
        (Span(START, START + DAY), Span(None, START + 1)),
        (Span(START, START + DAY), Span()),
        (Span(START), None),
    ],
)
def test_a_window_that_is_its_own_baseline_is_refused(
    tmp_path: Path, released: Released, baseline: Span, window: Span | None
) -> None:
    """Rows on both sides hide the shift of the others."""
    with pytest.raises(UsageError, match="overlap"):
        monitor(log_of(tmp_path / "log", released), released.path, baseline=baseline, window=window)


def test_a_small_shift_is_kept_however_many_pictures_show_it(
    tmp_path: Path, released: Released
) -> None:
    """A real shift of 0.3 standard deviations: found surely, and too small to matter."""
    old = rows(released.sha256, released.model, features(2, 1500), prompts(2, 1500), seed=2)
    new = rows(
        released.sha256, released.model, features(3, 1500, shift=0.3), prompts(3, 1500), seed=3,
        start=START + DAY,
    )  # fmt: skip
    log = write_log(tmp_path / "log", old, new)
    record = monitor(log, released.path, baseline=Span(START, START + DAY))
    assert outcomes(record)["feature_mean"] == "below margin" and record.answer == "keep"
    strict = MonitoringPolicy(margins=Margins(feature_mean=0.1))
    assert monitor(log, released.path, baseline=Span(START, START + DAY), policy=strict).answer == (
        "investigate"
    )


def test_few_rows_are_undecided(tmp_path: Path, released: Released) -> None:
    record = monitor(log_of(tmp_path / "log", released, n=60, shift=3.0), released.path)
    assert record.answer == "undecided" and "60 in the window, 100 are needed" in record.reasons[0]


def test_repeated_prompts_count_once(tmp_path: Path, released: Released) -> None:
    """Many images of few prompts say little of the mean: they are no independent rows."""
    texts = prompts(2, 40) * 5
    record = monitor(log_of(tmp_path / "log", released, texts=texts, shift=3.0), released.path)
    assert record.n_images == 200 and record.n_prompts == 40 and record.answer == "undecided"


def test_filters_that_stop_more_are_found(tmp_path: Path, released: Released) -> None:
    log = log_of(tmp_path / "log", released, n=300, blocked=0.1, prompt_blocked=0.2)
    found = outcomes(monitor(log, released.path))
    assert found["image_filter_rate"] == "found" and found["prompt_filter_rate"] == "found"


def test_another_filter_is_not_compared(tmp_path: Path, released: Released) -> None:
    made = rows(released.sha256, released.model, features(2, 200), prompts(2, 200), blocked=0.5)
    for row in made:
        row["filter"] = "mine"
    record = monitor(write_log(tmp_path / "log", made), released.path)
    assert outcomes(record)["image_filter_rate"] == "not measured"
    assert "mine here, open_nsfw in the reference" in record.tests[4].reason


def test_a_baseline_of_the_log_also_judges_latencies(tmp_path: Path, released: Released) -> None:
    made = [
        rows(released.sha256, released.model, features(seed, 240, shift=2.0), prompts(seed, 240),
             seed=seed, start=START + day * DAY, slower=slower)
        for seed, day, slower in ((2, 0, 1.0), (3, 1, 1.0), (4, 2, 2.0))
    ]  # fmt: skip
    log = write_log(tmp_path / "log", *made)
    first = Span(START, START + DAY)
    same = monitor(log, released.path, baseline=first, window=Span(START + DAY, START + 2 * DAY))
    assert same.answer == "keep" and same.reference == "baseline", same.reasons
    slow = monitor(log, released.path, baseline=first, window=Span(START + 2 * DAY))
    assert slow.answer == "investigate" and "load" in slow.reasons[0]
    assert outcomes(slow)["latency_p50"] == "found"
    assert slow.about["total_p50_s"] > 1.5 * same.about["total_p50_s"]
    # Both windows differ from the evaluation alike.
    assert monitor(log, released.path).answer == "investigate"


def test_other_settings_are_left_out_and_said(tmp_path: Path, released: Released) -> None:
    ours = rows(released.sha256, released.model, features(2, 150), prompts(2, 150), seed=2)
    other = rows(
        released.sha256, released.model, features(3, 150, shift=5.0), prompts(3, 150), seed=3,
        steps=30,
    )  # fmt: skip
    record = monitor(write_log(tmp_path / "log", ours, other), released.path)
    assert record.answer == "keep"
    assert any(warning.startswith("50% of the images") for warning in record.warnings)
    assert record.tests[0].n_window == 150


def test_rows_of_others_are_named_and_left_out(tmp_path: Path, released: Released) -> None:
    ours = rows(released.sha256, released.model, features(2, 150), prompts(2, 150), seed=2)
    far = features(3, 50, shift=9.0)
    log = write_log(
        tmp_path / "log", ours,
        rows("e" * 64, released.model, far, prompts(3, 50)),
        rows(released.sha256, "f" * 64, far, prompts(4, 50)),
        rows(released.sha256, released.model, far, prompts(5, 50), extractor="9" * 64),
    )  # fmt: skip
    with (log / "drift-0.jsonl").open("a") as handle:
        handle.write('{"kind":"image"}\nnot json\n[1]\n' + "[" * 100_000 + "\n" + '{"kind":"im')
    record = monitor(log, released.path)
    assert record.answer == "keep"
    assert record.refused == {
        "of another release (eeeeeeeeeeee)": 100, "of another model (ffffffffffff)": 100,
        "damaged": 4,
    }  # fmt: skip
    assert any("50 by another extractor (999999999999)" in text for text in record.warnings)


def test_a_log_of_another_release_only_is_undecided(tmp_path: Path, released: Released) -> None:
    log = write_log(
        tmp_path / "log", rows("e" * 64, released.model, features(2, 150), prompts(2, 150))
    )
    record = monitor(log, released.path)
    assert record.answer == "undecided" and record.n_images == 0


def test_an_overdue_evaluation_is_investigated(tmp_path: Path) -> None:
    policy = "version: 1\nmonitoring: {evaluate_every_days: 7, windows: 1, alpha: 0.02}\n"
    released = make_release(tmp_path, days_old=10, policy=policy)
    log = log_of(tmp_path / "log", released)
    record = monitor(log, released.path)
    assert record.overdue and record.answer == "investigate"
    assert record.reasons == [
        "the evaluation is 10 days old, 7 are agreed: run `modelops eval` on the release"
    ]
    assert record.alpha == 0.02 and record.windows == 1
    assert not monitor(log, released.path, now=time.time() - 5 * DAY).overdue


def test_without_a_reference_the_way_out_is_named(tmp_path: Path) -> None:
    released = make_release(tmp_path, reference=False)
    log = log_of(tmp_path / "log", released)
    record = monitor(log, released.path)
    assert record.answer == "undecided" and record.reference == "none"
    assert "--evaluation" in record.warnings[0]
    build_reference(released.evaluation, tmp_path / "made")
    found = monitor(log, released.path, reference=read_reference(tmp_path / "made"))
    assert found.answer == "keep"
    (tmp_path / "other").mkdir()
    drift_lab.write_evaluation(tmp_path / "other", model=released.model, seed=8)
    build_reference(tmp_path / "other/final.json", tmp_path / "foreign")
    with pytest.raises(IntegrityError, match="not in the release"):
        monitor(log, released.path, reference=read_reference(tmp_path / "foreign"))


def test_a_release_without_an_evaluation_is_not_called_up_to_date(tmp_path: Path) -> None:
    released = make_release(tmp_path, reference=False, evaluated=False)
    record = monitor(log_of(tmp_path / "log", released), released.path)
    assert record.evaluation_age_days is None and not record.overdue
    assert any("none can be called overdue" in text for text in record.warnings)


def test_features_that_are_not_finite_make_no_reference(tmp_path: Path) -> None:
    """float16 ends at 65,504: every later window would be refused with them."""
    path = drift_lab.write_evaluation(tmp_path, model="a" * 64, scale=1e6)
    with pytest.raises(EvaluationError, match="not finite"):
        build_reference(path, tmp_path / "made")


def test_a_level_that_no_test_can_reach_is_refused(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("monitoring: {windows: 1000, alpha: 0.05}\n")
    with pytest.raises(ConfigError, match="shows nothing below"):
        read_monitoring(policy)
    policy.write_text("monitoring: {windows: 500, alpha: 0.05}\n")
    assert read_monitoring(policy) is not None


def test_a_changed_reference_is_refused(tmp_path: Path) -> None:
    drift_lab.write_evaluation(tmp_path, model="a" * 64)
    build_reference(tmp_path / "final.json", tmp_path / "made")
    arrays = tmp_path / "made/reference.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="differs from the digest"):
        read_reference(tmp_path / "made")


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2026-11-01..2026-11-08", 1793491200, 1794096000),
        ("2026-11-01T12:00..", 1793534400, None),
        ("..2026-11-01T00:00+01:00", None, 1793487600),
    ],
)
def test_spans(text: str, start: float | None, end: float | None) -> None:
    assert parse_span(text) == Span(start, end)


@pytest.mark.parametrize("text", ["2026-11-01", "a..b", "2026-11-02..2026-11-01", "2026-13-01.."])
def test_odd_spans_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_span(text)


def test_no_log_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="no drift log"):
            read_log(path, release_sha256="", model_sha256="")


def test_the_command_answers_by_its_exit_code(tmp_path: Path, released: Released) -> None:
    still, moved = (
        log_of(tmp_path / name, released, shift=shift) for name, shift in (("a", 0.0), ("b", 1.0))
    )
    out, prom = tmp_path / "m.json", tmp_path / "m.prom"
    options = ["--release", str(released.path), "--out", str(out), "--textfile", str(prom)]
    done = CliRunner().invoke(cli, ["monitor", str(still), *options], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "keep: no shift" in done.output and "at most 0.013 of such windows" in done.output
    assert read_record(out, MonitorRecord).answer == "keep"
    command = [sys.executable, "-m", "modelops.cli.main", "monitor", str(moved), *options]
    asked = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert asked.returncode == 3, asked.stderr
    said = json.loads(asked.stdout)
    assert said["answer"] == "investigate" and said == json.loads(out.read_text())
    samples = {
        (sample.name, sample.labels.get("answer") or sample.labels.get("test")): sample.value
        for family in text_string_to_metric_families(prom.read_text())
        for sample in family.samples
    }
    assert samples["modelops_monitor_verdict", "investigate"] == 1
    assert samples["modelops_monitor_verdict", "keep"] == 0
    assert samples["modelops_monitor_test_found", "feature_mean"] == 1
    assert samples["modelops_monitor_tests_found", None] >= 1
    assert samples["modelops_monitor_interval_seconds", None] == 7.5 * DAY
    assert abs(samples["modelops_monitor_timestamp_seconds", None] - time.time()) < 600


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, released: Released, capsys: pytest.CaptureFixture[str]
) -> None:
    log, base = log_of(tmp_path / "log", released, n=30), ["--release", str(released.path)]
    assert main(["monitor", str(log), *base]) == 4
    assert "are needed" in capsys.readouterr().err
    assert main(["monitor", str(tmp_path / "none"), *base]) == 2
    assert "no drift log" in capsys.readouterr().err
    assert main(["monitor", str(log), *base, "--textfile", str(tmp_path / "a.txt")]) == 2
    assert ".prom" in capsys.readouterr().err
    (tmp_path / "p.yaml").write_text("monitoring: {alpha: 2}\n")
    assert main(["monitor", str(log), *base, "--policy", str(tmp_path / "p.yaml")]) == 2
    assert "monitoring.alpha" in capsys.readouterr().err
    (released.path / "NOTE").write_text("x")
    try:
        assert main(["monitor", str(log), *base]) == 1
    finally:
        (released.path / "NOTE").unlink()
    assert "not part of the release" in capsys.readouterr().err


def test_textfile_escapes_nothing_it_need_not(released: Released, tmp_path: Path) -> None:
    record = monitor(log_of(tmp_path / "log", released, n=30), released.path)
    assert 'release="tiny",version="0.1"' in textfile(record)
