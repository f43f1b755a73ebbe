"""`modelops export`: a checkpoint to ONNX, INT8, TensorRT or TorchScript."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelops.cli import output
from modelops.cli.options import PATH, dry_run_option

if TYPE_CHECKING:
    from modelops.export.lora import Lora
    from modelops.records.export import ArtifactRecord

# Which formats an option is for; given with another one it is refused, not ignored.
_SCOPES = {
    "onnx_dir": ("int8", "tensorrt"),
    "precision": ("onnx",),
    "size": ("onnx", "torchscript"),
    **dict.fromkeys(("lora_path", "lora_mode", "lora_scale"), ("onnx", "torchscript")),
    **dict.fromkeys(
        (
            "seed", "method", "error_budget", "search_seconds", "smooth", "weight_range",
            "ort_cpu",
        ),
        ("int8",),
    ),
    **dict.fromkeys(
        (
            "profiles", "workspace_mb", "optimization_level", "refit", "version_compatible",
            "timing_cache", "device",
        ),
        ("tensorrt",),
    ),
}  # fmt: skip
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _only_one(
    _ctx: click.Context, _option: click.Parameter, values: tuple[Path, ...]
) -> Path | None:
    """Refuse an option that is there twice: the last would count alone."""
    if len(values) > 1:
        raise click.BadParameter(f"{len(values)} were given, and one is taken; merge them first")
    return values[0] if values else None


def _size(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.lower().split("x")
    if not all(part.isdigit() for part in parts) or len(parts) > 2 or "0" in parts:
        raise click.BadParameter("give pixels as HEIGHTxWIDTH, such as 512x768, or one number")
    return int(parts[0]), int(parts[-1])


@click.command()
@click.pass_context
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option(
    "--to",
    "target",
    type=click.Choice(["onnx", "int8", "tensorrt", "torchscript"]),
    required=True,
    help="Format to export to.",
)
@click.option(
    "--out",
    "out_dir",
    type=PATH,
    required=True,
    help="Directory of the artifact.",
)
@click.option(
    "--onnx",
    "onnx_dir",
    type=PATH,
    help="For int8 and tensorrt: ONNX artifact of the same checkpoint to start from.  [default: "
    "'onnx' beside --out]",
)
@click.option(
    "--precision",
    type=click.Choice(list(_PRECISIONS)),
    default="fp32",
    show_default=True,
    help="For onnx: precision of the graph. fp16 and bf16 are mixed: norms and values that would "
    "overflow stay fp32.",
)
@click.option(
    "--size",
    callback=_size,
    metavar="HxW",
    help="For onnx and torchscript: image size in pixels for export and comparison.  [default: "
    "the model's own]",
)
@click.option(
    "--lora",
    "lora_path",
    type=PATH,
    multiple=True,
    callback=_only_one,
    help="For onnx and torchscript: LoRA weights to include.",
)
@click.option(
    "--lora-mode",
    type=click.Choice(["fused", "kept"]),
    default="fused",
    show_default=True,
    help="Whether to add the LoRA to the weights (fused) or to keep its layers.",
)
@click.option(
    "--lora-scale",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Factor of the LoRA, fused or kept.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=PATH,
    help="Text file of prompts for calibration and comparison, one a line.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="INT",
    help="For int8: seed of the noise for calibration and parity.",
)
@click.option(
    "--calibration",
    "method",
    type=click.Choice(["minmax", "percentile", "entropy"]),
    default="minmax",
    show_default=True,
    help="For int8: method that finds a tensor's range in the values seen.",
)
@click.option(
    "--error-budget",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="X",
    help="For int8: largest relative error of an output that the chosen set of layers may have.  "
    "[default: 0.06, or 1.5 x the rounding of bf16]",
)
@click.option(
    "--search-seconds",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="S",
    help="For int8: seconds for measuring groups of layers.",
)
@click.option(
    "--weight-range",
    type=click.Choice(["auto", "full", "reduced"]),
    default="auto",
    show_default=True,
    help="For int8: bits of the weights. full: 8. reduced: 7, with which sums saturate on no "
    "processor. auto: 7 where that adds little error.",
)
@click.option(
    "--smooth/--no-smooth",
    default=True,
    show_default=True,
    help="For int8: try SmoothQuant and shifts on transformers.",
)
@click.option(
    "--ort-cpu/--no-ort-cpu",
    default=None,
    help="For int8: also try a graph for onnxruntime's CPU provider.  [default: without OpenVINO]",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="AXIS=MIN:OPT:MAX,...",
    help="For tensorrt: ranges of the dynamic axes. Repeatable.  [default: batch=1:2:16]",
)
@click.option(
    "--workspace",
    "workspace_mb",
    type=click.IntRange(min=1),
    metavar="MB",
    help="For tensorrt: memory in MB that a layer may use while it runs.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="0-5",
    help="For tensorrt: effort of the builder's search; 5 takes longest.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="For tensorrt: build an engine whose weights can be exchanged later.",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="For tensorrt: build an engine that runs in later minor versions.",
)
@click.option(
    "--timing-cache",
    type=PATH,
    help="For tensorrt: folder where kernel timings are kept between builds.",
)
@click.option(
    "--device",
    type=click.IntRange(min=0),
    default=0,
    help="For tensorrt: number of the CUDA device.",
)
@click.option(
    "--allow",
    is_flag=True,
    help="Keep an export that is outside its bounds or not faster; the record says so.",
)
@click.option(
    "--overwrite", "--rebuild", "overwrite", is_flag=True,
    help="Replace an artifact that is already there.",
)  # fmt: skip
@dry_run_option
@output.json_option
def export(
    ctx: click.Context,
    checkpoint: str,
    target: str,
    out_dir: Path,
    onnx_dir: Path | None,
    prompts_file: Path | None,
    allow: bool,
    overwrite: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Export CHECKPOINT for a runtime, and prove that it makes the same images.

    CHECKPOINT is a diffusers directory or hub id of a pipeline that makes or changes images; each
    of its networks becomes a graph. An export that is not equal to its source within the
    bounds of its precision is not kept, and neither is INT8 that is not faster than fp32.

    TensorRT engines are built and checked where an NVIDIA GPU and TensorRT are.

    \b
    Examples:
      modelops export runs/pilot/checkpoints/step-1000 --to onnx --out artifacts/pilot/onnx
      modelops export runs/pilot/checkpoints/step-1000 --to int8 --out artifacts/pilot/int8
      modelops export sd15/ --to onnx --precision fp16 --size 512x512 --out artifacts/sd15/fp16
      modelops export sd15/ --to tensorrt --onnx artifacts/sd15/fp16 --profile batch=1:2:8 \\
          --out artifacts/sd15/tensorrt
    """
    _check_scopes(ctx, target)
    start = onnx_dir or out_dir.parent / "onnx"
    from modelops.evaluation.prompts import clean_text, read_lines
    from modelops.export.artifact.directory import check_destination, read_artifact

    check_destination(out_dir, overwrite=overwrite)
    from_artifact = target in ("int8", "tensorrt")
    if from_artifact:
        read_artifact(start)
    lines = None if prompts_file is None else map(clean_text, read_lines(prompts_file))
    prompts = None if lines is None else [line for line in lines if line]
    if dry_run:
        plan = {
            "status": "dry-run", "checkpoint": checkpoint, "to": target, "out": str(out_dir),
            "onnx": str(start) if from_artifact else None,
            "prompts": None if prompts is None else len(prompts),
        }  # fmt: skip
        output.emit(plan, text=f"would export {checkpoint} to {target} in {out_dir}")
        return

    from modelops.export.calibration import DEFAULT_PROMPTS

    common: dict[str, Any] = {
        "prompts": DEFAULT_PROMPTS if prompts is None else prompts,
        "allow": allow,
        "overwrite": overwrite,
    }
    with output.progress(f"exporting to {target}") as on_progress:
        record = _run(target, checkpoint, start, out_dir, options, common, on_progress)
    if record.error:
        output.say(f"warning: {record.error}")
    output.emit(record.model_dump(mode="json"))
    if not output.is_json():
        _print_tables(record, out_dir)


