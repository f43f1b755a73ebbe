"""Steps that are skipped while nothing they depend on has changed.

A ledger (`.modelops/steps.json` in the project) remembers for each step the digest of its inputs
and settings and the digest of each output. A step is fresh when all of these still hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelops import __version__
from modelops.base.errors import UsageError
from modelops.base.files import read_json, sha256_json, sha256_path, write_json

LEDGER = Path(".modelops/steps.json")
OnProgress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of a chain.

    Attributes:
        name: unique in its chain.
        title: what it does, for the progress display.
        run: does it; returns one line for the summary.
        inputs: files and directories it reads, relative to the project; or a function that names
            them, of a step that reads what an earlier one decided.
        outputs: files and directories it leaves, relative to the project.
        settings: JSON-able values that it also depends on.
        exclude: top-level names below a directory that do not count in its digest.
    """

    name: str
    title: str
    run: Callable[[OnProgress], str]
    inputs: Sequence[str] | Callable[[], Sequence[str]] = ()
    outputs: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ("training_state",)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of a step. `seconds` is the time of the run that made the outputs."""

    name: str
    title: str
    state: Literal["done", "fresh"]
    summary: str
    seconds: float


class Chain:
    """Chain of steps that run in order in a project directory, skipping the fresh ones."""

    def __init__(self, root: Path, steps: Sequence[Step]) -> None:
        names = [step.name for step in steps]
        if len(set(names)) != len(names):
            raise ValueError("step names must be unique")
        self.root = root
        self.steps = steps

    def run(
        self,
        *,
        force: Sequence[str] = (),
        on_start: Callable[[Step], OnProgress] | None = None,
    ) -> Iterator[StepResult]:
        """Run the steps that are not fresh; yield a result for each step as it ends.

        Args:
            force: names of steps to run even if they are fresh.
            on_start: called when a step starts to run; returns what receives its progress.

        Raises:
            UsageError: `force` names a step that is not there.
            ModelopsError: whatever a step raises; earlier steps stay recorded.
        """
        unknown = set(force) - {step.name for step in self.steps}
        if unknown:
            known = ", ".join(step.name for step in self.steps)
            raise UsageError(f"no step named {', '.join(sorted(unknown))}", hint=f"steps: {known}")
        for step in self.steps:
            ledger = self._read()
            key = self._key(step)
            entry = ledger.get(step.name)
            if step.name not in force and entry and self._is_fresh(step, key, entry):
                yield StepResult(
                    name=step.name, title=step.title, state="fresh",
                    summary=entry["summary"], seconds=entry["seconds"],
                )  # fmt: skip
                continue
            report = on_start(step) if on_start else (lambda done, total: None)
            started = time.monotonic()
            summary = step.run(report)
            seconds = time.monotonic() - started
            ledger[step.name] = {
                "key": key,
                "outputs": {name: self._digest(name, step) for name in step.outputs},
                "summary": summary,
                "seconds": seconds,
            }
            write_json(self.root / LEDGER, ledger)
            yield StepResult(
                name=step.name, title=step.title, state="done", summary=summary, seconds=seconds
            )

    def _key(self, step: Step) -> str:
        names = step.inputs() if callable(step.inputs) else step.inputs
        inputs = {name: self._digest(name, step) for name in names}
        missing = sorted(name for name, digest in inputs.items() if digest is None)
        if missing:
            raise UsageError(f"step {step.name}: {self.root / missing[0]} is missing")
        return sha256_json(
            {
                "step": step.name,
                "inputs": inputs,
                "settings": dict(step.settings),
                "version": __version__,
            }
        )

    def _is_fresh(self, step: Step, key: str, entry: Mapping[str, Any]) -> bool:
        return (
            entry.get("key") == key
            and set(entry["outputs"]) == set(step.outputs)
            and all(
                digest is not None and self._digest(name, step) == digest
                for name, digest in entry["outputs"].items()
            )
        )

    def _digest(self, name: str, step: Step) -> str | None:
        path = self.root / name
        return sha256_path(path, exclude=step.exclude) if path.exists() else None

    def _read(self) -> dict[str, Any]:
        path = self.root / LEDGER
        if not path.exists():
            return {}
        data = read_json(path)
        return data if isinstance(data, dict) else {}
