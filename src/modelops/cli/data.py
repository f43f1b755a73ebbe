"""`modelops data`: manifests, duplicates, splits and shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modelops.cli.options import PATH, dry_run_option, seed_option
from modelops.cli.output import emit, is_json, json_option, progress, say, table

MANIFEST = click.argument("manifest", type=PATH)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Make and check manifests, splits and shards.

    \b
    Example, from drawings to shards that are safe to train on:
      modelops data corpus openmoji data --resolution 64
      modelops data check data/manifest.parquet
      modelops data dedup data/manifest.parquet
      modelops data split data/manifest.parquet
      modelops data shard data/manifest.parquet --resolution 64
      modelops data smoke data/shard_manifest.csv
    """


@data.group()
def corpus() -> None:
    """Make a corpus: images with a manifest.

    \b
    Example:
      modelops data corpus openmoji data --resolution 64
    """


@corpus.command()
@click.argument("directory", type=PATH)
@click.option(
    "--resolution",
    default=64,
    show_default=True,
    metavar="PIXELS",
    help="Height and width of each image, in pixels.",
)
@click.option("--limit", type=int, metavar="N", help="Render at most N images, in whole groups.")
@seed_option("Seed for choosing groups.")
@dry_run_option
@json_option
def openmoji(directory: Path, resolution: int, limit: int | None, seed: int, dry_run: bool) -> None:
    """Render OpenMoji into DIRECTORY/images with DIRECTORY/manifest.parquet.

    The images are CC BY-SA 4.0: show the attribution where you show them.

    \b
    Example:
      modelops data corpus openmoji data --resolution 64
      modelops data corpus openmoji small --resolution 32 --limit 150
    """
    from modelops.data.corpora import openmoji as source

    if dry_run:
        planned = len(source.take_groups(source.list_drawings(), limit, seed))
        emit(
            {"status": "planned", "samples": planned, "directory": str(directory)},
            text=f"would render {planned} images into {directory / 'images'}",
        )
        return
    with progress("rendering") as on_progress:
        path = source.build_corpus(
            directory, resolution=resolution, limit=limit, seed=seed, on_progress=on_progress
        )
    from modelops.data.manifest import read_manifest

    found, counts, credit = (
        read_manifest(path, check_files=False),
        source.coverage(),
        source.attribution(),
    )
    groups = len({row.group for row in found.rows})
    emit(
        {
            "status": "ok", "manifest": str(path), "samples": len(found.rows), "groups": groups,
            "drawings_without_name": counts.unnamed, "attribution": credit,
        },
        text=f"{path}: {len(found.rows)} images in {groups} groups; "
        f"{counts.unnamed} drawings without an English name skipped\n{credit['text']}",
    )  # fmt: skip


@data.command()
@MANIFEST
@json_option
def check(manifest: Path) -> int:
    """Check a manifest and every file it names; exits 1 if a row cannot be used.

    \b
    Example:
      modelops data check data/manifest.parquet
      modelops data check data/manifest.csv --json | jq .quarantined
    """
    from modelops.data.check import check_manifest

    with progress("decoding") as on_progress:
        result = check_manifest(manifest, on_progress=on_progress)
    emit(result)
    if not is_json():
        rows = [["usable", str(result["usable"])], ["quarantined", str(result["n_quarantined"])]]
        rows += [[f"license {name}", str(count)] for name, count in result["licenses"].items()]
        rows += [[f"size {name}", str(count)] for name, count in result["sizes"].items()]
        table(["what", "samples"], rows, title=str(manifest))
        if result["quarantined"]:
            table(["quarantined", "reason"], result["quarantined"].items())
    return 1 if result["n_quarantined"] else 0


