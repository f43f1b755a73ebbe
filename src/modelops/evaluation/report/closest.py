"""closest.html: samples beside their nearest training images, and held-out images for scale."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ImageError
from modelops.base.files import write_text
from modelops.evaluation.report.text import shorten, visible
from modelops.metrics.memorization import Neighbours, is_authentic

if TYPE_CHECKING:
    from modelops.evaluation.workbench import Workbench
    from modelops.records.evaluation import EvaluationRecord

TEMPLATES = Path(__file__).parent / "templates"
LARGEST = 320  # pixels a side in the page
SMALL = 160  # up to here pixels are shown as they are, without smoothing
LONGEST = 300  # characters of a prompt or caption
BARS = 40


@dataclass(frozen=True, slots=True)
class Shown:
    """An image in the page: a data URI, or why there is none."""

    src: str = ""
    missing: str = ""
    small: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A sample or held-out image and its nearest training image.

    Attributes:
        text: the sample's prompt or the held-out image's caption.
        name: the sample's seed or the held-out image's id.
        caption, training_id: of the training image.
        cosine: of the two.
        own_cosine: of the training image and its own nearest training neighbour.
    """

    image: Shown
    text: str
    name: str
    training: Shown
    caption: str
    training_id: str
    cosine: float
    own_cosine: float
    authentic: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin of the drawing, in its units: the heights are shares of the larger side's peak."""

    x: float
    width: float
    above: float
    below: float


def closest_pairs(
    bench: Workbench,
    neighbours: Neighbours,
    own: npt.NDArray[np.float64],
    count: int,
    *,
    heldout: npt.NDArray[np.bool_] | None = None,
) -> list[Pair]:
    """The `count` closest pairs, closest first.

    Args:
        neighbours: of the samples that were made, or of all held-out images.
        own: as in `is_authentic`.
        heldout: [M] which held-out images to show; None shows samples.
    """
    training, reference = bench.training, bench.reference
    assert training is not None and reference is not None
    authentic = is_authentic(neighbours, own)
    order = np.argsort(neighbours.distance, kind="stable")
    if heldout is not None:
        order = order[heldout[order]]
    pairs = []
    for row in order[:count].tolist():
        at = int(neighbours.index[row])
        if heldout is None:
            planned = bench.samples.plan[bench.samples.made[row]]
            image, text, name = bench.image(row), planned.prompt, f"seed {planned.seed}"
            shown = _show(image)
        else:
            sample = reference.samples[row]
            shown, text, name = _show_real(reference, row), sample.caption, sample.id
        original = training.samples[at]
        pairs.append(
            Pair(
                shown, _words(text), _words(name), _show_real(training, at),
                _words(original.caption), _words(original.id),
                1.0 - float(neighbours.distance[row]), 1.0 - float(own[row]), bool(authentic[row]),
            )
        )  # fmt: skip
    return pairs


def write_closest_page(
    path: Path,
    record: EvaluationRecord,
    *,
    samples: Sequence[Pair],
    heldout: Sequence[Pair],
    cosines: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    near_copy_cosine: float,
) -> Path:
    """Write the page; it needs no other file and no network.

    Args:
        record: with its memorization verdict.
        cosines: of all samples and of all held-out images with their nearest training images.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    ranks = [
        (place + 1, *(side[place] if place < len(side) else None for side in (samples, heldout)))
        for place in range(max(len(samples), len(heldout)))
    ]
    low, bars = _bars(*cosines, near_copy_cosine)
    text = environment.get_template("closest.html.j2").render(
        source=_words(record.source.uri), verdict=record.memorization, ranks=ranks,
        n=len(cosines[0]), n_heldout=len(cosines[1]), limit=near_copy_cosine, low=low, bars=bars,
        limit_x=(near_copy_cosine - low) / (1.0 - low) if near_copy_cosine < 1.0 else 1.0,
        medians=[float(np.median(side)) if len(side) else None for side in cosines],
        started=record.started_at.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    write_text(path, text)
    return path


def _bars(
    samples: npt.NDArray[np.float64], heldout: npt.NDArray[np.float64], limit: float
) -> tuple[float, list[Bar]]:
    """(the axis's low end, bars) of cosines up to 1: samples above the axis, held-out below."""
    everything = np.concatenate([samples, heldout, [limit]])
    low = float(np.floor(everything.min() * 10) / 10)
    edges = np.linspace(low, 1.0, BARS + 1)
    shares = [
        np.histogram(np.clip(side, low, 1.0), edges)[0] / max(1, len(side))
        for side in (samples, heldout)
    ]
    peak = max(float(side.max()) for side in shares) or 1.0
    return low, [
        Bar(place / BARS, 1 / BARS, float(above) / peak, float(below) / peak)
        for place, (above, below) in enumerate(zip(*shares, strict=True))
        if above or below
    ]


def _show_real(pictures: object, index: int) -> Shown:
    from modelops.evaluation.reference import RealPictures

    assert isinstance(pictures, RealPictures)
    try:
        return _show(pictures.read(index))
    except ImageError as error:
        return Shown(missing=_words(error.message))


def _show(image: npt.NDArray[np.uint8]) -> Shown:
    from PIL import Image

    picture = Image.fromarray(image)
    small = max(picture.size) <= SMALL
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=9)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Shown(f"data:image/png;base64,{encoded}", small=small)


def _words(text: str) -> str:
    return shorten(visible(text), LONGEST)
