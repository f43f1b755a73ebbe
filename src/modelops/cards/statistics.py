"""A manifest's statistics, as `data.stats.manifest_statistics` counts them, into tables."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from modelops.base.errors import UsageError
from modelops.cards.escape import markdown, megabytes, number

MOST_ROWS = 15

# key -> heading of a table of counts; in the order of the card
COUNTED = {
    "licenses": "Licences",
    "sources": "Sources",
    "splits": "Splits",
    "tags": "Tags",
    "resolutions": "Stored sizes",
}
_SUMMARISED = {
    "samples", "groups", "bytes", "distinct_captions", "caption_words", "nsfw", "dates",
    "quarantined",
}  # fmt: skip


def value(item: Any) -> Markup:
    """A plain value of the statistics as text.

    Raises:
        ValueError: NaN or infinite.
    """
    if item is None:
        return Markup("*not recorded*")
    if isinstance(item, bool):
        return Markup("yes" if item else "no")
    if isinstance(item, int):
        return Markup(f"{item:,}")
    if isinstance(item, float):
        return Markup(number(item))
    return markdown(str(item))


def summary(statistics: dict[str, Any]) -> list[tuple[str, Markup]]:
    """Return (what, value) rows of single figures."""
    nsfw, dates = statistics.get("nsfw") or {}, statistics.get("dates") or {}
    words = statistics.get("caption_words") or {}
    rows: list[tuple[str, Markup]] = [("Images", value(statistics.get("samples")))]
    if "groups" in statistics:
        rows.append(("Groups of variants", value(statistics["groups"])))
    if "bytes" in statistics:
        rows.append(("Size", Markup(megabytes(statistics["bytes"]))))
    if "distinct_captions" in statistics:
        rows.append(("Different captions", value(statistics["distinct_captions"])))
    if words:
        shown = ", ".join(f"{name} {value(words[name])}" for name in words)
        rows.append(("Words per caption", Markup(shown)))
    if nsfw:
        shown = f"{value(nsfw.get('flagged'))} of {value(nsfw.get('samples'))}"
        rows.append(("Flagged unsafe in the manifest", Markup(shown)))
    if dates:
        shown = f"{value(dates.get('first'))} to {value(dates.get('last'))}"
        rows.append(("Collected", Markup(shown)))
    quarantined = statistics.get("quarantined")
    if quarantined is not None:
        rows.append(("Quarantined as unreadable", value(len(quarantined))))
    return rows


def tables(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    """Make tables of counts and their shares; long ones give the number of rows left out."""
    made = []
    for key, heading in COUNTED.items():
        counts = statistics.get(key)
        if not counts:
            continue
        if not isinstance(counts, dict):
            raise UsageError(f"statistics: {key}: should be counts by name")
        samples = statistics.get("samples") or 0
        shown = list(counts.items())[:MOST_ROWS]
        made.append(
            {
                "heading": heading,
                "rows": [(markdown(str(name)), value(n), _share(n, samples)) for name, n in shown],
                "more": len(counts) - len(shown),
            }
        )
    return made


def _share(count: Any, samples: int) -> Markup:
    if not isinstance(count, int) or samples <= 0:
        return Markup("–")
    return Markup(f"{100 * count / samples:.1f} %")


def quarantined(statistics: dict[str, Any]) -> list[tuple[Markup, Markup]]:
    """Return (id, reason) of the first samples that were left out."""
    items = statistics.get("quarantined") or {}
    return [(markdown(str(name)), markdown(str(why))) for name, why in items.items()][:MOST_ROWS]


def left_out(statistics: dict[str, Any]) -> str:
    """Return the statistics that the card does not print, in words."""
    names = sorted(statistics.keys() - COUNTED.keys() - _SUMMARISED)
    return ", ".join(name.replace("_", " ") for name in names)