@data.command()
@MANIFEST
@click.option(
    "--report",
    type=PATH,
    help="Report to write.  [default: dedup_report.json beside MANIFEST]",
)
@click.option(
    "--threshold",
    default=0.95,
    show_default=True,
    metavar="COSINE",
    help="Cosine similarity from which two images are near-duplicates.",
)
@click.option(
    "--neighbours",
    default=5,
    show_default=True,
    metavar="K",
    help="Nearest neighbours to check for each image.",
)
@seed_option("Seed of calibration and shown pairs.")
@click.option(
    "--cleaned", type=PATH, metavar="MANIFEST",
    help="Also write a manifest without duplicates, in the folder of the old one.",
)  # fmt: skip
@click.option(
    "--drop", default="bytes,pixels", show_default=True, metavar="KINDS",
    help="Kinds of duplicates that --cleaned leaves out: bytes, pixels, embedding.",
)  # fmt: skip
@json_option
def dedup(
    manifest: Path,
    report: Path | None,
    threshold: float,
    neighbours: int,
    seed: int,
    cleaned: Path | None,
    drop: str,
) -> None:
    """Find duplicates; writes dedup_report.json and dedup_candidates.png to look at.

    \b
    Example:
      modelops data dedup data/manifest.parquet
      modelops data dedup data/manifest.parquet --cleaned data/cleaned.parquet
    """
    from modelops.data.dedup import CANDIDATE_SHEET, clean_manifest, deduplicate, parse_kinds

    kinds = parse_kinds(drop)
    target = report or manifest.parent / "dedup_report.json"
    with progress("embedding") as on_progress:
        found = deduplicate(
            manifest, target,
            threshold=threshold, neighbours=neighbours, seed=seed, on_progress=on_progress,
        )  # fmt: skip
    result: dict[str, Any] = {"report": str(target), **found.model_dump(mode="json")}
    if cleaned:
        kept, left_out = clean_manifest(manifest, target, cleaned, kinds=kinds)
        result |= {"cleaned": str(cleaned), "kept": kept, "left_out": left_out}
    emit(result)
    if is_json():
        return
    rows = [
        ["images", str(found.n_images)],
        ["quarantined", str(len(found.quarantined))],
        ["exact copies", str(found.n_exact_duplicates)],
        [f"pairs at cosine {threshold}", str(found.n_candidate_pairs)],
        ["clusters", str(len(found.clusters))],
        ["linked components", str(len(found.components))],
        ["largest component", str(found.chaining.get("largest", 0))],
    ]
    rows += [[name, format_measurement(value)] for name, value in found.calibration.items()]
    rows += [["kept / left out", f"{result['kept']} / {result['left_out']}"]] if cleaned else []
    table(["what", "value"], rows, title=f"{target} ({found.extractor})")
    for warning in found.warnings:
        say(f"warning: {warning}")
    if found.files:
        say(f"look at {target.parent / CANDIDATE_SHEET}")


@data.command()
@MANIFEST
@click.option(
    "--dedup",
    "dedup_path",
    type=PATH,
    help="Duplicate report.  [default: dedup_report.json beside MANIFEST]",
)
@click.option(
    "--out",
    type=PATH,
    help="Folder to write to.  [default: the manifest's folder]",
)
@seed_option("Seed for dealing units to splits.")
@click.option(
    "--fractions",
    default="0.8,0.1,0.1",
    show_default=True,
    metavar="TRAIN,VAL,TEST",
    help="Shares of the three splits; they add up to 1.",
)
@json_option
def split(
    manifest: Path,
    dedup_path: Path | None,
    out: Path | None,
    seed: int,
    fractions: str,
) -> None:
    """Deal samples to train, val and test; writes splits.parquet and split.json.

    \b
    Example:
      modelops data split data/manifest.parquet --seed 0
    """
    from modelops.data.split import parse_fractions, split_manifest

    shares = parse_fractions(fractions)
    folder = out or manifest.parent
    with progress("reading embeddings") as on_progress:
        found = split_manifest(
            manifest, dedup_path or manifest.parent / "dedup_report.json", folder,
            seed=seed, fractions=shares, on_progress=on_progress,
        )  # fmt: skip
    emit({"report": str(folder / "split.json"), **found.model_dump(mode="json")})
    if is_json():
        return
    rows = [
        [name, f"{count} ({found.fractions[name]:.1%}) in {found.group_counts[name]} units"]
        for name, count in found.counts.items()
    ]
    rows += [[f"leak {name}", format_measurement(value)] for name, value in found.leakage.items()]
    table(["what", "value"], rows, title=found.strategy)
    for warning in found.warnings:
        say(f"warning: {warning}")


