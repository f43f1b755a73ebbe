"""Launch of a training run: check a config, freeze it as runs/NAME/config.json, run the trainer.

The trainer is never imported: a crash, a resume or a multi-process launch does not touch this
process. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelops.base.errors import ConfigError, IntegrityError, UsageError
from modelops.base.files import check_writable, read_json, sha256_file, write_json
from modelops.records.base import InputRef
from modelops.training.config import RunSpec, TrainConfig, load_config

OnLine = Callable[[str], None]
OnProgress = Callable[[int, int], None]
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Checked run that has not been started.

    Attributes:
        spec: content of config.json.
        run_dir: the run's directory.
        resume: whether it continues from a checkpoint.
        command: command to execute.
        environment: variables that are set for it.
    """

    spec: RunSpec
    run_dir: Path
    resume: bool
    command: list[str]
    environment: dict[str, str]

    @property
    def shell_line(self) -> str:
        """The command as one would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def launch_training(
    config: str | Path,
    run_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    processes: int = 1,
    on_line: OnLine | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Train as a child process and wait for it; returns its exit code.

    Args:
        config: the YAML config; its relative paths are relative to its folder.
        run_dir: runs/NAME; must be new unless `resume`.
        overrides: "section.key=value" each.
        resume: continue from the newest checkpoint, or start if there is none.
        processes: data-parallel processes.
        on_line: gets remarks and the child's stderr, line by line; by default stderr.
        on_progress: gets (steps done, steps planned).

    Raises:
        UsageError: the config, its data or the run directory cannot be used.
    """
    plan = plan_run(
        config, run_dir=Path(run_dir), overrides=overrides, resume=resume, processes=processes
    )
    return execute_run(plan, on_line=on_line, on_progress=on_progress)


def plan_run(
    config_path: str | Path,
    *,
    run_dir: Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    processes: int = 1,
) -> RunPlan:
    """Check everything that can be checked before a process is started; writes nothing.

    Raises:
        ConfigError: the config is not valid, or differs from that of the run to resume.
        UsageError: data files are missing, or the run directory is taken.
    """
    path = Path(config_path)
    config = load_config(path, overrides)
    if processes < 1:
        raise UsageError(f"--processes {processes}: should be at least 1")
    run_dir = run_dir or default_run_dir(path)
    root = path.resolve().parent
    inputs = {
        name: InputRef(path=_relative(file, root), sha256=sha256_file(file))
        for name, file in data_files(config, root, source=str(path)).items()
    }
    spec = RunSpec(
        run_name=run_dir.name,
        root=_relative(root, run_dir.resolve()),
        config=config,
        config_sha256=config.sha256,
        inputs=inputs,
        processes=processes,
    )
    _check_run_dir(spec, run_dir, resume=resume)
    command, environment = training_command(run_dir / "config.json", processes, resume=resume)
    return RunPlan(spec, run_dir, resume, command, environment)


def execute_run(
    plan: RunPlan, *, on_line: OnLine | None = None, on_progress: OnProgress | None = None
) -> int:
    """Write config.json, run the trainer, forward SIGINT and SIGTERM; returns its exit code.

    A run that a forwarded signal ended gives 128 + the signal's number.

    Raises:
        ModelopsError: the run directory cannot be written.
    """
    say = on_line or (lambda line: print(line, file=sys.stderr))
    check_writable(plan.run_dir)
    write_json(plan.run_dir / "config.json", plan.spec.model_dump(mode="json"))
    with (
        subprocess.Popen(
            plan.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **plan.environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C reaches it once, through us
        ) as child,
        _forwarding(child) as forwarded,
    ):
        log = plan.run_dir / "launcher.log" if plan.spec.processes > 1 else None
        errors = threading.Thread(target=_pass_on, args=(child.stderr, say, log), daemon=True)
        errors.start()
        try:
            for line in child.stdout or ():
                _handle_event(line.rstrip("\n"), say, on_progress)
            code = child.wait()
            errors.join()
        except BaseException:
            child.terminate()  # it saves a checkpoint and ends
            raise
    if forwarded and code:
        return 128 + forwarded[-1]
    if code < 0:
        say(f"the training process was killed by {signal.Signals(-code).name}; go on with --resume")
        return 128 - code
    return code


