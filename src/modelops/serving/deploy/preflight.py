"""Preflight: does a model give its own numbers on this machine? Run before it is served.

    python -m modelops.serving.deploy.preflight RELEASE

It prints one line and ends with exit code 1 if the release would not be served.

The command that starts the workers runs it in a separate process, so that it loads no torch itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from modelops.base.environment import current_environment
from modelops.base.errors import ModelopsError, NotReproducedError, ServingError, UsageError
from modelops.base.files import sha256_tree
from modelops.records.base import InputRef
from modelops.records.export import ReproductionCheck
from modelops.records.release import PreflightRecord, ReleaseRecord
from modelops.releases.verify import RECORD_FILE, verify_release

_TIMEOUT_S = 900.0


def run_preflight(directory: str | Path, *, runtime: str = "auto") -> PreflightRecord:
    """Run an artifact's own rows in every runtime of this machine.

    Args:
        directory: a release, an exported artifact, or a checkpoint. A checkpoint runs in torch as
            it was evaluated, so there is nothing to compare.
        runtime: "auto", or the only one to try.

    Returns:
        A record; its status is "refused" if no runtime gives the numbers and there is no fallback.

    Raises:
        ModelopsError: the directory is none of these, or was changed.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    root, release = Path(directory), None
    if (root / RECORD_FILE).is_file():
        release = verify_release(root)
        root = root / release.model
    elif not any((root / name).is_file() for name in ("artifact.json", "model_index.json")):
        raise UsageError(f"{directory}: neither a release nor a model", hint="name one of them")
    record = PreflightRecord(
        model_sha256=sha256_tree(root, exclude=["training_state"]), processor="",
        environment=current_environment(), started_at=started,
    )  # fmt: skip
    record.inputs["model"] = InputRef(path=root.name, sha256=record.model_sha256)
    _try_model(root, record, release, runtime)
    record.duration_s = time.monotonic() - clock
    return record


def _try_model(
    root: Path, record: PreflightRecord, release: ReleaseRecord | None, runtime: str
) -> None:
    from modelops.base.processor import this_processor

    record.processor = this_processor().kind
    if not (root / "artifact.json").is_file():
        record.runtime, record.reason = "torch", "a checkpoint runs as it was evaluated"
        return
    from modelops.export.artifact.choice import choose_runtime, try_runtimes
    from modelops.export.artifact.directory import verify_artifact
    from modelops.export.graphs.graph import available_runtimes
    from modelops.export.runtimes.probe import PROBE_ROWS

    artifact, digest = verify_artifact(root)
    try:
        choice = choose_runtime(root, artifact, digest, runtime=runtime)
        record.runtime, record.reason = choice.runtime, choice.reason
    except NotReproducedError as error:
        record.reason = error.message
        record.fallback = release is not None and release.fallback is not None
        if not record.fallback:
            record.status, record.error = "refused", error.message
    record.reproduced = [
        ReproductionCheck(
            processor=record.processor, **asdict(one.found), passed=one.found.passed, n=PROBE_ROWS
        )
        for one in try_runtimes(root, artifact, available_runtimes(artifact.format))
        if one.found is not None
    ]  # fmt: skip


def require_preflight(release_dir: str | Path, *, runtime: str = "auto") -> str:
    """Call `run_preflight` in a separate process.

    Returns:
        Its line: what would be served, and why.

    Raises:
        ServingError: nothing of the release gives its numbers here.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(release_dir), runtime],
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    line = (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[-1]
    if done.returncode:
        raise ServingError(line)
    return line


def _main(arguments: Sequence[str]) -> int:
    try:
        record = run_preflight(arguments[0], runtime=arguments[1])
    except ModelopsError as error:
        print(error)
        return 1
    print(record.error or f"{record.runtime or 'fallback'}: {record.reason}")
    return int(record.status != "ok")


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
