"""Tables of the search for an INT8 graph's layers, read from the artifact's record."""

from __future__ import annotations

from typing import Any

from modelops.records.export import ArtifactRecord

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def searched_layers(record: ArtifactRecord) -> list[dict[str, Any]]:
    """Return a row for each group of layers; none if no search was made.

    Returns:
        `group`; `nodes`: number of layers; `error`: relative error that INT8 adds, below 0 if it
        removes some; `ms_saved`: milliseconds saved a call, or None if not timed; `runs_in`: int8,
        or the precision of the other nodes in the artifact's runtime; `why`.
    """
    search = record.calibration.get("search") or {"table": []}
    given_up = set(record.calibration.get("keep_fp32", ()))
    rows = []
    for row in search["table"]:
        quantised = row["group"] not in given_up
        late = quantised != (row["decision"] == "int8")
        rest = _SHORT.get(search["precision"], search["precision"])
        rows.append(
            {
                **{name: row[name] for name in ("group", "nodes", "error", "ms_saved")},
                "runs_in": "int8" if quantised else rest,
                "why": "given up for parity" if late else row["why"],
            }
        )
    return rows
