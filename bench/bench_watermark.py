"""What the invisible watermark survives, at which sizes, and how invisible it is; peers beside it.

    python bench/bench_watermark.py [--pictures 24] [--keys 20000] [--no-peers]

Each cell: share of images in which it is found at a false-alarm bound of 1e-6, median z.
Drawings are OpenMoji rendered at that size, photographs scikit-image's. Then false alarms over
random keys, and what invisible-watermark's dwtDct (32 bits; found is at most 2 bits wrong, a
false-alarm rate of 1.2e-7) and Cox et al.'s additive spread spectrum (blind, the same band, at the
same PSNR) do with the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

from modelops.data.corpora.openmoji import list_drawings, render_drawing
from modelops.serving.provenance.watermark import Watermark, _basis, _psnr

Pixels = npt.NDArray[np.uint8]
SIZES = (16, 24, 32, 48, 64, 128, 256, 512, 1024)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
WORD = bytes.fromhex("5ec0de42")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24, help="drawings at each size")
    parser.add_argument("--keys", type=int, default=20_000)
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    mark = Watermark(hashlib.sha256(b"bench").digest())
    for kind in ("drawings", "photographs"):
        robustness(kind, arguments.pictures, mark.embed, mark.detect)
    if not arguments.no_peers:
        for kind in ("drawings", "photographs"):
            peers(kind, arguments.pictures)
    false_alarms(arguments.keys)


def robustness(kind: str, count: int, embed: Any, detect: Any) -> None:
    """Share found and median z by size and attack."""
    print(f"\n{kind}: found at 1e-6 / median z")
    names = [name for name, _ in ATTACKS]
    rows: dict[str, list[str]] = {name: [] for name in names}
    heads, quality, seconds = [], [], []
    for size in SIZES:
        originals = pictures(kind, size, count if size < 512 else max(4, count // 4))
        began = time.perf_counter()
        made = [embed(picture) for picture in originals]
        spent = 1000 * (time.perf_counter() - began) / len(made)
        heads.append(str(size))
        quality.append(f"{min(one.psnr_db for one in made):.1f}")
        seconds.append(f"{spent:.0f}")
        for name, attack in ATTACKS:
            found = [detect(attack(one.pixels)) for one in made]
            share = sum(one.found for one in found) / len(found)
            rows[name].append(f"{share:.0%} {statistics.median(one.z for one in found):.0f}")
    print_row("pixels", heads)
    print_row("lowest PSNR, dB", quality)
    print_row("embedding, ms", seconds)
    for name in names:
        print_row(name, rows[name])


def peers(kind: str, count: int) -> None:
    """Share found by dwtDct and by additive spread spectrum, at the sizes they take."""
    print(f"\n{kind}, peers: share found, ours / dwtDct / additive spread spectrum")
    mark = Watermark(hashlib.sha256(b"bench").digest())
    sizes = (32, 64, 256, 512)
    rows: dict[str, list[str]] = {name: [] for name, _ in ATTACKS}
    quality = []
    for size in sizes:
        originals = pictures(kind, size, count if size < 512 else max(4, count // 4))
        ours = [mark.embed(picture) for picture in originals]
        theirs = [dwt_embed(picture) for picture in originals]
        cox = [cox_embed(one, our.psnr_db) for one, our in zip(originals, ours, strict=True)]
        psnr = [
            "-" if other is None else f"{_psnr(one, other):.1f}"
            for one, other in zip(originals, theirs, strict=True)
        ]
        quality.append(f"{min(o.psnr_db for o in ours):.1f}/{min(psnr)}/same")
        for name, attack in ATTACKS:
            shares = [
                np.mean([mark.detect(attack(one.pixels)).found for one in ours]),
                np.mean([o is not None and dwt_found(attack(o)) for o in theirs]),
                np.mean([cox_found(attack(one)) for one in cox]),
            ]
            rows[name].append("/".join(f"{share:.0%}" for share in shares))
    print_row("pixels", [str(size) for size in sizes])
    print_row("lowest PSNR, dB", quality)
    for name, cells in rows.items():
        print_row(name, cells)


def false_alarms(keys: int) -> None:
    """How often random keys reach a p, beside the bound, for one drawing and one photograph."""
    print(
        f"\nfalse alarms over {keys} random keys: share with p at most 0.1, 0.01, 0.001; highest z"
    )
    for kind in ("drawings", "photographs"):
        picture = pictures(kind, 32, 4)[2]
        found = [Watermark(hashlib.sha256(str(n).encode()).digest()).detect(picture)
                 for n in range(keys)]  # fmt: skip
        shares = [np.mean([one.p_value <= level for one in found]) for level in (0.1, 0.01, 0.001)]
        line = "  ".join(f"{share:.5f}" for share in shares)
        print(f"  {kind:12} {line}  {max(one.z for one in found):.2f}")


def pictures(kind: str, size: int, count: int) -> list[Pixels]:
    """Square images [size, size, 3]."""
    if kind == "drawings":
        drawings = list_drawings()
        chosen = np.linspace(0, len(drawings) - 1, count).astype(int)
        return [decode(render_drawing(drawings[index].id, size)) for index in chosen]
    made = []
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(skimage.data, name)())
        side = min(photograph.size)
        square = photograph.crop((0, 0, side, side))
        made.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))
    return made


def decode(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def through(name: str, quality: int) -> Callable[[Pixels], Pixels]:
    def attack(pixels: Pixels) -> Pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, name, quality=quality)
        return decode(buffer.getvalue())

    return attack


def resize(factor: float) -> Callable[[Pixels], Pixels]:
    def attack(pixels: Pixels) -> Pixels:
        size = (max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor)))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    return attack


def crop(share: float) -> Callable[[Pixels], Pixels]:
    """From the upper left corner, at most so much of each side is cut off."""
    return lambda pixels: pixels[
        math.ceil(pixels.shape[0] * share) :, math.ceil(pixels.shape[1] * share) :
    ]


def brightness(factor: float) -> Callable[[Pixels], Pixels]:
    return lambda pixels: np.clip(np.rint(pixels * factor), 0, 255).astype(np.uint8)


def noise(deviation: float) -> Callable[[Pixels], Pixels]:
    def attack(pixels: Pixels) -> Pixels:
        added = np.random.default_rng(0).normal(0, deviation, pixels.shape)
        return np.clip(np.rint(pixels + added), 0, 255).astype(np.uint8)

    return attack


ATTACKS: list[tuple[str, Callable[[Pixels], Pixels]]] = [
    ("nothing", lambda pixels: pixels),
    *((f"JPEG {quality}", through("JPEG", quality)) for quality in (95, 90, 75, 50)),
    *((f"WebP {quality}", through("WEBP", quality)) for quality in (90, 75, 50)),
    *((f"resized x{factor:g}", resize(factor)) for factor in (0.5, 0.75, 1.5, 2)),
    ("resized x2, JPEG 75", lambda pixels: through("JPEG", 75)(resize(2)(pixels))),
    *((f"brightness x{factor:g}", brightness(factor)) for factor in (0.7, 0.9, 1.1, 1.3)),
    *((f"noise {deviation}", noise(deviation)) for deviation in (2, 5, 10)),
    *((f"cropped {share:.0%}", crop(share)) for share in (0.01, 0.1)),
]


def dwt_embed(pixels: Pixels) -> Pixels | None:
    """invisible-watermark's dwtDct; None where it refuses (under 256 x 256)."""
    from imwatermark import WatermarkEncoder

    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", WORD)
    try:
        return np.ascontiguousarray(encoder.encode(pixels[..., ::-1], "dwtDct")[..., ::-1])
    except RuntimeError:
        return None


