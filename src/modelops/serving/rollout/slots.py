"""Slots of a process's nodes, a stable one and perhaps a canary, and their requests in progress."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modelops.serving.api import ImagesRequest
from modelops.serving.rollout.interim import InterimAnalyses
from modelops.serving.rollout.metrics import RolloutMetrics, RunningTotals
from modelops.serving.rollout.routes import Route, Slot, choose_slot

if TYPE_CHECKING:
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.rollout.trial import Arm, Trial


class Slots:
    """Slots of the stable node, a canary on trial, and former nodes that finish their work.

    Attributes:
        stable, canary, draining: the slot of each role.
        trial, interim: of the canary; None without one.
        changed: guards all of these, and is notified when one of them or a count changes.
        totals: counters that go on over a promotion.
        metrics: of the rollout.
    """

    def __init__(self, stable: InferenceNode) -> None:
        self.stable = Slot(stable)
        self.canary: Slot | None = None
        self.draining: list[Slot] = []
        self.trial: Trial | None = None
        self.interim: InterimAnalyses | None = None
        self.changed = threading.Condition()
        self.totals = RunningTotals()
        self.metrics = RolloutMetrics()
        self.metrics.watch(
            share=lambda: 0.0 if (trial := self.trial) is None else trial.rules.share,
            up=lambda: (node := self.canary_node) is not None and not node.problems(),
            worse=lambda: (interim := self.interim) is not None and interim.worse,
        )

    @property
    def stable_node(self) -> InferenceNode:
        """Node of the stable release."""
        with self.changed:  # a slot loses its node once it has been drained
            return self.stable.node

    @property
    def canary_node(self) -> InferenceNode | None:
        """Node on trial, once it takes requests."""
        with self.changed:
            return None if self.canary is None else self.canary.node

    @contextlib.contextmanager
    def route(
        self, request: ImagesRequest, *, key: str = "", rescue: bool = False
    ) -> Iterator[Route]:
        """Choose the node for a request, held until the block ends.

        Args:
            request: what is asked for.
            key: name of the caller's API key, "" without one.
            rescue: whether the canary failed this request, so that the stable one retries it.

        Raises:
            ApiError: 404 for a model that is neither.
        """
        with self.changed:
            trial = self.trial
            slot, dealt = choose_slot(
                request.model, self.stable, self.canary,
                trial=trial, key=key, rescue=rescue,
            )  # fmt: skip
            slot.in_hand += 1
            arm: Arm = "canary" if slot is self.canary else "stable"
        route = Route(slot.node, request, arm=arm, dealt=dealt)
        try:
            yield route
        except BaseException as error:
            route.note(error)
            raise
        finally:
            with self.changed:
                slot.in_hand -= 1
                self.changed.notify_all()
            outcome = route.outcome()
            if trial is not None and arm == "canary":
                self.metrics.on_canary(outcome, time.monotonic() - route.began)
            if trial is not None and dealt:
                trial.count(arm, outcome)

    def models(self) -> list[tuple[str, str, InferenceNode]]:
        """Return (id, role, node) of what can be asked for."""
        with self.changed:
            found = [(self.stable.name, "stable", self.stable.node)]
            if self.canary is not None:
                found.append((self.canary.label, "canary", self.canary.node))
        return found

    def about(self) -> dict[str, Any]:
        """Return the nodes and the canary's trial, for a person or a program."""
        with self.changed:
            stable, canary, interim = self.stable, self.canary, self.interim
            node = canary.node if canary else None
            draining = list(self.draining)
        verdict = interim.verdict() if interim else None
        about = None
        if canary is not None and node is not None and interim is not None:
            about = {
                **canary.about(), **interim.trial.rules.about(), "problems": node.problems(),
                "so_far": interim.trial.counts(), "measured": interim.trial.measured(),
                "next_look": interim.next_requests,
            }  # fmt: skip
        return {
            "stable": stable.about(),
            "canary": about,
            "draining": [slot.about() for slot in draining],
            "verdict": verdict.as_json() if verdict else None,
        }

    def begin_trial(self, slot: Slot, trial: Trial) -> None:
        """Let a node take its share of the requests. The caller holds `changed`."""
        self.canary, self.trial, self.interim = slot, trial, InterimAnalyses(trial)

    def promote(self, new: Slot) -> None:
        """Make the canary the stable node; the former one is to be drained."""
        with self.changed:
            old = self.stable
            self.totals.take_over(old.node.metrics.registry, new.node.metrics.registry)
            self.stable = new
            self._end_trial(old)

    def take_away(self, canary: Slot) -> None:
        """End a trial; the canary is to be drained."""
        with self.changed:
            self._end_trial(canary)

    def wait_until_idle(self, slot: Slot, *, limit_s: float, stopped: threading.Event) -> int:
        """Wait until a slot has no request in progress, or `stopped`; return the number left."""
        with self.changed:
            self.changed.wait_for(lambda: slot.in_hand == 0 or stopped.is_set(), limit_s)
            return slot.in_hand

    def vacate(self, slot: Slot) -> None:
        """Forget a drained node after it was closed."""
        registry = slot.node.metrics.registry
        with self.changed:
            self.totals.forget(registry)
            self.draining.remove(slot)
            slot.vacate()

    def nodes(self) -> list[InferenceNode]:
        """Return every node that is still there."""
        with self.changed:
            slots = [self.stable, *([self.canary] if self.canary else []), *self.draining]
            return [slot.node for slot in slots]

    def _end_trial(self, leaving: Slot) -> None:
        for slot in (self.stable, self.canary, leaving):
            if slot is not None:
                slot.node.on_step = None
        self.canary, self.trial, self.interim = None, None, None
        self.draining.append(leaving)
