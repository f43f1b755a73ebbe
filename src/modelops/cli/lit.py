"""`modelops fit-lit`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.output import dry_run_option, emit, json_option, progress, say, table

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("fit-lit")
@click.argument("manifest", type=_FILE)
@click.option(
    "--splits",
    type=_FILE,
    metavar="FILE",
    help="Splits of the samples.  [default: splits.parquet beside MANIFEST]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed for fitting the heads.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
              metavar="DIR", help="Folder for an open_clip checkpoint and lit.json.")  # fmt: skip
@dry_run_option
@json_option
def fit_lit(
    manifest: Path, splits: Path | None, seed: int, out: Path, dry_run: bool, as_json: bool
) -> None:
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
        emit({"status": "ok", "dry_run": True, "out": str(out)}, as_json=as_json,
             text=f"would fit on {manifest} and write {out}")  # fmt: skip
        return
    with progress("Fitting", quiet=as_json) as report:
        record = fit(manifest, splits, out, seed=seed, on_progress=report)
    emit(record.model_dump(mode="json"), as_json=as_json)
    if not as_json:
        from modelops.evaluation.report.rows import metric_rows

        table(["metric", "value", "95 % interval", "n", "method"], metric_rows(record.metrics))
        say(f"{out} ({record.duration_s:.0f} s)")
