"""Compare two evaluation records: better, worse, within noise, or not comparable.

A verdict says that there is a difference, whatever its size. With many metrics some would differ by
chance, so p-values are adjusted by Holm's method unless that is turned off. Whether a source is
good enough is another question, and needs a margin: the loss that is accepted. There the burden of
proof is reversed and all margins must be met together, so each is decided on its own interval
without adjustment. Where a margin was asked for, it decides in place of the verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from modelops.base.environment import current_environment
from modelops.base.errors import EvaluationError
from modelops.base.files import sha256_file
from modelops.evaluation.compare.evidence import Evidence, Reference, read_evidence
from modelops.evaluation.compare.margins import (
    Margin,
    default_margin,
    detectable,
    prompts_needed,
    unknown_margins,
    within_margin,
)
from modelops.evaluation.compare.pairing import Pairing, independent, same_images
from modelops.metrics.multiple import holm
from modelops.metrics.paired import PairedDifference
from modelops.metrics.protocol import protocol_differences
from modelops.records.base import Answer, InputRef, Measurement
from modelops.records.comparison import ComparedMetric, ComparisonRecord
from modelops.records.evaluation import EvaluationRecord

OnProgress = Callable[[str, int, int], None]
Verdict = Literal["better", "worse", "within noise", "not comparable"]
ALPHA = 0.05
SHARED_INPUTS = ("manifest", "splits", "lit")
# Below zero is bad, farther above zero no better: samples closer to training images than real
# held-out images are may be copies, but noise is farthest from them of all.
GUARDS = ("nearest_train_distance_gap",)
GUARDED_BY_BASE = ("authenticity_lite0",)  # the same, with what real held-out images get as zero


def compare_records(
    first_path: str | Path,
    second_path: str | Path,
    *,
    margins: Mapping[str, Margin] | None = None,
    default_margins: bool = False,
    adjust: bool = True,
    manifest: Path | None = None,
    splits: Path | None = None,
    lpips_weights: Path | None = None,
    lpips_net: str = "alex",
    seed: int = 0,
    resamples: int = 2000,
    on_progress: OnProgress | None = None,
) -> ComparisonRecord:
    """Compare every metric that both records have and that has a better direction.

    Args:
        margins: accepted loss of these metrics.
        default_margins: let the default margins of the others decide too.
        adjust: p-values by Holm's method over all compared metrics.
        manifest, splits: of the reference images, if they are not where the records say.
        lpips_weights, lpips_net: torchvision's weights of LPIPS's backbone, and its name; LPIPS
            measures how different the two sources' images of the same prompts and seeds look.
        on_progress: called with (metric, done, total).

    Raises:
        UsageError: a file is not an evaluation record, or a margin names no metric of both.
        IntegrityError: a file beside a record is not the one that it names.
        MissingWeightsError: the weights of LPIPS cannot be used.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    first, second = read_evidence(first_path), read_evidence(second_path)
    for name in first.record.metrics.keys() - second.record.metrics.keys():
        second.record.metrics[name] = Measurement.missing("the second record does not have it")
    names = _comparable_names(first.record, second.record)
    asked = dict(margins or {})
    unknown_margins(asked, names)
    images = _image_measures(first, second, lpips_weights, lpips_net)  # weights may be unusable
    pairing = Pairing(
        first, second, Reference(first, second, manifest, splits), seed=seed, resamples=resamples,
        on_progress=on_progress,
    )  # fmt: skip
    found: dict[str, tuple[PairedDifference, list[str]] | str] = {
        name: _difference(name, pairing) for name in names
    }
    measured = {name: made for name, made in found.items() if not isinstance(made, str)}
    raw = [made.p for made, _ in measured.values()]
    adjusted = dict(zip(measured, holm(raw) if adjust else raw, strict=True))
    rows = []
    for name, made in found.items():
        a, b = first.record.metrics[name], second.record.metrics[name]
        if isinstance(made, str):
            rows.append(
                ComparedMetric(
                    metric=name, verdict="not comparable", reason=made, first=a.value,
                    second=b.value,
                )
            )  # fmt: skip
            continue
        rows.append(
            _decide(
                name, a, b, *made, float(adjusted[name]), len(measured) if adjust else 0,
                _guard(name, first.record),
            )
        )  # fmt: skip
        _apply_margin(rows[-1], a, made[0], asked.get(name))
    record = ComparisonRecord(
        first=first.record.source, second=second.record.source, answer="undecided",
        adjustment="holm" if adjust else "none", comparisons=rows, seeds={"seed": seed},
        inputs={"first": first.reference, "second": second.reference, **_shared(first, second),
                **_weights(lpips_weights)},
        metrics={
            name: _measurement(made, first.record.metrics[name], notes)
            for name, (made, notes) in measured.items()
        },
        images=images, warnings=_warnings(first, second),
        environment=current_environment(), started_at=started,
    )  # fmt: skip
    _answer(record, asked=set(asked), default_margins=default_margins)
    record.duration_s = time.monotonic() - clock
    return record