def training_command(
    config: Path, processes: int, *, resume: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Return (command, environment variables) that train a frozen config with `processes`."""
    tail = ["modelops.trainer", str(config), *(["--resume"] if resume else [])]
    if processes == 1:
        return [sys.executable, "-m", *tail], {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // processes))}
    if _has_cuda():
        configs = Path(__file__).resolve().parents[1] / "modelops" / "trainer" / "configs"
        with contextlib.suppress(ImportError, AttributeError):
            from importlib.resources import files

            configs = Path(str(files("modelops.trainer") / "configs"))
        return [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(configs / "accelerate" / "ddp.yaml"),
            "--num_processes", str(processes), "--main_process_port", str(_free_port()),
            "--module", *tail,
        ], environment  # fmt: skip
    # accelerate's own launcher starts one process on a CPU; torch's starts them all, over gloo.
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node", str(processes), "--master_port", str(_free_port()),
        "--module", *tail,
    ], {**environment, "ACCELERATE_USE_CPU": "true"}  # fmt: skip


def read_run_spec(path: str | Path) -> RunSpec:
    """Read runs/NAME/config.json.

    Raises:
        ConfigError: it is not one, or its config is not the one its digest promises.
    """
    try:
        spec = RunSpec.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from error
    if spec.config.sha256 != spec.config_sha256:
        raise ConfigError(f"{path}: was edited after the run began", hint="start a new run")
    return spec


def verify_inputs(spec: RunSpec, root: Path) -> None:
    """Compare the data files of a run with the digests in its config.json.

    Raises:
        IntegrityError: one of them has changed.
    """
    for name, ref in spec.inputs.items():
        if sha256_file(root / ref.path) != ref.sha256:
            raise IntegrityError(
                f"{root / ref.path}: the {name} changed since the run was set up",
                hint="start a new run with another --run-name",
            )


def data_files(config: TrainConfig, root: Path, *, source: str) -> dict[str, Path]:
    """{manifest, shards, splits: path} of the data files that a config reads.

    Raises:
        ConfigError: one of them does not exist.
    """
    named = {
        "manifest": root / config.data.manifest if config.data.manifest else None,
        "shards": root / config.data.shards if config.data.shards else None,
        "splits": splits_path(config, root),
    }
    found = {}
    for name, path in named.items():
        if path is None:
            continue
        if not path.is_file():
            raise ConfigError(
                f"{source}: data.{name}: {path} does not exist",
                hint="paths are relative to the config file's folder; "
                "make the data with modelops data, or set the path with "
                f"--set data.{name}=PATH",
            )
        found[name] = path
    return found


def splits_path(config: TrainConfig, root: Path) -> Path | None:
    """The splits file that a config names, or the one beside its data, or None."""
    if config.data.splits is not None:
        return root / config.data.splits
    for name in (config.data.manifest, config.data.shards):
        if name is not None and (beside := (root / name).parent / "splits.parquet").is_file():
            return beside
    return None


def default_run_dir(config_path: Path, *, out: Path | None = None, name: str | None = None) -> Path:
    """runs/NAME beside the config; pilot_config.yaml gives runs/pilot.

    Raises:
        UsageError: the name is not one plain word.
    """
    name = name or config_path.stem.removesuffix("_config")
    if not _RUN_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a usable run name", hint="use letters, digits, '-', '_' and '.'"
        )
    return (out or config_path.parent / "runs") / name


def _check_run_dir(spec: RunSpec, run_dir: Path, *, resume: bool) -> None:
    frozen = run_dir / "config.json"
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise UsageError(
                f"{run_dir} already exists",
                hint="go on with it: --resume; or begin another: --run-name NAME",
            )
        return
    if not frozen.is_file():
        if run_dir.exists() and any(run_dir.iterdir()):
            raise UsageError(f"{run_dir}: not a run (no config.json)", hint="--run-name NAME")
        return
    before = read_run_spec(frozen)
    changes = before.config.differences(spec.config)
    if before.effective_batch != spec.effective_batch:
        changes.append(
            "effective batch (microbatch x grad_accum_steps x processes): "
            f"{before.effective_batch} -> {spec.effective_batch}"
        )
    for name in sorted({*before.inputs, *spec.inputs}):
        old, new = before.inputs.get(name), spec.inputs.get(name)
        if (old.sha256 if old else None) != (new.sha256 if new else None):
            changes.append(f"{name}: its bytes changed")
    if changes:
        raise ConfigError(
            f"{frozen}: cannot go on with a different config: {'; '.join(changes)}",
            hint="change it back, or begin another run with --run-name NAME",
        )


def _handle_event(line: str, say: OnLine, on_progress: OnProgress | None) -> None:
    try:
        event: Any = json.loads(line)
    except json.JSONDecodeError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        if line.strip():
            say(line)
        return
    if event["event"] == "note":
        say(str(event["text"]))
    elif event["event"] in ("step", "end") and on_progress and event["total"]:
        on_progress(int(event["step"]), int(event["total"]))


def _pass_on(stream: Any, say: OnLine, log: Path | None) -> None:
    """Say the lines of a child's stderr. A launcher of several processes adds its own tracebacks:
    with `log`, everything goes there, and only the trainer's own lines are said, each once."""
    with log.open("a", encoding="utf-8") if log else contextlib.nullcontext() as file:
        said = set()
        for line in stream:
            text = line.rstrip("\n")
            if file is not None:
                file.write(line)
                file.flush()
                if text in said or not text.startswith(("error: ", "  try: ", "warning: ")):
                    continue
                said.add(text)
            if text.strip():
                say(text)


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to the child; yields the list of those that came."""
    came: list[int] = []

    def forward(signum: int, _frame: Any) -> None:
        came.append(signum)
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signum)

    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may set handlers
        return
    old = {name: signal.signal(name, forward) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()
