"""`modelops eval`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modelops.cli.output import dry_run_option, emit, json_option, progress, say, table

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("source")
@click.option("--manifest", type=_FILE, metavar="FILE", help="Real pictures.")
@click.option("--splits", type=_FILE, metavar="FILE", help="Their splits.")
@click.option("--split", default="test", show_default=True, help="Reference pictures and prompts.")
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
              help="clean-fid's inception-2015-12-05.pt: measures FID.")  # fmt: skip
@click.option("--clip-weights", type=_FILE, metavar="FILE",
              help="An open_clip state dict: measures CLIPScore.")  # fmt: skip
@click.option(
    "--clip-model",
    default="ViT-B-32-quickgelu",
    show_default=True,
    help="Architecture of the CLIP weights.",
)
@click.option("--safety", type=click.Choice(["open_nsfw", "none"]), default="open_nsfw",
              show_default=True, help="Image filter behind the unsafe rate.")  # fmt: skip
@click.option("--safety-threshold", type=click.FloatRange(0, 1, min_open=True), default=0.5,
              show_default=True, help="Score from which an image is unsafe.")  # fmt: skip
@click.option("--resamples", type=click.IntRange(20), default=2000, show_default=True,
              help="Bootstrap resamples.")  # fmt: skip
@click.option("--max-failures", type=click.IntRange(0), default=0, show_default=True,
              help="So many images may fail.")  # fmt: skip
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Images per call; does not change them.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Of a checkpoint: cpu, cuda, cuda:1."
)
@click.option("--runtime", default="auto", show_default=True, help="Of an exported artifact.")
@click.option("--out", type=_FILE, required=True, metavar="FILE", help="The record to write.")
@dry_run_option
@json_option
def evaluate(
    source: str,
    size: int | None,
    batch_size: int,
    device: str,
    runtime: str,
    out: Path,
    dry_run: bool,
    as_json: bool,
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
    """
    from modelops.evaluation.settings import EvaluationSettings

    settings = EvaluationSettings(height=size, width=size, **chosen)
    if dry_run:
        plan = {"source": source, "out": str(out), "settings": _plain(settings)}
        emit({"status": "ok", "dry_run": True, **plan}, as_json=as_json,
             text=f"would measure {source} and write {out}")  # fmt: skip
        return 0
    from modelops.evaluation.evaluate import evaluate as run
    from modelops.evaluation.sources import open_source

    opened = open_source(source, batch_size=batch_size, device=device, runtime=runtime)
    with progress("Evaluating", quiet=as_json) as report:
        record = run(opened, settings, out_path=out, on_progress=report)
    emit(record.model_dump(mode="json"), as_json=as_json)
    if not as_json:
        from modelops.evaluation.report import metric_rows

        table(["metric", "value", "95 % interval", "n", "method"], metric_rows(record.metrics))
        say(f"{out} ({record.duration_s:.0f} s)")
    return 0


def _plain(settings: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