def _comparable_names(first: EvaluationRecord, second: EvaluationRecord) -> list[str]:
    """List the sources' metrics (not real images' or the alignment model's) with a direction."""
    names = []
    for name in sorted(first.metrics.keys() & second.metrics.keys()):
        if name.startswith("lit_heldout") or name.endswith(("_floor", "_heldout")):
            continue
        a, b = first.metrics[name], second.metrics[name]
        measured = a if a.value is not None else b
        if measured.value is None:
            names.append(
                name
            )  # a metric that neither measured has no direction, but is not left out
        elif measured.higher_is_better is not None and _of_the_source(first, second, name):
            names.append(name)
    return names


def _of_the_source(first: EvaluationRecord, second: EvaluationRecord, name: str) -> bool:
    """Return whether a metric is about the images that the source made (not a filter, say)."""
    known = [r.protocols.get(r.metrics[name].protocol or "") for r in (first, second)]
    return not any(known) or any(protocol and "sampling" in protocol for protocol in known)


def _difference(name: str, pairing: Pairing) -> tuple[PairedDifference, list[str]] | str:
    """Return the difference with remarks, or the reason why there is none."""
    first, second = pairing.first.record, pairing.second.record
    a, b = first.metrics[name], second.metrics[name]
    reasons = _incomparable(first, second, a, b)
    if reasons:
        return "; ".join(dict.fromkeys(reasons))
    try:
        return pairing.difference(name, first.protocols[a.protocol or ""]), []
    except EvaluationError as error:
        why = error.message
    try:
        return independent(a, b), [f"not paired, so wider than need be: {why}"]
    except EvaluationError as error:
        return error.message


def _incomparable(
    first: EvaluationRecord, second: EvaluationRecord, a: Measurement, b: Measurement
) -> list[str]:
    missing = [m.not_measured for m in (a, b) if m.not_measured]
    if missing:
        return [f"not measured: {reason}" for reason in missing]
    known = [record.protocols.get(m.protocol or "") for record, m in ((first, a), (second, b))]
    if known[0] is None or known[1] is None:
        return ["a protocol is missing from its record"]
    return protocol_differences(known[0], known[1])


def _decide(
    name: str,
    a: Measurement,
    b: Measurement,
    made: PairedDifference,
    notes: list[str],
    adjusted: float,
    family: int,
    guard: float | None,
) -> ComparedMetric:
    """Decide on one difference.

    Args:
        adjusted: the p-value that decides.
        family: number of metrics that it was adjusted for; 0 if it was not.
        guard: see `_guard`.
    """
    assert a.value is not None
    clear = not made.low <= 0 <= made.high
    by = f"p {_p(made.p)}"
    if family:
        by += f", {_p(adjusted).removeprefix('= ')} by Holm over {family} metrics"
    reason = f"the interval of the difference {'is clear of' if clear else 'holds'} zero; {by}"
    verdict: Verdict = "within noise"
    if clear and adjusted <= ALPHA:
        verdict = "better" if (made.value > 0) == bool(a.higher_is_better) else "worse"
    guarded = a if verdict == "better" else b
    above = guard is not None and guarded.low is not None and guarded.low >= guard
    if verdict != "within noise" and above:
        verdict = "within noise"
        what = "zero" if name in GUARDS else "real held-out images' value"
        reason = f"both are clear of the {what} that this metric guards; farther is not better"
        notes = [*notes, reason]
    if made.variance == 0:
        notes = [*notes, "every value is the same on both sides: the interval has no width"]
    return ComparedMetric(
        metric=name, verdict=verdict, reason=reason, first=a.value,
        # A paired median leaves out the base rate that both records take away.
        second=a.value + made.value if name in GUARDS else made.second,
        difference=made.value, low=made.low, high=made.high, method=made.method, n=made.n, p=made.p,
        p_adjusted=adjusted if family else None,
        detectable=detectable(made) if made.variance > 0 else None, notes=notes,
    )  # fmt: skip


def _p(value: float) -> str:
    """Format a p-value; below one in ten thousand its digits mean nothing."""
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"


def _guard(name: str, record: EvaluationRecord) -> float | None:
    """Return the bound of a guard metric: worse is below it, and farther above is no better. None
    for others.
    """
    if name in GUARDS:
        return 0.0
    base = record.metrics.get(f"{name}_heldout") if name in GUARDED_BY_BASE else None
    return base.value if base else None


