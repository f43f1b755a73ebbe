"""`modelops watermark`: a key, and whether an image carries its watermark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modelops.cli.options import EXISTING_FILE, FILE
from modelops.cli.output import emit, is_json, json_option, say, table


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def watermark() -> None:
    """Make a watermark key, or search for its watermark in images.

    \b
    Examples:
      modelops watermark key watermark.key
      modelops serve release --watermark-key watermark.key
      modelops watermark detect picture.jpg --key watermark.key
    """


@watermark.command()
@click.argument("file", type=FILE)
@json_option
def key(file: Path) -> None:
    """Write a new key to FILE, which only you can read, and print its id.

    Anyone with the key can find the watermark, and also forge and remove it. Without the key the
    watermark cannot be found again: keep a copy.

    \b
    Example:
      modelops watermark key watermark.key
    """
    from modelops.serving.provenance.watermark import make_key

    made = make_key(file)
    emit({"status": "ok", "key_id": made, "file": str(file)}, text=made)


@watermark.command()
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True,
    type=EXISTING_FILE,
)  # fmt: skip
@click.option(
    "--key", "key_file", metavar="FILE", required=True,
    type=EXISTING_FILE,
    help="Key file of the watermark, or a copy of it.",
)  # fmt: skip
@json_option
def detect(images: tuple[Path, ...], key_file: Path) -> None:
    """Say of each IMAGE whether it carries the watermark of a key.

    p bounds the chance that an unmarked image of any content looks this much like a marked one; yes
    means at most one in a million. An image without the watermark may still have been made by the
    model: cropping or rotating removes the watermark, and under 32 pixels it is not reliable.

    \b
    Exit codes:
      0  all of them carry it (p at most 1e-6)
      2  usage error, or a file that is not an image
      3  at least one does not
    \b
    Example:
      modelops watermark detect picture.jpg --key watermark.key
    """
    from modelops.serving.provenance.images import read_pixels
    from modelops.serving.provenance.watermark import RELIABLE_SIDE, open_watermark

    mark = open_watermark(key_file)
    results: list[dict[str, Any]] = []
    for path in images:
        pixels = read_pixels(path)
        found = mark.detect(pixels)
        results.append(
            {
                "image": str(path),
                "found": found.found,
                "z": round(found.z, 2),
                "p": found.p_value,
                "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
            }
        )
    missing = sum(not result["found"] for result in results)
    emit({"status": "ok", "key_id": mark.key_id, "images": results})
    if not is_json():
        table(
            ["image", "size", "watermark", "z", "p at most"],
            [
                [r["image"], r["size"], "yes" if r["found"] else "no", f"{r['z']:.1f}",
                 f"{r['p']:.1e}"]
                for r in results
            ],
        )  # fmt: skip
        if any(min(map(int, r["size"].split("x"))) < RELIABLE_SIDE for r in results):
            say(f"an image under {RELIABLE_SIDE} pixels: a no means little")
    if missing:
        raise click.exceptions.Exit(3)
