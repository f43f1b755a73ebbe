"""Blind A/B studies: what is built tells nothing, votes survive, and the score is right."""

from __future__ import annotations

import http.client
import json
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abtest_studies import BLUE, PROMPTS, RED, make_study, write_samples
from modelops.abtest.build import StudySettings, build_study
from modelops.abtest.score import decide, score_study
from modelops.abtest.server import MAX_BODY, AbTestServer, ConflictError, Session
from modelops.abtest.statistics import (
    alpha_interval,
    bootstrap_share,
    clustered_share,
    krippendorff_alpha,
    raw_agreement,
    sign_test,
)
from modelops.abtest.study import (
    Showing,
    StudyKey,
    rater_order,
    read_key,
    read_study,
)
from modelops.abtest.votes import Vote, VoteLog, read_votes
from modelops.base.errors import (
    EvaluationError,
    IntegrityError,
    ModelopsError,
    ServingError,
    UsageError,
)
from modelops.base.images import read_image
from modelops.metrics.intervals import clopper_pearson
from modelops.records.comparison import AbTestRecord
from modelops.records.read import read_any_record

Rater = Callable[[Showing, StudyKey], tuple[str, float]]  # -> (choice, latency in ms)


def is_b(name: str, key: StudyKey) -> bool:
    return any(pair.b == name for pair in key.pairs)


def prefers_b(showing: Showing, key: StudyKey) -> tuple[str, float]:
    if key.trials[showing.trial].role == "attention":
        return ("left" if key.trials[showing.trial].expected == showing.left else "right"), 900
    return ("left" if is_b(showing.left, key) else "right"), 900


def prefers_left(showing: Showing, key: StudyKey) -> tuple[str, float]:
    return "left", 200


def vote_through(folder: Path, raters: dict[str, Rater], limit: int | None = None) -> None:
    session = Session(folder)
    key = read_key(folder / "key.json", session.study)
    for name, rater in raters.items():
        for _ in range(len(session.study.trials) if limit is None else limit):
            now = session.state(name)["current"]
            showing = Showing(now["trial"], now["prompt"], now["left"][7:-4], now["right"][7:-4])
            choice, latency = rater(showing, key)
            session.vote(name, now["trial"], choice, latency)
    session.close()


# --- build


def test_nothing_that_raters_get_tells_a_from_b(tmp_path: Path) -> None:
    study = make_study(tmp_path, n=None, repeat=0.5, attention=2)
    folder = tmp_path / "study"
    key = read_key(folder / "key.json", study)
    public = (folder / "study.json").read_text()
    assert str(key.seed) not in json.loads(public).values() and f'"seed": {key.seed}' not in public
    assert [trial.id for trial in study.trials] == sorted(trial.id for trial in study.trials)
    for path in (folder / "images").iterdir():
        data = path.read_bytes()
        assert len(path.stem) == 14 and int(path.stem, 16) >= 0
        # Only the chunks that an image cannot do without.
        kinds, at = set(), 8
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            kinds.add(data[at + 4 : at + 8])
            at += 12 + length
        assert kinds == {b"IHDR", b"IDAT", b"IEND"}
    # By chance alone, an image's name, or its time of writing, must not sort A before B.
    names = sorted(path.stem for path in (folder / "images").iterdir())
    ranks = [names.index(pair.b) > names.index(pair.a) for pair in key.pairs]
    assert 0 < sum(ranks) < len(ranks)


def test_the_pictures_are_the_sources_own(tmp_path: Path) -> None:
    study = make_study(tmp_path, n=None)
    key = read_key(tmp_path / "study" / "key.json", study)
    assert sorted(pair.prompt for pair in key.pairs) == sorted(PROMPTS)
    for pair in key.pairs:
        for name, side in ((pair.a, "a"), (pair.b, "b")):
            original = tmp_path / side / f"{PROMPTS.index(pair.prompt):04d}-0.png"
            shown = tmp_path / "study" / "images" / f"{name}.png"
            assert (read_image(original) == read_image(shown)).all()


