"""A stable release and, beside it, a canary: both in one process, with no request lost on the way.

    start_canary ─▶ loading ─▶ takes its share ─▶ promote   ─▶ stable; the former one drains
         (a thread: verify, open, golden  │
          image, filters)                 └────▶ roll back ─▶ drains, closes, memory is given back

A request is finished by the node that took it. One that chance dealt to a canary which then fails
is made again by the stable release: a canary that breaks costs its callers time, not an answer. A
canary that turns red is rolled back. Two engines share the processor, and two models the memory.

Framework-free; `modelops.serving.swap.routed` and `admin` put HTTP around it.
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

from modelops.errors import ModelopsError, UsageError
from modelops.release import RECORD_FILE
from modelops.serving.http.schema import ApiError, ImagesRequest
from modelops.serving.provenance.receipts import utc_now
from modelops.serving.swap.canary import (
    Looks,
    SwapEvents,
    compare_speed,
    give_memory_back,
    open_canary,
)
from modelops.serving.swap.lanes import Lane, Seat, choose_seat
from modelops.serving.swap.standing import RELEASE_VARIABLE, Standing, release_below, write_standing
from modelops.serving.swap.trial import CanaryRules, Trial
from modelops.serving.swap.verdict import CanaryVerdict, judge
from modelops.serving.telemetry.exposition import FleetMetrics, RunningTotals, exposition

if TYPE_CHECKING:
    from modelops.serving.node import InferenceNode
    from modelops.serving.settings import NodeSettings
    from modelops.serving.swap.trial import Arm

log = logging.getLogger("modelops.serving")


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
        self._loading: str | None = None
        self._draining: list[Seat] = []
        self._releases = Path(releases).resolve() if releases else None
        self._off = off or (None if releases and open_node else "MODELOPS_RELEASES is not set")
        self._open = open_node
        self._pinned = self._stable.label if pinned else None
        self._tick_s = tick_s
        self._changed = threading.Condition()  # guards what lies above
        self._swapping = threading.RLock()  # one change of the seats at a time
        self._stop_loading = threading.Event()
        self._closing = False
        self._latest: CanaryVerdict | None = None  # of the canary, as of the last tick
        self._last_verdict: CanaryVerdict | None = None  # of the one before
        self._threads: list[threading.Thread] = []
        self.totals = RunningTotals()
        self.metrics = FleetMetrics()
        self._events = SwapEvents(self.metrics.events)
        self.metrics.watch(
            share=lambda: 0.0 if (trial := self._trial) is None else trial.rules.share,
            up=lambda: (seat := self._canary) is not None and not seat.node.problems(),
            worse=lambda: (verdict := self._latest) is not None and verdict.answer == "worse",
        )

    # --- requests ---------------------------------------------------------------------------------

    @property
    def stable(self) -> InferenceNode:
        """The node that stands."""
        return self._stable.node

    @property
    def canary(self) -> InferenceNode | None:
        """The node on trial, once it takes requests."""
        seat = self._canary
        return None if seat is None else seat.node

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
            stable, canary = self._stable, self._canary
        found = [(stable.name, "stable", stable.node)]
        if canary is not None:
            found.append((canary.label, "canary", canary.node))
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
            self._stop_loading.clear()
            self._events.note("loading", self._loading, by=by)
            self._start(self._run_canary, path, self._loading, rules, by)

    def promote(self, *, by: str = "", reason: str = "", force: bool = False) -> None:
        """Make the canary the stable release; the former one finishes its work and closes.

        Raises:
            ApiError: 409 there is none, it is not well, or its verdict is worse and not `force`;
                503 serving.json cannot be written.
        """
        folder = self._folder()
        with self._swapping:
            new, old = self._canary, self._stable
            if new is None:
                raise ApiError(409, "swap_conflict", "there is no canary to promote")
            if problems := new.node.problems():
                raise ApiError(409, "swap_conflict", f"the canary is not well: {problems[0]}")
            verdict = self._last_verdict = self.verdict()
            if verdict is not None and verdict.answer == "worse" and not force:
                raise ApiError(
                    409, "canary_worse", f"the canary is {verdict.sentence}; roll it back, or force"
                )
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
            reason = reason or (verdict.sentence if verdict else "")
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
        """What has been measured of the canary so far; None without one."""
        trial = self._trial
        return None if trial is None else judge(trial.data(), trial.rules)

    def status(self) -> dict[str, Any]:
        """Where the fleet stands, for a person or a program."""
        with self._changed:
            stable, canary, trial = self._stable, self._canary, self._trial
            loading, draining = self._loading, list(self._draining)
        verdict = self.verdict()
        last = self._last_verdict
        about = None
        if canary is not None and trial is not None:
            about = {**canary.about(), **trial.rules.about(), "problems": canary.node.problems()}
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
        self._canary, self._trial, self._latest = None, None, None
        self._draining.append(leaving)

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, name="modelops-swap", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _run_canary(self, path: Path, name: str, rules: CanaryRules, by: str) -> None:
        """Load a release, and watch it for as long as it is the canary."""
        node: InferenceNode | None = None
        problem = ""
        try:
            assert self._open is not None
            node = open_canary(path, self.stable, self._open)
        except ModelopsError as error:
            problem = str(error)
        with self._swapping:
            if self._stop_loading.is_set():
                problem = problem or "stopped while it was loaded"
            if node is None or problem:
                self._events.note("load_failed", name, by=by, reason=problem)
            else:
                seat, trial = Seat(node), Trial(rules)
                with self._changed:
                    self._canary, self._trial = seat, trial
                    compare_speed(trial, node, self.stable)
                self._last_verdict = self._latest = None
                self._events.note("canary", seat.label, by=by, sha256=seat.sha256)
            if not problem:
                self._loading = None
        if not problem:
            del node
            self._watch(seat)
            return
        if node is not None:
            node.close(drain=False)
            node = None
        give_memory_back()
        self._loading = None

    def _watch(self, seat: Seat) -> None:
        """Roll a canary back that turns red; decide by itself where that was asked for."""
        looks = Looks()
        while True:
            with self._changed:
                self._changed.wait(self._tick_s)
                trial = self._trial
                if self._closing or self._canary is not seat or trial is None:
                    return
            try:
                self._latest = self.verdict()
                if problems := seat.node.problems():
                    self._decide(seat, "rolled_back_red", f"not well: {'; '.join(problems)}")
                elif trial.rules.auto and (found := looks.decide(trial)):
                    self._decide(seat, *found)
            except ApiError as error:  # such as a full disk
                log.warning("swap: %s", error.message)
            except Exception:
                log.exception("a canary could not be judged")

    def _decide(self, seat: Seat, event: str, reason: str) -> None:
        with self._swapping:
            if self._canary is not seat:
                return  # an operator was faster
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
