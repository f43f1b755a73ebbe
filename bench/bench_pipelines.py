"""What modelops does with each family of diffusers pipelines: docs/pipelines.md is its table.

    python bench/bench_pipelines.py                     # all families and columns: about an hour
    python bench/bench_pipelines.py --only Flux --columns sample,company,served
    python bench/bench_pipelines.py --write             # the table anew from what was measured

Tiny pipelines with random weights, made by tests/helpers/zoo with the traits of the released ones.
What was measured is kept in bench/pipelines.json, family by family, so that a run can be ended and
gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from zoo.all import FAMILIES, lacks  # noqa: E402
from zoo.measure import measure  # noqa: E402

FOUND = ROOT / "bench" / "pipelines.json"
TABLE = ROOT / "docs" / "pipelines.md"
COLUMNS = ("sample", "company", "served", "export", "other", "int8")
HEADS = {
    "sample": "sample = diffusers", "company": "in company", "served": "served together",
    "export": "export, dB", "other": "artifact, other calls", "int8": "INT8, dB",
}  # fmt: skip
TEXT = """# Pipelines

`modelops sample`, `eval`, `export` and `serve` take a diffusers pipeline as it is: they watch a few
quick calls of it and find its networks, which argument is its guidance scale, whether a negative
prompt has an effect, and which prompts may share a call without changing each other's images.
`modelops doctor --pipeline PATH` prints what is found for yours.

This table is measured, not claimed: `python bench/bench_pipelines.py` makes a tiny pipeline of each
family with random weights and the traits of the released one, and compares every image with that of
diffusers' own call with the same seed. A number is the largest difference of a pixel, of 255, where
0 and 1 are rounding; dB is the PSNR of exported images. Released weights were not tried here.

- **sample = diffusers**: one image of one prompt, no option given but steps and size.
- **in company**: short and long prompts given together, each against diffusers' call of it alone.
- **served together**: two requests of different steps in the engine that shares evaluations.
- **export**: least PSNR of the ONNX artifact's images; 120 is equal.
- **artifact, other calls**: another size, step count, guidance and a long prompt by the artifact.
- **INT8**: least PSNR of the quantised artifact's images, kept with `--allow`.
- An empty field was not measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families whose names hold this text")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--write", action="store_true", help="write the table and measure nothing")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
    columns = [name for name in COLUMNS if name in options.columns.split(",")]
    for family in () if options.write else FAMILIES:
        if options.only not in family.name or lacks(family):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(family, Path(folder), columns=columns).as_dict()
        kept = found.setdefault(family.name, {})
        kept |= {name: row[name] for name in columns if row[name] != ""}
        kept |= {
            "diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0],
            "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(family.name, {name: kept.get(name) for name in columns}, flush=True)
        FOUND.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(found), encoding="utf-8")


def table(found: dict[str, Any]) -> str:
    """docs/pipelines.md from what was measured."""
    names = [family.name for family in FAMILIES if family.name in found]
    lines = ["| family | " + " | ".join(HEADS[name] for name in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    notes: list[str] = []
    for name in names:
        cells = [_cell(found[name].get(column, ""), notes) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    versions = sorted({(row["diffusers"], row["torch"]) for row in found.values()})
    with_versions = "; ".join(f"diffusers {one}, torch {other}" for one, other in versions)
    counted = {
        column: sum(isinstance(found[name].get(column), (int, float)) for name in names)
        for column in COLUMNS
    }
    summary = (
        f"Of {len(names)} families {counted['sample']} are sampled, {counted['served']} served and "
        f"{counted['export']} exported so far ({with_versions}, on a CPU)."
    )
    sentences = [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    return "\n".join([TEXT, summary, "", *lines, "", *sentences, ""])


def _cell(value: Any, notes: list[str]) -> str:
    if isinstance(value, str):
        if not value:
            return ""
        text = value.replace("|", "/").replace("\n", " ")
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"
    return f"{value:g}" if isinstance(value, int) else f"{value:.1f}"


if __name__ == "__main__":
    main()