def _check_scopes(ctx: click.Context, target: str) -> None:
    given = click.core.ParameterSource.COMMANDLINE
    for parameter in ctx.command.params:
        formats = _SCOPES.get(parameter.name or "")
        asked = ctx.get_parameter_source(parameter.name or "") is given
        if asked and formats and target not in formats:
            raise click.UsageError(
                f"{parameter.opts[0]} is for --to {' and '.join(formats)}, not {target}"
            )
        if asked and parameter.name in ("lora_mode", "lora_scale") and not ctx.params["lora_path"]:
            raise click.UsageError(f"{parameter.opts[0]} says how to add a LoRA: give --lora too")


def _run(
    target: str,
    checkpoint: str,
    start: Path,
    out_dir: Path,
    options: dict[str, Any],
    common: dict[str, Any],
    on_progress: output.Progress,
) -> ArtifactRecord:
    shown: dict[str, Any] = {"on_progress": on_progress, "on_stage": on_progress.stage}
    if target == "onnx":
        from modelops.export.to_onnx import export_onnx

        return export_onnx(
            checkpoint, out_dir, precision=_PRECISIONS[options["precision"]], size=options["size"],
            lora=_lora(options), **shown, **common,
        )  # fmt: skip
    if target == "torchscript":
        from modelops.export.to_torchscript import export_torchscript

        return export_torchscript(
            checkpoint, out_dir, size=options["size"], lora=_lora(options), **shown, **common
        )
    if target == "int8":
        from modelops.export.to_int8 import Int8Options, export_int8

        how = Int8Options(
            method=options["method"], error_budget=options["error_budget"],
            search_seconds=options["search_seconds"], smooth=options["smooth"],
            weight_range=options["weight_range"], ort_cpu=options["ort_cpu"],
        )  # fmt: skip
        return export_int8(
            start, checkpoint, out_dir, seed=options["seed"], options=how, **shown, **common
        )
    from modelops.export.tensorrt.fingerprint import EngineFlags
    from modelops.export.to_tensorrt import DEFAULT_PROFILES, export_tensorrt

    given = {
        "workspace_bytes": options["workspace_mb"] and options["workspace_mb"] << 20,
        "optimization_level": options["optimization_level"],
        "refit": options["refit"],
        "version_compatible": options["version_compatible"],
    }
    flags = EngineFlags(**{name: value for name, value in given.items() if value is not None})

    return export_tensorrt(
        start, checkpoint, out_dir, profiles=options["profiles"] or DEFAULT_PROFILES, flags=flags,
        device=options["device"], timing_cache=options["timing_cache"], **shown, **common,
    )  # fmt: skip


