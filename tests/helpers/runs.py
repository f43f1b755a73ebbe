"""Training runs of tests: a frozen config, and what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelops.base.files import write_json
from modelops.training.launch import RunPlan, plan_run


def freeze(config: Path, run_dir: Path, **options: Any) -> RunPlan:
    """Plan a run and write its config.json, as `modelops train` does before the trainer starts."""
    plan = plan_run(config, run_dir=run_dir, **options)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", plan.spec.model_dump(mode="json"))
    return plan


def stats_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of stats.jsonl."""
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each row that has one."""
    return [(row["step"], row["loss"]) for row in stats_rows(run_dir) if "loss" in row]
