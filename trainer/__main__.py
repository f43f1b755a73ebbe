"""`python -m modelops.trainer runs/NAME/config.json [--resume]`: one training process."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from modelops.base.errors import ModelopsError


def main(argv: Sequence[str] | None = None) -> int:
    """Train; a known failure prints one line and the way out, and gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m modelops.trainer", description=__doc__)
    parser.add_argument("config", type=Path, help="runs/NAME/config.json")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    arguments = parser.parse_args(argv)
    from .train import train

    try:
        return train(arguments.config, resume=arguments.resume)
    except ModelopsError as error:
        line = f"error: {error.message}" + (f"\n  try: {error.hint}" if error.hint else "")
        print(line, file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        if os.environ.get("MODELOPS_DEBUG"):
            traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
