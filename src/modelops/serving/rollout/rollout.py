"""Rollout of a canary beside the stable release, in one process, without losing a request.

    start_canary ─▶ loading ─▶ takes its share ─▶ promote   ─▶ stable; the former one drains
         (a thread: verify, open, golden  │
          image, filters)                 └────▶ roll back ─▶ drains, closes, memory is given back

A request is finished by the node that took it. If chance dealt a request to the canary and that
fails, the stable release makes it: a broken canary costs its callers time, not an answer (except
for a stream that has already sent a partial image). A canary that turns red is rolled back. Two
engines share the processor, and two models the memory.

Framework-free; `modelops.serving.http.routing` and `admin` put HTTP around it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.releases.verify import RECORD_FILE
from modelops.serving.api import ApiError, ImagesRequest
from modelops.serving.provenance.receipts import utc_now
from modelops.serving.rollout.active_release import (
    ActiveRelease,
    release_below,
    write_active_release,
)
from modelops.serving.rollout.canary import (
    SwapEvents,
    compare_speed,
    give_memory_back,
    open_canary,
)
from modelops.serving.rollout.metrics import exposition
from modelops.serving.rollout.routes import Route, Slot
from modelops.serving.rollout.slots import Slots
from modelops.serving.rollout.trial import CanaryRules, Trial
from modelops.serving.rollout.verdict import CanaryVerdict, load_statistics

if TYPE_CHECKING:
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

RETRY_S = 30.0  # after a promotion that failed because the disk was full


class Rollout:
    """Rollout of a process: its nodes and the changes between them. Thread-safe.

    Args:
        stable: a node that was started.
        releases: folder of releases that may become canaries; None turns swapping off.
        off: reason why swapping is off although there is a folder.
        pinned: whether a restart serves the release named to it, whatever was promoted.
        open_node: makes a node of a release directory, not started; needed for swapping.
        tick_s: seconds between two checks of a canary's health.
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
        self.slots = Slots(stable)
        self._loading: str | None = None
        self._releases = Path(releases).resolve() if releases else None
        self._off = off or (None if releases and open_node else "MODELOPS_RELEASES is not set")
        if self._off is None:
            load_statistics()
        self._open = open_node
        self._pinned = self.slots.stable.label if pinned else None
        self._tick_s = tick_s
        self._swapping = threading.RLock()  # one change of the slots at a time
        self._stop_loading = threading.Event()
        self._stopped: dict[str, str] = {}  # by whom, and why
        self._closing = threading.Event()
        self._last_verdict: CanaryVerdict | None = None  # of the one before
        self._threads: list[threading.Thread] = []
        self._events = SwapEvents(self.slots.metrics.events)

    # --- requests ---------------------------------------------------------------------------------

    @property
    def stable(self) -> InferenceNode:
        """Node of the stable release."""
        return self.slots.stable_node

    @property
    def canary(self) -> InferenceNode | None:
        """Node on trial, once it takes requests."""
        return self.slots.canary_node

    def route(
        self, request: ImagesRequest, *, key: str = "", rescue: bool = False
    ) -> AbstractContextManager[Route]:
        """Choose the node for a request, held until the block ends; see `Slots.route`."""
        return self.slots.route(request, key=key, rescue=rescue)

    def models(self) -> list[tuple[str, str, InferenceNode]]:
        """Return (id, role, node) of what can be asked for."""
        return self.slots.models()

    def text(self) -> bytes:
        """Return the exposition for Prometheus."""
        slots = self.slots
        return exposition(slots.totals, self.stable.metrics.registry, slots.metrics.registry)

    # --- swapping ---------------------------------------------------------------------------------

    def start_canary(self, release: str, rules: CanaryRules, *, by: str = "") -> None:
        """Load a release in the background; it takes its share as soon as it is ready.

        Args:
            release: path below the folder of releases.
            by: who asked for it.

        Raises:
            ApiError: 404 swapping is off, 400 no such release, 409 a canary is there or loading.
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
            ApiError: 409 there is none, it is not ready, or no verdict says that it is no worse and
                `force` is not set; 503 serving.json cannot be written.
        """
        folder = self._folder()
        with self._swapping:
            new, old = self.slots.canary, self.slots.stable
            if self._closing.is_set():
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
            standing = ActiveRelease(
                release=new.node.directory.relative_to(folder).as_posix(),
                name=new.name, version=new.node.release.version, sha256=new.sha256,
                promoted=utc_now(), by=by, instead_of_sha256=old.sha256,
            )  # fmt: skip
            try:
                write_active_release(folder, standing)
            except ModelopsError as error:  # a restart would silently serve the former release
                raise ApiError(
                    503, "swap_failed", f"not promoted, a restart would not know: {error.message}"
                ) from error
            self.slots.promote(new)
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
            slot = self.slots.canary
            if slot is None:
                if self._loading is None:
                    raise ApiError(409, "swap_conflict", "there is no canary to roll back")
                self._stopped = {"by": by, "reason": reason or "stopped while it was loaded"}
                self._stop_loading.set()
                return
            self._last_verdict = self.verdict()
            self.slots.take_away(slot)
            self._events.note(
                event, slot.label, by=by, reason=reason, sha256=slot.node.release_sha256
            )
            self._start(self._drain, slot)

    def verdict(self) -> CanaryVerdict | None:
        """Verdict of the last interim analysis of the canary; None without one."""
        interim = self.slots.interim
        return None if interim is None else interim.verdict()

    def status(self) -> dict[str, Any]:
        """Return the state of the rollout, for a person or a program."""
        about, last = self.slots.about(), self._last_verdict
        loading = self._loading
        return {
            "swap": self._off or "on",
            "state": "canary" if about["canary"] else "loading" if loading else "stable only",
            "after_restart": self._pinned or about["stable"]["release"],
            **about,
            "loading": loading,
            "last_verdict": last.as_json() if last else None,
            "events": self._events.entries(),
        }

    def close(self, *, drain: bool = True, timeout_s: float | None = 60.0) -> None:
        """Finish the work of all nodes and end their threads."""
        with self._swapping:
            self._closing.set()
            self._stop_loading.set()
            nodes = self.slots.nodes()
            with self.slots.changed:
                self.slots.changed.notify_all()
        for node in nodes:
            node.begin_shutdown()
        for node in nodes:
            node.close(drain=drain, timeout_s=timeout_s)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(5.0)

    def _busy(self) -> str:
        if self._closing.is_set():
            return "the node is shutting down"
        if self._loading:
            return f"{self._loading} is being loaded"
        if self.slots.canary:
            return f"{self.slots.canary.label} is the canary"
        return "a former release still finishes its work" if self.slots.draining else ""

    # --- threads ----------------------------------------------------------------------------------

    def _folder(self) -> Path:
        if self._releases is None or self._off:
            raise ApiError(404, "swap_off", f"releases cannot be swapped here: {self._off}")
        return self._releases

    def _start(self, run: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=run, args=arguments, name="modelops-swap", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _run_canary(self, path: Path, name: str, rules: CanaryRules, by: str) -> None:
        """Load a release, and watch it for as long as it is the canary."""
        node: InferenceNode | None = None
        slot: Slot | None = None
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
                slot, trial = Slot(node), Trial(rules)
                with self.slots.changed:
                    self.slots.begin_trial(slot, trial)
                    compare_speed(trial, node, self.stable)
                self._last_verdict = None
                self._events.note("canary", slot.label, by=by, sha256=slot.sha256)
                self._loading = None
        if slot is None and node is not None:
            node.close(drain=False)
        node = None
        if slot is not None:
            self._watch(slot)
            return
        give_memory_back()
        self._loading = None

    def _watch(self, slot: Slot) -> None:
        """Roll back a canary that turns red; with `auto`, also promote or roll back by verdict."""
        again = 0.0
        while True:
            with self.slots.changed:
                self.slots.changed.wait(self._tick_s)
                interim = self.slots.interim
                if self._closing.is_set() or self.slots.canary is not slot or interim is None:
                    return
            try:
                verdict = interim.verdict()
                if problems := slot.node.problems():
                    self._decide(slot, "rolled_back_red", f"not well: {'; '.join(problems)}")
                elif not interim.trial.rules.auto or time.monotonic() < again:
                    continue
                elif verdict.answer == "worse":
                    self._decide(slot, "rolled_back_worse", verdict.sentence)
                elif verdict.answer != "undecided":
                    self._decide(slot, "promoted", verdict.sentence)
            except ApiError as error:  # such as a full disk
                again = time.monotonic() + RETRY_S
                log.warning("swap: %s", error.message)
            except Exception:
                log.exception("a canary could not be judged")

    def _decide(self, slot: Slot, event: str, reason: str) -> None:
        with self._swapping:
            # An operator was faster, or it is red because the whole node is shutting down.
            if self.slots.canary is not slot or self._closing.is_set():
                return
            if event == "promoted":
                self.promote(by="auto", reason=reason)
            else:
                self.roll_back(by="auto", reason=reason, event=event)

    def _drain(self, slot: Slot) -> None:
        """Wait for the requests in progress of a slot, then close it and free its memory."""
        label = slot.label
        limit_s = 2 * slot.node.settings.deadline_s + 60.0
        in_hand = self.slots.wait_until_idle(slot, limit_s=limit_s, stopped=self._closing)
        if in_hand:
            log.warning("swap: %d requests still in progress at %s", in_hand, label)
        if self._closing.is_set():
            return  # `close` closes this one too
        slot.node.close(drain=True, timeout_s=60.0)
        self.slots.vacate(slot)
        give_memory_back()
        self._events.note("drained", label)


def open_rollout(
    release: Path,
    settings: NodeSettings,
    open_node: Callable[[Path], InferenceNode],
    *,
    workers: int = 1,
) -> Rollout:
    """Make a rollout of one node, not started yet.

    Args:
        release: the stable one.
        open_node: makes a node of a release directory.
        workers: processes of this node. Swapping is off with several, as they cannot swap together.

    Raises:
        UsageError: the folder of releases does not exist.
        ModelopsError: the release was changed, or its model cannot be opened.
    """
    folder = Path(settings.releases) if settings.releases else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"MODELOPS_RELEASES={folder}: no such folder")
    many = f"this node has {workers} workers, and a swap reaches one of them only; replace the node"
    off = many if folder is not None and workers > 1 else None
    named = Path(settings.release or folder or release)
    pinned = (named / RECORD_FILE).is_file()
    return Rollout(open_node(release), releases=folder, off=off, pinned=pinned, open_node=open_node)
