"""Rate limits of a caller: two token buckets per key, for requests and for images.

An image is one with the steps that the release makes by default; with more or fewer steps it counts
more or less. So an image rate limits the product of images and steps, "image-steps".

A bucket holds a minute's worth and refills evenly, so a caller that was quiet may send a minute's
worth at once; over any longer time t it gets at most rate x (t + 60 s). The workers of a node share
their buckets, so a rate holds for all of them together; a caller without a rate costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from modelops.base.errors import ModelopsError
from modelops.serving.http.keys import Caller
from modelops.serving.settings import NodeSettings

log = logging.getLogger("modelops.serving")

T = TypeVar("T")

MINUTE_S = 60.0
MAX_CALLERS = 10_000
_WHAT = ("requests", "images")
_LOCK_S = 0.5  # it is held for microseconds, unless its process hangs
_LONGEST_WAIT_S = 0.064  # between two tries to take it
_ROUNDING = 1e-9  # tokens


class RateLimitError(ModelopsError):
    """Rate limit exceeded. `wait_s`: seconds until the request would be accepted; None: never."""

    def __init__(self, message: str, *, wait_s: float | None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class HeldError(Exception):
    """The buckets of a caller are held by another worker."""


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a request: its images, the steps of each, and those that the release makes by
    default."""

    images: int = 1
    steps: int = 1
    own_steps: int = 1

    @property
    def cost(self) -> float:
        """Images of the release's own number of steps."""
        return self.images * self.steps / self.own_steps


@dataclass(frozen=True, slots=True)
class ImageRate:
    """Rate of a caller and what is left of it, in image-steps (images x steps)."""

    limit: float
    remaining: float


@dataclass(slots=True)
class TokenBucket:
    """Bucket that refills at `rate` tokens per minute, up to `rate`; `level` at time `at` (s)."""

    rate: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Add the tokens of the time since `at`."""
        self.level = min(self.rate, self.level + max(0.0, now - self.at) * self.rate / MINUTE_S)
        self.at = now

    def wait(self, tokens: float) -> float | None:
        """Return the seconds until there are `tokens`; None when there never will be."""
        if tokens > self.rate + _ROUNDING:
            return None
        missing = tokens - self.level
        return missing * MINUTE_S / self.rate if missing > _ROUNDING else 0.0


Buckets = dict[str, TokenBucket]  # of one caller, by what is counted: "requests", "images"


_FORM = struct.Struct("<6d")  # of both: rate, level, at
_NONE = TokenBucket(rate=0.0, level=0.0, at=0.0)


class BucketStore(Protocol):
    """Store of the buckets."""

    def of(self, caller: str) -> AbstractContextManager[Buckets]:
        """A caller's buckets, nobody else's within the block; changes are kept at its end."""


class OwnBuckets:
    """Buckets in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Buckets] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, caller: str) -> Iterator[Buckets]:
        """A caller's buckets."""
        with self._lock:
            if caller not in self._buckets and len(self._buckets) >= MAX_CALLERS:
                self._forget_full_ones()
            yield self._buckets.setdefault(caller, {})

    def _forget_full_ones(self) -> None:
        """Forget full buckets, which are the same as new ones: keys come and go."""
        now = self._clock()
        for name, buckets in list(self._buckets.items()):
            for bucket in buckets.values():
                bucket.refill(now)
            if all(bucket.level >= bucket.rate for bucket in buckets.values()):
                del self._buckets[name]


