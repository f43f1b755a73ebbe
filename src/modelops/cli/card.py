"""`modelops card model | dataset | check`"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.base.errors import ModelopsError, UsageError
from modelops.cli.options import EXISTING, FILE
from modelops.cli.output import emit, is_json, json_option


@click.group()
def card() -> None:
    """Write and check model and dataset cards.

    \b
    Examples:
      modelops card model --train runs/pilot/train.json --evaluation final=evaluations/final.json
      modelops card check cards/
    """


def _about_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--about", type=FILE, metavar="YAML",
        help="File with purpose, limits, licences and attribution.  "
        "[default: none of them is stated]",
    )(command)  # fmt: skip


def _picture_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--picture", "pictures", multiple=True, metavar="TEXT=FILE",
        help="Caption and file of an image; the first one is at the top. Repeatable.",
    )(command)  # fmt: skip


def _force_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--force", is_flag=True, help="Replace a file that modelops did not write."
    )(command)


@card.command("model")
@click.option(
    "--train",
    type=FILE,
    metavar="FILE",
    help="Training record of the run, train.json.  [default: the model was not trained here]",
)
@click.option(
    "--evaluation", "evaluations", multiple=True, metavar="NAME=FILE",
    help="Name and file of an evaluation record; `early` is the baseline. Repeatable.",
)  # fmt: skip
@click.option(
    "--artifact", "artifacts", multiple=True, metavar="NAME=FILE",
    help="Name and artifact.json of an exported artifact. Repeatable.",
)  # fmt: skip
@click.option("--verdict", type=FILE, metavar="FILE", help="Verdict of the gate, verdict.json.")
@click.option("--split", type=FILE, metavar="FILE", help="Split record of the data, split.json.")
@click.option(
    "--dedup", type=FILE, metavar="FILE", help="Duplicate report of the data, dedup_report.json."
)
@click.option("--dataset-card", type=FILE, metavar="FILE", help="Dataset card to link.")
@_picture_option
@_about_option
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    default=Path("cards/model_card.md"),
    show_default=True,
    help="Card to write.",
)
@_force_option
@json_option
def model(
    train: Path | None,
    evaluations: tuple[str, ...],
    artifacts: tuple[str, ...],
    verdict: Path | None,
    split: Path | None,
    dedup: Path | None,
    dataset_card: Path | None,
    pictures: tuple[str, ...],
    about: Path | None,
    out: Path,
    force: bool,
) -> None:
    """Write a model card from records.

    Every number comes from a record and names it. Text between the notes marks is kept. A model
    that was not trained here needs no --train: its card says what was evaluated, and that nobody
    has stated who made the weights.

    \b
    Examples:
      modelops card model --train runs/pilot/train.json \\
        --evaluation early=evaluations/early.json --evaluation final=evaluations/final.json \\
        --evaluation int8=evaluations/int8.json \\
        --artifact int8=artifacts/pilot/int8/artifact.json \\
        --picture "Samples from fixed seeds=evaluations/final/grid.png" \\
        --picture "Loss curve=runs/pilot/loss.png" --out cards/model_card.md
      modelops card model --evaluation final=evaluations/final.json --about about.yaml
    """
    from modelops.cards.model import write_model_card

    written = write_model_card(
        out,
        train=train,
        evaluations=_named(evaluations, "--evaluation"),
        artifacts=_named(artifacts, "--artifact"),
        verdict=verdict,
        split=split,
        dedup=dedup,
        pictures=_named(pictures, "--picture"),
        about=about,
        dataset_card=dataset_card,
        force=force,
    )
    emit({"status": "ok", "path": str(written)}, text=f"written: {written}")


@card.command("dataset")
@click.option(
    "--manifest",
    type=FILE,
    required=True,
    metavar="FILE",
    help="Manifest of the data, manifest.parquet.",
)
@click.option(
    "--splits",
    type=FILE,
    metavar="FILE",
    help="Splits of the data, splits.parquet, to count samples by split.",
)
@click.option("--split", type=FILE, metavar="FILE", help="Split record of the data, split.json.")
@click.option(
    "--dedup", type=FILE, metavar="FILE", help="Duplicate report of the data, dedup_report.json."
)
@click.option(
    "--smoke", type=FILE, metavar="FILE", help="Record of the DataLoader test, smoke.json."
)
@_picture_option
@_about_option
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    default=Path("cards/dataset_card.md"),
    show_default=True,
    help="Card to write.",
)
@_force_option
@json_option
def dataset(
    manifest: Path,
    splits: Path | None,
    split: Path | None,
    dedup: Path | None,
    smoke: Path | None,
    pictures: tuple[str, ...],
    about: Path | None,
    out: Path,
    force: bool,
) -> None:
    """Write a dataset card from a manifest and the records of the data.

    \b
    Example:
      modelops card dataset --manifest data/manifest.parquet --splits data/splits.parquet \\
        --split data/split.json --dedup data/dedup_report.json --smoke data/smoke.json
    """
    from modelops.cards.dataset import write_dataset_card
    from modelops.data.stats import manifest_statistics

    written = write_dataset_card(
        out,
        statistics=manifest_statistics(manifest, splits, dedup),
        manifest=manifest,
        dedup=dedup,
        split=split,
        smoke=smoke,
        pictures=_named(pictures, "--picture"),
        about=about,
        force=force,
    )
    emit({"status": "ok", "path": str(written)}, text=f"written: {written}")


@card.command("check")
@click.argument("path", type=EXISTING)
@json_option
def check(path: Path) -> int:
    """Compare cards with the records they print; exits 1 with one line per finding.

    PATH is a card or a folder of cards. A record or image that changed, and a line edited
    outside the notes, are findings.

    \b
    Example:
      modelops card check cards/
    """
    from modelops.cards.check import check_card, find_cards

    found = {str(item): check_card(item) for item in find_cards(path)}
    count = sum(len(lines) for lines in found.values())
    emit({"status": "failed" if count else "ok", "findings": found})
    if not is_json():
        for item, lines in found.items():
            emit({}, text="\n".join(f"{item}: {line}" for line in lines or ["ok"]))
    if count and not is_json():
        raise ModelopsError(
            f"{count} finding{'s' if count > 1 else ''} in {path}", hint="write the cards again"
        )
    return 1 if count else 0


def _named(pairs: tuple[str, ...], option: str) -> dict[str, Path]:
    """NAME=FILE pairs in their order."""
    named: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name.strip() or not path:
            raise UsageError(f"{option} {pair}: should be NAME=FILE")
        if name in named:
            raise UsageError(f"{option} {pair}: {name} is there twice")
        named[name.strip()] = Path(path)
    return named