def test_sides_are_balanced_and_repeats_are_swapped_and_far_apart(tmp_path: Path) -> None:
    study = make_study(tmp_path, n=None, repeat=0.5)
    key = read_key(tmp_path / "study" / "key.json", study)
    first_sides: Counter[tuple[int, bool]] = Counter()
    orders = set()
    for rater in (f"rater {i}" for i in range(40)):
        order = rater_order(study, rater)
        assert order == rater_order(study, rater)
        orders.add(tuple(showing.trial for showing in order))
        assert sorted(s.trial for s in order) == [trial.id for trial in study.trials]
        assert sum(is_b(s.left, key) for s in order) * 2 == len(order)
        at = {showing.trial: place for place, showing in enumerate(order)}
        for trial in study.trials:
            first = order[at[trial.again_of]] if trial.again_of else None
            if first:
                second = order[at[trial.id]]
                assert (first.left, first.right) == (second.right, second.left)
                assert at[trial.id] - at[first.trial] >= 3
        for showing in order:
            truth = key.trials[showing.trial]
            if truth.role == "first":
                first_sides[truth.pair, is_b(showing.left, key)] += 1
    assert len(orders) == 40
    for pair in range(len(PROMPTS)):  # every pair is seen by some raters either way
        assert min(first_sides[pair, True], first_sides[pair, False]) >= 8


def test_a_seed_gives_the_same_study_again_and_none_a_new_one(tmp_path: Path) -> None:
    def built(name: str, **settings: Any) -> Any:
        study = make_study(tmp_path / name, **settings)
        return study.trials, study.images

    same = built("one")
    assert same == built("two")
    assert same != built("three", seed=8)
    assert built("four", seed=None) != built("five", seed=None)


