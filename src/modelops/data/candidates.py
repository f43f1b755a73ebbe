"""Near-duplicate pairs side by side on one image, for a person to judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modelops.base.files import sha256_bytes, write_bytes
from modelops.base.images import encode_png, resize_image
from modelops.base.seeding import numpy_generator
from modelops.data.manifest import Manifest, Sample
from modelops.data.neighbours import Pairs
from modelops.records.base import InputRef

CELL = 96  # pixels of a thumbnail
COLUMNS = 4  # pairs a row
SHOWN = 24  # pairs


def write_candidate_sheet(
    manifest: Manifest, samples: Sequence[Sample], pairs: Pairs, path: Path, *, seed: int
) -> InputRef | None:
    """Write a sheet of at most 24 pairs over the whole range of cosines, the least alike first.

    Half of them are pairs of different groups, if there are any: the threshold may be wrong about
    those. Returns None if there are no pairs.
    """
    if not len(pairs):
        return None
    chosen = _choose_pairs(samples, pairs, seed)
    width, height = COLUMNS * (2 * CELL + 24), -(-len(chosen) // COLUMNS) * (CELL + 40)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, index in enumerate(chosen):
        left, top = number % COLUMNS * (2 * CELL + 24) + 6, number // COLUMNS * (CELL + 40) + 4
        couple = [samples[int(pairs.first[index])], samples[int(pairs.second[index])]]
        for side, sample in enumerate(couple):
            image = resize_image(manifest.read_image(sample), CELL)
            sheet.paste(Image.fromarray(image), (left + side * (CELL + 4), top))
            place = (left + side * (CELL + 4), top + CELL + 14)
            draw.text(place, _shorten(sample.caption), fill="black", font=font)
        relation = "same group" if couple[0].group == couple[1].group else "different groups"
        label = f"{pairs.cosine[index]:.4f}  {relation}"
        draw.text((left, top + CELL + 1), label, fill="#a00000", font=font)
    data = encode_png(np.array(sheet))
    write_bytes(path, data)
    return InputRef(path=path.name, sha256=sha256_bytes(data))


def _choose_pairs(samples: Sequence[Sample], pairs: Pairs, seed: int) -> list[int]:
    """Indices of the pairs to show: evenly over the ranks of cosine, half across groups."""
    groups = np.array([sample.group for sample in samples])
    across = np.flatnonzero(groups[pairs.first] != groups[pairs.second])
    within = np.flatnonzero(groups[pairs.first] == groups[pairs.second])
    quota = min(len(across), max(SHOWN // 2, SHOWN - len(within)))
    chosen: list[int] = []
    for pool, wanted in ((across, quota), (within, min(len(within), SHOWN - quota))):
        ranked = pool[np.argsort(pairs.cosine[pool], kind="stable")]
        draws = numpy_generator(seed, "dedup sheet", len(chosen))
        for part in np.array_split(ranked, wanted) if wanted else []:
            chosen.append(int(draws.choice(part)))
    return sorted(chosen, key=lambda index: (pairs.cosine[index], index))


def _shorten(text: str, length: int = 15) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
