"""Verdict on a window of the drift log against a reference.

A served model's weights cannot change: the release is verified. So the meaning of a shift depends
on the other shifts:

keep         nothing that was tested shifted by as much as its margin
retrain      both images and prompts differ from those that were evaluated: the model is used for
             something it was not measured on. Evaluate it on such prompts; if that does not pass
             the gate, train on them
investigate  any other shift: the runtime, the hardware, the load, the users; or the evaluation is
             overdue
undecided    too little was logged, or there is no reference to compare with

`retrain` is the most expensive answer, so it needs both shifts. If only the images moved, the
runtime may be the cause, which training would not fix. If only the prompts moved, no effect on the
images was seen. `retrain` also needs the release's evaluation as reference, because it claims that
the use differs from what was gated. An earlier window of the log only shows whether anything has
changed since then, and so leads to `investigate` at most. Prompts in service differ from evaluation
prompts from the first day, so most often both questions are worth asking.

Limits: of a prompt only its length and its scripts are logged. Users who turn to other topics in
the same language and with the same number of words move only the images; the investigation has to
find them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from modelops.base.environment import current_environment
from modelops.base.errors import UsageError
from modelops.base.files import sha256_file
from modelops.metrics.multiple import holm
from modelops.metrics.protocol import protocol_id
from modelops.monitoring.log import DriftRows, Span, read_log
from modelops.monitoring.pictures import Shift, picture_shifts
from modelops.monitoring.policy import POLICY_FILE, MonitoringPolicy, released_monitoring
from modelops.monitoring.reference import Reference, released_reference, require_released
from modelops.monitoring.samples import (
    Sample,
    commonest_settings,
    log_sample,
    reference_sample,
)
from modelops.monitoring.shifts import Found, latency_shift, mix_shift, rank_shift, rate_shift
from modelops.records.base import InputRef
from modelops.records.monitoring import DriftTest, MonitorAnswer, MonitorRecord
from modelops.records.release import ReleaseRecord
from modelops.releases.verify import (
    RECORD_FILE,
    evaluation_end,
    released_evaluations,
    verify_release,
)

PICTURES = ("feature_mean", "feature_covariance")
PROMPTS = ("prompt_length", "script_mix")
NEEDED = (*PICTURES, *PROMPTS)  # without any of these the answer is not keep
UNITS = {
    "feature_mean": "standard deviations",
    "feature_covariance": "of the covariance",
    "image_score": "P(later > earlier) - 1/2",
    "prompt_length": "P(later > earlier) - 1/2",
    "image_filter_rate": "difference of shares",
    "prompt_filter_rate": "difference of shares",
    "script_mix": "total variation",
    "latency_p50": "slower by this share",
    "latency_p95": "slower by this share",
}


def monitor(
    log: str | Path,
    release_dir: str | Path,
    *,
    window: Span | None = None,
    baseline: Span | None = None,
    reference: Reference | None = None,
    policy: MonitoringPolicy | None = None,
    now: float | None = None,
    seed: int = 0,
) -> MonitorRecord:
    """Judge a window of a drift log.

    Args:
        log: the folder that the node writes, or one of its files.
        release_dir: the release that it serves.
        window: rows to judge; by default all, or all after the baseline.
        baseline: rows to compare with, in place of the release's evaluation; must not overlap with
            the window.
        reference: of the release's evaluation, if the release holds none itself.
        policy: replaces the released policy's `monitoring:` section, or the defaults.
        now: Unix time for the check whether the evaluation is overdue.

    Raises:
        UsageError: there is no log, or no release; or baseline and window overlap.
        IntegrityError: the release was changed, or the reference is not of its evaluation.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    span = window or Span(start=baseline.end if baseline else None)
    if baseline and baseline.overlaps(span):
        raise UsageError(
            f"the baseline {baseline} and the window {span} overlap",
            hint="rows that are on both sides hide a shift; end the baseline before the window",
        )
    top = Path(release_dir)
    release = verify_release(top)
    release_sha256 = sha256_file(top / RECORD_FILE)
    rules = policy or released_monitoring(top) or MonitoringPolicy()
    rows = read_log(log, release_sha256=release_sha256, model_sha256=release.model_sha256)
    inputs = {"log": rows.ref, "release": InputRef(path=RECORD_FILE, sha256=release_sha256)}
    if POLICY_FILE in release.files and policy is None:
        inputs["policy"] = InputRef(path=POLICY_FILE, sha256=release.files[POLICY_FILE].sha256)
    if reference is None:
        reference, absent = released_reference(top, release)
    else:
        require_released(reference.record, release, "the reference")
        absent = ""
    if reference is not None:
        inputs["evaluation"] = reference.record.evaluation
        inputs["reference"] = reference.record.arrays
    judged = rows.within(span)
    age = _age_days(top, release, time.time() if now is None else now)
    record = MonitorRecord(
        answer="undecided", reasons=[], release=f"{release.name} {release.version}",
        release_sha256=release_sha256, model_sha256=release.model_sha256,
        reference="baseline" if baseline else "evaluation" if reference else "none",
        window=_covered(judged, span), baseline=str(baseline) if baseline else None,
        alpha=rules.window_alpha, period_alpha=rules.alpha, windows=rules.windows,
        n_requests=len(judged.requests), n_images=len(judged.images),
        n_prompts=len({row.prompt for row in judged.requests}), refused=dict(rows.refused),
        evaluation_age_days=age, evaluate_every_days=rules.evaluate_every_days,
        overdue=age is not None and age > rules.evaluate_every_days,
        inputs=inputs, seeds={"seed": seed}, environment=current_environment(), started_at=started,
    )  # fmt: skip
    if absent and not baseline:
        record.warnings.append(f"{absent}; name its evaluation with --evaluation, or a --baseline")
    if age is None:
        record.warnings.append(
            "the release holds no evaluation of its model, so none can be called overdue"
        )
    _test(record, rules, rows, judged, baseline, reference, seed)
    _answer(record)
    record.duration_s = time.monotonic() - clock
    return record


