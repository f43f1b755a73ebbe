"""Records to model_card.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modelops.base.errors import UsageError
from modelops.base.files import check_writable, sha256_bytes, write_text
from modelops.cards.about import About, parse_about, read_about
from modelops.cards.context import evaluations_of, known_data, model_context
from modelops.cards.hub import check_model_front_matter, count_results, model_front_matter
from modelops.cards.render import render_template
from modelops.cards.sources import (
    CardSources,
    about_file,
    copy_picture,
    existing_notes,
    reference,
    with_notes,
    write_sources,
)


def write_model_card(
    out_path: str | Path,
    *,
    train: str | Path | None = None,
    evaluations: Mapping[str, str | Path],
    artifacts: Mapping[str, str | Path] | None = None,
    verdict: str | Path | None = None,
    split: str | Path | None = None,
    dedup: str | Path | None = None,
    config: str | Path | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    about: About | str | Path | None = None,
    dataset_card: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write a model card, its images and NAME.sources.json beside it.

    Args:
        out_path: path of the card; notes of an earlier card are kept.
        train: train.json; None for a model that was not trained here, of which the card then says
            what was evaluated and exported, and that nobody has stated who made its weights.
        evaluations: name -> record, in the order of the columns; `early` is the baseline, which is
            printed but not offered to the Hub as a result.
        artifacts: name -> artifact.json.
        verdict: verdict.json.
        split, dedup: records of the data.
        config: the run's frozen config; by default config.json beside train.json, when there.
        pictures: what it shows -> image. The first is at the top (the grid).
        about: purpose, limits and licences, or their YAML file, which the check then compares;
            "not stated" and an unknown licence by default.
        dataset_card: is linked.
        force: replace a file that is not such a card.

    Returns:
        `out_path`.

    Raises:
        UsageError: a record or image is missing, unreadable or of another kind, or there is
            neither a training record nor an evaluation nor an artifact.
        ConfigError: `about` is not valid.
        ModelopsError: the card would print an undefined or non-finite value.
    """
    card = Path(out_path)
    folder = card.parent
    check_writable(folder)
    notes = existing_notes(card, force=force)
    if train is None and not evaluations and not artifacts:
        raise UsageError(
            "nothing to print", hint="give --train, --evaluation NAME=FILE or --artifact NAME=FILE"
        )
    if config is None and train is not None:
        config = Path(train).parent / "config.json"
    named: dict[str, str | Path | None] = {
        "train": train,
        "config": config if config and Path(config).is_file() else None,
        "split": split,
        "dedup": dedup,
        **{f"evaluation:{name}": path for name, path in evaluations.items()},
        **{f"artifact:{name}": path for name, path in (artifacts or {}).items()},
        "verdict": verdict,
    }
    inputs = {role: reference(path, folder) for role, path in named.items() if path is not None}
    options = {"dataset_card": reference(dataset_card, folder).path} if dataset_card else {}
    taken: set[str] = set()
    sources = CardSources(
        card="model",
        about=read_about(about).model_dump(mode="json"),
        options=options,
        inputs=inputs,
        watched=about_file(about, folder),
        pictures=[copy_picture(path, alt, folder, taken) for alt, path in (pictures or {}).items()],
    )
    body = render_model_card(sources, folder)
    sources.body_sha256 = sha256_bytes(body.encode())
    write_text(card, with_notes(body, notes))
    write_sources(card, sources)
    return card


def render_model_card(sources: CardSources, folder: Path) -> str:
    """Render the card's text with an empty notes region, from the records as they are now.

    Raises:
        UsageError: a record is missing or of another kind.
        ModelopsError: the card would print an undefined or non-finite value.
    """
    about = parse_about(sources.about, source="about")
    evaluations = evaluations_of(sources, folder)
    # An endpoint or a folder of images says nothing of what loads the model.
    known = sources.inputs.keys() & {"train"} or any(
        role.startswith("artifact:") for role in sources.inputs
    )
    loads = known or any(item.record.source.kind == "checkpoint" for item in evaluations)
    text = model_front_matter(
        about, evaluations, manifests=known_data(sources, folder),
        library="diffusers" if loads else None,
    )  # fmt: skip
    text += render_template("model_card.md.j2", model_context(sources, folder))
    check_model_front_matter(text, count_results(evaluations))
    return text
