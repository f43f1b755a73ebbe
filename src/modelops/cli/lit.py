"""`modelops fit-lit`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import DIRECTORY, FILE, dry_run_option, seed_option
from modelops.cli.output import emit, is_json, json_option, progress, say, table


@click.command("fit-lit")
@click.argument("manifest", type=FILE)
@click.option(
    "--splits",
    type=FILE,
    metavar="FILE",
    help="Splits of the samples.  [default: splits.parquet beside MANIFEST]",
)
@seed_option("Seed for fitting the heads.")
@click.option("--out", type=DIRECTORY, required=True,
              metavar="DIR", help="Folder for an open_clip checkpoint and lit.json.")  # fmt: skip
@dry_run_option
@json_option
def fit_lit(manifest: Path, splits: Path | None, seed: int, out: Path, dry_run: bool) -> None:
    """Fit the alignment model that `modelops eval --lit` scores prompts with.

    Two frozen towers (EfficientNet-Lite0, MiniLM) get heads fitted on the train split, chosen on
    val and measured on test, so it needs no download. Its held-out retrieval rates, which are
    printed beside every score, show how far its scores can be trusted.

    \b
    Example:
      modelops fit-lit data/manifest.parquet --out models/lit
    """
    from modelops.data.split import read_splits
    from modelops.evaluation.lit import fit_lit as fit

    splits = splits or manifest.parent / "splits.parquet"
    if dry_run:
        read_splits(splits)
        emit({"status": "ok", "dry_run": True, "out": str(out)},
             text=f"would fit on {manifest} and write {out}")  # fmt: skip
        return
    with progress("Fitting") as report:
        record = fit(manifest, splits, out, seed=seed, on_progress=report)
    emit(record.model_dump(mode="json"))
    if not is_json():
        from modelops.evaluation.report.rows import metric_rows

        table(["metric", "value", "95 % interval", "n", "method"], metric_rows(record.metrics))
        say(f"{out} ({record.duration_s:.0f} s)")
