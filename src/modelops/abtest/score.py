"""Score a study: who wins, how sure that is, and whether the raters can be believed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from modelops.abtest.statistics import (
    Floats,
    Ints,
    alpha_interval,
    balanced_mean,
    bootstrap_share,
    clustered_share,
    krippendorff_alpha,
    raw_agreement,
    sign_test,
)
from modelops.abtest.study import (
    KEY,
    STUDY,
    VOTES,
    Study,
    StudyKey,
    read_key,
    read_study,
)
from modelops.abtest.votes import Vote, read_votes, standing_votes
from modelops.base.environment import current_environment
from modelops.base.errors import EvaluationError, IntegrityError
from modelops.base.files import sha256_file
from modelops.metrics.intervals import Interval, clopper_pearson
from modelops.records.base import InputRef, Measurement
from modelops.records.comparison import AbTestRecord, RaterSummary, SignTest

Answer = Literal["pass", "fail", "undecided"]
RESAMPLES = 2000
HASTY_S = 0.5  # a median below this is not looking


@dataclass(frozen=True, slots=True)
class Judgement:
    """One vote on a pair of A and B. `score` is 1 for B, 0 for A, 0.5 for equal."""

    rater: str
    prompt: int
    pair: int
    again: bool
    b_left: bool
    score: float

    @property
    def left_score(self) -> float:
        """1 for the left image, 0 for the right one, 0.5 for equal."""
        return self.score if self.b_left else 1 - self.score


def score_study(
    directory: str | Path,
    *,
    key_path: str | Path | None = None,
    min_attention: float = 0.0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> AbTestRecord:
    """Compute the results of the votes as a record, which is not written here.

    Args:
        key_path: the study's key.json, if it is not in the directory.
        min_attention: raters who pass a smaller share of their attention checks are left out, by
            name.
        seed, resamples: of the bootstrap.

    Raises:
        UsageError: no study, or no key.
        IntegrityError: the key or the votes belong to another study or are damaged.
    """
    clock, started = time.monotonic(), datetime.now(UTC)
    folder = Path(directory)
    study, study_sha256 = read_study(folder)
    key_file = Path(key_path) if key_path else folder / KEY
    key = read_key(key_file, study)
    votes, torn = read_votes(folder / VOTES, study_sha256)
    by_rater = standing_votes(votes)
    record = AbTestRecord(
        question=study.question, sources=key.sources, records=study.records,
        n_pairs=study.n_pairs, n_identical_pairs=sum(pair.identical for pair in key.pairs),
        left_out=study.left_out, differences=study.differences,
        n_undone=sum(vote.kind == "undo" for vote in votes),
        seeds={"seed": seed}, environment=current_environment(), started_at=started,
        inputs={
            "study": InputRef(path=str(folder / STUDY), sha256=study_sha256),
            "key": InputRef(path=str(key_file), sha256=study.key_sha256),
        },
    )  # fmt: skip
    if votes:
        path = folder / VOTES
        record.inputs["votes"] = InputRef(path=str(path), sha256=sha256_file(path))
    if torn:
        record.warnings.append(f"the last line of {VOTES} is cut short ({torn} bytes); left out")

    judged: list[Judgement] = []
    for rater, mine in by_rater.items():
        own, summary = _rater(study, key, mine)
        record.raters[rater] = summary
        if summary.attention_shown:
            passed = summary.attention_passed / summary.attention_shown
            if passed < min_attention:
                summary.left_out = (
                    f"passed {summary.attention_passed} of {summary.attention_shown} attention "
                    f"checks, fewer than {min_attention:.0%}"
                )
                record.warnings.append(f"{rater} is left out: {summary.left_out}")
                continue
        judged += own
        if summary.median_s is not None and summary.median_s < HASTY_S:
            record.warnings.append(f"{rater} took {summary.median_s:.2g} s a vote (median)")
        if summary.remaining:
            record.warnings.append(f"{rater} has not finished: {summary.remaining} to go")
    record.n_votes = len(judged)
    record.n_prompts = len({judgement.prompt for judgement in judged})
    record.metrics = _metrics(judged, seed, resamples)
    record.sign_test = _sign_test(judged)
    if not judged:
        record.status, record.error = "failed", "no votes on pairs yet"
    record.duration_s = time.monotonic() - clock
    return record


def decide(
    record: AbTestRecord, require: Literal["better", "not-worse"], *, margin: float = 0.05
) -> tuple[Answer, str]:
    """Decide whether B is better, or not worse by more than `margin` of the win rate; with reason.

    pass when the whole interval of the win rate is above the bound (0.5, or 0.5 - margin), fail
    when it is all below, else undecided.
    """
    bound = 0.5 if require == "better" else 0.5 - margin
    rate = record.metrics["win_rate"]
    if rate.value is None or rate.low is None or rate.high is None:
        return "undecided", f"the win rate was not measured: {rate.not_measured}"
    shown = f"B's win rate {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
    if rate.low > bound:
        return "pass", f"{shown} is above {bound:g}"
    if rate.high < bound:
        return "fail", f"{shown} is below {bound:g}"
    return "undecided", f"{shown} holds {bound:g}: more votes or prompts are needed"


def _rater(study: Study, key: StudyKey, votes: list[Vote]) -> tuple[list[Judgement], RaterSummary]:
    """Votes of one rater with the blind lifted."""
    prompts = {pair.prompt: index for index, pair in reversed(list(enumerate(key.pairs)))}
    images = {trial.id: set(trial.images) for trial in study.trials}
    summary = RaterSummary(remaining=len(study.trials) - len(votes))
    judged = []
    for vote in votes:
        if images.get(vote.trial) != {vote.left, vote.right}:
            raise IntegrityError(f"{VOTES}: {vote.rater}'s {vote.trial} is no trial of this study")
        truth = key.trials[vote.trial]
        picked = {"left": vote.left, "right": vote.right, "equal": None}[vote.choice or "equal"]
        if truth.role == "attention":
            summary.attention_shown += 1
            summary.attention_passed += picked == truth.expected
            continue
        pair = key.pairs[truth.pair]
        score = 0.5 if picked is None else float(picked == pair.b)
        judged.append(
            Judgement(
                vote.rater,
                prompts[pair.prompt],
                truth.pair,
                truth.role == "again",
                vote.left == pair.b,
                score,
            )
        )
    summary.votes = len(judged)
    summary.for_a = sum(j.score == 0 for j in judged)
    summary.for_b = sum(j.score == 1 for j in judged)
    summary.equal = summary.votes - summary.for_a - summary.for_b
    summary.left = sum(j.left_score == 1 for j in judged)
    twice = _twice(judged)
    summary.shown_twice, summary.same_twice = len(twice), sum(same for _, same in twice)
    if votes:
        summary.median_s = float(np.median([vote.latency_ms for vote in votes])) / 1000
    return judged, summary


def _metrics(judged: list[Judgement], seed: int, resamples: int) -> dict[str, Measurement]:
    decided = [j for j in judged if j.score != 0.5]
    return {
        "win_rate": _win_rate(judged, seed, resamples),
        "win_rate_without_ties": _share(decided, lambda j: j.score, True),
        "win_rate_other_raters": _other_raters(judged, seed, resamples),
        "tie_rate": _share(judged, lambda j: float(j.score == 0.5), None),
        "prompt_win_rate": _prompt_win_rate(judged),
        "position_bias": _position_bias(judged),
        "self_agreement": _self_agreement(judged),
        "rater_agreement": _rater_agreement(judged, seed, resamples),
    }


def _win_rate(judged: list[Judgement], seed: int, resamples: int) -> Measurement:
    """Share of votes for B, ties half."""
    measured = _share(judged, lambda j: j.score, True)
    if measured.value is not None:
        scores, prompts = _arrays(judged, lambda j: j.score)
        boot = bootstrap_share(scores, prompts, seed=seed, resamples=resamples)
        measured.details |= {"bootstrap_low": boot.low, "bootstrap_high": boot.high}
    return measured


def _other_raters(judged: list[Judgement], seed: int, resamples: int) -> Measurement:
    names = sorted({j.rater for j in judged})
    if len(names) < 3:
        return Measurement.missing(f"{len(names)} raters; other raters can be guessed at from 3")
    scores, prompts = _arrays(judged, lambda j: j.score)
    raters = np.array([names.index(j.rater) for j in judged])
    made = bootstrap_share(scores, prompts, raters, seed=seed, resamples=resamples)
    return _measurement(made, len(judged), better=True, raters=len(names))


def _prompt_means(judged: list[Judgement]) -> list[float]:
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for j in judged:
        by_prompt[j.prompt].append(j.score)
    return [float(np.mean(scores)) for scores in by_prompt.values()]


def _prompt_win_rate(judged: list[Judgement]) -> Measurement:
    """Share of prompts whose votes go to B, of those that go either way."""
    means = _prompt_means(judged)
    wins, losses = sum(m > 0.5 for m in means), sum(m < 0.5 for m in means)
    if wins + losses == 0:
        return Measurement.missing("no prompt has a winner")
    return _measurement(
        clopper_pearson(wins, wins + losses), wins + losses, better=True,
        prompts_b=wins, prompts_a=losses, prompts_even=len(means) - wins - losses,
    )  # fmt: skip


def _sign_test(judged: list[Judgement]) -> SignTest:
    means = _prompt_means(judged)
    wins, losses = sum(m > 0.5 for m in means), sum(m < 0.5 for m in means)
    return SignTest(
        prompts_b=wins, prompts_a=losses, prompts_even=len(means) - wins - losses,
        p_value=sign_test(wins, losses),
    )  # fmt: skip


def _position_bias(judged: list[Judgement]) -> Measurement:
    """Share of votes for the left image, ties half, above the 0.5 of a rater without a bias.

    The mean over votes with A and votes with B on the left, so that it does not matter if one of
    them was there more often.
    """
    sides = [[j for j in judged if j.b_left is b_left] for b_left in (False, True)]
    made = []
    for side in sides:
        try:
            made.append(clustered_share(*_arrays(side, lambda j: j.left_score))[0])
        except EvaluationError:
            return Measurement.missing("too few prompts with A, or with B, on the left")
    left = balanced_mean(*made)
    return _measurement(
        Interval(left.value - 0.5, left.low - 0.5, left.high - 0.5, left.method),
        len(judged), better=None,
        left_share_a_left=made[0].value, left_share_b_left=made[1].value,
    )  # fmt: skip


def _twice(judged: list[Judgement]) -> list[tuple[int, bool]]:
    """Return (prompt, same answer) of each pair that a rater saw with both orders of sides."""
    first = {(j.rater, j.pair): j for j in judged if not j.again}
    return [
        (j.prompt, first[j.rater, j.pair].score == j.score)
        for j in judged
        if j.again and (j.rater, j.pair) in first
    ]


def _self_agreement(judged: list[Judgement]) -> Measurement:
    twice = _twice(judged)
    if not twice:
        return Measurement.missing("no pair was shown to a rater twice")
    same = np.array([float(agrees) for _, agrees in twice])
    prompts = np.array([prompt for prompt, _ in twice])
    try:
        made, effective = clustered_share(same, prompts)
    except EvaluationError as error:
        return Measurement.missing(error.message)
    return _measurement(made, len(twice), better=True, effective_n=effective)


def _rater_agreement(judged: list[Judgement], seed: int, resamples: int) -> Measurement:
    """Krippendorff's alpha of the first showing of each pair."""
    raters = sorted({j.rater for j in judged})
    if len(raters) < 2:
        return Measurement.missing(f"{len(raters)} raters; agreement needs two")
    pairs = sorted({j.pair for j in judged})
    values = np.full((len(raters), len(pairs)), np.nan)
    prompts = np.zeros(len(pairs), np.int64)
    rows = {name: row for row, name in enumerate(raters)}
    columns = {pair: column for column, pair in enumerate(pairs)}
    for j in judged:
        prompts[columns[j.pair]] = j.prompt
        if not j.again:
            values[rows[j.rater], columns[j.pair]] = j.score
    made = alpha_interval(values, prompts, seed=seed, resamples=resamples)
    if made is None:
        return Measurement.missing("no two raters share enough pairs, or all votes are the same")
    shared = int(((~np.isnan(values)).sum(axis=0) >= 2).sum())
    return _measurement(
        made, shared, better=True, raters=len(raters),
        nominal_alpha=krippendorff_alpha(values, level="nominal"),
        raw_agreement=raw_agreement(values),
    )  # fmt: skip


def _share(
    judged: list[Judgement], value: Callable[[Judgement], float], better: bool | None
) -> Measurement:
    if not judged:
        return Measurement.missing("no votes on pairs yet")
    scores, prompts = _arrays(judged, value)
    try:
        made, effective = clustered_share(scores, prompts)
    except EvaluationError as error:
        return Measurement.missing(error.message)
    return _measurement(
        made, len(judged), better=better, effective_n=effective, prompts=len(np.unique(prompts))
    )


def _arrays(judged: list[Judgement], value: Callable[[Judgement], float]) -> tuple[Floats, Ints]:
    return np.array([value(j) for j in judged]), np.array([j.prompt for j in judged], np.int64)


def _measurement(
    made: Interval, n: int, *, better: bool | None, **details: float | int | None
) -> Measurement:
    return Measurement(
        value=made.value, low=made.low, high=made.high, method=made.method, n=n,
        higher_is_better=better, details=dict(details),
    )  # fmt: skip
