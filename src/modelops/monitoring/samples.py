"""Rows of a log, and a release's reference, to the samples that are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.metrics.protocol import protocol_id
from modelops.monitoring.log import DriftRows
from modelops.monitoring.reference import FilterRate, Reference
from modelops.monitoring.rows import ImageRow, RequestRow, shares_to_vector, text_to_features
from modelops.monitoring.scripts import SCRIPTS
from modelops.monitoring.shifts import Latencies

Settings = tuple[int, float]


@dataclass(slots=True)
class Sample:
    """One side of every test.

    It has one image and one length for each prompt, as several would not be independent. Rates also
    count prompts. A prompt is recognised by its tag, and so only within one process of the node: a
    prompt that comes to several workers, or again after a restart, is counted once in each.

    Attributes:
        features: [N, D] float16; of images of one setting, by an extractor of one protocol.
        scores: of the image filter [N]; of the same images.
        characters, scripts: [P] and [P, len(SCRIPTS)], of prompts that the prompt filter let pass.
        prompt_filter, image_filter: number that each stopped, and its name.
        latencies: of requests of one setting; empty for an evaluation.
        missing: {name of a part: reason why it is empty}.
    """

    features: npt.NDArray[np.float16]
    scores: npt.NDArray[np.float64]
    characters: npt.NDArray[np.int64]
    scripts: npt.NDArray[np.float64]
    prompt_filter: FilterRate | None
    image_filter: FilterRate | None
    latencies: Latencies
    missing: dict[str, str] = field(default_factory=dict)


def reference_sample(reference: Reference) -> Sample:
    """The release's evaluation as a sample."""
    missing = {"latency": "an evaluation times no service; name a --baseline of the log"}
    if not len(reference.scores):
        missing["scores"] = "the evaluation has no image filter's scores"
    return Sample(
        features=reference.features,
        scores=reference.scores.astype(np.float64),
        characters=reference.characters.astype(np.int64),
        scripts=reference.scripts.astype(np.float64),
        prompt_filter=reference.record.prompt_filter,
        image_filter=reference.record.image_filter,
        latencies=Latencies(np.zeros(0), np.zeros(0)),
        missing=missing,
    )


def log_sample(
    rows: DriftRows, *, settings: Settings | None, extractor: dict[str, Any] | None
) -> Sample:
    """A stretch of a log as a sample; images of other settings or another protocol are left out.

    Args:
        settings: steps and guidance of the images that count; None takes none.
        extractor: the features' protocol; None takes none.
    """
    ours = [row for row in rows.images if (row.steps, row.guidance) == settings]
    one_each = _first(ours)
    missing: dict[str, str] = {}
    features: list[npt.NDArray[np.float16]] = []
    wanted, dim = (protocol_id(extractor), int(extractor["dim"])) if extractor else ("", 0)
    why: Counter[str] = Counter()
    for row in _first(row for row in ours if row.features is not None and row.extractor == wanted):
        found = text_to_features(row.features or "", dim)
        if found is None:
            why["damaged"] += 1
        else:
            features.append(found)
    for row in one_each:
        if row.features is None:
            why["without features"] += 1
        elif row.extractor != wanted:
            why[f"by another extractor ({(row.extractor or '')[:12]})"] += 1
    if why:
        missing["features"] = ", ".join(f"{n} {text}" for text, n in why.items())
    passed = _first(row for row in rows.requests if not row.blocked)
    every = _first(row for row in rows.requests)
    latencies = _latencies(ours)
    return Sample(
        features=np.array(features, np.float16).reshape(len(features), dim),
        scores=np.array([row.score for row in one_each]),
        characters=np.array([row.characters for row in passed], np.int64),
        scripts=np.array([shares_to_vector(row.scripts) for row in passed]).reshape(
            len(passed), len(SCRIPTS)
        ),
        prompt_filter=_rate(every),
        image_filter=_rate(one_each),
        latencies=latencies,
        missing=missing,
    )


def commonest_settings(rows: DriftRows) -> Settings | None:
    """Steps and guidance that most images of a stretch have."""
    counted = Counter((row.steps, row.guidance) for row in rows.images)
    return counted.most_common(1)[0][0] if counted else None


def _first(rows: Iterable[Any]) -> list[Any]:
    """The first row of each prompt."""
    found: dict[str, Any] = {}
    for row in rows:
        found.setdefault(row.prompt, row)
    return list(found.values())


def _rate(rows: list[RequestRow] | list[ImageRow]) -> FilterRate | None:
    if not rows:
        return None
    names = sorted({row.filter for row in rows})
    return FilterRate(
        name=" and ".join(names), stopped=sum(row.blocked for row in rows), n=len(rows)
    )


def _latencies(rows: list[ImageRow]) -> Latencies:
    """One latency a request: that of its first image, which waited for the others."""
    requests: dict[str, tuple[float, float]] = {}
    for row in rows:
        if "total" in row.seconds:
            requests.setdefault(row.request, (row.time, row.seconds["total"]))
    found = np.array(list(requests.values())).reshape(len(requests), 2)
    return Latencies(found[:, 0], found[:, 1])
