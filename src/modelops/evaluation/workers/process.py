"""Worker process of an evaluation, run as `python -m modelops.evaluation.workers.process`.

Standard input: a line of JSON for each task, either {"opening", "jobs"}, images to make, or
{"share"}, images to read; its end means that the evaluation has ended or died. Standard output: a
line of JSON for each image made, and one for each share read.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any, TextIO


def main() -> int:
    """Do the tasks on standard input; return the exit code."""
    logging.disable(logging.WARNING)  # the evaluation's own process has said them
    # Libraries print to standard error; only answers go to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(tasks, busy), daemon=True).start()

    from modelops.base.errors import ModelopsError

    while True:
        busy.clear()
        line = tasks.get()
        busy.set()
        try:
            _do(json.loads(line), answers)
        except ModelopsError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


def _do(task: dict[str, Any], answers: TextIO) -> None:
    from modelops.evaluation.workers.tasks import job_from_json, share_from_json

    if "share" in task:
        from modelops.evaluation.workers.reading import failure_of

        failure = failure_of(share_from_json(task["share"]))
        _say({"failure": asdict(failure) if failure else None}, answers)
        return
    import torch

    from modelops.evaluation.sources.open import open_source
    from modelops.evaluation.workers.making import make_images

    opening = task["opening"]
    source = open_source(opening.pop("uri"), **opening)
    for outcome in make_images(source, [job_from_json(entry) for entry in task["jobs"]]):
        _say(asdict(outcome), answers)
    if torch.cuda.is_initialized():  # what reads images next has the device to itself
        del source
        torch.cuda.empty_cache()


def _say(answer: dict[str, Any], answers: TextIO) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _listen(tasks: queue.SimpleQueue[str], busy: threading.Event) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(1 if busy.is_set() or not tasks.empty() else 0)


if __name__ == "__main__":
    # Not sys.exit: a thread that waits for standard input would hold the interpreter up.
    code = main()
    sys.stderr.flush()
    os._exit(code)
