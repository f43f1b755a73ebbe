"""Statistics and records of the data to dataset_card.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from modelops.base.errors import UsageError
from modelops.base.files import check_writable, read_json, sha256_bytes, write_json, write_text
from modelops.cards import statistics as stats
from modelops.cards.about import About, licence_words, parse_about, read_about
from modelops.cards.context import read_input
from modelops.cards.evaluated import UNSTATED
from modelops.cards.hub import dataset_front_matter
from modelops.cards.licences import data_licences
from modelops.cards.numbers import measurements_table
from modelops.cards.provenance import origins, packages, printed_from
from modelops.cards.render import render_template
from modelops.cards.sources import (
    CardSources,
    about_file,
    copy_picture,
    existing_notes,
    reference,
    with_notes,
    write_sources,
)
from modelops.records.data import DedupReport, SmokeReport, SplitReport

COLUMNS = (
    ("id", "text", "names the sample"),
    ("filepath", "text", "of the image, relative to the manifest"),
    ("caption", "text", "what the image shows"),
    ("license", "text", "of this sample"),
    ("source", "text", "where it comes from"),
    ("sha256", "text", "of the file's bytes"),
    ("nsfw_flag", "0 or 1", "1 for unsafe"),
    ("tags", "text", "separated by semicolons"),
    ("date_collected", "date", "YYYY-MM-DD"),
)


def write_dataset_card(
    out_path: str | Path,
    *,
    statistics: dict[str, Any] | str | Path,
    manifest: str | Path | None = None,
    dedup: str | Path | None = None,
    split: str | Path | None = None,
    smoke: str | Path | None = None,
    shard_manifest: str | Path | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    about: About | str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a dataset card, its images, NAME.statistics.json and NAME.sources.json beside it.

    Args:
        out_path: path of the card; notes of an earlier card are kept.
        statistics: of `data.stats.manifest_statistics`, or a JSON file of them.
        manifest, shard_manifest: the files that they describe; watched for changes if present.
        dedup, split, smoke: records of the data.
        pictures: what it shows -> image.
        about: sources, biases and licences, or their YAML file, which the check then compares; by
            default "not stated", with the licences that the manifest names.
        force: replace a file that is not such a card.

    Raises:
        UsageError: an input is missing, unreadable or of another kind.
        ConfigError: `about` is not valid, or states another licence than the manifest names.
        ModelopsError: the card would print an undefined or non-finite value.
    """
    card = Path(out_path)
    folder = card.parent
    check_writable(folder)
    notes = existing_notes(card, force=force)
    if isinstance(statistics, dict):
        path = card.with_suffix(".statistics.json")
        write_json(path, statistics)
    else:
        path = Path(statistics)
    named = {"statistics": path, "dedup": dedup, "split": split, "smoke": smoke}
    watched = {"manifest": manifest, "shard_manifest": shard_manifest}
    taken: set[str] = set()
    sources = CardSources(
        card="dataset",
        about=read_about(about).model_dump(mode="json"),
        inputs={role: reference(item, folder) for role, item in named.items() if item is not None},
        watched={
            **{role: reference(item, folder) for role, item in watched.items() if item is not None},
            **about_file(about, folder),
        },
        pictures=[copy_picture(item, alt, folder, taken) for alt, item in (pictures or {}).items()],
    )
    body = render_dataset_card(sources, folder)
    sources.body_sha256 = sha256_bytes(body.encode())
    write_text(card, with_notes(body, notes))
    write_sources(card, sources)
    return card


def render_dataset_card(sources: CardSources, folder: Path) -> str:
    """Render the card's text with an empty notes region, from the records as they are now.

    Raises:
        UsageError: an input is missing or of another kind.
        ModelopsError: the card would print an undefined or non-finite value.
    """
    about = parse_about(sources.about, source="about")
    path = sources.place("statistics", folder)
    counted = read_json(path)
    if not isinstance(counted, dict) or not isinstance(counted.get("samples"), int):
        raise UsageError(f"{path}: not the statistics of a manifest")
    records = {
        role: read_input(sources, folder, role, kind) if role in sources.inputs else None
        for role, kind in (("dedup", DedupReport), ("split", SplitReport), ("smoke", SmokeReport))
    }
    split, dedup, smoke = records["split"], records["dedup"], records["smoke"]
    made = [record for record in records.values() if record is not None]
    licences = data_licences(about.dataset_license, _counts(counted, path), source=str(path))
    try:
        context = {
            "about": about,
            "stated": about.dataset_id != UNSTATED,
            "manifest": _name(sources, "manifest") or "manifest.parquet",
            "shards": _name(sources, "shard_manifest"),
            "licence": licence_words(about, "dataset_license"),
            "licences": [] if licences == [about.dataset_license] else licences,
            "columns": COLUMNS,
            "summary": stats.summary(counted),
            "tables": stats.tables(counted),
            "quarantined": stats.quarantined(counted),
            **records,
            "calibration": measurements_table(
                dedup.calibration if isinstance(dedup, DedupReport) else {}
            ),
            "leakage": measurements_table(split.leakage if isinstance(split, SplitReport) else {}),
            "loading": measurements_table(
                smoke.measurements if isinstance(smoke, SmokeReport) else {}
            ),
            "pictures": sources.pictures,
            "inputs": sources.inputs,
            "printed": printed_from(sources, records, also={"statistics": stats.left_out(counted)}),
            "origins": origins(made),
            "packages": packages(made),
            "watched": sources.watched,
            "sources_sha256": sources.digest,
        }
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    text = dataset_front_matter(about, counted["samples"], licences)
    return text + render_template("dataset_card.md.j2", context)


def _name(sources: CardSources, role: str) -> str:
    """Return the name of a watched file, or an empty text without one."""
    return PurePosixPath(sources.watched[role].path).name if role in sources.watched else ""


def _counts(counted: dict[str, Any], path: Path) -> dict[str, int]:
    found = counted.get("licenses") or {}
    if not isinstance(found, dict) or not all(isinstance(n, int) for n in found.values()):
        raise UsageError(f"{path}: licenses: should be counts by name")
    return found
