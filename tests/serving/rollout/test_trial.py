"""Verdicts: rates of error known by counting, evaluations that compare, looks that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelops.base.errors import UsageError
from modelops.serving.rollout.interim import InterimAnalyses, spent
from modelops.serving.rollout.trial import OUTCOMES, CanaryRules, Trial, TrialData, log_bound
from modelops.serving.rollout.verdict import CanaryVerdict, judge

RULES = CanaryRules(requests=400, seconds=60)


def data(
    canary: dict[str, int], stable: dict[str, int], *, ratio: float = 1.0, seconds: float = 600,
    spread: float = 0.02, blocks: int = 100, seed: int = 0,
) -> TrialData:  # fmt: skip
    logs = np.random.default_rng(seed).normal(math.log(ratio), spread, blocks)
    zero = dict.fromkeys(OUTCOMES, 0)
    return TrialData(
        canary=zero | canary, stable=zero | stable, log_at_least=tuple(logs),
        log_at_most=tuple(logs), seconds=seconds,
    )  # fmt: skip


def test_equal_releases_are_within_noise() -> None:
    verdict = judge(data({"ok": 1000}, {"ok": 9000}), RULES)
    assert verdict.answer == "within noise" and verdict.requests == 1000
    assert {finding.answer for finding in verdict.findings} == {"within noise"}
    assert verdict.as_json()["findings"][0]["stable"] == (0, 9000)


def test_what_is_worse_is_said_with_the_measure() -> None:
    verdict = judge(data({"ok": 90, "failed": 10}, {"ok": 900}), RULES)
    assert verdict.answer == "worse" and "errors 10 of 100 against 0 of 900" in verdict.sentence
    verdict = judge(data({"ok": 90, "image_blocked": 20}, {"ok": 900, "image_blocked": 9}), RULES)
    assert verdict.answer == "worse" and "image filter" in verdict.sentence
    verdict = judge(data({"ok": 1000}, {"ok": 9000}, ratio=1.4), RULES)
    assert verdict.answer == "worse" and "latency x 1.4" in verdict.sentence
    # Slower, but by less than the margin: no reason to go back.
    assert judge(data({"ok": 1000}, {"ok": 9000}, ratio=1.05), RULES).answer == "within noise"
    assert judge(data({"ok": 1000}, {"ok": 9000}, ratio=0.8), RULES).answer == "better"


def test_too_little_decides_nothing_but_harm() -> None:
    early = judge(data({"ok": 100}, {"ok": 900}), RULES)
    assert early.answer == "undecided" and "100 of 400 requests" in early.sentence
    soon = judge(data({"ok": 1000}, {"ok": 900}, seconds=30), RULES)
    assert soon.answer == "undecided" and "30 of 60 s" in soon.sentence
    assert judge(data({"failed": 5}, {"ok": 20}), RULES).answer == "worse"
    assert judge(data({}, {}, blocks=0), RULES).answer == "undecided"
    # 400 requests cannot show what a margin of a tenth of a percent asks for.
    strict = CanaryRules(requests=400, seconds=60, error_margin=0.001)
    assert "errors" in judge(data({"ok": 400}, {"ok": 9000}), strict).sentence
    # No evaluations that could be compared.
    blind = judge(data({"ok": 1000}, {"ok": 9000}, blocks=0), RULES)
    assert blind.answer == "undecided" and "no evaluations yet" in blind.sentence


def test_no_caller_chooses_its_side() -> None:
    """1,000 requests by chance, 6 standard deviations; a key keeps its side for one trial only."""
    trial, other = (Trial(CanaryRules(sticky="key", share=0.25)) for _ in range(2))
    for key in ("", "alice"):
        request = Trial(CanaryRules(share=0.25))
        assert abs(sum(request.deal(key) for _ in range(1000)) - 250) < 6 * math.sqrt(1000 * 0.1875)
    assert abs(sum(trial.deal() for _ in range(1000)) - 250) < 6 * math.sqrt(1000 * 0.1875)
    keys = [f"key-{index}" for index in range(1000)]
    first = [trial.deal(key) for key in keys]
    assert first == [trial.deal(key) for key in keys] != [other.deal(key) for key in keys]
    assert abs(sum(first) - 250) < 6 * math.sqrt(1000 * 0.1875)


def test_requests_of_one_key_are_no_sample() -> None:
    rules = CanaryRules(sticky="key", requests=400, seconds=60)
    assert judge(data({"ok": 1000}, {"ok": 9000}), rules).answer == "undecided"
    assert judge(data({"ok": 90, "failed": 10}, {"ok": 900}), rules).answer == "worse"


def test_false_alarms_and_false_passes_stay_below_alpha() -> None:
    """Many trials by chance: a harmless canary is called worse in at most 5 % of them, and one that
    fails a margin more often is called no worse in at most 5 %."""
    generator = np.random.default_rng(3)
    alarms = passes = 0
    runs = 150
    for run in range(runs):

        def drawn(n: int, error: float) -> dict[str, int]:
            failed = int(generator.binomial(n, error))
            blocked = int(generator.binomial(n - failed, 0.05))
            return {"ok": n - failed - blocked, "failed": failed, "image_blocked": blocked}

        same = data(drawn(1500, 0.01), drawn(6000, 0.01), spread=0.1, blocks=60, seed=run)
        alarms += judge(same, RULES).answer == "worse"
        bad = data(drawn(1500, 0.02), drawn(6000, 0.01), spread=0.1, blocks=60, seed=run)
        passes += judge(bad, RULES).answer in ("within noise", "better")
    assert alarms / runs <= 0.05 and passes / runs <= 0.05


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def asked_after_each(
    outcomes: tuple[list[str], list[str]], rules: CanaryRules, *, step_s: float = 1.0
) -> list[tuple[int, CanaryVerdict]]:
    """(requests so far, verdict) of somebody who asks after every single request."""
    clock = Clock()
    trial = Trial(rules, clock=clock)
    trial._at_least.extend([0.0] * 60)  # as fast as each other
    trial._at_most.extend([0.0] * 60)
    looks, found = InterimAnalyses(trial), []
    for number, (canary, stable) in enumerate(zip(*outcomes, strict=True), 1):
        clock.now += step_s
        trial.count("canary", canary)
        trial.count("stable", stable)
        found.append((number, looks.verdict()))
    return found


def looked(verdicts: list[tuple[int, CanaryVerdict]]) -> list[tuple[int, float]]:
    """(requests, alpha) of the looks that were made."""
    made = [(verdict.requests, verdict.alpha) for _, verdict in verdicts if verdict.alpha]
    return list(dict.fromkeys(made))


def test_looks_are_made_when_requests_double_and_spend_alpha_once() -> None:
    assert sum(map(spent, range(1, 100_000))) == pytest.approx(1, abs=1e-4)
    rules = CanaryRules(requests=400, seconds=60)
    fine = ["ok"] * 900
    verdicts = asked_after_each((fine, fine), rules)
    made = looked(verdicts)
    assert [requests for requests, _ in made] == [20, 40, 80, 160, 320, 400, 800]
    assert [alpha for _, alpha in made] == [0.05 * spent(k) for k in range(1, 8)]
    # Before it could be found no worse the sentence says how far it is; from then on it is.
    answers = {number: verdict.answer for number, verdict in verdicts}
    assert answers[399] == "undecided" and answers[400] == answers[900] == "within noise"
    assert "7 of 400 requests, 7 of 60 s" in verdicts[6][1].sentence
    assert "399 of 400 requests" in verdicts[398][1].sentence
    # Requests come first and the time later: then the look waits for it.
    late = asked_after_each((fine, fine), rules, step_s=0.125)
    assert [requests for requests, _ in looked(late)] == [20, 40, 80, 160, 320, 480]
    # A canary dealt out by key is never found no worse.
    by_key = asked_after_each((fine, fine), CanaryRules(sticky="key"))
    assert {verdict.answer for _, verdict in by_key} == {"undecided"}
    assert "dealt out by key" in by_key[-1][1].sentence


def test_what_is_found_worse_stays_so() -> None:
    bad = ["failed"] * 20 + ["ok"] * 2000
    verdicts = asked_after_each((bad, ["ok"] * 2020), CanaryRules(requests=400, seconds=60))
    assert verdicts[18][1].answer == "undecided"
    assert {verdict.answer for _, verdict in verdicts[19:]} == {"worse"}
    assert "errors 20 of 20 against 0 of 20" in verdicts[-1][1].sentence


def test_asking_after_every_request_finds_nothing_by_chance() -> None:
    """The same is called worse in at most 5 % of the trials, and what fails more often by just the
    margin passes in at most 5 %, though somebody asks 1600 times in each and would act at once."""
    rules, runs = CanaryRules(requests=400, seconds=60), 60
    alarms = passes = 0
    for run in range(runs):
        generator = np.random.default_rng(run)

        def drawn(error: float, generator: np.random.Generator = generator) -> list[str]:
            return ["failed" if one < error else "ok" for one in generator.random(1600)]

        same = asked_after_each((drawn(0.05), drawn(0.05)), rules)
        alarms += any(verdict.answer == "worse" for _, verdict in same)
        bad = asked_after_each((drawn(0.02), drawn(0.01)), rules)
        passes += any(verdict.answer in ("within noise", "better") for _, verdict in bad)
    assert alarms / runs <= 0.05 and passes / runs <= 0.05


def test_only_evaluations_alike_are_compared() -> None:
    """The canary is as fast as the stable release in batches as wide, though its own are narrower,
    and though the other engine was in its way more often."""
    clock = Clock()
    trial = Trial(CanaryRules(block_s=1.0), clock=clock)
    for _ in range(20):
        for _ in range(5):
            clock.now += 0.1
            trial.step("stable", rows=8, seconds=0.08, other_since=None)
            clock.now += 0.02
            trial.step("stable", rows=1, seconds=0.01, other_since=None)
            clock.now += 0.02
            trial.step("canary", rows=1, seconds=0.01, other_since=None)
    found = trial.data()
    assert len(found.log_at_least) == len(found.log_at_most) >= 12
    assert np.allclose(found.log_at_least, 0.0) and np.allclose(found.log_at_most, 0.0)


def test_bounds_say_only_what_they_can() -> None:
    """Wider batches and a busy neighbour make an evaluation slower, never faster."""
    one = math.log(2.0)
    # Narrower, less disturbed, and yet twice as slow: at least twice as slow.
    assert log_bound({(1, 0): [0.2]}, {(8, 4): [0.1]}, 1) == pytest.approx(one)
    assert log_bound({(1, 0): [0.2]}, {(8, 4): [0.1]}, -1) is None
    # Wider, more disturbed, and yet twice as fast: at least twice as fast.
    assert log_bound({(8, 4): [0.1]}, {(1, 0): [0.2]}, -1) == pytest.approx(-one)
    assert log_bound({(8, 4): [0.1]}, {(1, 0): [0.2]}, 1) is None
    # A pile of work in a canary: eight rows take at most as long as four times two.
    assert log_bound({(8, 4): [0.8]}, {(2, 4): [0.1]}, 1) == pytest.approx(one)
    assert log_bound({(8, 4): [0.8]}, {(2, 4): [0.1], (8, 4): [0.2]}, 1) == pytest.approx(2 * one)
    assert log_bound({(8, 4): [0.8]}, {(2, 0): [0.1]}, 1) is None
    # Neither.
    for sign in (1, -1):
        assert log_bound({(1, 4): [0.2]}, {(8, 0): [0.1]}, sign) is None
        assert log_bound({}, {(8, 0): [0.1]}, sign) is None
    # The same kind is exact, and is what is taken when there is one.
    many = {(1, 0): [0.1], (4, 0): [0.4], (4, 2): [0.6]}
    for sign in (1, -1):
        assert log_bound({(4, 0): [0.8, 0.8, 0.8]}, many, sign) == pytest.approx(one)


def test_a_slow_canary_shows_and_memory_is_bounded() -> None:
    clock = Clock()
    trial = Trial(CanaryRules(block_s=0.5), clock=clock)
    for _ in range(11_000):
        clock.now += 0.1
        trial.step("stable", rows=2, seconds=0.02, other_since=None)
        clock.now += 0.1
        trial.step("canary", rows=2, seconds=0.03, other_since=None)
    found = trial.data()
    assert len(found.log_at_least) == 4096
    assert np.exp(np.median(found.log_at_least)) == pytest.approx(1.5)
    assert np.exp(np.median(found.log_at_most)) == pytest.approx(1.5)
    assert len(trial._cells["canary"]) + len(trial._cells["stable"]) < 20
    trial.count("canary", "failed")
    trial.count("canary", "left")
    assert trial.measured() == 1 and trial.data().canary["left"] == 1


@pytest.mark.parametrize(
    "wrong",
    [{"share": 0}, {"share": 1.5}, {"share": float("nan")}, {"requests": 5}, {"sticky": "ip"},
     {"latency_margin": 1.0}, {"seconds": -1}, {"alpha": 0.9}, {"share": 1, "auto": True}],
)  # fmt: skip
def test_rules_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        CanaryRules(**wrong)  # type: ignore[arg-type]
