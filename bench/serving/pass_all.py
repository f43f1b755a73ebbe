"""Image filter that passes everything, for the comparison without filters ONLY.

The node has no such filter. The bench registers this one the way any package adds a filter: an
entry point, in a folder that only the bench's own server sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "bench_pass_all"


class PassAll:
    """Says safe of everything."""

    @property
    def info(self) -> dict[str, Any]:
        return {"filter": NAME}

    def check(self, images: Sequence[Any]) -> list[Any]:
        """A verdict for each image, whose score is the brightness of its first row: a node refuses
        a filter that gives all images one score."""
        from modelops.safety.image import ImageVerdict

        return [ImageVerdict(float(image[0].mean()) / 510, False) for image in images]


def open_pass_all(name: Any, *, threshold: float) -> PassAll:
    """As the entry-point group `modelops.image_filters` wants it."""
    return PassAll()


def register(folder: Path) -> None:
    """Write the entry point into a folder; whoever has it on PYTHONPATH sees the filter."""
    info = folder / "modelops_serving_bench-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: modelops-serving-bench\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(
        f"[modelops.image_filters]\n{NAME} = serving.pass_all:open_pass_all\n"
    )
