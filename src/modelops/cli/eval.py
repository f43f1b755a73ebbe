"""`modelops eval`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelops.cli.output import dry_run_option, emit, is_json, json_option, progress, say, table

if TYPE_CHECKING:
    from modelops.records.base import Measurement

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("source")
@click.option("--manifest", type=_FILE, metavar="FILE", help="Real images.")
@click.option("--splits", type=_FILE, metavar="FILE", help="Their splits.")
@click.option("--split", default="test", show_default=True, help="Reference images and prompts.")
@click.option("--train-split", default="train", show_default=True, help="Must not be copied from.")
@click.option(
    "--prompts", "prompts_file", type=_FILE, metavar="FILE", help="One prompt a line, UTF-8."
)
@click.option("-n", type=click.IntRange(2), help="Images. [default: one per prompt]")
@click.option("--replicates", type=click.IntRange(1), default=1, show_default=True,
              help="Images per prompt, without -n.")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images and resampling."
)
@click.option("--steps", type=click.IntRange(1), help="[default: the source's own]")
@click.option("--guidance", type=float, help="[default: the source's own]")
@click.option("--size", type=click.IntRange(1), metavar="PIXELS", help="Height and width.")
@click.option("--lit", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Alignment model of `modelops fit-lit`.")  # fmt: skip
@click.option("--inception-weights", type=_FILE, metavar="FILE",
              help="pytorch-fid's, torch-fidelity's or clean-fid's file: measures FID, KID, "
              "Inception Score.")  # fmt: skip
@click.option("--fid-mode", type=click.Choice(["clean", "legacy_pytorch", "legacy_tensorflow"]),
              default="clean", show_default=True,
              help="Resize of clean-fid, pytorch-fid or torch-fidelity.")  # fmt: skip
@click.option("--extractor-dtype", type=click.Choice(["float32", "float64"]), default="float32",
              show_default=True, help="Of Inception; float64 for audits.")  # fmt: skip
@click.option("--clip-weights", type=click.Path(path_type=Path), metavar="FILE|DIR",
              help="An open_clip state dict, or a directory with its config: measures "
              "CLIPScore.")  # fmt: skip
@click.option(
    "--clip-model",
    default="ViT-B-32-quickgelu",
    show_default=True,
    help="Architecture of the CLIP weights.",
)
@click.option("--dinov2-weights", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="DINOv2 as transformers saves it: measures distances on it.")  # fmt: skip
@click.option("--safety", metavar="FILTER", default="open_nsfw", show_default=True,
              help="Image filter behind the unsafe rate: open_nsfw, transformers:PATH_OR_HUB, "
              "diffusers-safety-checker:PATH_OR_HUB, one of a package, or none.")  # fmt: skip
@click.option("--safety-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Score from which an image is unsafe.")  # fmt: skip
@click.option("--serve-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Score from which a service withholds it.")  # fmt: skip
@click.option("--prompt-filter", metavar="FILTER", default="words", show_default=True,
              help="words, words:DIR of own lists, one of a package, or none.")  # fmt: skip
@click.option("--audit-safety", metavar="FILTER",
              help="A second image filter: measures what the first lets through.")  # fmt: skip
@click.option("--audit-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Its score from which an image is unsafe.")  # fmt: skip
@click.option("--blocklist", type=click.Path(path_type=Path), metavar="DIR|FILE",
              help="Images, or their hashes, that must not come out again.")  # fmt: skip
@click.option("--train-record", type=_FILE, metavar="FILE",
              help="The run's train.json: its losses enter the note on overfitting.")  # fmt: skip
@click.option("--slice-by", multiple=True, metavar="COLUMN|tags|words",
              help="Compare slices of the prompts with the rest: by manifest column, tags, or "
              "words about people in the prompt. Repeatable.")  # fmt: skip
@click.option("--slice-min", type=click.IntRange(2), default=10, show_default=True,
              help="Independent groups of prompts for a verdict on a slice.")  # fmt: skip
@click.option("--resamples", type=click.IntRange(20), default=2000, show_default=True,
              help="Bootstrap resamples.")  # fmt: skip
@click.option("--stream/--no-stream", default=None,
              help="Keep features in files and read them chunk by chunk, so that memory does not "
              "grow with the number of images.  [default: from 10,000 images on]")  # fmt: skip
@click.option("--cache/--no-cache", default=True, show_default=True,
              help="Keep features of the reference images beside their manifest, and use those "
              "that are kept.")  # fmt: skip
@click.option("--max-failures", type=click.IntRange(0), default=0, show_default=True,
              help="So many images may fail.")  # fmt: skip
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images per call; does not change them.",
)
@click.option("--processes", type=click.IntRange(1), default=1, metavar="N", show_default=True,
              help="Make and read the images in N processes: the same images, and numbers but for "
              "rounding.")  # fmt: skip
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where torch runs a checkpoint and extractors: cpu, cuda, cuda:1.",
)
@click.option("--runtime", default="auto", show_default=True, help="Of an exported artifact.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              default=120, show_default=True,
              help="How long to wait for an answer of a service.")  # fmt: skip
@click.option("--out", type=_FILE, required=True, metavar="FILE", help="The record to write.")
@click.option("--report/--no-report", default=True, show_default=True,
              help="Write a page to read beside the record.")  # fmt: skip
@dry_run_option
@json_option
def evaluate(
    source: str,
    size: int | None,
    batch_size: int,
    processes: int,
    device: str,
    runtime: str,
    timeout: float,
    out: Path,
    report: bool,
    dry_run: bool,
    **chosen: Any,
) -> int:
    """Measure SOURCE and write an evaluation record.

    SOURCE is a checkpoint directory or hub id, an artifact directory, the URL of a running service,
    or a folder of images. A run that was killed goes on where it was. Exits 1 if the record is
    `failed`: more images failed than --max-failures, or the safety filter is broken.

    \b
    Examples:
      modelops eval runs/pilot/checkpoints/step-1000 --manifest data/manifest.parquet \\
          --splits data/splits.parquet --lit models/lit -n 256 --out evaluations/final.json
      modelops eval http://127.0.0.1:3000 --prompts prompts.txt --lit models/lit \\
          --out evaluations/endpoint.json
      modelops eval runs/pilot/checkpoints/step-1000 --prompts prompts.txt --processes 4 \\
          --device cuda --out evaluations/final.json
    """
    from modelops.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(height=size, width=size, extractor_device=device, **chosen)
    if settings.slice_by:
        from modelops.evaluation.measures.slices import check_slice_options

        check_slice_options(settings.manifest, settings.slice_by)
    if dry_run:
        plan = {"source": source, "out": str(out), "settings": _plain(settings)}
        also = f" and {out.with_suffix('.html')}" if report else ""
        emit({"status": "ok", "dry_run": True, **plan},
             text=f"would measure {source} and write {out}{also}")  # fmt: skip
        return 0
    from modelops.cli.report import write_report_beside
    from modelops.evaluation.evaluate import evaluate as run
    from modelops.evaluation.workers.open import open_with_workers

    opening: dict[str, Any] = {
        "uri": source,
        "batch_size": batch_size,
        "device": device,
        "runtime": runtime,
        "timeout_s": timeout,
    }
    opened, workers = open_with_workers(opening, processes)
    try:
        with progress("opening") as shown:
            record = run(
                opened, settings, out_path=out, workers=workers,
                on_progress=shown, on_stage=shown.stage,
            )  # fmt: skip
    except Exception:  # the record says `failed`, and so does its report
        if report and out.is_file() and (page := write_report_beside(out)):
            say(str(page))
        raise
    page = write_report_beside(out) if report else None
    emit(record.model_dump(mode="json"))
    if not is_json():
        from modelops.evaluation.report.rows import metric_rows

        table(["metric", "value", "95 % interval", "n", "method"], metric_rows(record.metrics))
        if record.slices:
            from modelops.evaluation.measures.slices import slice_metrics, slice_rows, slice_summary

            table(["slice", "groups", *slice_metrics(record.slices)], slice_rows(record.slices))
            say(slice_summary(record.slices))
        for warning, metrics in _warnings(record.metrics).items():
            of = ", ".join(metrics) if len(metrics) <= 4 else f"{len(metrics)} metrics"
            say(f"warning: {of}: {warning}")
        say(f"{out} ({record.duration_s:.0f} s)")
    if page:
        say(str(page))
    return 0


def _warnings(metrics: Mapping[str, Measurement]) -> dict[str, list[str]]:
    """{warning: metrics that carry it}"""
    found: dict[str, list[str]] = {}
    for name, measured in metrics.items():
        for warning in measured.warnings:
            found.setdefault(warning, []).append(name)
    return found


def _plain(settings: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
