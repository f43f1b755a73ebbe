"""A stable release and, beside it, a canary: both in one process, with no request lost on the way.

    start_canary ─▶ loading ─▶ takes its share ─▶ promote   ─▶ stable; the former one drains
         (a thread: verify, open, golden  │
          image, filters)                 └────▶ roll back ─▶ drains, closes, memory is given back

A request is finished by the node that took it. One that chance dealt to a canary which then fails
is made again by the stable release: a canary that breaks costs its callers time, not an answer
(but for a stream that has sent a partial image already). A canary that turns red is rolled back.
Two engines share the processor, and two models the memory.

Framework-free; `modelops.serving.http.routing` and `admin` put HTTP around it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.releases.build import RECORD_FILE
from modelops.serving.api import ApiError, ImagesRequest
from modelops.serving.provenance.receipts import utc_now
from modelops.serving.rollout.active_release import (
    RELEASE_VARIABLE,
    Standing,
    release_below,
    write_standing,
)
from modelops.serving.rollout.canary import (
    SwapEvents,
    compare_speed,
    give_memory_back,
    open_canary,
)
from modelops.serving.rollout.looks import Looks
from modelops.serving.rollout.metrics import FleetMetrics, RunningTotals, exposition
from modelops.serving.rollout.routes import Lane, Seat, choose_seat
from modelops.serving.rollout.trial import CanaryRules, Trial
from modelops.serving.rollout.verdict import CanaryVerdict, load_statistics

if TYPE_CHECKING:
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.rollout.trial import Arm
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

RETRY_S = 30.0  # after a promotion that the disk had no room for


class Fleet:
    """The nodes of a process. Its methods may be called by any thread.

    Args:
        stable: a node that was started.
        releases: folder of releases that may become canaries; None turns swapping off.
        off: why swapping is off although there is a folder.
        pinned: a restart serves a release that was named to it, whatever was promoted.
        open_node: makes a node of a release directory, not started; needed for swapping.
        tick_s: seconds between two looks at a canary's health.
    """

    def __init__(
        self,
        stable: InferenceNode,
        *,
        releases: str | Path | None = None,
        off: str | None = None,
        pinned: bool = False,
        open_node: Callable[[Path], InferenceNode] | None = None,
        tick_s: float = 0.5,
    ) -> None:
        self._stable = Seat(stable)
        self._canary: Seat | None = None
        self._trial: Trial | None = None
        self._looks: Looks | None = None  # at that trial
        self._loading: str | None = None
        self._draining: list[Seat] = []
        self._releases = Path(releases).resolve() if releases else None
        self._off = off or (None if releases and open_node else "MODELOPS_RELEASES is not set")
        if self._off is None:
            load_statistics()
        self._open = open_node
        self._pinned = self._stable.label if pinned else None
        self._tick_s = tick_s
        self._changed = threading.Condition()  # guards what lies above
        self._swapping = threading.RLock()  # one change of the seats at a time
        self._stop_loading = threading.Event()
        self._stopped: dict[str, str] = {}  # by whom, and why
        self._closing = False
        self._last_verdict: CanaryVerdict | None = None  # of the one before
        self._threads: list[threading.Thread] = []
        self.totals = RunningTotals()
        self.metrics = FleetMetrics()
        self._events = SwapEvents(self.metrics.events)
        self.metrics.watch(
            share=lambda: 0.0 if (trial := self._trial) is None else trial.rules.share,
            up=lambda: (node := self.canary) is not None and not node.problems(),
            worse=lambda: (looks := self._looks) is not None and looks.worse,
        )

    # --- requests ---------------------------------------------------------------------------------

    @property
    def stable(self) -> InferenceNode:
        """The node that stands."""
        with self._changed:  # a seat loses its node once it has been drained
            return self._stable.node

    @property
    def canary(self) -> InferenceNode | None:
        """The node on trial, once it takes requests."""
        with self._changed:
            return None if self._canary is None else self._canary.node

    @contextlib.contextmanager
    def lane(
        self, request: ImagesRequest, *, identity: str, key: str = "", rescue: bool = False
    ) -> Iterator[Lane]:
        """The node for a request, held until the block ends.

        Args:
            identity: the request's id; the same one goes the same way while a canary lasts.
            key: name of the caller's API key, "" without one.
            rescue: the canary has failed this very request, so take the stable one.

        Raises:
            ApiError: 404 for a model that is neither.
        """
        with self._changed:
            trial = self._trial
            seat, dealt = choose_seat(
                request.model, self._stable, self._canary,
                rules=trial.rules if trial else None, identity=identity, key=key, rescue=rescue,
            )  # fmt: skip
            seat.in_hand += 1
            arm: Arm = "canary" if seat is self._canary else "stable"
        lane = Lane(seat.node, request, arm=arm, dealt=dealt)
        try:
            yield lane
        except BaseException as error:
            lane.note(error)
            raise
        finally:
            with self._changed:
                seat.in_hand -= 1
                self._changed.notify_all()
            outcome = lane.outcome()
            if trial is not None and arm == "canary":
                self.metrics.on_canary(outcome, time.monotonic() - lane.began)
            if trial is not None and dealt:
                trial.count(arm, outcome)

    def models(self) -> list[tuple[str, str, InferenceNode]]:
        """(id, role, node) of what can be asked for."""
        with self._changed:
            found = [(self._stable.name, "stable", self._stable.node)]
            if self._canary is not None:
                found.append((self._canary.label, "canary", self._canary.node))
        return found

    def text(self) -> bytes:
        """The exposition for Prometheus."""
        return exposition(self.totals, self.stable.metrics.registry, self.metrics.registry)

    # --- swapping ---------------------------------------------------------------------------------

    def start_canary(self, release: str, rules: CanaryRules, *, by: str = "") -> None:
        """Load a release in the background; it takes its share as soon as it is ready.

        Args:
            release: path below the folder of releases.
            by: who asked for it.

        Raises:
            ApiError: 404 swapping is off, 400 no such release, 409 one is on its way already.
        """
        folder = self._folder()
        try:
            path = release_below(folder, release)
        except UsageError as error:
            raise ApiError(400, "invalid_value", error.message, param="release") from error
        with self._swapping:
            if busy := self._busy():
                raise ApiError(409, "swap_conflict", f"{busy}; one at a time")
            self._loading = path.relative_to(folder).as_posix()
            self._stopped = {"reason": "the node shut down while it was loaded"}
            self._stop_loading.clear()
            self._events.note("loading", self._loading, by=by)
            self._start(self._run_canary, path, self._loading, rules, by)

    def promote(self, *, by: str = "", reason: str = "", force: bool = False) -> None:
        """Make the canary the stable release; the former one finishes its work and closes.

        Raises:
            ApiError: 409 there is none, it is not well, or nothing says yet that it is no worse and
                not `force`; 503 serving.json cannot be written.
        """
        folder = self._folder()
        with self._swapping:
            new, old = self._canary, self._stable
            if self._closing:
                raise ApiError(409, "swap_conflict", "the node is shutting down")
            if new is None:
                raise ApiError(409, "swap_conflict", "there is no canary to promote")
            if problems := new.node.problems():
                raise ApiError(409, "swap_conflict", f"the canary is not well: {problems[0]}")
            verdict = self._last_verdict = self.verdict()
            assert verdict is not None
            shown = verdict.answer in ("within noise", "better")
            if not (shown or force):
                code = "canary_worse" if verdict.answer == "worse" else "canary_undecided"
                way = "roll it back" if verdict.answer == "worse" else "wait, roll it back"
                raise ApiError(409, code, f"the canary is {verdict.sentence}; {way}, or force")
            standing = Standing(
                release=new.node.directory.relative_to(folder).as_posix(),
                name=new.name, version=new.node.release.version, sha256=new.sha256,
                promoted=utc_now(), by=by, instead_of_sha256=old.sha256,
            )  # fmt: skip
            try:
                write_standing(folder, standing)
            except ModelopsError as error:  # a restart would silently go back
                raise ApiError(
                    503, "swap_failed", f"not promoted, a restart would not know: {error.message}"
                ) from error
            with self._changed:
                self.totals.take_over(old.node.metrics.registry, new.node.metrics.registry)
                self._stable = new
                self._end_trial(old)
            reason = reason or ("" if shown else "forced, ") + verdict.sentence
            self._events.note(
                "promoted", new.label, by=by, reason=reason, sha256=new.node.release_sha256
            )
            self._start(self._drain, old)

    def roll_back(self, *, by: str = "", reason: str = "", event: str = "rolled_back") -> None:
        """Take the canary's traffic away, or stop its loading; it finishes its work and closes.

        Raises:
            ApiError: 409 there is none.
        """
        with self._swapping:
            seat = self._canary
            if seat is None:
                if self._loading is None:
                    raise ApiError(409, "swap_conflict", "there is no canary to roll back")
                self._stopped = {"by": by, "reason": reason or "stopped while it was loaded"}
                self._stop_loading.set()
                return
            self._last_verdict = self.verdict()
            with self._changed:
                self._end_trial(seat)
            self._events.note(
                event, seat.label, by=by, reason=reason, sha256=seat.node.release_sha256
            )
            self._start(self._drain, seat)

    def verdict(self) -> CanaryVerdict | None:
        """Of the last look at the canary, see `looks`; None without one."""
        looks = self._looks
        return None if looks is None else looks.verdict()

    def status(self) -> dict[str, Any]:
        """Where the fleet stands, for a person or a program."""
        with self._changed:
            stable, canary, looks = self._stable, self._canary, self._looks
            node = canary.node if canary else None
            loading, draining = self._loading, list(self._draining)
        verdict = looks.verdict() if looks else None
        last = self._last_verdict
        about = None
        if canary is not None and node is not None and looks is not None:
            about = {
                **canary.about(), **looks.trial.rules.about(), "problems": node.problems(),
                "so_far": looks.trial.counts(), "measured": looks.trial.measured(),
                "next_look": looks.next_requests,
            }  # fmt: skip
        return {
            "swap": self._off or "on",
            "state": "canary" if canary else "loading" if loading else "stable only",
            "stable": stable.about(),
            "after_restart": self._pinned or stable.label,
            "canary": about,
            "loading": loading,
            "draining": [seat.about() for seat in draining],
            "verdict": verdict.as_json() if verdict else None,
            "last_verdict": last.as_json() if last else None,
            "events": self._events.entries(),
        }

    def close(self, *, drain: bool = True, timeout_s: float | None = 60.0) -> None:
        """Finish the work of all nodes and end their threads."""
        with self._swapping:
            self._closing = True
            self._stop_loading.set()
            with self._changed:
                seats = [self._stable, *([self._canary] if self._canary else []), *self._draining]
                nodes = [seat.node for seat in seats]
                self._changed.notify_all()
        for node in nodes:
            node.begin_shutdown()
        for node in nodes:
            node.close(drain=drain, timeout_s=timeout_s)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)

    def _busy(self) -> str:
        if self._closing:
            return "the node is shutting down"
        if self._loading:
            return f"{self._loading} is being loaded"
        if self._canary:
            return f"{self._canary.label} is the canary"
        return "a former release still finishes its work" if self._draining else ""

    # --- threads ----------------------------------------------------------------------------------

    def _folder(self) -> Path:
        if self._releases is None or self._off:
            raise ApiError(404, "swap_off", f"releases cannot be swapped here: {self._off}")
        return self._releases

    def _end_trial(self, leaving: Seat) -> None:
        for seat in (self._stable, self._canary, leaving):
            if seat is not None:
                seat.node.on_step = None
        self._canary, self._trial, self._looks = None, None, None
        self._draining.append(leaving)

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, name="modelops-swap", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _run_canary(self, path: Path, name: str, rules: CanaryRules, by: str) -> None:
        """Load a release, and watch it for as long as it is the canary."""
        node: InferenceNode | None = None
        seat: Seat | None = None
        problem = ""
        try:
            assert self._open is not None
            node = open_canary(path, self.stable, self._open)
        except ModelopsError as error:
            problem = str(error)
        with self._swapping:
            if self._stop_loading.is_set():
                self._events.note("rolled_back", name, **self._stopped)
            elif node is None:
                self._events.note("load_failed", name, by=by, reason=problem)
            else:
                seat, trial = Seat(node), Trial(rules)
                with self._changed:
                    self._canary, self._trial, self._looks = seat, trial, Looks(trial)
                    compare_speed(trial, node, self.stable)
                self._last_verdict = None
                self._events.note("canary", seat.label, by=by, sha256=seat.sha256)
                self._loading = None
        if seat is None and node is not None:
            node.close(drain=False)
        node = None
        if seat is not None:
            self._watch(seat)
            return
        give_memory_back()
        self._loading = None

    def _watch(self, seat: Seat) -> None:
        """Roll a canary back that turns red; decide by itself where that was asked for."""
        again = 0.0
        while True:
            with self._changed:
                self._changed.wait(self._tick_s)
                looks = self._looks
                if self._closing or self._canary is not seat or looks is None:
                    return
            try:
                verdict = looks.verdict()
                if problems := seat.node.problems():
                    self._decide(seat, "rolled_back_red", f"not well: {'; '.join(problems)}")
                elif not looks.trial.rules.auto or time.monotonic() < again:
                    continue
                elif verdict.answer == "worse":
                    self._decide(seat, "rolled_back_worse", verdict.sentence)
                elif verdict.answer != "undecided":
                    self._decide(seat, "promoted", verdict.sentence)
            except ApiError as error:  # such as a full disk
                again = time.monotonic() + RETRY_S
                log.warning("swap: %s", error.message)
            except Exception:
                log.exception("a canary could not be judged")

    def _decide(self, seat: Seat, event: str, reason: str) -> None:
        with self._swapping:
            # An operator was faster, or it is red because the whole node is shutting down.
            if self._canary is not seat or self._closing:
                return
            if event == "promoted":
                self.promote(by="auto", reason=reason)
            else:
                self.roll_back(by="auto", reason=reason, event=event)

    def _drain(self, seat: Seat) -> None:
        """Wait for the requests that a seat has in hand, then close it and give its memory back."""
        label, registry = seat.label, seat.node.metrics.registry
        limit_s = 2 * seat.node.settings.deadline_s + 60.0
        with self._changed:
            self._changed.wait_for(lambda: seat.in_hand == 0 or self._closing, limit_s)
            if seat.in_hand:
                log.warning("swap: %d requests still in hand at %s", seat.in_hand, label)
            if self._closing:
                return  # `close` closes this one too
        seat.node.close(drain=True, timeout_s=60.0)
        with self._changed:
            self.totals.forget(registry)
            self._draining.remove(seat)
            seat.vacate()
        del registry
        give_memory_back()
        self._events.note("drained", label)


def open_fleet(
    release: Path,
    settings: NodeSettings,
    open_node: Callable[[Path], InferenceNode],
    *,
    workers: int = 1,
) -> Fleet:
    """A fleet of one node, not started yet.

    Args:
        release: the stable one.
        open_node: makes a node of a release directory.
        workers: processes of this node. Several have no way to swap together.

    Raises:
        UsageError: the folder of releases does not exist.
        ModelopsError: the release was changed, or its model cannot be opened.
    """
    folder = Path(settings.releases) if settings.releases else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"MODELOPS_RELEASES={folder}: no such folder")
    many = f"this node has {workers} workers, and a swap reaches one of them only; replace the node"
    off = many if folder is not None and workers > 1 else None
    named = Path(os.environ.get(RELEASE_VARIABLE) or folder or release)
    pinned = (named / RECORD_FILE).is_file()
    return Fleet(open_node(release), releases=folder, off=off, pinned=pinned, open_node=open_node)
