"""`modelops export`: a checkpoint to ONNX or INT8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.cli import output

if TYPE_CHECKING:
    from modelops.records import ArtifactRecord


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(["onnx", "int8"]), required=True, help="Format.")
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="The artifact's directory.",
)
@click.option(
    "--onnx",
    "onnx_dir",
    type=click.Path(path_type=Path),
    help="For int8: the fp32 artifact of the same checkpoint.  [default: 'onnx' beside --out]",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    help="Text file, one prompt a line, to calibrate and compare with.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="INT",
    help="Of calibration and parity noise.",
)
@click.option(
    "--calibration",
    "method",
    type=click.Choice(["minmax", "percentile", "entropy"]),
    default="minmax",
    show_default=True,
    help="For int8: how a tensor's range is taken from the values seen.",
)
@click.option("--allow", is_flag=True, help="Keep an export outside its parity bounds; recorded.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already there.")
@output.dry_run_option
@output.json_option
def export(
    checkpoint: Path,
    target: str,
    out_dir: Path,
    onnx_dir: Path | None,
    prompts_file: Path | None,
    seed: int,
    method: str,
    allow: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT for a runtime, and prove that it makes the same pictures.

    An export that is not equal to its source within the bounds of its precision is not kept.

    \b
    Examples:
      modelops export runs/pilot/checkpoints/step-1000 --to onnx --out artifacts/pilot/onnx
      modelops export runs/pilot/checkpoints/step-1000 --to int8 --out artifacts/pilot/int8
    """
    fp32_dir = onnx_dir or out_dir.parent / "onnx"
    from modelops.export.artifact import check_destination, read_artifact
    from modelops.files import read_text

    check_destination(out_dir, overwrite=overwrite)
    if target == "int8":
        read_artifact(fp32_dir)
    lines = read_text(prompts_file).splitlines() if prompts_file else None
    prompts = None if lines is None else [line for line in lines if line.strip()]
    if dry_run:
        plan = {
            "status": "dry-run", "checkpoint": str(checkpoint), "to": target, "out": str(out_dir),
            "onnx": str(fp32_dir) if target == "int8" else None,
            "prompts": None if prompts is None else len(prompts),
        }  # fmt: skip
        output.emit(
            plan, as_json=as_json, text=f"would export {checkpoint} to {target} in {out_dir}"
        )
        return

    from modelops.export.calibration import DEFAULT_PROMPTS

    texts = DEFAULT_PROMPTS if prompts is None else prompts
    with output.progress(f"exporting to {target}", quiet=as_json) as on_progress:
        if target == "onnx":
            from modelops.export.onnx import export_onnx

            record = export_onnx(
                checkpoint, out_dir, prompts=texts, allow=allow, overwrite=overwrite,
                on_progress=on_progress,
            )  # fmt: skip
        else:
            from modelops.export.int8 import export_int8

            record = export_int8(
                fp32_dir, checkpoint, out_dir, prompts=texts, seed=seed, method=method,  # type: ignore[arg-type]
                allow=allow, overwrite=overwrite, on_progress=on_progress,
            )  # fmt: skip
    if record.error:
        output.say(f"warning: {record.error}")
    for name, speed in record.speed.items():
        if speed.high is not None and speed.high < 1.0:
            output.say(f"warning: slower than its baseline here: {name} {speed.value:.2f} x")
    output.emit(record.model_dump(mode="json"), as_json=as_json)
    if not as_json:
        _print_tables(record, out_dir)


def _print_tables(record: ArtifactRecord, out_dir: Path) -> None:
    output.table(
        ("component", "precision", "MB", "nodes", "int8 nodes", "dynamic axes"),
        [
            (
                item.name, item.precision, f"{item.bytes / 1e6:.1f}", str(item.total_nodes),
                str(item.quantized_nodes), ", ".join(item.dynamic_axes),
            )
            for item in record.components
        ],
        title=f"{out_dir}: {record.format}, {record.precision}, for {record.runtime}",
    )  # fmt: skip
    output.table(
        ("parity", "measure", "value", "bound", "n", ""),
        [
            (
                check.name, check.measure, f"{check.value:.3g}", f"{check.bound:.3g}", str(check.n),
                "ok" if check.passed else "FAILED",
            )
            for check in record.parity
        ],
    )  # fmt: skip
    if record.speed:
        output.table(
            ("speed", "times as fast", "95 % interval", "ms", "baseline ms"),
            [
                (
                    name, f"{item.value:.2f}", f"{item.low:.2f} to {item.high:.2f}",
                    f"{item.details['of_ms']:.1f}", f"{item.details['over_ms']:.1f}",
                )
                for name, item in record.speed.items()
            ],
        )  # fmt: skip
