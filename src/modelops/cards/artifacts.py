"""Records of exports into the tables of a model card."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from modelops.base.errors import UsageError
from modelops.cards.escape import code, markdown, megabytes, number
from modelops.cards.numbers import measurements_table
from modelops.export.artifact.layers import searched_layers
from modelops.records.base import InputRef
from modelops.records.export import ArtifactRecord, ExportedComponent

MORE_IS_BETTER = ("psnr_db", "ssim")  # among parity's measures
_NAMES = {"psnr_db": "PSNR, dB", "ssim": "SSIM"}


def artifact_tables(name: str, file: InputRef, record: ArtifactRecord) -> dict[str, Any]:
    """Return what the card prints of one artifact.

    Raises:
        UsageError: the record's search or its error by noise level lacks a number.
    """
    share = record.bytes_total / record.source_bytes_total if record.source_bytes_total else None
    try:
        layers = _layers(record)
        noise = [
            {
                "level": f"{band['sigma_low']:.2f} to {band['sigma_high']:.2f}",
                "rms": number(band["rms"]),
                "largest": number(band["max"]),
                "n": int(band["n"]),
            }
            for band in record.error_by_noise
        ]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{file.path}: its calibration or error_by_noise is not as `modelops export` writes it "
            f"({type(error).__name__}: {error})",
            hint="export it again",
        ) from error
    return {
        "name": name,
        "file": file,
        "record": record,
        "remark": (record.error or "").partition("\n")[0],  # below it, a row for each layer
        "share": f"({share * 100:.0f} % of its source)" if share else "",
        "about": _about(record),
        "components": [_component(item) for item in record.components],
        "parity": [
            {
                "name": check.name,
                "measure": _NAMES.get(check.measure, check.measure.replace("_", " ")),
                "value": number(check.value),
                "bound": f"{'≥' if check.measure in MORE_IS_BETTER else '≤'} {number(check.bound)}",
                "answer": Markup("passed" if check.holds else "**failed**"),
                "n": check.n,
            }
            for check in record.parity
        ],
        "reproduced": [
            {
                "processor": one.processor
                + (f" (imitated by {one.imitated_by})" if one.imitated_by else ""),
                "runtime": f"{one.runtime}, {one.precision}",
                "error": "" if one.fault else number(one.error),
                "bound": "" if one.fault else number(one.bound),
                "answer": "the same" if one.holds else Markup("**")
                + markdown(f"{one.fault or 'others'}: not served there")
                + Markup("**"),
                "n": one.n,
            }
            for one in record.reproduced
        ],
        "speed": measurements_table(record.speed),
        "noise": noise,
        "layers": layers,
    }  # fmt: skip


def _about(record: ArtifactRecord) -> list[Markup]:
    """Return lines on what was exported, from what, and what was left out."""
    lines = []
    if record.inputs:
        made_from = (
            markdown(name) + Markup(" ") + code(reference.sha256[:12])
            for name, reference in record.inputs.items()
        )
        lines.append(Markup("Made from ") + Markup(", ").join(made_from) + Markup("."))
    if record.pipeline or record.size:
        size = " × ".join(str(side) for side in record.size)
        at = f" at {size} pixels" if size else ""
        lines.append(markdown(f"Pipeline {record.pipeline or 'not recorded'}, compared{at}."))
    if record.lora:
        said = ", ".join(f"{name} {value}" for name, value in record.lora.items())
        lines.append(markdown(f"LoRA: {said}."))
    if record.omitted:
        lines.append(markdown(f"Left out of the artifact: {', '.join(record.omitted)}."))
    return lines


def _component(item: ExportedComponent) -> dict[str, Any]:
    nodes = f"{item.quantized_nodes} of {item.total_nodes}" if item.total_nodes else "not counted"
    return {
        "name": item.name,
        "role": item.role or item.attribute or "not recorded",
        "precision": item.precision,
        "nodes": nodes,
        "size": megabytes(item.bytes),
        "sha256": item.sha256[:12],
    }


def _layers(record: ArtifactRecord) -> dict[str, Any] | None:
    """Return the precision of each group of layers and its reason; None if no search was made."""
    search = record.calibration.get("search")
    if not search:
        return None
    rows = [
        {
            **row,
            "error": number(max(row["error"], 0.0)),
            "saved": "not timed" if row["ms_saved"] is None else number(row["ms_saved"]),
        }
        for row in searched_layers(record)
    ]
    return {"rows": rows, "error": number(search["error"]), "budget": number(search["budget"])}
