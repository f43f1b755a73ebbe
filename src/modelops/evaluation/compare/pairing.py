"""Paired difference of each metric, and the values that it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError
from modelops.evaluation.compare.evidence import Evidence, Reference
from modelops.metrics.intervals import Interval
from modelops.metrics.multiple import independent_difference
from modelops.metrics.paired import (
    PairedDifference,
    paired_mean,
    paired_median,
    paired_rate,
)
from modelops.metrics.paired_sets import paired_frechet, paired_kernel, paired_prdc
from modelops.metrics.protocol import protocol_id
from modelops.records.base import Measurement

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]
Protocol = Mapping[str, Any]
OnProgress = Callable[[str, int, int], None]
TOLERANCE = 1e-5  # relative; between a value and what its record says


def _among(field: str, k: int) -> Callable[[Row, Protocol], bool]:
    """Make the test whether a row's own prompt is among the k nearest; a failed image is a miss."""
    return lambda row, _: row.get(field, k) < k


# Mean over prompts of the first field of a row minus the others.
MEANS = {
    "lit_alignment": ("alignment",),
    "lit_alignment_gain": ("alignment", "alignment_shuffled"),
    "clipscore": ("clipscore",),
    "clip_score_torchmetrics": ("clip_score_torchmetrics",),
}
# Median over images; the value subtracted from it is the same in both records.
MEDIANS = {"nearest_train_distance_gap": "nearest_train_distance"}
# Whether a row counts; None if the row is in no denominator.
RATES: dict[str, Callable[[Row, Protocol], bool | None]] = {
    "failed_image_rate": lambda row, _: row.get("failure") is not None,
    "unsafe_rate": lambda row, protocol: (
        row["nsfw_score"] >= protocol["filter"]["threshold"] if "nsfw_score" in row else None
    ),
    "near_copy_rate": lambda row, protocol: (
        row["nearest_train_distance"] <= 1.0 - protocol["near_copy_cosine"]
        if "nearest_train_distance" in row
        else None
    ),
    "authenticity_lite0": lambda row, _: row.get("authentic"),
    **{
        f"{prefix}_retrieval_top{k}": _among(rank, k)
        for prefix, rank in (
            ("lit", "alignment_rank"),
            ("clip", "clip_rank"),
            ("siglip", "siglip_rank"),
        )
        for k in (1, 5)
    },
}
FRECHET = ("frechet distance", "fid")
KERNEL = ("kernel distance", "kid")
CUBIC = "(x.y/d + 1)^3, unbiased"
NEIGHBOURHOODS = ("precision", "recall", "density", "coverage")


