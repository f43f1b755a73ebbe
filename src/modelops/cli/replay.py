"""`modelops replay`: was this image made by this release?"""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import (
    DIRECTORY,
    EXISTING,
    EXISTING_FILE,
    dry_run_option,
    trust_code_option,
)
from modelops.cli.output import emit, json_option


@click.command()
@click.argument("receipt", type=EXISTING)
@click.option(
    "--release", required=True, metavar="DIR", type=DIRECTORY,
    help="Release that made the image.",
)  # fmt: skip
@click.option("--prompt", help="Prompt of the image, if the receipt has only its digest.")
@click.option(
    "--negative-prompt", help="Negative prompt of the image, if the receipt has only its digest."
)
@click.option(
    "--image", metavar="FILE", type=EXISTING_FILE,
    help="Image that was sent, to measure how far its pixels are off.",
)  # fmt: skip
@click.option(
    "--key", metavar="FILE", type=EXISTING_FILE,
    help="Certificate or public key (PEM) to trust.  [default: $MODELOPS_SIGNING_CHAIN, else this "
    "machine's development key]",
)  # fmt: skip
@click.option("--id", "receipt_id", help="Id of the receipt, if RECEIPT holds several.")
@click.option(
    "--receipts", metavar="DIR", type=EXISTING,
    help="Folder of receipts to search, if RECEIPT is an image.",
)  # fmt: skip
@click.option("--runtime", help="Runtime to use in place of the one that made the image.")
@click.option(
    "--tolerance", type=click.IntRange(0, 255),
    help="Grey levels (of 255) by which pixels may differ; needs --image.  "
    "[default: the batch invariance in the release]",
)  # fmt: skip
@dry_run_option
@trust_code_option
@json_option
def replay(
    receipt: Path,
    release: Path,
    prompt: str | None,
    negative_prompt: str | None,
    image: Path | None,
    key: Path | None,
    receipt_id: str | None,
    receipts: Path | None,
    runtime: str | None,
    tolerance: int | None,
    dry_run: bool,
) -> None:
    """Make the image of RECEIPT again and say whether the pixels are equal.

    RECEIPT is a receipt (`x_modelops` of an answer), a whole answer, a .jsonl file or folder of
    receipts, or the image itself with its C2PA manifest. Its signature, the digests of prompt,
    release and model are checked first; --dry-run stops there.

    \b
    Exit codes:
      0  equal, or within --tolerance
      1  differs, or cannot be verified (tampered, other key, other release)
      2  usage
    \b
    Examples:
      modelops replay receipt.json --release release
      modelops replay picture.png --release release --prompt "red heart"
    """
    from dataclasses import asdict

    from modelops.serving.node.replay import (
        check_release,
        open_recipe,
        recipe_texts,
        replay_recipe,
    )
    from modelops.serving.provenance.signing import find_verifying_key

    if tolerance and image is None and picture_of(receipt) is None:
        raise click.UsageError("--tolerance needs the image: --image FILE")
    trusted = find_verifying_key(key)
    recipe = open_recipe(receipt, trusted, receipt_id=receipt_id, receipts=receipts)
    texts = recipe_texts(recipe, {"prompt": prompt, "negative_prompt": negative_prompt})
    check_release(recipe, release)
    about = asdict(recipe) | {"key_id": trusted.key_id}
    if dry_run:
        emit(
            {"status": "dry-run", "recipe": about},
            text=f"{recipe.signed_by} {recipe.receipt_id}: signature, texts and release are right; "
            f"would make it again with {recipe.runtime}",
        )
        return
    result = replay_recipe(
        recipe, release, texts,
        image=image or picture_of(receipt), runtime=runtime, tolerance=tolerance,
    )  # fmt: skip
    emit({"status": "ok", **asdict(result), "recipe": about}, text=result.sentence)
    if result.answer == "differs":
        raise click.exceptions.Exit(1)


def picture_of(path: Path) -> Path | None:
    """The path, if it is an image."""
    from modelops.serving.provenance.manifests import picture_format

    if not path.is_file():
        return None
    with path.open("rb") as handle:
        return path if picture_format(handle.read(16)) else None
