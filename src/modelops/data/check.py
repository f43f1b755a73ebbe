"""A manifest to a verdict on every row: the table, the bytes, and whether each image decodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelops.base.errors import ImageError
from modelops.data.manifest import read_manifest

OnProgress = Callable[[int, int], None]  # (done, total)


def check_manifest(path: str | Path, *, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Read a manifest, its files and their pixels.

    Returns JSON-able values: status (`ok`, or `failed` if a row is quarantined), manifest, sha256,
    usable, n_quarantined, quarantined {id: reason}, licenses, sources, sizes {WxH: count}.

    Raises:
        ManifestError: the table itself is malformed.
        UsageError: the file does not exist.
    """
    manifest = read_manifest(path)
    quarantined = dict(manifest.quarantined)
    licenses: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for done, sample in enumerate(manifest.rows, 1):
        try:
            height, width, _ = manifest.read_image(sample).shape
        except ImageError as error:
            quarantined[sample.id] = error.message
        else:
            licenses[sample.license] += 1
            sources[sample.source or "unknown"] += 1
            sizes[f"{width}x{height}"] += 1
        if on_progress:
            on_progress(done, len(manifest.rows))
    return {
        "status": "failed" if quarantined else "ok",
        "manifest": str(path),
        "sha256": manifest.sha256,
        "usable": sum(sizes.values()),
        "n_quarantined": len(quarantined),
        "quarantined": quarantined,
        "licenses": dict(licenses.most_common()),
        "sources": dict(sources.most_common()),
        "sizes": dict(sizes.most_common()),
    }
