"""Project directory of the demo: its layout, its creation and its results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import check_writable, read_json, remove_leftovers, write_json, write_text
from modelops.demo.budgets import Budget, policy_file, trainer_config
from modelops.demo.plan import Plan
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record

SEED = 0
NEED_BYTES = 2_000_000_000
SETTINGS = ".modelops/demo.json"
CONFIG = "pilot_config.yaml"
POLICY = "policy.yaml"
RUN = "runs/pilot"
FINAL, EARLY, RELEASED = (f"evaluations/{name}.json" for name in ("final", "early", "released"))
ONNX_DIR, INT8_DIR = "artifacts/pilot/onnx", "artifacts/pilot/int8"
INT8_REFUSED = f"{INT8_DIR}.refused.json"  # the record of an INT8 export that was not kept
RELEASED_DIR = "artifacts/pilot/released"  # the one of them that is evaluated, gated and served
MANIFEST, DEDUP = "data/manifest.parquet", "data/dedup_report.json"
SPLITS, SHARDS = "data/splits.parquet", "data/shard_manifest.csv"
CARDS = ("cards/model_card.md", "cards/dataset_card.md")
LIT, GRID, VERDICT = "models/lit", "cards/grid.png", "gate/verdict.json"
ENDPOINT, SERVED_IMAGES = "evaluations/endpoint.json", 8
MODEL_NAME = "openmoji-pilot"
_ALWAYS_CITED = (
    EARLY, FINAL, RELEASED, f"{RUN}/train.json", f"{RUN}/config.json", f"{ONNX_DIR}/artifact.json",
    DEDUP, "data/split.json", "data/smoke.json",
)  # fmt: skip


def cited(root: Path) -> list[str]:
    """The records that cards are printed from."""
    return [*_ALWAYS_CITED, int8_record(root)]


def int8_record(root: Path) -> str:
    """Return the record of the INT8 export: the artifact's, or that of its refusal."""
    refused = (root / INT8_REFUSED).is_file()
    return INT8_REFUSED if refused else f"{INT8_DIR}/artifact.json"


def check_place(root: Path, budget_name: str) -> None:
    """Make sure that a demo of this budget can be in `root`, before anything is measured for it.

    Raises:
        UsageError: the directory holds something else, or a demo of another budget.
        ModelopsError: it cannot be written, or the disk is too full.
    """
    _read_state(root, budget_name)
    check_writable(root, need_bytes=NEED_BYTES)


def is_made(root: Path, budget_name: str) -> bool:
    """Return whether the project directory is ready, so that nothing in it needs planning.

    Raises:
        UsageError: the directory holds something else, or a demo of another budget.
    """
    return bool(_read_state(root, budget_name).get("ready"))


def kept_plan(root: Path, budget_name: str) -> Plan | None:
    """Read the plan of an existing demo; None if there is no demo or it is from before plans.

    Raises:
        UsageError: the directory holds something else, or a demo of another budget; or the plan is
            damaged.
    """
    values = _read_state(root, budget_name).get("plan")
    return Plan.from_dict(values) if values else None


def prepare(root: Path, budget_name: str, budget: Budget, plan: Plan | None = None) -> None:
    """Make the project directory, or accept it as one of the same budget.

    Args:
        budget: with the plan applied.
        plan: written down, for the runs after a first one that was interrupted.

    Raises:
        UsageError: the directory holds something else, or a demo of another budget.
        ModelopsError: it cannot be written, or the disk is too full.
    """
    from modelops.training.new_project import init_project

    check_place(root, budget_name)
    state = _read_state(root, budget_name)
    for folder in (".", "data", "runs", RUN, "models", "artifacts/pilot", "evaluations", "cards"):
        remove_leftovers(root / folder)
    if not state.get("ready"):
        known = {"budget": budget_name, **({"plan": plan.as_dict()} if plan else {})}
        write_json(root / SETTINGS, {**known, "ready": False})
        init_project(root, force=True)
        write_text(root / CONFIG, config_text(budget))
        write_text(root / POLICY, policy_file(budget.policy).read_text("utf-8"))
        write_json(root / SETTINGS, {**known, "ready": True})


def config_text(budget: Budget) -> str:
    """The training config of a budget, with its own time limit in place of the config's."""
    text = trainer_config(budget.config).read_text("utf-8")
    if budget.training_seconds is None:
        return text
    line = f"time_limit_seconds: {budget.training_seconds:.0f}"
    changed, count = re.subn(r"time_limit_seconds: *\S+", line, text)
    if count != 1:
        raise ModelopsError(f"{budget.config}: has {count} time limits", hint="reinstall modelops")
    return changed


def _read_state(root: Path, budget_name: str) -> dict[str, Any]:
    settings = root / SETTINGS
    state: dict[str, Any] = read_json(settings) if settings.exists() else {}
    if state:
        earlier = state.get("budget")
        if earlier != budget_name:
            raise UsageError(
                f"{root}: made with --budget {earlier}, not {budget_name}",
                hint=f"use --budget {earlier}, or another directory",
            )
    elif root.exists() and not root.is_dir():
        raise UsageError(f"{root}: not a directory", hint="name a new directory")
    elif root.exists() and any(root.iterdir()):
        raise UsageError(f"{root}: not empty and not a demo", hint="name a new directory")
    return state


def grid_prompts() -> list[str]:
    """The 64 prompts of the fixed 8 x 8 grid."""
    text = (Path(__file__).parent / "prompts.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line]


def headline(root: Path) -> list[tuple[str, str, str]]:
    """Return (measure, value, meaning) rows about a finished demo."""
    early, final, released = (
        read_record(root / name, EvaluationRecord) for name in (EARLY, FINAL, RELEASED)
    )
    artifact = read_record(root / RELEASED_DIR / "artifact.json", ArtifactRecord)
    int8 = read_record(root / int8_record(root), ArtifactRecord)
    key = "frechet_distance_lite0"
    rows = [
        ("Fréchet distance at 5 %", early.metrics[key], "Lite0 features, to held-out images"),
        ("Fréchet distance, final", final.metrics[key], "lower is better"),
        (f"Fréchet distance, {artifact.precision}", released.metrics[key],
         "the artifact that is served"),
        ("... of training images", final.metrics[f"{key}_floor"], "the floor at this n"),
        ("alignment gain", final.metrics["lit_alignment_gain"], "own minus shuffled prompts"),
        ("nearest-neighbour gap", final.metrics["nearest_train_distance_gap"],
         "above 0: farther from training images than held-out ones are"),
        ("unsafe rate", released.metrics["unsafe_rate"], "open_nsfw, exact interval"),
        *((name, value, f"INT8, {'in use' if int8.status == 'ok' else 'refused'}")
          for name, value in int8.speed.items()),
    ]  # fmt: skip
    return [(name, describe(value), meaning) for name, value, meaning in rows]


def describe(measurement: Measurement) -> str:
    """`0.123 [0.101, 0.140]`, or why there is no number."""
    if measurement.value is None:
        return f"not measured ({measurement.not_measured})"
    return f"{measurement.value:.3g} [{measurement.low:.3g}, {measurement.high:.3g}]"