class SharedBuckets:
    """Buckets of the workers of a node: one small file for each caller, locked while it is used.

    A killed worker lets its locks go. One that hangs within the block keeps that caller out:
    HeldError, at once, rather than no limit. Where the files cannot be written, each worker counts
    by itself.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._own = OwnBuckets(clock)
        self._broken = False

    @contextlib.contextmanager
    def of(self, caller: str) -> Iterator[Buckets]:
        """A caller's buckets.

        Raises:
            HeldError: another worker uses them.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = self._open(caller)
                stack.callback(os.close, file)
                self._lock(file)
                buckets = _unpacked(os.pread(file, _FORM.size, 0))
                # A full disk shows here, before a token is spent that could not be noted.
                os.pwrite(file, _packed(buckets), 0)
            except OSError as error:
                if not self._broken:  # one line, not one for each request
                    log.warning("rates are counted by each worker: %s", error.strerror or error)
                self._broken = True
                yield stack.enter_context(self._own.of(caller))
                return
            self._broken = False
            yield buckets
            os.pwrite(file, _packed(buckets), 0)

    def _open(self, caller: str) -> int:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        name = hashlib.sha256(caller.encode()).hexdigest()[:32]
        # Opened anew each time: threads of one process exclude each other, too.
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @staticmethod
    def _lock(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HeldError from error


def _packed(buckets: Buckets) -> bytes:
    kept = [buckets.get(what) or _NONE for what in _WHAT]
    return _FORM.pack(*(number for one in kept for number in (one.rate, one.level, one.at)))


def _unpacked(data: bytes) -> Buckets:
    if len(data) != _FORM.size:
        return {}  # a new file
    numbers = _FORM.unpack(data)
    found = (TokenBucket(*numbers[at : at + 3]) for at in (0, 3))
    return {what: one for what, one in zip(_WHAT, found, strict=True) if one.rate}


class RateLimits:
    """Buckets by caller. Thread-safe.

    Args:
        requests_per_minute, images_per_minute: of callers without a rate of their own; None does
            not limit them.
        store: where buckets are kept; in this process when not given.
        clock: seconds, never going back, the same in all processes that share the store.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        images_per_minute: int | None = None,
        store: BucketStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = {"requests": requests_per_minute, "images": images_per_minute}
        self._clock = clock
        self._store = store or OwnBuckets(clock)

    @classmethod
    def from_settings(cls, settings: NodeSettings) -> RateLimits:
        """Make the limits that a node's settings say; its workers share their buckets in its run
        directory."""
        shared = settings.shared_directory
        return cls(
            requests_per_minute=settings.requests_per_minute,
            images_per_minute=settings.images_per_minute,
            store=SharedBuckets(shared / "limits") if shared else None,
        )

    async def take(self, caller: Caller, work: Work) -> ImageRate | None:
        """Count one request and return the caller's rate of images, None when it has none; nothing
        is counted on an error.

        Raises:
            RateLimitError: names the limit and the wait in seconds.
        """
        rates = self._rates(caller)
        if not rates:
            return None
        costs = {"requests": 1.0, "images": work.cost}

        def spend(buckets: Buckets) -> ImageRate | None:
            now = self._clock()
            wanted = [
                (what, costs[what], _bucket(buckets, what, rate, now))
                for what, rate in rates.items()
            ]
            waits = [(bucket.wait(tokens), what, bucket) for what, tokens, bucket in wanted]
            for wait_s, what, bucket in waits:
                if wait_s is None:
                    raise RateLimitError(
                        f"this key may make {_rate(bucket, what, work)}, fewer than were asked for "
                        "at once",
                        wait_s=None,
                    )
            longest = max(waits, key=lambda entry: entry[0] or 0.0)
            if longest[0]:
                raise RateLimitError(
                    f"this key may make {_rate(longest[2], longest[1], work)}", wait_s=longest[0]
                )
            for _, tokens, bucket in wanted:
                bucket.level -= tokens
            left = buckets["images"] if "images" in rates else None
            if left is None:
                return None
            steps = work.own_steps
            return ImageRate(left.rate * steps, max(0.0, left.level * steps))

        return await self._with(caller, spend)

    async def give_back_images(self, caller: Caller, images: float) -> None:
        """Give back images that were never made because the node was full or failed. A negative
        number takes them again, even if they were spent meanwhile."""
        if "images" not in self._rates(caller):
            return

        def put(buckets: Buckets) -> None:
            bucket = buckets.get("images")
            if bucket is not None:
                bucket.level = min(bucket.rate, bucket.level + images)

        with contextlib.suppress(RateLimitError):
            await self._with(caller, put)

    async def _with(self, caller: Caller, use: Callable[[Buckets], T]) -> T:
        """Call `use` with a caller's buckets; the event loop goes on while they are held elsewhere.

        Raises:
            RateLimitError: they are held for too long.
        """
        deadline, wait_s = time.monotonic() + _LOCK_S, 0.0005
        while True:
            with contextlib.suppress(HeldError), self._store.of(caller.name) as buckets:
                return use(buckets)
            if time.monotonic() > deadline:
                raise RateLimitError("the rate of this key cannot be told; try again", wait_s=1.0)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _rates(self, caller: Caller) -> dict[str, int]:
        own = {"requests": caller.requests_per_minute, "images": caller.images_per_minute}
        rates = {what: self._defaults[what] if own[what] is None else own[what] for what in _WHAT}
        return {what: rate for what, rate in rates.items() if rate is not None}


def _rate(bucket: TokenBucket, what: str, work: Work) -> str:
    if what == "requests":
        return f"{bucket.rate:g} requests a minute"
    return (
        f"{bucket.rate:g} images of {work.own_steps} steps a minute "
        f"({bucket.rate * work.own_steps:g} image-steps)"
    )


def _bucket(buckets: Buckets, what: str, rate: int, now: float) -> TokenBucket:
    bucket = buckets.get(what)
    if bucket is None or bucket.rate != rate:  # new, or the file gave it another rate
        level = rate if bucket is None else min(bucket.level, rate)
        bucket = TokenBucket(rate=rate, level=level, at=now if bucket is None else bucket.at)
        buckets[what] = bucket
    bucket.refill(now)
    return bucket
