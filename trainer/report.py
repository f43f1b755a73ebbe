"""Report of a finished run for a person: report.md and loss.png."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from modelops.base.files import write_bytes, write_text
from modelops.records.train import TrainRecord, read_stats
from modelops.training.config import TrainConfig

SIGNIFICANT = 0.02


def loss_trend(losses: Sequence[float]) -> Literal["down", "flat", "up", "unknown"]:
    """Return the trend of logged losses, the last third against the first.

    By a rank test (p ≤ 0.02).

    "unknown" below twelve values.
    """
    third = len(losses) // 3
    if third < 4:
        return "unknown"
    from scipy.stats import mannwhitneyu

    # Ranks, not means: the first losses are far larger than all others and would drown the rest.
    early, late = losses[:third], losses[-third:]
    if mannwhitneyu(late, early, alternative="less").pvalue <= SIGNIFICANT:
        return "down"
    return (
        "up" if mannwhitneyu(late, early, alternative="greater").pvalue <= SIGNIFICANT else "flat"
    )


def write_report(run_dir: Path, record: TrainRecord, config: TrainConfig) -> None:
    """Write loss.png and report.md from stats.jsonl, the grids and the record."""
    rows = read_stats(run_dir / "stats.jsonl")
    curves = {
        name: [(row["step"], row[name]) for row in rows if name in row]
        for name in (
            "loss",
            "validation_loss",
            "train_probe_loss",
            "lr",
            "grad_norm",
            "early_nearest_train_gap",
        )
    }
    if curves["loss"]:
        write_bytes(run_dir / "loss.png", _plot(curves))
    grids = sorted((run_dir / "grids").glob("step-*.png"))
    write_text(run_dir / "report.md", _text(record, config, curves, grids))


def _text(
    record: TrainRecord,
    config: TrainConfig,
    curves: dict[str, list[tuple[int, float]]],
    grids: list[Path],
) -> str:
    minutes = record.training_seconds / 60
    lines = [
        f"# Run {record.run_name}",
        "",
        f"{record.status}: {record.stop_reason or record.error or ''}".rstrip(": "),
        "",
        "| | |",
        "|---|---|",
        f"| steps | {record.steps} of {record.planned_steps} |",
        f"| images seen | {record.images_seen} ({_epochs(record)}) |",
        f"| effective batch | {record.effective_batch} on {record.processes} process(es) |",
        f"| parameters | {record.parameters / 1e6:.2f} M |",
        f"| training time | {minutes:.1f} min{_limit(record)} |",
        f"| before it: data, captions, networks | {_number(record.setup_seconds)} s |",
        f"| speed | {_number(record.images_per_second)} images/s on {record.device} |",
        f"| precision | {record.precision}: {record.precision_reason} |",
        f"| measured before the first step | {_rates(record)} |",
        f"| peak memory | {_number(record.peak_memory_gb)} GB |",
        f"| loss | {_number(record.final_train_loss)}, trend {record.loss_trend} |",
        f"| held-out loss | {_number(record.final_validation_loss)} |",
        f"| same measure on training images | {_number(_last(curves['train_probe_loss']))} |",
        f"| nearest training image: samples minus held-out images | "
        f"{_number(_last(curves['early_nearest_train_gap']))} |",
        f"| left out | {len(record.quarantined)} image(s) |",
        "",
    ]
    lines += [f"- {warning}" for warning in record.warnings]
    if curves["loss"]:
        lines += ["", "![loss](loss.png)"]
    if grids:
        shown = grids if len(grids) <= 3 else [grids[0], grids[len(grids) // 2], grids[-1]]
        shown.sort(key=lambda path: int(path.stem.removeprefix("step-")))
        lines += ["", "Samples of the averaged weights, same prompts and seeds:", ""]
        lines += [f"![{path.stem}](grids/{path.name})" for path in shown]
    lines += ["", f"Config sha256 `{record.config_sha256[:16]}`, seed {config.training.seed}.", ""]
    return "\n".join(lines)


def _plot(curves: dict[str, list[tuple[int, float]]]) -> bytes:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    labels = {
        "loss": "training (live weights)",
        "train_probe_loss": "training images, fixed noise (averaged weights)",
        "validation_loss": "held-out images, fixed noise (averaged weights)",
    }
    for name, label in labels.items():
        if curves[name]:
            style: dict[str, Any] = {"alpha": 0.5} if name == "loss" else {"marker": "."}
            top.plot(*zip(*curves[name], strict=True), label=label, **style)
    top.set_yscale("log")
    top.yaxis.set_major_formatter(ScalarFormatter())
    top.yaxis.set_minor_formatter(ScalarFormatter())
    top.set_ylabel("velocity error (MSE)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(*zip(*curves["lr"], strict=True), color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _last(curve: list[tuple[int, float]]) -> float | None:
    return curve[-1][1] if curve else None


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _limit(record: TrainRecord) -> str:
    if record.time_limit_seconds is None:
        return ""
    return f" ({record.training_seconds:.0f} s of a limit of {record.time_limit_seconds:.0f} s)"


def _rates(record: TrainRecord) -> str:
    rates = record.precision_images_per_second
    found = [f"{name} {_number(rate)} images/s" for name, rate in rates.items()]
    return ", ".join(found) or _number(None)


def _epochs(record: TrainRecord) -> str:
    if not record.n_train_images:
        return "no images"
    return f"{record.images_seen / record.n_train_images:.1f} epochs of {record.n_train_images}"
