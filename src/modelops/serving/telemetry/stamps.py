"""Stamps of time in file names, which sort in the order of writing whatever the clock does."""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Iterable

_STAMP = re.compile(r"(\d{8}T\d{6})-(\d{9})", re.ASCII)


def ns_to_stamp(ns: int) -> str:
    """Nanoseconds since 1970 to a stamp such as 20261130T164825-000000001, in UTC."""
    seconds, rest = divmod(ns, 10**9)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}-{rest:09d}"


def stamp_to_ns(stamp: str) -> int | None:
    """Stamp to nanoseconds since 1970; None if the text is no stamp."""
    parts = _STAMP.fullmatch(stamp)
    if parts is None:
        return None
    try:
        return calendar.timegm(time.strptime(parts[1], "%Y%m%dT%H%M%S")) * 10**9 + int(parts[2])
    except ValueError:
        return None


def next_stamp(now_ns: int, stamps: Iterable[str]) -> str:
    """Return the stamp of a new file: the time, or one nanosecond after the newest of `stamps`
    when the clock is behind it."""
    newest = max((stamp_to_ns(stamp) or 0 for stamp in stamps), default=-1)
    return ns_to_stamp(max(now_ns, newest + 1))
