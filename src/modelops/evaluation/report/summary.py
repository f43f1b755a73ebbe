"""The first paragraph of the report: what the record comes to, in plain sentences."""

from __future__ import annotations

from modelops.evaluation.report.comparison import ComparisonPart
from modelops.evaluation.report.text import number, plural
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord


def summary_sentences(record: EvaluationRecord, comparison: ComparisonPart | None) -> list[str]:
    """Sentences that hold for this record; what was not measured is named as such."""
    told = [_what(record)]
    told += [_set_distance(record), _alignment(record), _memorization(record), _unsafe(record)]
    missing = [key for key, measured in record.metrics.items() if measured.value is None]
    if len(missing) > 4:
        told.append(f"{len(missing)} metrics were not measured; each says why below.")
    elif missing:
        told.append(f"Not measured: {', '.join(missing)}.")
    if comparison is not None:
        told.append(comparison.summary)
    return [sentence for sentence in told if sentence]


def _what(record: EvaluationRecord) -> str:
    source, sampling = record.source, record.sampling
    if sampling is None:
        return f"The {source.kind} {source.uri} was to be evaluated; no image was made."
    planned = record.metrics.get("failed_image_rate")
    total = planned.n if planned and planned.n else sampling.n_prompts * sampling.replicates
    made = plural(max(total - record.n_failed_images, 0), "image")
    of = f" of {total:,}" if record.n_failed_images else ""
    prompts = plural(sampling.n_prompts, "prompt")
    text = f"{made}{of} for {prompts} from the {source.kind} {source.uri}"
    if record.reference:
        text += f", against the real images of {record.reference.path}"
    return f"{text}."


def _made(record: EvaluationRecord, key: str) -> Measurement | None:
    measured = record.metrics.get(key)
    return measured if measured is not None and measured.value is not None else None


def _with_ends(measured: Measurement) -> str:
    low, value, high = (number(v, 3) for v in (measured.low, measured.value, measured.high))
    return f"{value} [{low}, {high}]"


def _set_distance(record: EvaluationRecord) -> str:
    for key, name in (("fid", "FID"), ("frechet_distance_lite0", "Fréchet distance (Lite0)")):
        if found := _made(record, key):
            text = f"{name} {_with_ends(found)}"
            if floor := _made(record, f"{key}_floor"):
                text += f"; real training images themselves get {_with_ends(floor)}"
            return f"{text}."
    return ""


def _alignment(record: EvaluationRecord) -> str:
    if (gain := _made(record, "lit_alignment_gain")) and gain.low is not None:
        assert gain.high is not None
        if gain.low > 0:
            verdict = "Images follow their prompts"
        elif gain.high < 0:
            verdict = "Images go worse with their own prompts than with others"
        else:
            verdict = "Nothing shows that images follow their prompts"
        return f"{verdict}: alignment gain over other prompts {_with_ends(gain)}."
    if score := _made(record, "clipscore"):
        return f"CLIPScore {_with_ends(score)}."
    return ""


def _memorization(record: EvaluationRecord) -> str:
    if found := record.memorization:
        return f"Memorization: {found.answer}: {found.reason.rstrip('.')}."
    gap = _made(record, "nearest_train_distance_gap")
    if gap is None or gap.low is None or gap.high is None:
        return ""
    if gap.high < 0:
        verdict = "Images are closer to training images than new real images are"
        verdict += ", a sign of copying"
    elif gap.low > 0:
        verdict = "Images are no closer to training images than new real images are"
    else:
        verdict = "Images are about as close to training images as new real images are"
    return f"{verdict} (gap {_with_ends(gap)})."


def _unsafe(record: EvaluationRecord) -> str:
    unsafe = _made(record, "unsafe_rate")
    if unsafe is None or unsafe.value is None or unsafe.high is None:
        return ""
    count = round(unsafe.value * unsafe.n)
    share = f"{100 * unsafe.high:.2g} %"
    return (
        f"The image filter flagged {count:,} of {unsafe.n:,} images"
        f"{f' (up to {share} at {100 * unsafe.confidence:g} % confidence)'}."
    )