def _test(
    record: MonitorRecord, rules: MonitoringPolicy, rows: DriftRows, judged: DriftRows,
    baseline: Span | None, reference: Reference | None, seed: int,
) -> None:  # fmt: skip
    """Make every test that can be made, and correct them together."""
    extractor = reference.record.extractor if reference else _logged_extractor(judged)
    if baseline:
        settings = commonest_settings(judged)
    else:
        settings = (reference.record.steps, reference.record.guidance) if reference else None
    later = log_sample(judged, settings=settings, extractor=extractor)
    earlier: Sample | None = None
    if baseline:
        earlier = log_sample(rows.within(baseline), settings=settings, extractor=extractor)
    elif reference:
        earlier = reference_sample(reference)
    record.about = _about(judged, settings)
    if settings and judged.images and record.about["share_at_settings"] < 1:
        record.warnings.append(
            f"{1 - record.about['share_at_settings']:.0%} of the images were made with other "
            f"steps or guidance than {settings[0]} and {settings[1]:g}; images and latencies are "
            "compared at these only"
        )
    if later.missing.get("features"):
        record.warnings.append(f"images left out: {later.missing['features']}")
    record.tests = compare_samples(later, earlier, rules, seed=seed)


def compare_samples(
    later: Sample, earlier: Sample | None, rules: MonitoringPolicy, *, seed: int
) -> list[DriftTest]:
    """Make every test that two samples allow, corrected together; the others give the reason.

    Without drift any of them is `found` with a probability of at most `rules.window_alpha`.
    """
    tests = _Tests(rules, later, earlier, seed).made()
    tested = [test for test in tests if test.p is not None]
    for test, adjusted in zip(tested, holm([test.p or 0.0 for test in tested]), strict=True):
        test.p_adjusted, test.threshold = float(adjusted), rules.window_alpha
        surely = adjusted <= rules.window_alpha
        enough = _size(test) >= (test.margin or 0.0)
        test.outcome = ("found" if enough else "below margin") if surely else "not found"
        test.reason = _reason(test)
    return tests


