"""Slices of the prompts, each against the rest: by tag, by manifest column, by words about people.

The compared metrics are alignment gain (or CLIPScore), unsafe rate, distance to the nearest
training image and failure rate; see `modelops.metrics.multiple` for the tests and their correction.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import UsageError
from modelops.data.manifest import COLUMNS, Manifest, Sample, read_manifest
from modelops.evaluation.workbench import Workbench
from modelops.metrics.intervals import Interval
from modelops.metrics.multiple import SliceDifference, holm, slice_difference
from modelops.records.base import Measurement
from modelops.records.evaluation import SliceMeasurement, SliceVerdict

KEYS: tuple[str, ...] = ()  # results are in the record's `slices`
TAGS, WORDS = "tags", "words"
UNIQUE_COLUMNS = ("id", "filepath", "caption", "sha256")
MAX_SLICES = 200  # of one column; more is a mistake, and would drown every other comparison
ALPHA = 0.05
MIN_PERMUTATIONS, MAX_PERMUTATIONS = 9_999, 199_999

_TONE = re.compile(
    r"\b(medium-light|medium-dark|light|medium|dark)[ -]skin(?:ned|[ -]tone)?\b", re.IGNORECASE
)
_GENDERS = {
    "man": "man men male boy boys father king prince mister gentleman",
    "woman": "woman women female girl girls mother queen princess lady",
    "person": "person persons people child children adult adults",
}


@dataclass(frozen=True, slots=True)
class _Metric:
    """Metric with one value per prompt, NaN where it has none."""

    key: str
    values: npt.NDArray[np.float64]
    images: npt.NDArray[np.int64]  # behind each prompt's value
    rate: bool = False


@dataclass(frozen=True, slots=True)
class _Slice:
    by: str
    value: str
    member: npt.NDArray[np.bool_]  # [P]


def measure(bench: Workbench) -> None:
    """Fill the record's `slices`, if any were asked for.

    Raises:
        UsageError: the images have no prompts, or a column cannot be sliced by.
    """
    columns = bench.settings.slice_by
    if not columns:
        return
    if not bench.has_prompts:
        raise UsageError("the images have no prompts to slice by", hint="leave out --slice-by")
    manifest = bench.reference.manifest if bench.reference else None
    check_columns(manifest, columns)
    samples = _samples_of_prompts(bench, manifest)
    slices = [
        found
        for by in dict.fromkeys(columns)
        for found in _slices(by, bench.prompts.prompts, samples)
    ]
    groups = _groups(bench.prompts.prompts, samples)
    bench.record.slices = _compare(bench, slices, groups)


def check_columns(manifest: Manifest | None, columns: Sequence[str]) -> None:
    """Check that prompts can be sliced by these columns.

    Raises:
        UsageError: there is no manifest or no such column, or it has more than `MAX_SLICES` values.
    """
    for name in columns:
        if name == WORDS:
            continue
        if manifest is None:
            raise UsageError(
                f"slices by {name!r} need a manifest", hint=f"give --manifest, or slice by {WORDS}"
            )
        known = {*COLUMNS, *(column for sample in manifest.rows for column in sample.extra)}
        values = {value for sample in manifest.rows for value in _values(sample, name)}
        if name not in known:
            usable = sorted({*known, WORDS} - set(UNIQUE_COLUMNS))
            raise UsageError(
                f"{manifest.path}: no column {name!r} to slice by",
                hint=f"slice by {', '.join(usable)}",
            )
        if name in UNIQUE_COLUMNS or len(values) > MAX_SLICES:
            raise UsageError(
                f"{manifest.path}: column {name!r} has {len(values)} different values, too many to "
                f"slice by",
                hint=f"slice by a column with at most {MAX_SLICES} values",
            )


def check_slice_options(manifest: Path | None, columns: Sequence[str]) -> None:
    """Call `check_columns` before any image is made."""
    if columns:
        found = read_manifest(manifest, check_files=False) if manifest else None
        check_columns(found, columns)


def prompt_to_words(prompt: str) -> tuple[str, ...]:
    """Return the skin tones and genders that a prompt names, in the form of OpenMoji's tags.

    >>> prompt_to_words("kiss: woman, man, medium-light skin tone, dark skin tone")
    ('gender:man', 'gender:woman', 'skin-tone:dark', 'skin-tone:medium-light')
    """
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    genders = {f"gender:{name}" for name, forms in _GENDERS.items() if words & set(forms.split())}
    return tuple(sorted(genders | {f"skin-tone:{tone.lower()}" for tone in _TONE.findall(prompt)}))


def slice_rows(slices: Sequence[SliceMeasurement]) -> list[list[str]]:
    """Return [slice, groups, one cell for each of `slice_metrics`] of each slice, for a table."""
    cells: dict[tuple[str, str], dict[str, SliceMeasurement]] = defaultdict(dict)
    for found in slices:
        cells[found.by, found.value][found.metric] = found
    metrics = slice_metrics(slices)
    return [
        [f"{by}: {value or '(none)'}", str(max(found.n_groups for found in row.values())),
         *(_cell(row.get(metric)) for metric in metrics)]
        for (by, value), row in cells.items()
    ]  # fmt: skip


def slice_metrics(slices: Sequence[SliceMeasurement]) -> list[str]:
    """Return the metrics of slices, in their order."""
    return list(dict.fromkeys(found.metric for found in slices))


def slice_summary(slices: Sequence[SliceMeasurement]) -> str:
    """Summarise in one line how many comparisons differ."""
    verdicts = [found.verdict for found in slices]
    family = max((found.n_comparisons for found in slices), default=0)
    return (
        f"slices: {verdicts.count('differs')} comparisons differ, "
        f"{verdicts.count('within noise')} are within noise, {verdicts.count('too few')} have too "
        f"few independent groups (Holm over {family} tests, {ALPHA:.0%})"
    )


def _cell(found: SliceMeasurement | None) -> str:
    if found is None:
        return ""
    value = "" if found.inside.value is None else f"{found.inside.value:.3g}"
    if found.verdict != "differs" or found.difference.value is None:
        return f"{value} {found.verdict}".strip()
    return f"{value} differs by {found.difference.value:+.2g}"


def _samples_of_prompts(bench: Workbench, manifest: Manifest | None) -> list[Sample | None]:
    """Return the manifest's row of each prompt, by id or caption; None where there is none."""
    if manifest is None:
        return [None] * len(bench.prompts.prompts)
    if bench.prompts.ids:
        by_id = {sample.id: sample for sample in manifest.rows}
        return [by_id.get(name) for name in bench.prompts.ids]
    by_caption = {sample.caption.strip(): sample for sample in reversed(manifest.rows)}
    return [by_caption.get(prompt) for prompt in bench.prompts.prompts]


