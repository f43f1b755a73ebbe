"""Front matter as the Hugging Face Hub reads it, checked because nothing offline does."""

from __future__ import annotations

from typing import Any

from modelops.base.errors import ModelopsError
from modelops.cards.about import About
from modelops.cards.context import measurement_in, released_evaluations
from modelops.cards.escape import one_line
from modelops.cards.evaluated import UNSTATED, measured_on
from modelops.cards.licences import OTHER, front_matter_id, licence_id
from modelops.cards.numbers import Measured
from modelops.evaluation.report.words import words_of

TASK = "text-to-image"


def model_front_matter(
    about: About, evaluations: list[Measured], *, manifests: set[str], library: str | None
) -> str:
    """The YAML block of a model card, between its `---` lines.

    Results that share task and dataset are merged by the Hub's own code, so what tells them apart
    (evaluation, n, seed, interval, record) is in each metric's args.

    Args:
        about: names and licences.
        evaluations: become results of the Hub's model-index, but for the baseline.
        manifests: digests of the manifests that are the data set of `about`.
        library: that loads the model; None if it is not known.
    """
    from huggingface_hub import ModelCardData

    stated = about.dataset_id != UNSTATED
    data = ModelCardData(
        **_licence([about.license], about.license_name, about.license_link),
        language=[one_line(tag) for tag in about.language],
        library_name=library,
        pipeline_tag=TASK,
        tags=[one_line(tag) for tag in about.tags] or None,
        datasets=[one_line(about.dataset_id)] if stated else None,
        model_name=one_line(about.name),
        eval_results=_results(about, evaluations, manifests) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _licence(licences: list[str], name: str, link: str) -> dict[str, Any]:
    """Return the front matter's keys for licences, of which one may be unknown to the Hub."""
    ids = sorted({front_matter_id(item) for item in licences})
    own = [licence_id(item) for item in licences if front_matter_id(item) == OTHER]
    keys: dict[str, Any] = {"license": ids[0] if len(ids) == 1 else ids}
    if own:
        keys["license_name"] = one_line(name) or ", ".join(own)
        keys["license_link"] = one_line(link) or None
    return keys


def _results(about: About, evaluations: list[Measured], manifests: set[str]) -> list[Any]:
    from huggingface_hub import EvalResult

    results = []
    for item in released_evaluations(evaluations):
        data = measured_on(item, about, manifests)
        for key in item.record.metrics:
            measured = measurement_in(item, key)
            if measured.value is None:
                continue
            results.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=one_line(data.id),
                    dataset_name=one_line(data.name),
                    dataset_split=one_line(data.split) if data.split else None,
                    metric_type=one_line(key),
                    metric_name=f"{words_of(key).title} ({one_line(item.name)})",
                    metric_value=float(f"{measured.value:.6g}"),
                    metric_args={
                        "evaluation": one_line(item.name),
                        "n": measured.n,
                        "seed": item.record.sampling.seed if item.record.sampling else None,
                        "low": _rounded(measured.low),
                        "high": _rounded(measured.high),
                        "confidence": measured.confidence,
                        "method": one_line(measured.method),
                        "record_sha256": item.file.sha256,
                    },
                )
            )
    return results


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def dataset_front_matter(about: About, count: int | None, licences: list[str]) -> str:
    """The YAML block of a dataset card."""
    from huggingface_hub import DatasetCardData

    sizes = [(10**power, name) for power, name in ((3, "n<1K"), (4, "1K<n<10K"), (5, "10K<n<100K"),
             (6, "100K<n<1M"), (7, "1M<n<10M"))]  # fmt: skip
    size = next((name for limit, name in sizes if count is not None and count < limit), None)
    data = DatasetCardData(
        **_licence(licences, about.dataset_license_name, about.dataset_license_link),
        language=[one_line(tag) for tag in about.language],
        pretty_name=one_line(about.dataset_name) if about.dataset_id != UNSTATED else None,
        size_categories=[size] if size else None,
        task_categories=[TASK],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def check_model_front_matter(text: str, expected_results: int) -> None:
    """Parse the card as the Hub would.

    Raises:
        ModelopsError: a required field is missing, or a result was lost.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(text).data
    except (ValueError, KeyError) as error:
        raise ModelopsError(f"the model card's front matter does not parse: {error}") from error
    missing = [name for name in ("license", "pipeline_tag") if not getattr(data, name, None)]
    if missing:
        raise ModelopsError(f"the model card's front matter lacks {', '.join(missing)}")
    if len(getattr(data, "eval_results", None) or []) != expected_results:
        raise ModelopsError("the model card's front matter lost evaluation results")


def count_results(evaluations: list[Measured]) -> int:
    """Count the results that the front matter should hold."""
    return sum(
        measurement_in(item, key).value is not None
        for item in released_evaluations(evaluations)
        for key in item.record.metrics
    )