def dwt_found(pixels: Pixels) -> bool:
    """At most 2 of 32 bits wrong: 529 of 2^32 words."""
    from imwatermark import WatermarkDecoder

    try:
        read = WatermarkDecoder("bytes", 32).decode(pixels[..., ::-1], "dwtDct")
    except RuntimeError:
        return False
    return sum((a ^ b).bit_count() for a, b in zip(read, WORD, strict=True)) <= 2


_SIGNS = np.random.default_rng(1).integers(0, 2, (96, 96)) * 2.0 - 1
_SIGNIFICANT = math.sqrt(2 * math.log(1e6))


def cox_embed(pixels: Pixels, psnr: float) -> Pixels:
    """Cox et al.'s c' = c (1 + alpha s) on the same band, with the alpha that gives this PSNR."""
    vertical, horizontal, inside, spectrum = _band_of(pixels)

    def make(alpha: float) -> Pixels:
        change = (
            np.where(inside, alpha * np.abs(spectrum), 0)
            * _SIGNS[: len(vertical), : len(horizontal)]
        )
        added = vertical.T @ change @ horizontal
        return np.clip(np.rint(pixels + added[..., None]), 0, 255).astype(np.uint8)

    low, high = 0.0, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _psnr(pixels, make(middle)) >= psnr else (low, middle)
    return make(low)


def cox_found(pixels: Pixels) -> bool:
    """Blind: the same signs against coefficients that are clipped to their ring's median."""
    vertical, horizontal, inside, spectrum = _band_of(pixels)
    rows, columns = np.indices(spectrum.shape)
    ring = (np.hypot(rows, columns) // 2).astype(int)
    weighed = np.zeros_like(spectrum)
    for number in np.unique(ring[inside]):
        where = inside & (ring == number)
        scale = max(1.0, float(np.median(np.abs(spectrum[where]))))
        weighed[where] = np.clip(spectrum[where] / scale, -3, 3)
    signs = _SIGNS[: len(vertical), : len(horizontal)]
    norm = math.sqrt(float((weighed**2).sum())) or 1.0
    return float((weighed * signs).sum()) / norm >= _SIGNIFICANT


def _band_of(pixels: Pixels) -> tuple[Any, Any, Any, Any]:
    height, width = pixels.shape[:2]
    vertical, horizontal = _basis(height, 96), _basis(width, 96)
    spectrum = vertical @ (pixels @ np.array([0.299, 0.587, 0.114])) @ horizontal.T
    rows, columns = np.indices(spectrum.shape)
    radius = np.hypot(rows, columns)
    return vertical, horizontal, (radius >= 3) & (radius <= 0.85 * min(height, width)), spectrum


def print_row(name: str, cells: list[str]) -> None:
    print(f"  {name:20} " + " ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