def _groups(prompts: Sequence[str], samples: Sequence[Sample | None]) -> npt.NDArray[np.int64]:
    """Return a number for each prompt's group in the manifest, or for the prompt; groups are
    independent.
    """
    names = [
        f"group {sample.group}" if sample else f"prompt {prompt}"
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    return np.asarray(np.unique(names, return_inverse=True)[1], np.int64)


def _slices(by: str, prompts: Sequence[str], samples: Sequence[Sample | None]) -> list[_Slice]:
    """Return the slices of one column, sorted; a prompt without a value belongs to none."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        for value in prompt_to_words(prompt) if by == WORDS else _values(sample, by):
            members[value].append(index)
    found = []
    for value, rows in sorted(members.items()):
        member = np.zeros(len(prompts), bool)
        member[rows] = True
        found.append(_Slice(by, value, member))
    return found


def _values(sample: Sample | None, column: str) -> tuple[str, ...]:
    if sample is None:
        return ()
    if column == TAGS:
        return tuple(tag for tag in sample.tags if tag)
    value = getattr(sample, column) if column in COLUMNS else sample.extra.get(column, "")
    return (str(value),) if str(value) else ()


def _metrics(bench: Workbench) -> list[_Metric]:
    """Return the metrics that were measured and have a value for each image or prompt."""
    known, per_image, owner = bench.record.metrics, bench.per_image, bench.owner
    prompts = len(bench.prompts.prompts)

    def over_prompts(
        key: str, values: npt.NDArray[np.float64], owners: npt.NDArray[np.int64], rate: bool = False
    ) -> _Metric:
        images = np.bincount(owners, minlength=prompts)
        with np.errstate(invalid="ignore"):
            means = np.bincount(owners, values, prompts) / images
        return _Metric(key, means, images.astype(np.int64), rate)

    def measured(key: str, *columns: str) -> bool:
        found = known.get(key)
        return bool(
            found and found.value is not None and all(name in per_image for name in columns)
        )

    made = []
    if measured("lit_alignment_gain", "alignment", "alignment_shuffled"):
        gain = np.array(per_image["alignment"]) - np.array(per_image["alignment_shuffled"])
        made.append(over_prompts("lit_alignment_gain", gain, owner))
    elif measured("clipscore", "clipscore"):
        made.append(over_prompts("clipscore", np.array(per_image["clipscore"]), owner))
    if measured("unsafe_rate", "nsfw_score"):
        unsafe = np.array(per_image["nsfw_score"], np.float64) >= bench.settings.safety_threshold
        # An image that the source withheld is unsafe, as in the rate itself.
        withheld = np.array(
            [bench.samples.plan[place].owner for place in sorted(bench.samples.blocked)], np.int64
        )
        flags = np.concatenate([unsafe.astype(np.float64), np.ones(len(withheld))])
        made.append(over_prompts("unsafe_rate", flags, np.concatenate([owner, withheld]), True))
    if measured("nearest_train_distance", "nearest_train_distance"):
        distances = np.array(per_image["nearest_train_distance"])
        made.append(over_prompts("nearest_train_distance", distances, owner))
    if measured("failed_image_rate"):
        # A prompt that cannot be used is in no slice.
        places = [place for place, p in enumerate(bench.samples.plan) if p.owner < prompts]
        failed = np.array([float(place in bench.samples.failures) for place in places])
        owners = np.array([bench.samples.plan[place].owner for place in places], np.int64)
        made.append(over_prompts("failed_image_rate", failed, owners, True))
    return made


def _compare(
    bench: Workbench, slices: Sequence[_Slice], groups: npt.NDArray[np.int64]
) -> list[SliceMeasurement]:
    """Compare every slice by every metric, corrected together."""
    settings, metrics = bench.settings, _metrics(bench)
    # Enough that a difference can still be found after the correction.
    family = len(slices) * len(metrics)
    permutations = min(MAX_PERMUTATIONS, max(MIN_PERMUTATIONS, 200 * family - 1))
    found: dict[tuple[str, bytes], SliceDifference] = {}
    made: list[tuple[_Slice, _Metric, tuple[str, bytes], bool]] = []
    real = _real_gains(bench, slices, groups)
    for one in slices:
        for metric in metrics:
            rows = np.isfinite(metric.values)
            member, complement = one.member[rows].tobytes(), (~one.member[rows]).tobytes()
            # A slice and the rest, when the rest is a slice too, are one comparison.
            key, mirrored = (metric.key, min(member, complement)), complement < member
            made.append((one, metric, key, mirrored))
            if key in found:
                continue
            asked = ~one.member[rows] if mirrored else one.member[rows]
            found[key] = slice_difference(
                metric.values[rows], groups[rows], asked, rate=metric.rate,
                minimum=settings.slice_min, seed=settings.seed, resamples=settings.resamples,
                permutations=permutations, purpose=f"slice/{metric.key}",
            )  # fmt: skip
    # A metric that is the same everywhere could not differ, whatever the slice (Tarone, 1990).
    varies = {m.key for m in metrics if len(np.unique(m.values[np.isfinite(m.values)])) > 1}
    tested = {key: d.p for key, d in found.items() if d.p is not None and key[0] in varies}
    corrected = dict(zip(tested, holm(list(tested.values())).tolist(), strict=True))
    return [
        _to_record(
            bench, one, metric, _mirror(found[key]) if mirrored else found[key],
            corrected.get(key, found[key].p), len(tested),
            real.get((one.by, one.value)) if metric.key == "lit_alignment_gain" else None,
        )
        for one, metric, key, mirrored in made
    ]  # fmt: skip


def _to_record(
    bench: Workbench,
    one: _Slice,
    metric: _Metric,
    found: SliceDifference,
    corrected: float | None,
    tests: int,
    real: SliceDifference | None,
) -> SliceMeasurement:
    base = bench.record.metrics[metric.key]
    rows = np.isfinite(metric.values)
    inside, rest = rows & one.member, rows & ~one.member

    def measurement(
        part: str, n: int, reason: str, details: Mapping[str, int], method: str = ""
    ) -> Measurement:
        interval: Interval | None = getattr(found, part)
        if interval is None:
            return Measurement.missing(reason)
        of_real: Interval | None = getattr(real, part, None)
        return Measurement(
            value=interval.value, low=interval.low, high=interval.high,
            method=interval.method + method, n=n, unit=base.unit,
            higher_is_better=base.higher_is_better, protocol=base.protocol,
            details={**details, **({"real_pictures": of_real.value} if of_real else {})},
        )  # fmt: skip

    def counts(members: npt.NDArray[np.bool_]) -> dict[str, int]:
        return {"prompts": int(members.sum()), "images": int(metric.images[members].sum())}

    verdict: SliceVerdict = "too few"
    if corrected is not None:
        verdict = "differs" if corrected <= ALPHA else "within noise"
    return SliceMeasurement(
        by=one.by, value=one.value, metric=metric.key, verdict=verdict,
        n_groups=found.n_inside, n_prompts=int(inside.sum()),
        inside=measurement("inside", found.n_inside, "no image in the slice", counts(inside)),
        rest=measurement("rest", found.n_rest, "no image outside the slice", counts(rest)),
        difference=measurement(
            "difference", found.n_both if found.paired else found.n_inside,
            f"fewer than {bench.settings.slice_min} independent groups on one side",
            {"groups on both sides": found.n_both},
            f", paired within {found.n_both} groups" if found.paired else "",
        ),
        p_value=found.p, p_corrected=corrected, n_comparisons=tests,
    )  # fmt: skip


def _mirror(found: SliceDifference) -> SliceDifference:
    """Mirror a comparison, to see it from the other side."""
    d = found.difference
    turned = Interval(-d.value, -d.high, -d.low, d.method) if d else None
    return SliceDifference(
        found.rest, found.inside, turned, found.p, found.paired, found.n_rest, found.n_inside,
        found.n_both,
    )  # fmt: skip


def _real_gains(
    bench: Workbench, slices: Sequence[_Slice], groups: npt.NDArray[np.int64]
) -> dict[tuple[str, str], SliceDifference]:
    """Return the alignment gain of the prompts' real images, of each slice; not tested."""
    values = bench.per_image.get("alignment_gain_real")
    if values is None:
        return {}
    gains = np.full(len(bench.prompts.prompts), np.nan)
    gains[bench.owner] = values
    rows = np.isfinite(gains)
    return {
        (one.by, one.value): slice_difference(
            gains[rows], groups[rows], one.member[rows], rate=False, resamples=20, permutations=1,
            minimum=bench.settings.slice_min, seed=bench.settings.seed, purpose="slice/real",
        )
        for one in slices
    }  # fmt: skip
