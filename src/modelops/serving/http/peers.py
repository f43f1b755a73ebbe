"""Peer sockets of a node's workers: the one that gets a scrape or a probe answers for all.

A worker listens on a Unix socket in the run directory (see `workers`) and answers two questions:
its metrics, and its health. A merged exposition keeps every worker's series apart by a label
`worker`: a sum would fall when a worker is started again, and a rate over it would be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelops.serving.workers import Worker

log = logging.getLogger("modelops.serving")

TIMEOUT_S = 3.0  # below the timeouts of a scrape and of a probe
MUTE_S = 60.0  # a process that is silent for longer is killed
_END = b"# EOF\n"  # of an answer; one that a killed worker cut short has none
_UP = (
    "# HELP modelops_worker_up 1 when the worker answers, by its number\n"
    "# TYPE modelops_worker_up gauge\n"
)


class Peers:
    """Socket of a worker, and its questions to the others. Belongs to one event loop.

    Args:
        worker: this one; there are others.
        node: returns its InferenceNode.
        text: returns its own exposition.
        timeout_s: seconds within which a peer must answer.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        node: Callable[[], Any],
        text: Callable[[], bytes],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        assert worker.directory is not None
        self.worker = worker
        self._directory = worker.directory
        self._node = node
        self._text = text
        self._timeout_s = timeout_s
        self._server: asyncio.AbstractServer | None = None
        # Under load the loop's own threads wait for filters, and so may a question about this
        # worker's health: metrics must not wait for it.
        self._threads = {
            what: ThreadPoolExecutor(1, thread_name_prefix=f"modelops-peers-{what}")
            for what in ("metrics", "health")
        }
        self._processes: dict[int, int] = {}  # of the workers that answered once
        self._mute_since: dict[int, float] = {}

    async def start(self) -> None:
        """Listen."""
        path = self._path(self.worker.index)
        path.unlink(missing_ok=True)  # a killed predecessor's
        self._server = await asyncio.start_unix_server(self._answer, path)
        path.chmod(0o600)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        for pool in self._threads.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def exposition(self) -> bytes:
        """Return every worker's metrics with a label `worker`, and which workers answer."""
        texts = await self._ask_all("metrics", self._text)
        found = {index: text.decode() for index, text in texts.items() if text is not None}
        up = "".join(
            f'modelops_worker_up{{worker="{index}"}} {int(text is not None)}.0\n'
            for index, text in sorted(texts.items())
        )
        return (merge_expositions(found) + _UP + up).encode()

    async def problems(self) -> list[str]:
        """Return why a worker other than this one is not ready; empty when all are."""
        problems = []
        for index, state in (await self._states()).items():
            if state is None:
                problems.append(f"worker {index} does not answer: it died, hangs or is starting")
            else:
                problems += [f"worker {index}: {problem}" for problem in state["problems"]]
        return problems

    async def alive(self) -> bool:
        """Return whether no other worker has a dead engine, or is alive and silent for a minute.

        BentoML starts a process again that has died, but not one that hangs.
        """
        states = await self._states()
        if any(state is not None and not state["alive"] for state in states.values()):
            return False
        now = time.monotonic()
        return not any(
            now - since > MUTE_S and _exists(self._processes[index])
            for index, since in self._mute_since.items()
            if index in self._processes
        )

    async def _states(self) -> dict[int, dict[str, Any] | None]:
        answers = await self._ask_all("health", None)
        states: dict[int, dict[str, Any] | None] = {}
        for index, answer in answers.items():
            state = None if answer is None else json.loads(answer)
            states[index] = state
            if state is None:
                self._mute_since.setdefault(index, time.monotonic())
            else:
                self._mute_since.pop(index, None)
                self._processes[index] = int(state["pid"])
        return states

    async def _ask_all(self, what: str, own: Callable[[], bytes] | None) -> dict[int, bytes | None]:
        """Return the answers by worker, None for no answer. This worker's is `own`, if given."""
        loop = asyncio.get_running_loop()
        indices = range(1, self.worker.count + 1)
        others = [index for index in indices if index != self.worker.index]
        answers = dict(
            zip(others, await asyncio.gather(*(self._ask(i, what) for i in others)), strict=True)
        )
        if own is not None:
            answers[self.worker.index] = await loop.run_in_executor(self._threads[what], own)
        return dict(sorted(answers.items()))

    async def _ask(self, index: int, what: str) -> bytes | None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path(index))
                writer.write(f"{what}\n".encode())
                answer = await reader.read()
        except (OSError, TimeoutError):
            return None
        finally:
            if writer is not None:
                writer.close()
        return answer.removesuffix(_END) if answer.endswith(_END) else None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(10 * self._timeout_s):
                what = (await reader.readline()).decode("ascii", "replace").strip()
                make = {"metrics": self._text, "health": self._health}.get(what)
                if make is not None:
                    writer.write(await loop.run_in_executor(self._threads[what], make) + _END)
                    await writer.drain()
        except (OSError, TimeoutError, RuntimeError):  # it left, or this worker is closing
            pass
        except Exception:
            log.exception("a question of another worker could not be answered")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _health(self) -> bytes:
        node = self._node()
        state = {"pid": os.getpid(), "alive": node.alive(), "problems": node.readiness()}
        return json.dumps(state).encode()

    def _path(self, index: int) -> Path:
        return self._directory / f"{index}.sock"


def merge_expositions(texts: Mapping[int, str]) -> str:
    """Merge the expositions of several workers into one, in Prometheus' text format.

    HELP and TYPE of each metric occur once, and every sample has a first label `worker`.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for index, text in sorted(texts.items()):
        name, new = "", False
        for line in text.split("\n"):
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                new = name not in headers
                headers.setdefault(name, [])
            if line.startswith("#"):
                if new:
                    headers[name].append(line)
            elif line:
                samples.setdefault(name, []).append(_labelled(line, index))
    return "".join(
        "\n".join([*lines, *samples.get(name, [])]) + "\n" for name, lines in headers.items()
    )


def _labelled(sample: str, worker: int) -> str:
    """Turn `name{a="b"} 1` into `name{worker="2",a="b"} 1`, whatever the labels' values hold."""
    end = next((at for at, sign in enumerate(sample) if sign in "{ "), len(sample))
    name, rest = sample[:end], sample[end:]
    if rest.startswith("{"):
        inside = rest[1:]
        comma = "" if inside.startswith("}") else ","
        return f'{name}{{worker="{worker}"{comma}{inside}'
    return f'{name}{{worker="{worker}"}}{rest}'


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
