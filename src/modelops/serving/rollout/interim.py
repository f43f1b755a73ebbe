"""Looks at a canary: the moments of its verdicts, the same for everybody who asks.

Repeated tests find a difference in the end, even where there is none. So a verdict is made only at
a few looks (interim analyses). Everybody who asks in between (a person, a script, the gauge for the
alert) gets the verdict of the last look. Later counts can be read, but are not tested.

    requests of the canary   20   40   80  ...   `requests`, after `seconds`   2 x   4 x  ...
    can be found worse       x    x    x         x                             x     x
    can be found no worse                        x                             x     x

Look number k for either finding spends alpha / (k (k + 1)) on it: together alpha. The time of a
look depends on the number of requests and on the seconds, never on how the requests ended.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from modelops.serving.rollout.trial import Trial
from modelops.serving.rollout.verdict import CanaryVerdict, judge, not_yet

log = logging.getLogger("modelops.serving")

FIRST_LOOK = 20  # requests of the canary


class InterimAnalyses:
    """Interim analyses of a trial. Thread-safe."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._lock = threading.Lock()
        self._made = 0
        self._decisive = 0  # of those, looks that could find it no worse
        self._next = FIRST_LOOK
        self._standing: CanaryVerdict | None = None

    @property
    def worse(self) -> bool:
        """Return whether the last verdict was "worse"; makes none."""
        return (found := self._standing) is not None and found.answer == "worse"

    @property
    def next_requests(self) -> int:
        """Number of the canary's requests at which the next look is due at the latest."""
        rules = self.trial.rules
        return self._next if self._decisive else min(self._next, max(rules.requests, FIRST_LOOK))

    def verdict(self) -> CanaryVerdict:
        """Make the look that is due now, if any, and return the last verdict.

        Worse stays worse: a later look does not take it back.
        """
        with self._lock:
            rules, requests, seconds = self.trial.rules, self.trial.measured(), self.trial.seconds()
            waiting = not_yet(rules, requests, seconds)
            if not self.worse and (requests >= self._next or not (waiting or self._decisive)):
                self._look()
            found = self._standing
            if found is None:
                return CanaryVerdict(
                    answer="undecided", sentence=waiting, alpha=0.0, seconds=round(seconds, 1),
                    requests=requests, findings=(),
                )  # fmt: skip
            return replace(found, sentence=waiting) if waiting and not self.worse else found

    def _look(self) -> None:
        rules, data = self.trial.rules, self.trial.data()
        self._made += 1
        self._decisive += not not_yet(rules, data.requests, data.seconds)
        self._next = 2 * data.requests
        self._standing = found = judge(
            data, rules,
            alpha=rules.alpha * spent(self._made),
            alpha_no_worse=rules.alpha * spent(max(1, self._decisive)),
        )  # fmt: skip
        log.log(
            logging.WARNING if found.answer == "worse" else logging.INFO,
            "swap: look %d: %s", self._made, found.sentence,
        )  # fmt: skip


def spent(look: int) -> float:
    """Return the part of alpha that a look (from 1) may spend; all looks add up to 1."""
    return 1.0 / (look * (look + 1))
