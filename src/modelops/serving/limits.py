"""How often a caller may ask: two token buckets per key, for requests and for images.

A bucket holds a minute's worth and refills evenly, so a caller that was quiet may send a minute's
worth at once; over any longer time t it gets at most rate x (t + 60 s). Buckets belong to one
process: a node with several workers allows each of them the rate.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modelops.errors import ModelopsError, UsageError
from modelops.serving.keys import Caller

REQUESTS_VARIABLE = "MODELOPS_REQUESTS_PER_MINUTE"
IMAGES_VARIABLE = "MODELOPS_IMAGES_PER_MINUTE"
MINUTE_S = 60.0
MAX_CALLERS = 10_000


class RateLimitError(ModelopsError):
    """Too often. `wait_s`: seconds until the same request would be let in; None is never."""

    def __init__(self, message: str, *, wait_s: float | None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(slots=True)
class TokenBucket:
    """Tokens that refill at `rate` per minute, up to `rate`; `level` is that of `at` (seconds)."""

    rate: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Let the tokens of the time since `at` flow in."""
        self.level = min(self.rate, self.level + max(0.0, now - self.at) * self.rate / MINUTE_S)
        self.at = now

    def wait(self, tokens: float) -> float | None:
        """Seconds until there are as many; None when there never will be."""
        if tokens > self.rate:
            return None
        return max(0.0, tokens - self.level) * MINUTE_S / self.rate


class RateLimits:
    """Buckets by caller. Thread-safe.

    Args:
        requests_per_minute, images_per_minute: of callers without a rate of their own; None does
            not limit them.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        images_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = {"requests": requests_per_minute, "images": images_per_minute}
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RateLimits:
        """Default rates from MODELOPS_REQUESTS_PER_MINUTE and MODELOPS_IMAGES_PER_MINUTE.

        Raises:
            UsageError: not a whole number from 1 on.
        """

        def rate(name: str) -> int | None:
            text = environment.get(name, "")
            if not text:
                return None
            if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
                raise UsageError(f"{name}={text!r}: not a whole number from 1 to 1000000")
            return int(text)

        return cls(
            requests_per_minute=rate(REQUESTS_VARIABLE), images_per_minute=rate(IMAGES_VARIABLE)
        )

    def take(self, caller: Caller, *, images: int) -> None:
        """Count one request for `images` images; all of it or, on an error, none of it.

        Raises:
            RateLimitError: says which limit, and how long to wait.
        """
        with self._lock:
            now = self._clock()
            wanted = [
                (what, tokens, bucket)
                for what, tokens in (("requests", 1), ("images", images))
                if (bucket := self._bucket(caller, what, now)) is not None
            ]
            waits = [(bucket.wait(tokens), what, bucket) for what, tokens, bucket in wanted]
            for wait_s, what, bucket in waits:
                if wait_s is None:
                    raise RateLimitError(
                        f"this key may make {bucket.rate:g} {what} a minute, fewer than were asked "
                        "for at once",
                        wait_s=None,
                    )
            longest = max(waits, key=lambda entry: entry[0] or 0.0, default=None)
            if longest is not None and longest[0]:
                raise RateLimitError(
                    f"this key may make {longest[2].rate:g} {longest[1]} a minute",
                    wait_s=longest[0],
                )
            for _, tokens, bucket in wanted:
                bucket.level -= tokens

    def give_back_images(self, caller: Caller, images: int) -> None:
        """Return images that were never made, because the node was full or failed."""
        with self._lock:
            bucket = self._buckets.get((caller.name, "images"))
            if bucket is not None:
                bucket.level = min(bucket.rate, bucket.level + images)

    def _bucket(self, caller: Caller, what: str, now: float) -> TokenBucket | None:
        own = caller.requests_per_minute if what == "requests" else caller.images_per_minute
        rate = own if own is not None else self._defaults[what]
        if rate is None:
            return None
        bucket = self._buckets.get((caller.name, what))
        if bucket is None or bucket.rate != rate:  # new, or the file gave it another rate
            level = rate if bucket is None else min(bucket.level, rate)
            bucket = TokenBucket(rate=rate, level=level, at=now if bucket is None else bucket.at)
            self._forget_full_ones(now)
            self._buckets[caller.name, what] = bucket
        bucket.refill(now)
        return bucket

    def _forget_full_ones(self, now: float) -> None:
        """Keys come and go; a full bucket is worth as much as none."""
        if len(self._buckets) < MAX_CALLERS:
            return
        for name, bucket in list(self._buckets.items()):
            bucket.refill(now)
            if bucket.level >= bucket.rate:
                del self._buckets[name]