def _apply_margin(
    row: ComparedMetric, a: Measurement, made: PairedDifference, asked: Margin | None
) -> None:
    """Add to the row its margin, whether the difference is within it, and the prompts needed for
    that.
    """
    margin = asked or default_margin(row.metric, a.unit)
    assert a.value is not None and a.low is not None and a.high is not None
    if margin.relative and a.low <= 0 <= a.high:
        row.notes.append(
            "a share of a first value that is not clear of zero means nothing: give a margin in "
            "the metric's unit"
        )
        if asked is None:
            return
    row.margin = margin.absolute(a.value)
    row.margin_source = "default" if asked is None else "asked"
    row.within_margin = within_margin(made, row.margin, higher_is_better=bool(a.higher_is_better))
    if "guards" in row.reason:
        row.within_margin = "yes"
    if made.variance == 0:
        return
    row.prompts_needed = prompts_needed(made, row.margin)
    if row.prompts_needed is None:
        row.notes.append(
            "no number of prompts proves a margin of 0"
            if row.margin == 0
            else "no number of prompts is enough for the margin: the reference images alone make "
            "more noise"
        )
    elif made.grows_together:
        row.notes.append("the prompts needed assume as many times more reference images")


def _answer(record: ComparisonRecord, *, asked: set[str], default_margins: bool) -> None:
    """Fill in the answer, its reasons and the counts. Where a margin decides, the verdict does not.
    A metric that the first record measured must be comparable in the second; one that neither
    measured decides nothing, unless its margin was asked for.

    Args:
        asked: metrics whose margin was asked for.
        default_margins: whether the others' default margins decide too.
    """
    failures, doubts = [], []
    rows = record.comparisons
    deciding = {row.metric for row in rows} if default_margins else asked
    for row in record.comparisons:
        if row.verdict == "not comparable":
            known = row.first is not None or row.second is not None
            alone = row.first is not None and row.second is None
            if alone and row.metric not in deciding:  # nobody passes by measuring less,
                doubts.append(f"{row.metric} was measured in the first record alone")
            elif (  # or in another way
                row.first is not None or row.metric in asked or (known and row.metric in deciding)
            ):
                doubts.append(f"{row.metric} is not comparable")
        elif row.metric in deciding:
            if row.within_margin == "no":
                failures.append(
                    f"{row.metric} is worse by more than its margin of {row.margin:.4g}"
                )
            elif row.within_margin == "undecided":
                doubts.append(
                    f"{row.metric} may be worse by more than its margin of {row.margin:.4g}"
                )
        elif row.verdict == "worse":
            failures.append(f"{row.metric} is worse")
    verdicts = [row.verdict for row in record.comparisons]
    record.n_better, record.n_worse = verdicts.count("better"), verdicts.count("worse")
    record.n_within_noise = verdicts.count("within noise")
    record.n_not_comparable = verdicts.count("not comparable")
    within = [row.within_margin for row in record.comparisons if row.metric in deciding]
    record.n_margins_missed, record.n_margins_undecided = (
        within.count("no"),
        within.count("undecided"),
    )
    if record.n_not_comparable == len(verdicts):
        doubts = ["nothing could be compared"]
    if any("is failed" in warning for warning in record.warnings):
        doubts.append("a record that is failed decides nothing")
    answer: Answer = "fail" if failures else "undecided" if doubts else "pass"
    record.answer, record.reasons = answer, failures + doubts


def _measurement(made: PairedDifference, a: Measurement, notes: list[str]) -> Measurement:
    """Make the measurement of the difference, second minus first."""
    return Measurement(
        value=made.value, low=made.low, high=made.high, method=made.method, n=made.n, unit=a.unit,
        higher_is_better=a.higher_is_better, protocol=a.protocol, warnings=notes,
    )  # fmt: skip


def _shared(first: Evidence, second: Evidence) -> dict[str, InputRef]:
    """Return the inputs that both records were made from."""
    ours, theirs = first.record.inputs, second.record.inputs
    return {
        name: ours[name]
        for name in SHARED_INPUTS
        if name in ours and name in theirs and ours[name].sha256 == theirs[name].sha256
    }


def _warnings(first: Evidence, second: Evidence) -> list[str]:
    warnings = [
        f"{evidence.path} is {evidence.record.status}: {evidence.record.error}"
        for evidence in (first, second)
        if evidence.record.status != "ok"
    ]
    if first.sha256 == second.sha256:
        warnings.append("both records are the same file")
    elif same_images(first, second):
        warnings.append("both records measured the same images: their features are equal")
    digests = [evidence.record.source.sha256 for evidence in (first, second)]
    if first.sha256 != second.sha256 and digests[0] is not None and digests[0] == digests[1]:
        warnings.append("both records are of the same source")
    return warnings


def _weights(path: Path | None) -> dict[str, InputRef]:
    return {"lpips": InputRef(path=str(path), sha256=sha256_file(path))} if path else {}


def _image_measures(
    first: Evidence, second: Evidence, lpips_weights: Path | None, lpips_net: str
) -> dict[str, Measurement]:
    """Measure the similarity of the two sources' images of the same prompts and seeds."""
    from modelops.evaluation.compare.agreement import pairwise_measures

    try:
        return dict(
            pairwise_measures(
                first.path, second.path, lpips_weights=lpips_weights, lpips_net=lpips_net
            )
        )
    except EvaluationError as error:
        return {"image_agreement": Measurement.missing(error.message)}
