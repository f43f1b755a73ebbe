"""A process that makes a share of an evaluation's images: `python -m modelops.evaluation.worker`.

Standard input: one line of JSON with the source and the jobs; then nothing, and its end means that
the evaluation is gone. Standard output: one line of JSON for each outcome.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict


def main() -> int:
    """Make the images; returns the exit code."""
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    from modelops.errors import ModelopsError
    from modelops.evaluation.processes import read_task
    from modelops.evaluation.samples import make_images
    from modelops.evaluation.sources import open_source

    opening, jobs = read_task(line)
    try:
        source = open_source(opening.pop("uri"), **opening)
        for outcome in make_images(source, jobs):
            print(json.dumps(asdict(outcome)), flush=True)
    except ModelopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    # Not sys.exit: a thread that waits for standard input would hold the interpreter up.
    code = main()
    sys.stdout.flush()
    os._exit(code)
