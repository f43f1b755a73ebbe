"""`modelops release`: a directory with digests of everything that is being released."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelops.cli.options import (
    EXISTING,
    EXISTING_DIRECTORY,
    PATH,
    dry_run_option,
    read_guidance,
    trust_code_option,
)
from modelops.cli.output import emit, json_option, say

if TYPE_CHECKING:
    from modelops.records.release import ReleaseRecord


@click.group()
def release() -> None:
    """Build and verify a release directory.

    \b
    Examples:
      modelops release build release --model artifacts/pilot/int8 --verdict gate/verdict.json \\
          --name openmoji-pilot --version 1.0
      modelops release verify release
    """


@release.command()
@click.argument("directory", type=PATH)
@click.option(
    "--model", "model_dir", required=True, metavar="DIR",
    type=EXISTING_DIRECTORY,
    help="Checkpoint or exported artifact to release.",
)  # fmt: skip
@click.option(
    "--verdict", required=True, metavar="FILE", type=EXISTING,
    help="Verdict of the gate on this very model, verdict.json.",
)  # fmt: skip
@click.option(
    "--policy", metavar="FILE", type=EXISTING,
    help="Policy of the verdict.",
)  # fmt: skip
@click.option(
    "--record", "records", multiple=True, metavar="FILE",
    type=EXISTING, help="Record to include. Repeatable.",
)  # fmt: skip
@click.option(
    "--card", "cards", multiple=True, metavar="FILE",
    type=EXISTING,
    help="Card to include, with its images; one that `modelops card check` passes. Repeatable.",
)  # fmt: skip
@click.option(
    "--fallback", metavar="DIR", type=EXISTING_DIRECTORY,
    help="ONNX artifact of the same checkpoint. It is served on processors where no runtime gives "
    "the numbers that the model was gated with.",
)  # fmt: skip
@click.option(
    "--preflight", "preflights", multiple=True, metavar="FILE",
    type=EXISTING,
    help="Record of `modelops serve preflight` on another machine. Repeatable.",
)  # fmt: skip
@click.option(
    "--name", required=True, help="Name of the release, which is the id of the served model."
)
@click.option("--version", required=True, help="Version of the release.")
@click.option(
    "--steps", type=click.IntRange(1, 1000), help="Number of denoising steps served by default."
)
@click.option(
    "--guidance", type=click.FloatRange(0, 20), callback=read_guidance,
    help="Guidance scale served by default; 0 or 1 is off.",
)  # fmt: skip
@click.option(
    "--notice", metavar="FILE", type=EXISTING,
    help="File with the attribution of images and weights.",
)  # fmt: skip
@click.option(
    "--golden/--no-golden", default=True, show_default=True,
    help="Run the model here to make a golden image, which a node must make again before it is "
    "ready, and to measure batch invariance.",
)  # fmt: skip
@click.option(
    "--allow", is_flag=True, help="Build although the gate did not pass; the release says so."
)
@dry_run_option
@trust_code_option
@json_option
def build(
    directory: Path,
    model_dir: Path,
    verdict: Path,
    policy: Path | None,
    records: tuple[Path, ...],
    cards: tuple[Path, ...],
    fallback: Path | None,
    preflights: tuple[Path, ...],
    name: str,
    version: str,
    steps: int | None,
    guidance: float | None,
    notice: Path | None,
    golden: bool,
    allow: bool,
    dry_run: bool,
) -> None:
    """Copy a model, its verdict, records and cards to DIRECTORY, with digests.

    If the records include an evaluation of this model, with its features beside it, the release
    also gets the reference with which `modelops monitor` compares served images.

    \b
    Example:
      modelops release build release --model artifacts/pilot/int8 --verdict gate/verdict.json \\
          --policy policy.yaml --card cards/model_card.md --name openmoji-pilot --version 1.0
    """
    import tempfile

    from modelops.base.errors import IntegrityError
    from modelops.base.files import read_text, sha256_tree
    from modelops.cards.check import check_card
    from modelops.monitoring.reference import release_files
    from modelops.releases.build import build_release, check_verdict
    from modelops.releases.verify import check_fallback
    from modelops.serving.node.batch_invariance import release_proofs

    if dry_run:
        emit(
            {"status": "dry-run", "directory": str(directory)},
            text=f"would build {directory} from {model_dir}",
        )
        return
    usual = {"steps": steps, "guidance": guidance}
    defaults: dict[str, object] = {key: value for key, value in usual.items() if value is not None}
    check_verdict(verdict, model_dir, policy=policy, allow=allow)
    for card in cards:
        findings = check_card(card)
        if findings:
            raise IntegrityError(f"{card}: {findings[0]}", hint="write it with `modelops card`")
    if fallback is not None:
        check_fallback(fallback, model_dir)
    with tempfile.TemporaryDirectory() as folder:
        extra: dict[str, Path] = {}
        if golden:
            say("making the golden image, and the same images alone and in batches")
            said, extra = release_proofs(
                model_dir, folder, steps=steps, guidance=guidance, fallback=fallback
            )
            defaults |= said
        model_sha256 = sha256_tree(model_dir, exclude=["training_state"])
        reference, remark = release_files(records, model_sha256=model_sha256, folder=folder)
        record = build_release(
            directory,
            model_dir=model_dir,
            verdict=verdict,
            policy=policy,
            records=records,
            cards=cards,
            name=name,
            version=version,
            defaults=defaults,
            notice=read_text(notice) if notice else "",
            extra_files={**reference, **extra},
            fallback=fallback,
            preflights=preflights,
            allow=allow,
        )
    size = sum(entry.bytes for entry in record.files.values())
    emit(
        record.model_dump(mode="json"),
        text=f"{directory}: {name} {version}, {len(record.files)} files, {size / 1e6:.1f} MB\n"
        f"{remark}\n{said_of_processors(record)}serve it: modelops serve {directory}",
    )


def said_of_processors(record: ReleaseRecord) -> str:
    """A line for each kind of processor on which the model was tried; "" of a checkpoint."""
    lines = [
        f"{'gives' if one.holds else 'does NOT give'} its numbers in {one.runtime} on "
        f"{one.processor}: {one.distance or one.fault}\n"
        for one in record.reproduced
    ]
    if record.fallback:
        lines.append("carries a fallback for other processors\n")
    return "".join(lines)


@release.command()
@click.argument("directory", type=PATH)
@json_option
def verify(directory: Path) -> None:
    """Check every byte of DIRECTORY, and its cards against its records.

    \b
    Example:
      modelops release verify release
    """
    from modelops.cards.check import check_released_cards
    from modelops.releases.verify import verify_release

    record = verify_release(directory)
    check_released_cards(
        directory,
        {name: file.sha256 for name, file in record.files.items()},
        apart={record.model, record.fallback or record.model},
    )
    emit(
        {"status": "ok", "name": record.name, "version": record.version,
         "files": len(record.files), "model_sha256": record.model_sha256,
         "fallback_sha256": record.fallback_sha256,
         "reproduced": [one.model_dump(mode="json") for one in record.reproduced]},
        text=f"{directory}: {record.name} {record.version}, {len(record.files)} files unchanged, "
        f"gate {record.verdict_answer}\n{said_of_processors(record)}".rstrip(),
    )  # fmt: skip
