"""The load generator, a process of its own: open loop, closed loop, probes.

    cd bench && python -m serving.load PLAN.json RESULT.json

PLAN: url, bodies (JSON texts, taken in turn), headers, and one of
  closed: {concurrency, seconds or count}    the next request when an answer is there
  open:   {times}                            requests at their times, whatever comes back
With `open` also: obey (a 429 is tried again when it says so), probes: {count, every_s, body}.
With `closed` also: leave_s (seconds after which request i hangs up, or null; taken in turn).

RESULT: began (time.monotonic of the start), elapsed_s, cores (this process's processor time per
second), records of [kind, number, try, due, sent, done, status, retry_after_s, bytes], in seconds
from the start. Latency counts from `due`, so that a late generator or a full socket is not hidden.
Status 0 is a connection that failed, 499 one that this side gave up on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

FAILED, LEFT = 0, 499
GIVE_UP_S = 180.0


class Load:
    """One plan against one server."""

    def __init__(self, plan: dict[str, Any], session: aiohttp.ClientSession) -> None:
        self.plan, self.session = plan, session
        self.bodies = [body.encode() for body in plan["bodies"]]
        self.records: list[tuple[Any, ...]] = []
        self.knocking = True
        self.began = time.monotonic()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    async def ask(
        self,
        kind: str,
        index: int,
        due: float,
        body: bytes,
        *,
        attempt: int = 0,
        leave_s: float | None = None,
    ) -> tuple[int, float | None, float]:
        """(status, Retry-After in seconds, when it was sent)."""
        sent, status, after, size = self.now(), FAILED, None, 0
        headers = {"X-Request-Id": f"{kind}-{index}-{attempt}"}
        try:
            async with (
                asyncio.timeout(leave_s if leave_s is not None else GIVE_UP_S),
                self.session.post(self.plan["url"], data=body, headers=headers) as answer,
            ):
                size = len(await answer.read())
                status, after = answer.status, retry_after(answer.headers)
        except TimeoutError:
            status = LEFT if leave_s is not None else FAILED
        except aiohttp.ClientError:
            pass
        self.records.append(
            (kind, index, attempt, due, sent, self.now(), status, after, size)
        )  # fmt: skip
        return status, after, sent

    async def closed(self, concurrency: int, seconds: float | None, count: int | None) -> None:
        """`concurrency` clients, each with one request in progress."""
        leave, following = self.plan.get("leave_s") or [None], iter(range(count or 10**9))

        async def client() -> None:
            for index in following:
                if seconds is not None and self.now() >= seconds:
                    return
                body = self.bodies[index % len(self.bodies)]
                await self.ask(
                    "load", index, self.now(), body, leave_s=leave[index % len(leave)]
                )  # fmt: skip

        clients = [asyncio.create_task(client()) for _ in range(concurrency)]
        await asyncio.wait(clients, timeout=seconds)
        await stop(clients)

    async def open(self, times: list[float]) -> None:
        """Requests at their times."""
        obey, tasks = bool(self.plan.get("obey")), []
        probes = [
            asyncio.create_task(self.probe(index, **self.plan["probes"]))
            for index in range((self.plan.get("probes") or {}).get("count", 0))
        ]
        for index, due in enumerate(times):
            if (wait := due - self.now()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.client(index, due, obey=obey)))
        self.knocking = False  # a probe that has been let in still gets its answer
        if everything := [*tasks, *probes]:
            await asyncio.wait(everything)

    async def client(self, index: int, due: float, *, obey: bool) -> None:
        """One request; with `obey` again and again, each time after what a 429 said."""
        body = self.bodies[index % len(self.bodies)]
        for attempt in range(100):
            status, after, _ = await self.ask("load", index, due, body, attempt=attempt)
            if status != 429 or not obey:
                return
            await asyncio.sleep(after or 1.0)

    async def probe(self, number: int, *, count: int, every_s: float, body: str) -> None:
        """Knock until let in, over and over; a refusal's record and the next 200's belong together.

        A 429 is there at once and a 200 is not, so a probe that is let in ends the knocking.
        """
        await asyncio.sleep(1.0 + every_s * number / count)
        knocked = 0
        while self.knocking:
            status, _, _ = await self.ask(f"probe{number}", knocked, self.now(), body.encode())
            knocked += 1
            await asyncio.sleep(every_s if status == 429 else 10 * every_s)


def retry_after(headers: Any) -> float | None:
    """Seconds; OpenAI's client reads the milliseconds first too."""
    if text := headers.get("Retry-After-Ms"):
        return float(text) / 1000
    return float(text) if (text := headers.get("Retry-After")) else None


async def stop(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel and collect."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Play a plan."""
    # A server closes idle connections after seconds: one that it is about to close is not reused.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        load = Load(plan, session)
        if "closed" in plan:
            wanted = plan["closed"]
            await load.closed(wanted["concurrency"], wanted.get("seconds"), wanted.get("count"))
        else:
            await load.open(plan["open"]["times"])
        elapsed = load.now()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "began": load.began, "elapsed_s": elapsed,
        "cores": (used.ru_utime + used.ru_stime) / elapsed, "records": load.records,
    }  # fmt: skip


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    gc.freeze()
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(run(plan))))


if __name__ == "__main__":
    main()