class _Tests:
    """The family of tests of two samples."""

    def __init__(
        self, rules: MonitoringPolicy, later: Sample, earlier: Sample | None, seed: int
    ) -> None:
        self.rules, self.later, self.earlier, self.seed = rules, later, earlier, seed
        # The smallest p-value is a fifth of Holm's first threshold.
        self.permutations = int(min(max(1999, 5 * len(UNITS) / rules.window_alpha), 99_999))

    def made(self) -> list[DriftTest]:
        """Return all tests in a fixed order; those that cannot be made give the reason."""
        if self.earlier is None:
            return [self._not(name, "not measured", "no reference") for name in UNITS]
        later, earlier = self.later, self.earlier
        return [
            *self._pictures(later, earlier),
            self._ranks("image_score", earlier.scores, later.scores, earlier, "scores"),
            self._ranks("prompt_length", earlier.characters, later.characters, earlier, ""),
            self._rates("image_filter_rate", "image_filter", later, earlier),
            self._rates("prompt_filter_rate", "prompt_filter", later, earlier),
            self._counted(
                "script_mix", len(earlier.scripts), len(later.scripts),
                lambda: mix_shift(
                    earlier.scripts, later.scripts, seed=self.seed, permutations=self.permutations
                ),
            ),
            *(self._latency(f"latency_p{q}", q / 100, later, earlier) for q in (50, 95)),
        ]  # fmt: skip

    def _pictures(self, later: Sample, earlier: Sample) -> list[DriftTest]:
        n, m = len(earlier.features), len(later.features)
        if min(n, m) < self.rules.min_n:
            return [self._few(name, n, m) for name in PICTURES]
        found = picture_shifts(
            earlier.features, later.features, seed=self.seed, permutations=self.permutations
        )
        method = f"permutation test, {found.directions} pooled directions"

        def made(name: str, shift: Shift) -> DriftTest:
            values = (shift.statistic, shift.p, shift.effect, shift.low, shift.high)
            return self._of(name, Found(*values, method), found.n_first, found.n_second)

        return [made(PICTURES[0], found.mean), made(PICTURES[1], found.covariance)]

    def _ranks(
        self, name: str, old: np.ndarray, new: np.ndarray, earlier: Sample, part: str
    ) -> DriftTest:
        if part in earlier.missing:
            return self._not(name, "not measured", earlier.missing[part])
        if name == "image_score" and (reason := self._other_filter("image_filter")):
            return self._not(name, "not measured", reason)
        return self._counted(name, len(old), len(new), lambda: rank_shift(old, new))

    def _rates(self, name: str, part: str, later: Sample, earlier: Sample) -> DriftTest:
        old, new = getattr(earlier, part), getattr(later, part)
        if old is None:
            return self._not(name, "not measured", "not measured by the reference")
        if reason := self._other_filter(part):
            return self._not(name, "not measured", reason)
        return self._counted(
            name, old.n, new.n if new else 0,
            lambda: rate_shift((old.stopped, old.n), (new.stopped, new.n)),
        )  # fmt: skip

    def _latency(self, name: str, quantile: float, later: Sample, earlier: Sample) -> DriftTest:
        if "latency" in earlier.missing:
            return self._not(name, "not measured", earlier.missing["latency"])
        n, m = len(earlier.latencies.seconds), len(later.latencies.seconds)
        if min(n, m) < self.rules.min_n:
            return self._few(name, n, m)
        found = latency_shift(
            earlier.latencies, later.latencies, quantile, seed=self.seed,
            permutations=self.permutations,
        )  # fmt: skip
        if found is None:
            return self._not(name, "undecided", "too short a time: too few blocks of it")
        return self._of(name, found, n, m)

    def _other_filter(self, part: str) -> str:
        assert self.earlier is not None
        old, new = getattr(self.earlier, part), getattr(self.later, part)
        if old is None or new is None or old.name == new.name:
            return ""
        return f"another filter: {new.name} here, {old.name} in the reference"

    def _counted(self, name: str, n: int, m: int, make: Callable[[], Found]) -> DriftTest:
        return self._few(name, n, m) if min(n, m) < self.rules.min_n else self._of(
            name, make(), n, m
        )  # fmt: skip

    def _of(self, name: str, found: Found, n: int, m: int) -> DriftTest:
        return DriftTest(
            name=name, outcome="undecided", reason="", method=found.method, n_reference=n,
            n_window=m, statistic=found.statistic, p=found.p, effect=found.effect, low=found.low,
            high=found.high, margin=getattr(self.rules.margins, name), unit=UNITS[name],
        )  # fmt: skip

    def _few(self, name: str, n: int, m: int) -> DriftTest:
        side = f"{m} in the window" if m < self.rules.min_n else f"{n} in the reference"
        made = self._not(name, "undecided", f"{side}, {self.rules.min_n} are needed")
        made.n_reference, made.n_window = n, m
        return made

    def _not(self, name: str, outcome: str, reason: str) -> DriftTest:
        return DriftTest.model_validate(
            {"name": name, "outcome": outcome, "reason": reason, "unit": UNITS[name],
             "margin": getattr(self.rules.margins, name)}
        )  # fmt: skip


