"""The feature extractor that an evaluation used, opened again by its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelops.base.errors import EvaluationError
from modelops.records.evaluation import EvaluationRecord

if TYPE_CHECKING:
    from modelops.metrics.features import Extractor

SET_METRIC = "frechet_distance_lite0"  # the one whose weights come inside a package


def features_protocol(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return the protocol of the features behind an evaluation's set metric.

    Raises:
        EvaluationError: the evaluation has no such metric.
    """
    metric = evaluation.metrics.get(SET_METRIC)
    whole = evaluation.protocols.get(metric.protocol or "") if metric else None
    features = (whole or {}).get("features")
    if not isinstance(features, dict):
        raise EvaluationError(f"the evaluation has no {SET_METRIC}, so its features are not known")
    return features


def open_extractor(protocol: Mapping[str, Any]) -> Extractor:
    """The extractor of a protocol; its weights are read with the first image.

    Raises:
        EvaluationError: nothing on this machine has this very protocol; the message says how ours
            differs.
    """
    from modelops.metrics.features import Lite0Extractor
    from modelops.metrics.protocol import protocol_differences

    ours = Lite0Extractor(batch_size=8)
    if differences := protocol_differences(protocol, ours.protocol):
        raise EvaluationError(
            f"the evaluation's features ({protocol.get('extractor')}) cannot be made here: "
            + "; ".join(differences)
        )
    return ours