@dataclass(slots=True)
class Pairing:
    """Paired differences of two evaluations of the same prompts.

    Attributes:
        on_progress: called with (what, done, total) by the metrics that take long.
    """

    first: Evidence
    second: Evidence
    reference: Reference
    seed: int = 0
    resamples: int = 2000
    groups: int = 40
    on_progress: OnProgress | None = None
    _prdc: dict[str, dict[str, PairedDifference]] = field(default_factory=dict)

    def difference(self, name: str, protocol: Protocol) -> PairedDifference:
        """Return the paired difference of a metric that both records measured under this protocol.

        Raises:
            EvaluationError: it cannot be paired, with the reason.
            IntegrityError: a file is not the one that its record names.
        """
        made = self._difference(name, protocol)
        for evidence, value in ((self.first, made.first), (self.second, made.second)):
            stated = evidence.record.metrics[name].value
            assert stated is not None  # the caller has seen to it
            if name in MEDIANS:
                continue  # the record's value has the base rate taken away
            if abs(value - stated) > TOLERANCE * max(abs(stated), 1e-3):
                raise EvaluationError(
                    f"{evidence.path.name} says {stated:.6g}, its files give {value:.6g}"
                )
        return made

    def _difference(self, name: str, protocol: Protocol) -> PairedDifference:
        metric = str(protocol.get("metric", ""))
        options: dict[str, Any] = {"seed": self.seed, "resamples": self.resamples}
        if name in MEANS:
            parts = MEANS[name]
            keys, a, b = self._values(
                lambda row: (
                    row[parts[0]] - sum(row[p] for p in parts[1:])
                    if all(p in row for p in parts)
                    else None
                )
            )
            owner = np.unique([key[0] for key in keys], return_inverse=True)[1]
            counts = np.bincount(owner)
            return paired_mean(
                np.bincount(owner, a) / counts, np.bincount(owner, b) / counts,
                purpose=f"compare/{name}", **options,
            )  # fmt: skip
        if name in MEDIANS:
            keys, a, b = self._values(lambda row: row.get(MEDIANS[name]))
            owner = np.unique([key[0] for key in keys], return_inverse=True)[1]
            return paired_median(a, b, owner, purpose=f"compare/{name}", **options)
        if name in RATES:
            keys, a, b = self._values(lambda row: RATES[name](row, protocol))
            owner = np.unique([key[0] for key in keys], return_inverse=True)[1]
            hits = [np.rint(np.bincount(owner, side)).astype(np.int64) for side in (a, b)]
            return paired_rate(hits[0], hits[1], np.bincount(owner))
        if isinstance(protocol.get("features"), Mapping):
            return self._set_difference(metric, protocol)
        raise EvaluationError("there are no paired values of this metric")

    def _set_difference(self, metric: str, protocol: Protocol) -> PairedDifference:
        features = protocol["features"]
        key = protocol_id({"features": features, "neighbours": protocol.get("neighbours")})
        if metric in NEIGHBOURHOODS and key in self._prdc:
            return self._prdc[key][metric]
        known = metric in (*FRECHET, *NEIGHBOURHOODS) or (
            metric in KERNEL and protocol.get("kernel") == CUBIC
        )
        if not known:
            raise EvaluationError("there is no paired interval of this metric yet")
        sides = [evidence.features(features) for evidence in (self.first, self.second)]
        real = self.reference.features(features)
        names = [
            [row["prompt"] for row in evidence.made()] for evidence in (self.first, self.second)
        ]
        place = np.unique(names[0] + names[1], return_inverse=True)[1]
        first, second = place[: len(names[0])], place[len(names[0]) :]
        report = self.on_progress

        def progress(done: int, total: int) -> None:
            if report:
                report(metric, done, total)

        if metric in KERNEL:
            return paired_kernel(sides[0], sides[1], real, owner_first=first, owner_second=second)
        if metric in NEIGHBOURHOODS:
            self._prdc[key] = paired_prdc(
                sides[0], sides[1], real, seed=self.seed, neighbours=int(protocol["neighbours"]),
                on_progress=progress, owner_first=first, owner_second=second,
            )  # fmt: skip
            return self._prdc[key][metric]
        return paired_frechet(
            sides[0], sides[1], real, seed=self.seed, groups=self.groups, on_progress=progress,
            owner_first=first, owner_second=second,
        )  # fmt: skip

    def _values(
        self, of: Callable[[Row], float | bool | None]
    ) -> tuple[list[tuple[str, int]], Floats, Floats]:
        """Return ((prompt, replicate) [N], first [N], second [N]) of the images that both have."""
        found: list[dict[tuple[str, int], float]] = []
        for evidence in (self.first, self.second):
            values = {
                (str(row["prompt"]), int(row["replicate"])): of(row) for row in evidence.rows()
            }
            found.append({key: float(v) for key, v in values.items() if v is not None})
        shared = sorted(found[0].keys() & found[1].keys())
        if len({prompt for prompt, _ in shared}) < 2:
            raise EvaluationError("fewer than two prompts in common")
        first, second = (np.array([side[key] for key in shared]) for side in found)
        return shared, first, second


def independent(a: Measurement, b: Measurement) -> PairedDifference:
    """Return second minus first as if the two were independent (Newcombe, 1998); too wide if not.

    Raises:
        EvaluationError: a value has no interval.
    """
    from scipy.stats import norm

    sides = [_interval(m) for m in (a, b)]
    made = independent_difference(sides[1], sides[0])
    z = float(norm.ppf(0.975))
    half = made.value - made.low if made.value > 0 else made.high - made.value
    p = 2.0 * float(norm.sf(abs(made.value) / half * z)) if half > 0 else float(made.value == 0)
    error = (made.high - made.low) / 2 / z
    return PairedDifference(
        sides[0].value, sides[1].value, made.value, made.low, made.high, p, made.method,
        min(a.n, b.n), error * error, grows_together=True,
    )  # fmt: skip


def _interval(measured: Measurement) -> Interval:
    if measured.value is None or measured.low is None or measured.high is None:
        raise EvaluationError("a value without an interval")
    return Interval(measured.value, measured.low, measured.high, measured.method)


def same_images(first: Evidence, second: Evidence) -> bool:
    """Return whether both records name the very same features, byte for byte."""
    ours, theirs = [
        entry.sha256 if (entry := evidence.record.files.get("features")) else None
        for evidence in (first, second)
    ]
    return ours is not None and ours == theirs
