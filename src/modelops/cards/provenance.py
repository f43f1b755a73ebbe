"""Provenance of a card's numbers: records, and what made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from markupsafe import Markup

from modelops.base.environment import Environment
from modelops.cards.escape import code, link, markdown, seconds
from modelops.cards.sources import CardSources
from modelops.cards.unprinted import left_out
from modelops.records.base import Record


def printed_from(
    sources: CardSources, records: Mapping[str, Record | None], also: Mapping[str, str] = {}
) -> Iterable[dict[str, Markup]]:
    """Return the rows of the card's table of records: role, file, time, what else is in it, digest.

    Args:
        sources: of the card.
        records: role -> record.
        also: role -> what else is in it, of inputs that are no records.
    """
    for role, file in sources.inputs.items():
        record = records.get(role)
        yield {
            "role": markdown(role),
            "file": link(PurePosixPath(file.path).name, file.path),
            "made": Markup(f"{record.started_at:%Y-%m-%d %H:%M} UTC, {seconds(record.duration_s)}")
            if record
            else Markup(""),
            "also": markdown(
                ", ".join(left_out(sources.card, record)) if record else also.get(role, "")
            ),
            "sha256": code(file.sha256),
        }


def hardware(environment: Environment | None) -> str:
    """Accelerators, processor and memory of a record's machine in words."""
    if environment is None:
        return "not recorded"
    devices = ", ".join(environment.accelerators)
    memory = f", {environment.memory_gb:g} GB" if environment.memory_gb else ""
    cpu = f"{environment.cpu or 'unknown CPU'}, {environment.cores or '?'} cores{memory}"
    return f"{devices}; {cpu}" if devices else f"{cpu}, no accelerator"


def origins(records: list[Record]) -> list[str]:
    """`modelops 0.1.0 at commit abc with uncommitted changes, Python 3.11, on …`, each once."""
    found = []
    for record in records:
        environment = record.environment
        if environment is None:
            text = "a record without environment"
        else:
            commit = f" at commit {environment.commit[:12]}" if environment.commit else ""
            dirty = " with uncommitted changes" if environment.dirty else ""
            text = (
                f"modelops {environment.modelops}{commit}{dirty}, Python {environment.python}, "
                f"{environment.platform}, {hardware(environment)}"
            )
        if text not in found:
            found.append(text)
    return found


def packages(records: list[Record]) -> str:
    """Versions that the records were made with: `torch 2.6.0`, or `torch 2.6.0 and 2.7.0`."""
    versions: dict[str, list[str]] = {}
    for record in records:
        packages = record.environment.packages if record.environment else {}
        for name, version in packages.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    return ", ".join(f"{name} {' and '.join(found)}" for name, found in sorted(versions.items()))
