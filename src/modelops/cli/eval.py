"""`modelops eval`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelops.cli.options import (
    DIRECTORY,
    FILE,
    PATH,
    dry_run_option,
    input_images_option,
    read_guidance,
    seed_option,
    trust_code_option,
)
from modelops.cli.output import emit, is_json, json_option, progress, say, table

if TYPE_CHECKING:
    from modelops.records.base import Measurement


@click.command("eval")
@click.argument("source")
@click.option("--manifest", type=FILE, metavar="FILE", help="Manifest of the real images.")
@click.option("--splits", type=FILE, metavar="FILE", help="Splits of the real images.")
@click.option("--reference", type=PATH, metavar="DIR|NPZ",
              help="Real images in place of a manifest: a folder of them, or an .npz file with mu "
              "and sigma of their Inception features, as pytorch-fid writes it.")  # fmt: skip
@click.option(
    "--split",
    default="test",
    show_default=True,
    help="Split that gives the reference images and the prompts.",
)
@click.option(
    "--train-split",
    default="train",
    show_default=True,
    help="Split of the training images, which the model must not copy.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=FILE,
    metavar="FILE",
    help="File of prompts, one a line, UTF-8.",
)
@input_images_option
@click.option("-n", type=click.IntRange(2), help="Number of images.  [default: one per prompt]")
@click.option("--replicates", type=click.IntRange(1), default=1, show_default=True,
              help="Number of images per prompt if -n is not given.")  # fmt: skip
@seed_option("Seed of the images and of the bootstrap resampling.")
@click.option(
    "--steps", type=click.IntRange(1), help="Number of sampling steps.  [default: the source's own]"
)
@click.option(
    "--guidance",
    type=click.FloatRange(0),
    callback=read_guidance,
    help="Classifier-free guidance scale; 0 or 1 is off.  [default: the source's own]",
)
@click.option(
    "--size",
    type=click.IntRange(1),
    metavar="PIXELS",
    help="Height and width of each image, in pixels.  [default: the source's own]",
)
@click.option("--lit", type=DIRECTORY, metavar="DIR",
              help="Folder of an alignment model from `modelops fit-lit`.")  # fmt: skip
@click.option("--inception-weights", type=FILE, metavar="FILE",
              help="Inception weights file of pytorch-fid, torch-fidelity or clean-fid. With it, "
              "FID, KID and Inception Score are measured.")  # fmt: skip
@click.option("--fid-mode", type=click.Choice(["clean", "legacy_pytorch", "legacy_tensorflow"]),
              default="clean", show_default=True,
              help="Resize method: that of clean-fid, pytorch-fid or torch-fidelity.")  # fmt: skip
@click.option("--extractor-dtype", type=click.Choice(["float32", "float64"]), default="float32",
              show_default=True, help="Precision of Inception; float64 for audits.")  # fmt: skip
@click.option("--clip-weights", type=PATH, metavar="FILE|DIR",
              help="open_clip state dict, or a directory with its config. With it, CLIPScore is "
              "measured.")  # fmt: skip
@click.option(
    "--clip-model",
    default="ViT-B-32-quickgelu",
    show_default=True,
    help="Architecture of the CLIP weights.",
)
@click.option("--dinov2-weights", type=DIRECTORY, metavar="DIR",
              help="DINOv2 as transformers saves it. With it, distances of DINOv2 features are "
              "measured.")  # fmt: skip
@click.option("--safety", metavar="FILTER", default="open_nsfw", show_default=True,
              help="Image filter that measures the unsafe rate: open_nsfw, "
              "transformers:PATH_OR_HUB, diffusers-safety-checker:PATH_OR_HUB, one from an "
              "installed package, or none.")  # fmt: skip
@click.option("--safety-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Score from which an image counts as unsafe.")  # fmt: skip
@click.option("--serve-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Score from which a service withholds an image.")  # fmt: skip
@click.option("--prompt-filter", metavar="FILTER", default="words", show_default=True,
              help="Prompt filter: words, words:DIR with your own lists, one from an installed "
              "package, or none.")  # fmt: skip
@click.option("--audit-safety", metavar="FILTER",
              help="Second image filter, to measure what the first one lets through.")  # fmt: skip
@click.option("--audit-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True,
              help="Score of the second filter from which an image counts as unsafe.")  # fmt: skip
@click.option("--blocklist", type=PATH, metavar="DIR|FILE",
              help="Images, or a file of hashes, that the model must not make again.")  # fmt: skip
@click.option("--train-record", type=FILE, metavar="FILE",
              help="train.json of the run: its losses enter the overfitting note.")  # fmt: skip
@click.option("--slice-by", multiple=True, metavar="COLUMN|tags|words",
              help="Compare slices of the prompts with the rest: by manifest column, tags, or "
              "words about people in the prompt. Repeatable.")  # fmt: skip
@click.option("--slice-min", type=click.IntRange(2), default=10, show_default=True,
              help="Independent prompt groups that a slice needs for a verdict.")  # fmt: skip
@click.option("--resamples", type=click.IntRange(20), default=2000, show_default=True,
              help="Number of bootstrap resamples.")  # fmt: skip
@click.option("--stream/--no-stream", default=None,
              help="Keep features in files and read them chunk by chunk, so that memory does not "
              "grow with the number of images.  [default: from 10,000 images on]")  # fmt: skip
@click.option("--cache/--no-cache", default=True, show_default=True,
              help="Keep the features of the reference images beside their manifest, and use "
              "those kept before.")  # fmt: skip
@click.option("--max-failures", type=click.IntRange(0), default=0, show_default=True,
              help="Number of images that may fail before the evaluation is refused.")  # fmt: skip
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images per call; does not change the images.",
)
@click.option("--processes", type=click.IntRange(1), default=1, metavar="N", show_default=True,
              help="Number of processes that make and read the images; changes images and values "
              "by rounding only.")  # fmt: skip
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device on which torch runs a checkpoint and the extractors: cpu, cuda, cuda:1.",
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="Runtime of an exported artifact: auto, or a name such as openvino.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              default=120, show_default=True,
              help="Seconds to wait for an answer of a service.")  # fmt: skip
@click.option("--out", type=FILE, required=True, metavar="FILE", help="Record to write.")
@click.option("--report/--no-report", default=True, show_default=True,
              help="Also write an HTML page beside the record.")  # fmt: skip
@dry_run_option
@trust_code_option
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

    SOURCE is a checkpoint directory or hub id (OWNER/NAME@REVISION), an artifact directory, the URL
    of a running service (with #model=NAME where it has several), or a folder of images. A killed
    run continues where it was. Exits 1 if the record is `failed`: more images failed than
    --max-failures, or the safety filter is broken.

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
        with progress("loading") as shown:
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