def _answer(record: MonitorRecord) -> None:
    by_outcome: dict[str, list[str]] = {}
    for test in record.tests:
        by_outcome.setdefault(test.outcome, []).append(test.name)
    found = by_outcome.get("found", [])
    answer: MonitorAnswer = "keep"
    both = set(found) & set(PICTURES) and set(found) & set(PROMPTS)
    if both and record.reference == "evaluation":
        answer = "retrain"
        record.reasons.append(
            f"the prompts and the images are no longer those of the evaluation "
            f"({', '.join(found)}): evaluate the model on such prompts, and train on them unless "
            "that passes the gate"
        )
    elif found:
        answer = "investigate"
        record.reasons.append(f"shifted: {', '.join(found)}; {_advice(found, by_outcome)}")
    if record.overdue:
        answer = "investigate" if answer == "keep" else answer
        record.reasons.append(
            f"the evaluation is {record.evaluation_age_days:.0f} days old, "
            f"{record.evaluate_every_days:g} are agreed: run `modelops eval` on the release"
        )
    open_ones = [test for test in record.tests if test.outcome in ("undecided", "not measured")]
    needed = [test for test in open_ones if test.name in NEEDED]
    if answer == "keep" and needed:
        answer = "undecided"
        for reason in dict.fromkeys(test.reason for test in needed):
            names = ", ".join(test.name for test in needed if test.reason == reason)
            record.reasons.append(f"{names}: {reason}")
    if answer == "keep":
        record.reasons.append("no shift as large as its margin was found")
    record.answer = answer


def _advice(found: list[str], by_outcome: dict[str, list[str]]) -> str:
    """Advise where to look first. Claims that something is as before only where that was tested."""
    same = {name for outcome in ("not found", "below margin")
            for name in by_outcome.get(outcome, [])}  # fmt: skip
    pictures, prompts = (bool(set(found) & set(some)) for some in (PICTURES, PROMPTS))
    if pictures and prompts:
        return (
            "other prompts give other images than in the baseline; whether that is what was "
            "evaluated says the window held against the evaluation"
        )
    if pictures:
        alike = (
            "the prompts look the same by length and script, so "
            if same >= set(PROMPTS)
            else "whether the prompts are the same could not be tested; "
        )
        return (
            f"{alike}see first whether the runtime or the hardware changed (`modelops replay`), "
            "then what is asked for"
        )
    if prompts:
        if same >= set(PICTURES):
            return "the images still look the same"
        return "whether the images are the same could not be tested"
    if any(name.startswith("latency") for name in found):
        return "see which phase grew, and the load"
    return "see what the filters stop"


def _size(test: DriftTest) -> float:
    """Return the effect to compare with its margin; a latency that fell is no drift."""
    effect = test.effect or 0.0
    return effect if test.name.startswith("latency") else abs(effect)


def _reason(test: DriftTest) -> str:
    margin, size = test.margin or 0.0, abs(test.effect or 0.0)
    if test.outcome == "found":
        return f"{size:.3g} {test.unit}, at least the margin {margin:g}"
    if test.outcome == "below margin":
        return f"a shift, but a small one: below the margin {margin:g}"
    reach = max(abs(test.low or 0.0), abs(test.high or 0.0))
    return "no shift shown" + ("" if reach < margin else f"; up to {reach:.2g} is possible")


def _logged_extractor(rows: DriftRows) -> dict[str, object] | None:
    """Return the protocol of this machine's extractor if the rows are of it (no reference)."""
    from modelops.metrics.features import Lite0Extractor

    ours = Lite0Extractor().protocol
    named = {row.extractor for row in rows.images if row.extractor}
    return ours if protocol_id(ours) in named else None


def _about(rows: DriftRows, settings: tuple[int, float] | None) -> dict[str, float]:
    made: dict[str, float] = {}
    if not rows.images:
        return made
    ours = sum((row.steps, row.guidance) == settings for row in rows.images)
    made["share_at_settings"] = ours / len(rows.images)
    made["mean_rows"] = float(np.mean([row.rows for row in rows.images]))
    phases = sorted({phase for row in rows.images for phase in row.seconds})
    for phase in phases[:20]:
        seconds = [row.seconds[phase] for row in rows.images if phase in row.seconds]
        for q in (50, 95):
            made[f"{phase}_p{q}_s"] = float(np.quantile(seconds, q / 100))
    return {key: round(value, 4) for key, value in made.items()}


def _age_days(top: Path, release: ReleaseRecord, now: float) -> float | None:
    found = released_evaluations(top, release).values()
    return (now - max(map(evaluation_end, found))) / 86400 if found else None


def _covered(rows: DriftRows, span: Span) -> str:
    """The window as asked for, its open ends replaced by what there is."""
    times = [row.time for row in (*rows.requests, *rows.images)]
    if not times:
        return str(span)
    start = min(times) if span.start is None else span.start
    return str(Span(start, max(times) if span.end is None else span.end))
