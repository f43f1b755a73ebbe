"""A new release beside the old one, no request lost on the way: real releases, a real server."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import threading
import time
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelops.base.errors import IntegrityError, ServingError, UsageError
from modelops.base.files import sha256_file
from modelops.cli.main import main
from modelops.serving.http.keys import KeyRing, create_key, read_keys
from modelops.serving.rollout.active_release import (
    read_active_release,
    release_from_settings,
    release_to_serve,
)
from modelops.serving.rollout.client import exit_code, trial_exit_code
from modelops.serving.rollout.trial import CanaryRules
from modelops.serving.settings import NodeSettings
from rollouts import Load, build_releases, live, pixels, second_checkpoint
from waiting import wait_until


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rollout")
    other = second_checkpoint(tiny_checkpoint, home / "checkpoint")
    build_releases(home / "releases", tiny_checkpoint, other)
    return home / "releases"


@pytest.fixture
def releases(made: Path, tmp_path: Path) -> Path:
    """A folder of the test's own: a promotion writes into it."""
    shutil.copytree(made, tmp_path / "releases", copy_function=os.link)
    return tmp_path / "releases"


def digest(releases: Path, name: str) -> str:
    return sha256_file(releases / name / "release.json")


def event(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(entry for entry in reversed(status["events"]) if entry["event"] == kind)


def counters(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.type in ("counter", "histogram") and not sample.name.startswith("process_")
    }


def value(text: str, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(name)


def test_swaps_under_load_lose_nothing(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []
    with live(releases, tmp_path / "keys.json", monkeypatch=monkeypatch) as node:
        old = weakref.ref(node.rollout.stable.engine)
        load, done = Load(node), threading.Event()

        def scrape() -> None:
            while not done.is_set():
                pages.append(node.text())
                time.sleep(0.05)

        scraper = threading.Thread(target=scrape)
        scraper.start()
        with load.running(3):
            load.more(5)
            # A canary, chosen by each request's id.
            assert node.swap("canary", {"release": "next", "share": 0.5})[0] == 202
            wait_until(lambda: node.rollout.canary is not None)
            load.more(4)
            first = len(load.answers)
            load.more(40)
            last = len(load.answers)
            assert node.swap()[1]["canary"]["release"] == "tiny@0.2"
            # Promoted: all of it is made there, the former one drains, closes and is let go.
            status, answer = node.swap("promote", {})  # so few requests show nothing
            assert (status, answer["error"]["code"]) == (409, "canary_undecided")
            assert node.swap("promote", {"force": True})[0] == 200
            wait_until(lambda: not node.swap()[1]["draining"])
            load.more(4)
            promoted = len(load.answers)
            load.more(8)
            # Releases that must not be served never take a request.
            for name, why in (("golden", "golden image"), ("torn", "changed")):
                assert node.swap("canary", {"release": name, "share": 1.0})[0] == 202
                wait_until(lambda: node.swap()[1]["loading"] is None)
                failed = event(node.swap()[1], "load_failed")
                assert failed["release"] == name and why in failed["reason"]
            refused = len(load.answers)
            # A canary that takes everything, and is rolled back.
            assert node.swap("canary", {"release": "twin", "share": 1.0})[0] == 202
            wait_until(lambda: node.rollout.canary is not None)
            load.more(4)
            all_canary = len(load.answers)
            load.more(8)
            before_rollback = len(load.answers)
            assert node.swap("rollback", {"reason": "a test"})[0] == 200
            wait_until(lambda: not node.swap()[1]["draining"])
            load.more(4)
            rolled_back = len(load.answers)
            load.more(8)
        done.set()
        scraper.join()
        status = node.swap()[1]
        pages.append(node.text())
        gc.collect()
        assert old() is None  # its engine, and so its model, is gone

    stable, following, twin = (digest(releases, name) for name in ("stable", "next", "twin"))
    made_by = load.releases()  # and every answer was 200
    names = [name for name, _, _ in load.answers]
    assert {made_by[name] for name in names[first : last - 3]} == {following, stable}
    canaries = sum(made_by[name] == following for name in names[first:last])
    assert 5 <= canaries <= 35  # of 40
    assert {made_by[name] for name in names[promoted:refused]} == {following}
    assert {made_by[name] for name in names[all_canary:before_rollback]} == {twin}
    assert {made_by[name] for name in names[rolled_back:]} == {following}

    assert [entry["event"] for entry in status["events"]] == [
        "loading", "canary", "promoted", "drained", "loading", "load_failed", "loading",
        "load_failed", "loading", "canary", "rolled_back", "drained",
    ]  # fmt: skip
    assert event(status, "rolled_back")["by"] == "ops"
    assert event(status, "promoted")["reason"].startswith("forced, undecided: ")
    standing = read_active_release(releases)
    assert standing is not None and standing.sha256 == following and standing.by == "ops"

    # No counter ever went back, or jumped: http requests and images tell the same story.
    for before, after in itertools.pairwise(pages):
        earlier, later = counters(before), counters(after)
        assert not [key for key in earlier if later[key] < earlier[key]]
    end = pages[-1]
    answered = value(
        end, "modelops_http_requests_total", route="/v1/images/generations", status="200"
    )
    assert answered == len(load.answers)
    pictures = value(end, "modelops_images_total", output_format="png")
    by_canaries = value(end, "modelops_canary_requests_total", outcome="ok")
    in_hand = pictures + by_canaries - len(load.answers)
    assert 0 <= in_hand <= 3  # when it was promoted: the canary's by then, the stable node's after
    assert value(end, "modelops_canary_request_seconds_count") == by_canaries
    assert value(end, "modelops_swap_events_total", event="promoted") == 1
    assert value(end, "modelops_canary_up") == 0 == value(end, "modelops_canary_share")


def test_a_canary_that_breaks_costs_no_answer(releases: Path) -> None:
    with live(releases) as node:
        load = Load(node)
        with load.running(3):
            node.rollout.start_canary("next", CanaryRules(share=0.5))
            wait_until(lambda: node.rollout.canary is not None)
            canary = node.rollout.canary
            assert canary is not None
            load.more(10)

            def broken(*tensors: Any) -> Any:
                raise RuntimeError("a test breaks the network")

            canary.engine.pipeline.predict_velocity = broken
            wait_until(lambda: node.rollout.canary is None)  # nobody told it
            load.more(10)
        status = node.rollout.status()
        assert "the engine does not answer" in event(status, "rolled_back_red")["reason"]
        failed = value(node.text(), "modelops_canary_requests_total", outcome="failed")
        assert failed >= 1
        errors = [key for key, n in counters(node.text()).items() if "errors_total" in key[0] and n]
        assert not errors  # what was rescued is no error that a client saw
    assert set(load.releases().values()) == {digest(releases, n) for n in ("stable", "next")}


@pytest.mark.slow
def test_a_red_filter_of_the_canary_rolls_it_back(releases: Path) -> None:
    with live(releases) as node:
        load = Load(node)
        with load.running(2):
            node.rollout.start_canary("twin", CanaryRules(share=1.0))
            wait_until(lambda: node.rollout.canary is not None)
            canary = node.rollout.canary
            assert canary is not None
            load.more(4)

            def nan(images: Any) -> Any:
                raise ValueError("a test breaks the filter")

            canary.image_guard._filter.check = nan
            wait_until(lambda: node.rollout.canary is None)
            load.more(6)
        assert "image filter" in event(node.rollout.status(), "rolled_back_red")["reason"]
        assert node.rollout.stable.problems() == []
    assert load.releases()


def test_a_model_can_be_named(releases: Path) -> None:
    with live(releases) as node:

        def ask(model: str | None, name: str = "x", **more: Any) -> tuple[int, Any]:
            body = {"prompt": "sun", "steps": 2, "seed": 3, "model": model, **more}
            return node.post("/v1/images/generations", body, request_id=name)

        def version(answer: tuple[int, Any]) -> str:
            assert answer[0] == 200, answer
            return str(answer[1]["data"][0]["x_modelops"]["release"]["version"])

        assert version(ask("tiny@0.1")) == version(ask("tiny")) == version(ask(None)) == "0.1"
        assert ask("tiny@0.2")[0] == 404
        node.rollout.start_canary("next", CanaryRules(share=1.0))
        wait_until(lambda: node.rollout.canary is not None)
        assert version(ask("tiny")) == version(ask("tiny@0.1")) == "0.1"
        assert version(ask("tiny@0.2")) == version(ask(None)) == "0.2"
        listed = node.post("/v1/models")[1]["data"]
        assert [entry["id"] for entry in listed] == ["tiny", "tiny@0.2"]
        assert [entry["x_modelops"]["role"] for entry in listed] == ["stable", "canary"]
        status, answer = ask("other")
        assert status == 404 and answer["error"]["code"] == "model_not_found"
        # The two have other weights, so the same seed gives other images.
        first, second = ask("tiny@0.1")[1], ask("tiny@0.2")[1]
        assert np.abs(pixels(first) - pixels(second)).max() > 1
        status = node.rollout.status()
        # Those that named a model chose for themselves.
        assert status["canary"]["measured"] == 1 == status["canary"]["so_far"]["canary"]["ok"]

        # A caller aims at neither: the same id goes both ways.
        node.rollout.roll_back()
        wait_until(lambda: not node.rollout.status()["draining"])
        assert ask("tiny@0.2")[0] == 404
        node.rollout.start_canary("next", CanaryRules(share=0.5, named=True))
        wait_until(lambda: node.rollout.canary is not None)
        assert {version(ask(model)) for model in ("tiny", None) * 12} == {"0.1", "0.2"}


@pytest.mark.slow
def test_files_that_are_overwritten_change_neither_release(made: Path, tmp_path: Path) -> None:
    """The stable one, a canary on trial, and the canary after its promotion."""
    releases = Path(shutil.copytree(made, tmp_path / "releases"))
    with live(releases) as node:

        def drawn(model: str) -> list[int]:
            body = {"prompt": "sun", "steps": 2, "seed": 3, "model": model}
            status, answer = node.post("/v1/images/generations", body)
            assert status == 200, answer
            return pixels(answer).tolist()  # type: ignore[no-any-return]

        def overwrite(name: str) -> None:
            for path in (releases / name).rglob("*.safetensors"):
                with path.open("r+b") as handle:
                    handle.seek(path.stat().st_size // 4)
                    handle.write(b"\x11" * (path.stat().st_size // 2))
                os.truncate(path, path.stat().st_size // 3)

        stable = drawn("tiny@0.1")
        overwrite("stable")
        node.rollout.start_canary("next", CanaryRules(share=0.5))
        wait_until(lambda: node.rollout.canary is not None)
        canary = drawn("tiny@0.2")
        overwrite("next")
        assert (drawn("tiny@0.1"), drawn("tiny@0.2")) == (stable, canary) and stable != canary
        node.rollout.promote(force=True)
        wait_until(lambda: not node.rollout.status()["draining"])
        assert drawn("tiny@0.2") == canary and not node.rollout.stable.readiness()
        node.rollout.start_canary("stable", CanaryRules(share=0.5))
        wait_until(lambda: node.rollout.status()["loading"] is None)
        assert "changed" in event(node.rollout.status(), "load_failed")["reason"]


def streamed(node: Any, **more: Any) -> tuple[list[dict[str, Any]], int]:
    """(events, number of comments) of a stream."""
    body = {"prompt": "sun", "steps": 4, "stream": True, "partial_images": 1, **more}
    request = urllib.request.Request(
        f"{node.url}/v1/images/generations", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    return events, lines.count(": still at it")


@pytest.mark.slow
def test_a_stream_that_has_begun_ends_on_the_canary_that_is_rolled_back(releases: Path) -> None:
    with live(releases) as node:
        node.rollout.start_canary("next", CanaryRules(share=1.0))
        wait_until(lambda: node.rollout.canary is not None)
        canary = node.rollout.canary
        assert canary is not None
        pipeline, plain = canary.engine.pipeline, canary.engine.pipeline.predict_velocity
        go_on = threading.Event()

        def held_up(*tensors: Any) -> Any:
            assert go_on.wait(60)
            return plain(*tensors)

        pipeline.predict_velocity = held_up
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(streamed(node)[0]))
        thread.start()
        wait_until(lambda: canary.engine.running > 0)
        node.rollout.roll_back()
        assert node.rollout.status()["draining"][0]["in_hand"] == 1
        assert streamed(node)[0][-1]["x_modelops"]["release"]["version"] == "0.1"
        go_on.set()
        thread.join(60)
        assert found[-1]["type"] == "image_generation.completed"
        assert found[-1]["x_modelops"]["release"]["version"] == "0.2"
        wait_until(lambda: not node.rollout.status()["draining"])


@pytest.mark.slow
def test_streams_take_the_canary_too_and_are_rescued(
    releases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(node: Any, **more: Any) -> list[dict[str, Any]]:
        nonlocal comments
        events, comments = streamed(node, **more)
        return events

    comments = 0
    with live(releases) as node:
        node.rollout.start_canary("next", CanaryRules(share=1.0))
        wait_until(lambda: node.rollout.canary is not None)
        assert stream(node)[-1]["x_modelops"]["release"]["version"] == "0.2"
        assert stream(node, model="tiny")[-1]["x_modelops"]["release"]["version"] == "0.1"
        assert value(node.text(), "modelops_canary_requests_total", outcome="ok") == 1
        canary = node.rollout.canary
        assert canary is not None

        def broken(*tensors: Any) -> Any:
            raise RuntimeError("a test breaks the network")

        canary.engine.pipeline.predict_velocity = broken
        assert stream(node)[-1]["x_modelops"]["release"]["version"] == "0.1"
        assert value(node.text(), "modelops_canary_requests_total", outcome="failed") == 1

        # It fails only after comments have kept the connection open.
        monkeypatch.setattr("modelops.serving.http.streaming.KEEP_ALIVE_S", 0.05)
        monkeypatch.setattr(node.rollout, "_tick_s", 60.0)  # nobody rolls it back meanwhile

        def late(*tensors: Any) -> Any:
            time.sleep(0.5)
            raise RuntimeError("a test breaks the network")

        canary.engine.pipeline.predict_velocity = late
        events = stream(node)
        assert comments >= 3 and events[-1]["x_modelops"]["release"]["version"] == "0.1"
        assert not [one for one in events if one["type"] == "error"]
        assert value(node.text(), "modelops_canary_requests_total", outcome="failed") == 2
        # And if the stable release cannot either, the stream that has begun says so.
        node.rollout.stable.engine.pipeline.predict_velocity = broken
        assert [one["type"] for one in stream(node)] == ["error"] and comments >= 3


@pytest.mark.slow
def test_requests_in_hand_are_finished_where_they_are(releases: Path) -> None:
    """A long request taken by the stable node before the swap is its answer after it."""
    with live(releases) as node:
        slow = node.rollout.stable.engine.pipeline
        plain = slow.predict_velocity

        def slowly(*tensors: Any) -> Any:
            time.sleep(0.1)
            return plain(*tensors)

        slow.predict_velocity = slowly
        node.rollout.start_canary("next", CanaryRules(share=0.5))
        wait_until(lambda: node.rollout.canary is not None)
        answers: list[Any] = []

        def ask() -> None:
            body = {"prompt": "sun", "steps": 30, "model": "tiny@0.1"}
            answers.append(node.post("/v1/images/generations", body))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: node.rollout.stable.engine.running > 0)
        node.rollout.promote(force=True)
        assert node.rollout.status()["draining"][0]["in_hand"] == 1
        with pytest.raises(Exception, match="still finishes its work"):
            node.rollout.start_canary("twin", CanaryRules())
        thread.join(60)
        assert answers[0][0] == 200
        assert answers[0][1]["data"][0]["x_modelops"]["release"]["version"] == "0.1"
        wait_until(lambda: not node.rollout.status()["draining"])


@pytest.mark.slow
def test_automatic_promotion_and_rollback(releases: Path) -> None:
    quick = {"requests": 20, "seconds": 1.0, "error_margin": 0.5, "filter_margin": 0.5,
             "block_s": 0.1, "auto": True, "share": 0.5}  # fmt: skip
    with live(releases) as node:
        load = Load(node)
        with load.running(4, guidance=2.0):
            node.rollout.start_canary("next", CanaryRules(**quick, latency_margin=50.0))
            wait_until(lambda: node.rollout.stable.release.version == "0.2")
            wait_until(lambda: not node.rollout.status()["draining"])
            # The same, but made slow: no answer is wrong, and yet it has to go.
            node.rollout.start_canary("twin", CanaryRules(**quick, latency_margin=1.5))
            wait_until(lambda: node.rollout.canary is not None)
            canary = node.rollout.canary
            assert canary is not None
            plain = canary.engine.pipeline.predict_velocity

            def slowly(*tensors: Any) -> Any:
                time.sleep(0.15)
                return plain(*tensors)

            canary.engine.pipeline.predict_velocity = slowly
            wait_until(lambda: node.rollout.canary is None)
        status = node.rollout.status()
        assert event(status, "promoted")["by"] == "auto"
        assert "latency" in event(status, "rolled_back_worse")["reason"]
        assert status["last_verdict"]["answer"] in ("worse", "undecided")
        assert node.rollout.stable.release.version == "0.2"
    assert load.releases()


@pytest.mark.slow
def test_a_receipt_of_the_canary_replays_with_its_release(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.serving.node.replay import (
        check_release,
        open_recipe,
        recipe_texts,
        replay_recipe,
    )
    from modelops.serving.provenance.signing import load_verifying_key

    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))
    settings = NodeSettings(
        max_rows=4, profile_s=0, releases=str(releases), receipts=str(tmp_path / "receipts"),
        receipts_prompts="text",
    )  # fmt: skip
    with live(releases, settings=settings) as node:
        node.rollout.start_canary("next", CanaryRules(share=1.0))
        wait_until(lambda: node.rollout.canary is not None)
        answer = node.post("/v1/images/generations", {"prompt": "sun", "steps": 2})[1]
        listed = node.post("/v1/models")[1]["data"][1]["x_modelops"]["signing"]
    receipt = answer["data"][0]["x_modelops"]
    chain = tmp_path / "chain.pem"
    chain.write_text(listed["certificates"])
    recipe = open_recipe(tmp_path / "receipts", load_verifying_key(chain), receipt_id=receipt["id"])
    with pytest.raises(IntegrityError, match="is release"):
        check_release(recipe, releases / "stable")
    check_release(recipe, releases / "next")
    found = replay_recipe(recipe, releases / "next", recipe_texts(recipe, {}))
    assert found.answer == "equal"


# --- who may, and what is refused -----------------------------------------------------------------


def test_only_an_admin_key_swaps(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(releases, tmp_path / "keys.json", monkeypatch=monkeypatch) as node:
        for path, body in (("", None), ("/canary", {"release": "next"}), ("/promote", {}),
                           ("/rollback", {})):  # fmt: skip
            for key, status, code in (
                ("", 401, "invalid_api_key"), ("mo-x", 401, "invalid_api_key"),
                (node.user, 403, "admin_key_required"),
            ):  # fmt: skip
                found, answer = node.post(f"/admin/swap{path}", body, key=key)
                assert (found, answer["error"]["code"]) == (status, code)
        assert node.rollout.status()["events"] == []
        assert node.swap()[0] == 200
        assert node.swap("promote", {})[1]["error"]["code"] == "swap_conflict"
        assert node.swap("rollback", {})[0] == 409

        (releases / "out").symlink_to(tmp_path)
        (releases / "link").symlink_to(tmp_path / "elsewhere")
        shutil.copytree(releases / "next", tmp_path / "elsewhere")
        for name in (
            "", ".", "..", "../elsewhere", "out/elsewhere", "link", "/etc", "none", "a\0b",
            str(tmp_path / "elsewhere"), "next/model", "x" * 600, "..\\elsewhere",
        ):  # fmt: skip
            status, answer = node.swap("canary", {"release": name})
            assert status == 400 and answer["error"]["param"] == "release", name
        for body in (
            {}, [], {"release": 1}, {"release": "next", "share": 0}, {"release": "next", "auto": 1},
            {"release": "next", "share": "0.1"}, {"release": "next", "shar": 0.1},
            {"release": "next", "sticky": "ip"},
        ):  # fmt: skip
            assert node.swap("canary", body)[0] == 400, body
        assert node.swap("canary", {"release": "stable"})[0] == 202
        wait_until(lambda: node.swap()[1]["loading"] is None)
        assert "stable release itself" in event(node.swap()[1], "load_failed")["reason"]
        assert node.post("/admin/other")[0] == 404
        assert node.post("/admin/swap", {})[0] == 405


def test_without_keys_nobody_swaps_and_without_a_folder_nothing(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(releases) as node:
        for insecure in (False, True):
            status, answer = node.swap("canary", {"release": "next"})
            assert status == 403 and "--admin" in answer["error"]["message"]
            monkeypatch.setenv("MODELOPS_INSECURE", str(int(insecure)))
    settings = NodeSettings(max_rows=4, profile_s=0)
    with live(releases, tmp_path / "k.json", settings=settings, monkeypatch=monkeypatch) as node:
        assert "not set" in node.swap()[1]["swap"]
        status, answer = node.swap("canary", {"release": "next"})
        assert (status, answer["error"]["code"]) == (404, "swap_off")


@pytest.mark.slow
def test_a_disk_that_is_full_promotes_nothing(releases: Path) -> None:
    """A restart would go back to the former release in silence."""
    with live(releases) as node:
        node.rollout.start_canary("next", CanaryRules(share=0.5))
        wait_until(lambda: node.rollout.canary is not None)
        (releases / "serving.json").mkdir()  # cannot be replaced by a file
        with pytest.raises(Exception, match="a restart would not know"):
            node.rollout.promote(force=True)
        assert node.rollout.stable.release.version == "0.1" and node.rollout.canary is not None


def test_old_key_files_go_on_working_in_both_directions(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    user = create_key(path, "alice")
    assert "role" not in path.read_text()  # an older node refuses fields it does not know
    admin = create_key(path, "ops", admin=True)
    ring = KeyRing(path=path)
    assert not ring.identify(f"Bearer {user}").admin and ring.identify(f"Bearer {admin}").admin
    assert [key.role for key in read_keys(path)] == ["user", "admin"]
    digests = KeyRing(digests=(read_keys(path)[1].sha256,))
    assert not digests.identify(f"Bearer {admin}").admin  # a bare digest says nothing of a role


# --- restarts -------------------------------------------------------------------------------------


def test_what_was_promoted_stands_after_a_restart(releases: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several releases"):
        release_to_serve(releases)
    with live(releases) as node:
        node.rollout.start_canary("next", CanaryRules())
        wait_until(lambda: node.rollout.canary is not None)
        node.rollout.promote(by="ops", force=True)
    for environment in (
        {"MODELOPS_RELEASES": str(releases)},
        {"MODELOPS_RELEASES": str(releases), "MODELOPS_RELEASE": str(releases)},
    ):
        settings = NodeSettings.from_environment(environment)
        assert release_from_settings(settings) == (releases / "next").resolve()
    named = NodeSettings(releases=str(releases), release=str(releases / "twin"))
    assert release_from_settings(named) == releases / "twin"  # somebody wanted this one
    shutil.rmtree(releases / "next")
    with pytest.raises(UsageError, match="no release of this name"):
        release_to_serve(releases)
    shutil.copytree(releases / "twin", releases / "next")
    with pytest.raises(IntegrityError, match="not the release that was promoted"):
        release_to_serve(releases)
    (releases / "serving.json").write_text('{"kind": "serving", "release": "../x"}')
    with pytest.raises(UsageError, match="not what a promotion writes"):
        release_to_serve(releases)
    alone = tmp_path / "alone"
    shutil.copytree(releases / "twin", alone / "one")
    assert release_to_serve(alone) == (alone / "one").resolve()
    with pytest.raises(UsageError, match="MODELOPS_RELEASE is not set"):
        release_from_settings(NodeSettings())


# --- races ----------------------------------------------------------------------------------------


def test_a_canary_that_leaves_breaks_no_status_and_no_scrape(releases: Path) -> None:
    """A status and a scrape that began before it was rolled back end after it was let go."""
    with live(releases) as node:
        rollout, done, broken = node.rollout, threading.Event(), []

        def look() -> None:
            while not done.is_set():
                try:
                    rollout.status()
                    rollout.text()
                    rollout.models()
                except Exception as error:
                    broken.append(error)

        rollout.start_canary("next", CanaryRules(share=0.5))
        wait_until(lambda: rollout.canary is not None)
        slot = rollout.slots.canary
        assert slot is not None
        thread = threading.Thread(target=look)
        thread.start()
        rollout.roll_back()
        wait_until(lambda: not rollout.status()["draining"])
        done.set()
        thread.join(30)
        assert not broken
        with pytest.raises(AttributeError):
            _ = slot.node  # let go
        assert slot.about()["release"] == "tiny@0.2"  # as of a status that knew it before


def test_a_release_that_is_being_loaded_can_be_stopped(releases: Path) -> None:
    with live(releases) as node:
        node.rollout.start_canary("next", CanaryRules(share=0.5), by="pipeline")
        ordered = node.rollout.status()
        node.rollout.roll_back(by="ops")
        wait_until(lambda: node.rollout.status()["loading"] is None)
        status = node.rollout.status()
        assert [one["event"] for one in status["events"]] == ["loading", "rolled_back"]
        stopped = event(status, "rolled_back")
        assert (stopped["by"], stopped["reason"]) == ("ops", "stopped while it was loaded")
        assert node.rollout.canary is None and trial_exit_code(ordered, status) == 3


def test_a_node_that_shuts_down_rolls_nothing_back(releases: Path) -> None:
    """Its canary is red then, as everything in it, which says nothing about the release."""
    with live(releases) as node:
        rollout = node.rollout
        rollout.start_canary("next", CanaryRules(share=0.5))
        wait_until(lambda: rollout.canary is not None)
        slot = rollout.slots.canary
        assert slot is not None
        rollout.close(drain=False, timeout_s=10)
        assert "shutting down" in slot.node.problems()
        rollout._decide(slot, "rolled_back_red", "what the watching thread saw a moment ago")
        assert [one["event"] for one in rollout.status()["events"]] == ["loading", "canary"]
        with pytest.raises(Exception, match="shutting down"):
            rollout.promote(force=True)
        assert not (releases / "serving.json").exists()


# --- the command ----------------------------------------------------------------------------------


def test_who_waits_for_a_canary_learns_what_became_of_it(releases: Path) -> None:
    with live(releases) as node:
        before = node.rollout.status()
        node.rollout.start_canary("./next/", CanaryRules(share=0.5))
        ordered = node.rollout.status()
        wait_until(lambda: node.rollout.canary is not None)
        assert trial_exit_code(ordered, node.rollout.status()) == 0  # it is a canary
        # A process that was started again knows nothing of it: not promoted, whatever it serves.
        with pytest.raises(ServingError, match=r"next: .*started again.*serves tiny@0.1"):
            trial_exit_code(ordered, before)
        node.rollout.roll_back(by="ops")
        wait_until(lambda: not node.rollout.status()["draining"])
        assert trial_exit_code(ordered, node.rollout.status()) == 3
        assert exit_code(node.rollout.status()) == 0  # nothing is on trial


def test_commands(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with live(releases, tmp_path / "keys.json", monkeypatch=monkeypatch) as node:
        swap = ["serve", "swap"]
        monkeypatch.setenv("MODELOPS_ADMIN_KEY", node.admin)
        assert main([*swap, "status", node.url]) == 0
        assert "stable   tiny@0.1" in capsys.readouterr().out
        assert main([*swap, "canary", node.url, "golden", "--wait"]) == 1
        assert "load_failed golden by ops: golden image" in capsys.readouterr().out
        assert main([*swap, "canary", node.url, "next", "--share", "0.5", "--wait"]) == 0
        assert "50% of the requests" in capsys.readouterr().out
        assert main([*swap, "status", node.url, "--json"]) == 4  # nothing has been measured
        assert json.loads(capsys.readouterr().out)["verdict"]["answer"] == "undecided"
        assert main([*swap, "promote", node.url]) == 4
        assert "0 of 400 requests" in capsys.readouterr().err
        trial = node.rollout.slots.trial
        assert trial is not None
        for _ in range(50):
            trial.count("stable", "ok")
            trial.count("canary", "failed")
        assert main([*swap, "status", node.url]) == 3
        said = capsys.readouterr().out
        assert "errors 50 of 50 against 0 of 50" in said and "so far 50 failed; the next" in said
        assert value(node.text(), "modelops_canary_worse") == 1
        assert main([*swap, "promote", node.url]) == 3  # a release that is worse
        assert node.rollout.stable.release.version == "0.1"
        assert main([*swap, "promote", node.url, "--force", "--wait"]) == 0
        assert node.rollout.stable.release.version == "0.2"
        forced = event(node.rollout.status(), "promoted")
        assert forced["reason"].startswith("forced, worse: errors 50 of 50")
        assert main([*swap, "rollback", node.url]) == 1  # there is none
        assert "no canary" in capsys.readouterr().err

        (tmp_path / "alice").write_text(node.user + "\n")
        alice = ["--key-file", str(tmp_path / "alice")]
        for mode in (0o644, 0o640, 0o622):
            (tmp_path / "alice").chmod(mode)
            assert main([*swap, "status", node.url, *alice]) == 2
            assert "others can read this key" in capsys.readouterr().err
        (tmp_path / "alice").chmod(0o600)
        assert main([*swap, "status", node.url, *alice]) == 2
        assert "may not swap" in capsys.readouterr().err
        for url in ("http://example.org", "ftp://127.0.0.1", "nothing"):
            assert main([*swap, "status", url]) == 2
        assert main([*swap, "status", "http://127.0.0.1:1"]) == 1
        assert node.admin not in "".join(capsys.readouterr())
        monkeypatch.delenv("MODELOPS_ADMIN_KEY")
        assert main([*swap, "status", node.url]) == 2