def _lora(options: dict[str, Any]) -> Lora | None:
    if options["lora_path"] is None:
        return None
    from modelops.export.lora import Lora

    return Lora(
        options["lora_path"], fused=options["lora_mode"] == "fused", scale=options["lora_scale"]
    )


def _print_tables(record: ArtifactRecord, out_dir: Path) -> None:
    from modelops.export.artifact.layers import searched_layers

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
                check.name, check.measure.replace("_", " "), f"{check.value:.3g}",
                f"{'>=' if check.measure in ('psnr_db', 'ssim') else '<='} {check.bound:.3g}",
                str(check.n),
                "ok" if check.passed else "FAILED",
            )
            for check in record.parity
        ],
    )  # fmt: skip
    chosen = record.calibration.get("weight_range")
    if chosen:
        output.say(f"weights: {chosen['chosen']} range, {chosen['why']}")
    if record.reproduced:
        output.table(
            ("processor", "runtime", "", ""),
            [
                (
                    one.processor + (f" ({one.imitated_by})" if one.imitated_by else ""),
                    one.runtime, one.distance,
                    one.answer if one.passed else f"{one.answer}: not served there",
                )
                for one in record.reproduced
            ],
        )  # fmt: skip
    search = record.calibration.get("search")
    if search:
        output.table(
            ("layers", "nodes", "error", "ms saved", "runs in", "why"),
            [
                (
                    row["group"], str(row["nodes"]), f"{row['error']:.4f}",
                    "" if row["ms_saved"] is None else f"{row['ms_saved']:.2f}",
                    row["runs_in"], row["why"],
                )
                for row in searched_layers(record)
            ],
            title=f"error {search['error']:.3f}, budget {search['budget']:.3f}",
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