def test_what_differs_is_refused_and_all_of_it_is_named(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", BLUE)
    b = write_samples(tmp_path / "b", RED, prompts=PROMPTS[1:], seed=1, steps=8)
    with pytest.raises(EvaluationError) as caught:
        build_study(a, b, tmp_path / "study")
    for part in ("seed: 0 against 1", "steps: 4 against 8", "1 images only planned in A",
                 "'warm heart'", "image seeds: 11 differ"):  # fmt: skip
        assert part in caught.value.message
    assert not (tmp_path / "study").exists()

    c = write_samples(tmp_path / "c", RED, steps=8)
    with pytest.raises(EvaluationError) as caught:
        build_study(a, c, tmp_path / "study")
    assert caught.value.hint == "--allow steps"
    study = build_study(a, c, tmp_path / "study", StudySettings(allow=("steps",)))
    assert study.differences == ["steps: 4 against 8"]


def test_pairs_without_both_images_are_counted(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", BLUE, failed=["warm sun"])
    b = write_samples(tmp_path / "b", RED, failed=["warm sun", "cold crab"])
    study = build_study(a, b, tmp_path / "study", StudySettings(n=4, repeat=0))
    assert study.left_out == {
        "image of A and B failed": 1, "image of B failed": 1, "not among the chosen": 6,
    }  # fmt: skip
    assert len(study.trials) == study.n_pairs == 4


def test_bad_inputs_get_one_clear_line(tmp_path: Path) -> None:
    a = write_samples(tmp_path / "a", BLUE)
    big = write_samples(tmp_path / "big", RED, size=20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "bare").mkdir()
    cases: list[tuple[Path, Path, Path, type[ModelopsError], str]] = [
        (a, big, tmp_path / "s", EvaluationError, "height: 16 against 20"),
        (a, a, tmp_path / "full", UsageError, "not empty"),
        (a, tmp_path / "bare", tmp_path / "s", UsageError, "samples.json"),
        (a, tmp_path / "none.json", tmp_path / "s", UsageError, "no such file"),
    ]
    for first, second, out, error, words in cases:
        with pytest.raises(error, match=words):
            build_study(first, second, out)
    listing = json.loads((big / "samples.json").read_text()) | {"height": 16, "width": 16}
    (big / "samples.json").write_text(json.dumps(listing))
    with pytest.raises(EvaluationError, match="A is 16x16 and B 20x20"):
        build_study(a, big, tmp_path / "s")
    (a / "0003-0.png").write_bytes((a / "0002-0.png").read_bytes())
    with pytest.raises(IntegrityError, match="0003-0"):
        build_study(a, a, tmp_path / "s")
    (a / "samples.json").write_text("[]")
    with pytest.raises(UsageError, match="not what `modelops sample` writes"):
        build_study(a, a, tmp_path / "s")
    for settings in ({"n": 0}, {"repeat": 1.5}, {"seed": -1}, {"question": " "}, {"allow": ["x"]}):
        with pytest.raises(UsageError):
            StudySettings(**settings)  # type: ignore[arg-type]


# --- votes


def a_vote(number: int, **changed: Any) -> Vote:
    given = {"kind": "vote", "study": "s", "rater": "Ann", "trial": f"t{number}", "left": "x",
             "right": "y", "choice": "left"}  # fmt: skip
    return Vote.model_validate(given | changed)


def test_a_torn_last_line_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    log = VoteLog(path, "s")
    log.append(a_vote(0))
    log.append(a_vote(1))
    log.append(a_vote(2, rater="A" * 60))  # longer than what will take its place
    log.close()
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        votes, torn = read_votes(path, "s")
        assert ([vote.trial for vote in votes], torn) == (["t0", "t1"], cut - last)
        log = VoteLog(path, "s")
        assert log.torn_bytes == cut - last
        log.append(a_vote(9))
        log.close()
        assert [vote.trial for vote in read_votes(path, "s")[0]] == ["t0", "t1", "t9"]
        assert path.read_bytes().endswith(b"}\n")  # and nothing of the torn line
        assert path.read_bytes().startswith(whole[:last])  # what counted stays as it was


def test_other_damage_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    good = a_vote(0).model_dump_json(exclude_none=True) + "\n"
    for bad, words in (("{half\n", "line 2 is damaged"),
                       (good.replace('"s"', '"z"'), "another study"),
                       (good.replace('"left":"x"', '"left":"x","more":1'), "line 2 is damaged"),
                       (good.replace(',"choice":"left"', ""), "line 2 is damaged")):  # fmt: skip
        path.write_text(good + bad + good)
        with pytest.raises(IntegrityError, match=words):
            read_votes(path, "s")
    path.write_text(good + good)
    with pytest.raises(IntegrityError, match="two votes"):
        VoteLog(path, "s")
    assert read_votes(tmp_path / "none.jsonl", "s") == ([], 0)


def test_a_full_disk_loses_no_vote_and_invents_none(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    log = VoteLog(path, "s")
    log.append(a_vote(0))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(ModelopsError):
            log.append(a_vote(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [vote.trial for vote in log.standing["Ann"]] == ["t0"]
    log.append(a_vote(1))
    log.close()
    assert len(read_votes(path, "s")[0]) == 2


# --- sessions and the server


def test_votes_undo_and_resume(tmp_path: Path) -> None:
    make_study(tmp_path, n=4, repeat=0)
    folder = tmp_path / "study"
    session = Session(folder)
    trials = [showing.trial for showing in rater_order(session.study, "Ann")]
    state = session.state("  Ann ")
    assert (state["rater"], state["done"], state["current"]["trial"]) == ("Ann", 0, trials[0])
    for trial in trials[:2]:
        state = session.vote("Ann", trial, "equal", 5)
    with pytest.raises(ConflictError):
        session.vote("Ann", trials[0], "left", 5)  # sent twice
    with pytest.raises(ConflictError):
        session.undo("Ann", trials[0])
    assert session.undo("Ann", trials[1])["undo"] == trials[0]
    with pytest.raises(ServingError, match="already being served"):
        Session(folder)
    session.close()

    session = Session(folder)
    assert session.state("Ann")["current"]["trial"] == trials[1]
    assert session.state("Bo")["done"] == 0
    for trial in trials[1:]:
        state = session.vote("Ann", trial, "left", 5)
    assert state["current"] is None and state["done"] == 4
    session.close()
    for choice, latency in (("up", 1), ("left", -1), ("left", float("nan")), ("left", "soon")):
        session = Session(folder)
        with pytest.raises(UsageError):
            session.vote("Bo", rater_order(session.study, "Bo")[0].trial, choice, latency)
        session.close()
    for name in ("", " \t", "x" * 65, "a\0b", "a\u202eb", "\ud800"):
        session = Session(folder)
        with pytest.raises(UsageError):
            session.state(name)
        session.close()


def test_a_changed_picture_or_key_is_found_out(tmp_path: Path) -> None:
    study = make_study(tmp_path, n=4)
    folder = tmp_path / "study"
    key = folder / "key.json"
    key.write_text(key.read_text().replace('"first"', '"again"', 1))
    with pytest.raises(IntegrityError, match="not the key of this study"):
        score_study(folder)
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(IntegrityError, match="missing, or not the image"):
        Session(folder)
    assert read_study(folder)[0].trials == study.trials


@contextmanager
def serving(folder: Path) -> Iterator[AbTestServer]:
    session = Session(folder)
    server = AbTestServer(session, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        session.close()


def ask(
    server: AbTestServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given)
    answer = connection.getresponse()
    result = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
    connection.close()
    return result


def test_the_server_gives_out_pages_and_pictures_and_nothing_else(tmp_path: Path) -> None:
    study = make_study(tmp_path, n=4)
    with serving(tmp_path / "study") as server:
        for path in ("/", "/page.css", "/page.js"):
            status, body, headers = ask(server, "GET", path)
            assert status == 200 and b"http" not in body.replace(b"http://www.w3.org", b"")
            assert "default-src 'none'" in headers["content-security-policy"]
        name = next(iter(study.images))
        status, body, headers = ask(server, "GET", f"/image/{name}.png")
        assert (status, headers["content-type"]) == (200, "image/png")
        assert body == (tmp_path / "study" / "images" / f"{name}.png").read_bytes()
        assert "last-modified" not in headers
        assert ask(server, "HEAD", f"/image/{name}.png")[:2] == (200, b"")
        for path in ("/key.json", "/study.json", "/votes.jsonl", "/image/../key.json",
                     "/image/..%2fkey.json", "//key.json", "/image/0.png", "/../key.json",
                     "/%2e%2e/key.json", "/image/", f"/images/{name}.png",
                     "/page/page.js"):  # fmt: skip
            assert ask(server, "GET", path)[0] == 404, path
        state = ask(server, "GET", "/api/state?rater=J%C3%BCrgen%20O")
        assert json.loads(state[1])["rater"] == "Jürgen O"
        key = (tmp_path / "study" / "key.json").read_text()
        assert json.loads(key)["sources"]["A"]["uri"].encode() not in state[1].split()
        assert ask(server, "GET", "/api/state")[0] == 400


def test_the_server_refuses_what_is_no_vote_from_its_own_page(tmp_path: Path) -> None:
    make_study(tmp_path, n=4)
    with serving(tmp_path / "study") as server:
        trial = rater_order(server.session.study, "Ann")[0].trial
        vote = {"rater": "Ann", "trial": trial, "choice": "left", "latency_ms": 900}
        body, kind = json.dumps(vote).encode(), {"Content_Type": "application/json"}
        port = server.server_address[1]
        refused: list[tuple[int, bytes, dict[str, str]]] = [
            (415, body, {"Content_Type": "text/plain"}),
            (413, body + b" " * MAX_BODY, kind),
            (400, b"{", kind),
            (400, b"[" * 4000, kind),
            (400, b"[]", kind),
            (400, b'{"rater": 1, "trial": null}', kind),
            (400, json.dumps(vote | {"choice": "both"}).encode(), kind),
            (400, json.dumps(vote | {"rater": ""}).encode(), kind),
            (409, json.dumps(vote | {"trial": "0"}).encode(), kind),
            (403, body, kind | {"Origin": "http://evil.example"}),
            (421, body, kind | {"Host": "evil.example"}),
        ]
        for status, data, headers in refused:
            got = ask(server, "POST", "/api/vote", data, **headers)
            assert got[0] == status and "error" in json.loads(got[1]), (status, got)
        assert ask(server, "POST", "/", body, **kind)[0] == 404
        assert ask(server, "PUT", "/api/vote", body, **kind)[0] == 501
        assert server.session.log.standing == {}
        own = kind | {"Origin": f"http://127.0.0.1:{port}"}
        assert ask(server, "POST", "/api/vote", body, **own)[0] == 200
        with pytest.raises(ServingError, match=f":{port}: address already in use"):
            AbTestServer(server.session, port=port)
        with pytest.raises(UsageError, match="not an IP address"):
            AbTestServer(server.session, host="example", port=0)


def test_many_raters_at_once(tmp_path: Path) -> None:
    make_study(tmp_path, n=None)

    def work(name: str) -> None:
        for _ in range(14):
            state = json.loads(ask(server, "GET", f"/api/state?rater={name}")[1])
            vote = {"rater": name, "trial": state["current"]["trial"], "choice": "equal"}
            ask(server, "POST", "/api/vote", json.dumps(vote).encode(),
                Content_Type="application/json")  # fmt: skip

    with serving(tmp_path / "study") as server:
        threads = [threading.Thread(target=work, args=(f"r{i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    record = score_study(tmp_path / "study", resamples=20)
    assert record.n_votes == 6 * 14
    assert {r.remaining for r in record.raters.values()} == {0}


# --- score


def test_a_rater_who_sees_the_difference_is_believed(tmp_path: Path) -> None:
    make_study(tmp_path, n=None, repeat=0.5, attention=2)
    vote_through(tmp_path / "study", {"Ann": prefers_b, "Bo": prefers_b})
    record = score_study(tmp_path / "study", resamples=200)
    metrics = record.metrics
    assert record.n_votes == 36 and record.n_prompts == 12
    # Two raters and repeats do not make twelve prompts more than twelve.
    expected = clopper_pearson(12, 12)
    rate = metrics["win_rate"]
    assert (rate.value, rate.high) == (1.0, 1.0) and rate.low == pytest.approx(expected.low)
    assert metrics["self_agreement"].value == 1.0
    bias = metrics["position_bias"]
    assert bias.value == 0.0 and bias.low is not None and bias.low < 0
    assert metrics["rater_agreement"].not_measured  # agreement on one answer for all is no evidence
    assert record.sign_test and record.sign_test.p_value == pytest.approx(2**-11)
    assert record.raters["Ann"].attention_passed == record.raters["Ann"].attention_shown == 2
    assert decide(record, "better")[0] == "pass"
    record.write(tmp_path / "abtest.json")
    assert isinstance(read_any_record(tmp_path / "abtest.json"), AbTestRecord)


def test_a_rater_who_only_presses_left_shows_as_bias_not_as_a_win(tmp_path: Path) -> None:
    make_study(tmp_path, n=None, repeat=1.0, attention=4)
    vote_through(tmp_path / "study", {"Ann": prefers_left})
    record = score_study(tmp_path / "study", resamples=200)
    assert record.metrics["win_rate"].value == 0.5
    assert record.metrics["position_bias"].value == 0.5
    assert record.metrics["position_bias"].low is not None
    assert record.metrics["position_bias"].low > 0.2
    assert record.metrics["self_agreement"].value == 0.0
    assert record.sign_test and record.sign_test.prompts_even == 12
    assert record.raters["Ann"].attention_passed == 2
    assert any("0.2 s a vote" in warning for warning in record.warnings)
    assert decide(record, "better")[0] == "undecided"

    strict = score_study(tmp_path / "study", min_attention=0.75, resamples=200)
    assert strict.n_votes == 0 and strict.status == "failed"
    assert "2 of 4 attention checks" in str(strict.raters["Ann"].left_out)
    assert strict.metrics["win_rate"].not_measured == "no votes on pairs yet"
    assert decide(strict, "not-worse")[0] == "undecided"


def test_swapping_a_and_b_turns_every_number_around(tmp_path: Path) -> None:
    def by_prompt(favourite: str) -> Rater:
        def rater(showing: Showing, key: StudyKey) -> tuple[str, float]:
            number = PROMPTS.index(showing.prompt)
            if number % 4 == 0:
                return "equal", 700
            source = favourite if number % 3 else {"a": "b", "b": "a"}[favourite]
            wanted = {getattr(pair, source) for pair in key.pairs}
            return ("left" if showing.left in wanted else "right"), 700

        return rater

    a, b = write_samples(tmp_path / "a", BLUE), write_samples(tmp_path / "b", RED)
    records = []
    for name, (first, second), favourite in (("one", (a, b), "b"), ("two", (b, a), "a")):
        build_study(first, second, tmp_path / name, StudySettings(seed=3, repeat=0))
        vote_through(tmp_path / name, {"Ann": by_prompt(favourite)})
        records.append(score_study(tmp_path / name, resamples=200))
    for metric in ("win_rate", "win_rate_without_ties", "prompt_win_rate"):
        one, two = (record.metrics[metric] for record in records)
        assert None not in (one.value, one.low, one.high, two.value, two.low, two.high)
        assert one.value == pytest.approx(1 - two.value)
        assert one.low == pytest.approx(1 - two.high, abs=1e-9)
    rate = records[0].metrics["win_rate"]
    assert rate.value == pytest.approx((6 + 0.5 * 3) / 12)
    assert records[0].metrics["tie_rate"].value == pytest.approx(3 / 12)
    assert [decide(record, "not-worse", margin=0.05)[0] for record in records] == ["undecided"] * 2


def test_undone_votes_do_not_count(tmp_path: Path) -> None:
    make_study(tmp_path, n=None, repeat=0)
    vote_through(tmp_path / "study", {"Ann": prefers_left}, limit=5)
    session = Session(tmp_path / "study")
    for _ in range(5):
        session.undo("Ann", session.state("Ann")["undo"])
    session.close()
    vote_through(tmp_path / "study", {"Ann": prefers_b})
    record = score_study(tmp_path / "study", resamples=50)
    assert (record.n_undone, record.n_votes, record.metrics["win_rate"].value) == (5, 12, 1.0)


def test_a_study_that_b_loses_is_a_fail(tmp_path: Path) -> None:
    make_study(tmp_path, n=None, repeat=0)

    def prefers_a(showing: Showing, key: StudyKey) -> tuple[str, float]:
        return ("right" if is_b(showing.left, key) else "left"), 900

    vote_through(tmp_path / "study", dict.fromkeys(("Ann", "Bo", "Cy"), prefers_a))
    record = score_study(tmp_path / "study", resamples=50)
    assert decide(record, "better")[0] == decide(record, "not-worse")[0] == "fail"
    assert decide(record, "not-worse", margin=0.45)[0] == "undecided"
    assert record.metrics["win_rate_other_raters"].n == 36


# --- statistics

# Four observers, twelve units, missing values: Krippendorff, "Computing Krippendorff's
# Alpha-Reliability" (2011), part C and D.
NONE = float("nan")
PUBLISHED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
])  # fmt: skip


def test_alpha_of_the_published_example() -> None:
    assert krippendorff_alpha(PUBLISHED, level="nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, level="ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(PUBLISHED, level="interval") == pytest.approx(0.849, abs=5e-4)
    two = np.array([[1.0, 0.0, 0.5, 1.0, NONE], [1.0, 0.0, 0.5, 0.0, 1.0]])
    assert raw_agreement(two) == 0.75


def test_alpha_is_one_for_agreement_and_zero_for_chance() -> None:
    rng = np.random.default_rng(0)
    same = np.tile(rng.choice([0, 0.5, 1], 60), (3, 1))
    assert krippendorff_alpha(same) == pytest.approx(1.0)
    chance = rng.choice([0, 0.5, 1], (4, 4000))
    assert krippendorff_alpha(chance) == pytest.approx(0.0, abs=0.03)
    made = alpha_interval(chance[:, :200], np.arange(200), seed=0, resamples=400)
    assert made is not None and made.low < 0 < made.high
    assert krippendorff_alpha(np.ones((2, 5))) is None
    assert krippendorff_alpha(np.array([[1.0, NONE], [NONE, 0.0]])) is None


def test_one_vote_a_prompt_is_clopper_pearson_and_copies_of_votes_add_nothing() -> None:
    scores = np.array([1.0] * 13 + [0.0] * 7)
    plain, _ = clustered_share(scores, np.arange(20))
    exact = clopper_pearson(13, 20)
    assert (plain.low, plain.high) == pytest.approx((exact.low, exact.high))
    copied, effective = clustered_share(np.tile(scores, 5), np.tile(np.arange(20), 5))
    assert effective <= 20
    assert copied.low <= plain.low + 1e-9 and copied.high >= plain.high - 1e-9
    with pytest.raises(EvaluationError, match="needs two"):
        clustered_share(scores, np.zeros(20, np.int64))
    ties, effective = clustered_share(np.full(30, 0.5), np.arange(30) % 10)
    assert effective == 10 and ties.low < 0.3 and ties.high > 0.7


@pytest.mark.parametrize(("share", "spread"), [(0.5, 2.0), (0.7, 1.0), (0.9, 4.0)])
def test_the_interval_covers_the_truth_when_votes_on_a_prompt_go_together(
    share: float, spread: float
) -> None:
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(40), 5)
    covered = naive = 0
    runs = 400
    for _ in range(runs):
        of_prompt = rng.beta(share * spread, (1 - share) * spread, 40)
        scores = (rng.random(200) < np.repeat(of_prompt, 5)).astype(float)
        made, _ = clustered_share(scores, owners)
        covered += made.low <= share <= made.high
        wrong = clopper_pearson(int(scores.sum()), 200)
        naive += wrong.low <= share <= wrong.high
    assert 0.93 <= covered / runs <= 0.995
    assert naive < covered


def test_raters_who_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    raters = np.repeat(np.arange(6), 60)
    owners = np.tile(np.arange(60), 6)
    scores = (rng.random(360) < np.repeat([0.2, 0.9, 0.4, 0.8, 0.3, 0.7], 60)).astype(float)
    prompts = bootstrap_share(scores, owners, seed=0, resamples=500)
    both = bootstrap_share(scores, owners, raters, seed=0, resamples=500)
    assert both.high - both.low > 2 * (prompts.high - prompts.low)
    exact, _ = clustered_share(scores, owners)
    assert (prompts.low, prompts.high) == pytest.approx((exact.low, exact.high), abs=0.02)


def test_the_sign_test_counts_heads() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(10, 0) == pytest.approx(2 / 1024)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