@data.command()
@MANIFEST
@click.option(
    "--splits",
    type=PATH,
    help="Splits of the samples.  [default: splits.parquet beside MANIFEST]",
)
@click.option(
    "--out",
    type=PATH,
    help="Folder to write to.  [default: the manifest's folder]",
)
@click.option(
    "--resolution",
    default=64,
    show_default=True,
    metavar="PIXELS",
    help="Height and width of each image, in pixels.",
)
@click.option(
    "--samples-per-shard",
    default=1000,
    show_default=True,
    metavar="N",
    help="Images in a tar file.",
)
@seed_option("Seed of the order of samples.")
@dry_run_option
@json_option
def shard(
    manifest: Path,
    splits: Path | None,
    out: Path | None,
    resolution: int,
    samples_per_shard: int,
    seed: int,
    dry_run: bool,
) -> None:
    """Write WebDataset tars and shard_manifest.csv; replaces OUT/shards as a whole.

    \b
    Example:
      modelops data shard data/manifest.parquet --resolution 64
    """
    from modelops.data.shards import read_shard_manifest, write_shards
    from modelops.data.split import read_splits

    splits_path, folder = splits or manifest.parent / "splits.parquet", out or manifest.parent
    if dry_run:
        count = len(read_splits(splits_path))
        emit(
            {"status": "planned", "samples": count, "directory": str(folder / "shards")},
            text=f"would write {count} samples to {folder / 'shards'}",
        )
        return
    with progress("writing shards") as on_progress:
        path = write_shards(
            manifest, splits_path, folder,
            resolution=resolution, samples_per_shard=samples_per_shard, seed=seed,
            on_progress=on_progress,
        )  # fmt: skip
    rows = read_shard_manifest(path)
    emit(
        {
            "status": "ok",
            "shard_manifest": str(path),
            "shards": [
                {"shard": row.path, "split": row.split, "samples": row.samples, "bytes": row.bytes,
                 "sha256": row.sha256}
                for row in rows
            ],
        },
    )  # fmt: skip
    if not is_json():
        table(
            ["shard", "split", "samples", "bytes", "sha256"],
            [[r.path, r.split, str(r.samples), str(r.bytes), r.sha256[:12]] for r in rows],
            title=str(path),
        )


@data.command()
@click.argument("shard_manifest", type=PATH)
@click.option(
    "--out",
    type=PATH,
    help="Record to write.  [default: smoke.json beside SHARD_MANIFEST]",
)
@click.option("--batch-size", default=64, show_default=True, metavar="N", help="Images in a batch.")
@click.option(
    "--workers",
    default=0,
    show_default=True,
    metavar="N",
    help="Number of DataLoader workers; 0 reads in this process.",
)
@json_option
def smoke(shard_manifest: Path, out: Path | None, batch_size: int, workers: int) -> int:
    """Read every sample through a DataLoader and judge; exits 1 if the verdict is fail.

    \b
    Example:
      modelops data smoke data/shard_manifest.csv --workers 2
    """
    from modelops.data.smoke import smoke_test

    with progress("reading") as on_progress:
        report = smoke_test(
            shard_manifest, out or shard_manifest.parent / "smoke.json",
            batch_size=batch_size, workers=workers, on_progress=on_progress,
        )  # fmt: skip
    emit(report.model_dump(mode="json"))
    if not is_json():
        rows = [
            ["verdict", report.verdict],
            ["samples", str(report.n_samples)],
            ["shards", str(report.n_shards)],
            ["images per second", f"{report.images_per_second:.0f}"],
            ["slowest batch / median", f"{report.slowest_batch_over_median:.1f}"],
        ]
        rows += [["reason", reason] for reason in report.reasons[:20]]
        table(["what", "value"], rows, title=str(shard_manifest))
    return 0 if report.verdict == "pass" else 1


@data.command()
@MANIFEST
@click.option(
    "--splits",
    type=PATH,
    help="Splits of the samples, to count by split as well.",
)
@click.option(
    "--dedup",
    "dedup_path",
    type=PATH,
    help="Duplicate report, to count duplicates as well.",
)
@json_option
def stats(manifest: Path, splits: Path | None, dedup_path: Path | None) -> None:
    """Count what a manifest holds: licences, sources, tags, captions, sizes.

    \b
    Example:
      modelops data stats data/manifest.parquet --splits data/splits.parquet
    """
    from modelops.data.stats import manifest_statistics

    found = manifest_statistics(manifest, splits, dedup_path)
    emit(found)
    if not is_json():
        table(["what", "value"], flatten_counts(found), title=str(manifest))


def format_measurement(value: Any) -> str:
    """A measurement as `value [low, high], n`."""
    if value.value is None:
        return f"not measured: {value.not_measured}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}], n {value.n}"


def flatten_counts(counts: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested counts as rows of a table; of long lists the first 12."""
    rows: list[list[str]] = []
    for name, value in counts.items():
        if isinstance(value, dict):
            shown = dict(list(value.items())[:12])
            rows += flatten_counts(shown, f"{prefix}{name} ")
            if len(value) > len(shown):
                rows.append([f"{prefix}{name} ...", f"{len(value) - len(shown)} more"])
        else:
            rows.append([f"{prefix}{name}", str(value)])
    return rows
