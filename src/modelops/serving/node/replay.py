"""Replay of a receipt, or of an image with its manifest: make the image again and compare.

Pixels are compared, never files: a file holds a signature with a random number in it. The signature
is checked first: a receipt with a wrong one is not replayed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from modelops.base.errors import IntegrityError, UsageError
from modelops.base.files import sha256_bytes, sha256_file
from modelops.records.release import ReleaseDefaults
from modelops.releases.verify import RECORD_FILE, verify_release
from modelops.serving.provenance.manifests import picture_format, read_mark
from modelops.serving.provenance.receipts import Receipt, read_receipt, text_digest, verify_receipt
from modelops.serving.provenance.signing import VerifyingKey

if TYPE_CHECKING:
    from modelops.models.request import ImageRequest
    from modelops.records.release import ReleaseRecord

Answer = Literal["equal", "within tolerance", "differs"]
_MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Recipe of an image, as a signature vouches for it; texts by digest where known."""

    signed_by: Literal["receipt", "manifest"]
    receipt_id: str
    release_sha256: str
    model_sha256: str
    runtime: str
    precision: str | None
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    output_format: str
    pixels_sha256: str
    texts: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    output_sha256: str = ""
    batch_rows: tuple[int, ...] = ()
    watermarked_sha256: str | None = None  # of the pixels that were sent, if they have a watermark


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Comparison of the image made again with the one that was sent.

    Attributes:
        pixels_sha256: of the image made now.
        max_difference: in levels of 255, None without the image.
        psnr_db: None without the image, and for equal pixels (it would be infinite).
        notes: differences in how it was made.
    """

    answer: Answer
    recipe: Recipe
    pixels_sha256: str
    runtime: str
    precision: str
    max_difference: int | None = None
    psnr_db: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """Return the answer for a person."""
        if self.answer == "equal":
            text = "equal: the same pixels"
        elif self.max_difference is None:
            text = "differs; how far cannot be said without the image (--image)"
        else:
            psnr = "" if self.psnr_db is None else f", PSNR {self.psnr_db:.1f} dB"
            text = f"{self.answer}: at most {self.max_difference} of 255 levels{psnr}"
        return "; ".join([text, *self.notes])


def open_recipe(
    path: str | Path,
    key: VerifyingKey,
    *,
    receipt_id: str | None = None,
    receipts: str | Path | None = None,
) -> Recipe:
    """Read the recipe of a receipt, or of an image.

    Args:
        path: see `receipts.read_receipt`; or a PNG, JPEG or WebP file with a manifest.
        key: the key that must have signed it.
        receipt_id: id of the receipt, if the file holds several.
        receipts: folder with the receipt of an image; a receipt holds more than the manifest.

    Raises:
        UsageError: the file is missing or unreadable.
        IntegrityError: it was changed, or another key signed it.
    """
    source = Path(path)
    data = _read_file(source) if source.is_file() else b""
    output_format = picture_format(data)
    if output_format is None:
        return _from_receipt(verify_receipt(read_receipt(source, receipt_id=receipt_id), key))
    if key.chain is None:
        raise UsageError(
            "an image's manifest is checked with the signer's certificate",
            hint="give --key the certificate chain instead of a bare public key",
        )
    try:
        said = read_mark(data, output_format, signer=key.chain).generation
        # A manifest cannot name the file it is in, but its hashes were checked on these bytes.
        recipe = _from_manifest(said, output_format, output_sha256=sha256_bytes(data))
    except IntegrityError as error:
        raise IntegrityError(f"{source}: {error.message}", hint=error.hint) from error
    if receipts is None:
        return recipe
    kept = verify_receipt(read_receipt(receipts, receipt_id=recipe.receipt_id), key)
    if kept.output_sha256 != sha256_bytes(data):
        raise IntegrityError(f"{source}: not the file that its receipt is about")
    return _from_receipt(kept)


def check_release(recipe: Recipe, release_dir: str | Path) -> ReleaseRecord:
    """Return the release, if its bytes are intact and it is the recipe's.

    Raises:
        IntegrityError: the release was changed, or is another one.
        UsageError: there is no release.
    """
    release = verify_release(release_dir)
    found = sha256_file(Path(release_dir) / RECORD_FILE)
    models = (release.model_sha256, release.fallback_sha256)
    if found != recipe.release_sha256 or recipe.model_sha256 not in models:
        raise IntegrityError(
            f"{release_dir}: is release {found[:12]}, the image was made by "
            f"{recipe.release_sha256[:12]}",
            hint="name the release that the image was made by",
        )
    return release


def recipe_texts(recipe: Recipe, given: dict[str, str | None]) -> dict[str, str]:
    """Return prompt and negative prompt: the given ones, else those of the receipt.

    Raises:
        UsageError: a text is neither given nor in the receipt.
        IntegrityError: a given text is not the one whose digest was signed.
    """
    texts = {}
    for name in ("prompt", "negative_prompt"):
        text = given.get(name)
        digest = recipe.digests.get(name)
        if text is None:
            text = recipe.texts.get(name)
        if text is None and (name == "negative_prompt") and digest in (None, text_digest("")):
            text = ""
        option = f"--{name.replace('_', '-')}"
        if text is None:
            raise UsageError(
                f"the {recipe.signed_by} does not hold the text: {name.replace('_', ' ')}",
                hint=f"give it with {option}",
            )
        if digest is not None and text_digest(text) != digest:
            raise IntegrityError(f"{option}: not the text that was used, its digest is another")
        texts[name] = text
    return texts


def replay_recipe(
    recipe: Recipe,
    release_dir: str | Path,
    texts: dict[str, str],
    *,
    image: str | Path | None = None,
    runtime: str | None = None,
    tolerance: int | None = None,
) -> Replay:
    """Make the image again with the engine that serves, and compare.

    It is first made alone in its batch. A runtime may round differently in wider batches (INT8 in
    onnxruntime does). So if the result differs and the receipt holds the rows of each step, it is
    made once more in batches of that width.

    Args:
        release_dir: checked by `check_release`.
        texts: from `recipe_texts`.
        image: the image that was sent; needed to measure how far the pixels differ.
        runtime: in place of the one that made it.
        tolerance: levels of 255 that count as "within tolerance"; when not given, as many as the
            release states for images made in batches.

    Raises:
        IntegrityError: `image` is not the image that the recipe is about.
        ModelopsError: the release cannot be opened here, or gives no image.
    """
    from modelops.base.pixels import pixels_sha256
    from modelops.models.request import ImageRequest
    from modelops.serving.node.load import open_released

    release = check_release(recipe, release_dir)
    sent = None if image is None else _sent_pixels(Path(image), recipe)
    then, _, device = recipe.runtime.rpartition("-")
    chosen = runtime or ("auto" if then in ("", "torch") else then)  # torch runs a checkpoint
    opened = open_released(
        Path(release_dir), release, fallback=recipe.model_sha256 == release.fallback_sha256,
        runtime=chosen, device=device or "cpu",
    )  # fmt: skip
    pipeline, source = opened.pipeline, opened.source
    request = ImageRequest(
        prompt=texts["prompt"],
        negative_prompt=texts["negative_prompt"],
        seed=recipe.seed,
        steps=recipe.steps,
        guidance=recipe.guidance,
        height=recipe.height,
        width=recipe.width,
    )
    pixels = _make(pipeline, request)
    company = []
    if pixels_sha256(pixels) != recipe.pixels_sha256 and _had_company(recipe):
        pixels = _make(pipeline, request, recipe.batch_rows)
        company = [f"made in batches of up to {max(recipe.batch_rows)} rows, as then"]
    digest = pixels_sha256(pixels)
    notes = company + [
        f"{what} then {was}, now {now}"
        for what, was, now in (
            ("runtime", recipe.runtime, source.runtime),
            ("precision", recipe.precision, source.precision),
        )
        if was is not None and was != now
    ]
    answer: Answer = "equal" if digest == recipe.pixels_sha256 else "differs"
    if recipe.watermarked_sha256 and answer == "differs" and sent is not None:
        notes.append("the image that was sent has a watermark, which counts as a difference")
    difference, psnr = None, None
    if answer == "equal":
        difference = 0
    elif sent is not None:
        difference, psnr = picture_distance(sent, _as_sent(pixels, recipe.output_format))
        if tolerance is None:
            tolerance = stated_difference(release.defaults)
        if difference <= tolerance:
            answer = "within tolerance"
    return Replay(
        answer=answer,
        recipe=recipe,
        pixels_sha256=digest,
        runtime=source.runtime,
        precision=source.precision,
        max_difference=difference,
        psnr_db=psnr,
        notes=notes,
    )


def stated_difference(defaults: ReleaseDefaults) -> int:
    """Return the grey levels (of 255) by which a release says images made in batches may differ."""
    stated = defaults.get("company")
    if not stated:
        return 0
    return max(stated[beside]["max_difference"] for beside in ("company", "offline"))


def _make(
    pipeline: Any, request: ImageRequest, batch_rows: Sequence[int] = ()
) -> npt.NDArray[np.uint8]:
    """Make the image alone, or with batch_rows[k] rows in evaluation k; copies fill them."""
    from modelops.serving.engine.engine import StepEngine

    engine = StepEngine(pipeline)
    try:
        with engine.model.widened(batch_rows):
            (job,) = engine.submit([request])
            return job.future.result().pixels
    finally:
        engine.close(drain=False)


def _had_company(recipe: Recipe) -> bool:
    own = 1 if recipe.guidance == 1.0 else 2
    return max(recipe.batch_rows, default=0) > own


def picture_distance(
    one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]
) -> tuple[int, float | None]:
    """Return (largest difference in levels, PSNR in dB for a peak of 255) of images [H, W, 3].

    PSNR is None for equal pixels, where it is infinite.
    """
    if one.shape != other.shape:
        raise IntegrityError(f"images of different sizes: {one.shape} and {other.shape}")
    difference = one.astype(np.int16) - other.astype(np.int16)
    mean_square = float(np.mean(difference.astype(np.float64) ** 2))
    psnr = None if mean_square == 0 else float(10 * np.log10(255.0**2 / mean_square))
    return int(np.abs(difference).max()), psnr


def _from_receipt(receipt: Receipt) -> Recipe:
    request = receipt.request
    width, height = map(int, request.size.split("x"))
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    return Recipe(
        signed_by="receipt",
        receipt_id=receipt.id,
        release_sha256=receipt.release.sha256,
        model_sha256=receipt.model_sha256,
        runtime=receipt.runtime,
        precision=receipt.precision,
        seed=request.seed,
        steps=request.steps,
        guidance=request.guidance,
        width=width,
        height=height,
        output_format=request.output_format,
        pixels_sha256=receipt.pixels_sha256,
        texts={name: text for name, text in texts.items() if text is not None},
        digests={
            "prompt": request.prompt_sha256,
            "negative_prompt": request.negative_prompt_sha256,
        },
        output_sha256=receipt.output_sha256,
        batch_rows=tuple(receipt.batch_rows),
        watermarked_sha256=receipt.watermark.pixels_sha256 if receipt.watermark else None,
    )


def _from_manifest(said: dict[str, Any], output_format: str, *, output_sha256: str) -> Recipe:
    try:
        width, height = map(int, str(said["size"]).split("x"))
        return Recipe(
            signed_by="manifest",
            receipt_id=str(said["receipt"]),
            release_sha256=str(said["release_sha256"]),
            model_sha256=str(said["model_sha256"]),
            runtime=str(said["runtime"]),
            precision=None,
            seed=int(said["seed"]),
            steps=int(said["steps"]),
            guidance=float(said["guidance"]),
            width=width,
            height=height,
            output_format=output_format,
            pixels_sha256=str(said["pixels_sha256"]),
            output_sha256=output_sha256,
            watermarked_sha256=(
                str(said["watermark"]["pixels_sha256"]) if "watermark" in said else None
            ),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise IntegrityError(f"its manifest does not say how it was made ({error})") from error


def _sent_pixels(path: Path, recipe: Recipe) -> npt.NDArray[np.uint8]:
    """Read an image's pixels, if it is the recipe's: by its bytes, or by its lossless pixels."""
    from modelops.base.pixels import pixels_sha256

    data = _read_file(path)
    pixels = _decode(data, path)
    lossless = recipe.watermarked_sha256 or recipe.pixels_sha256
    if sha256_bytes(data) != recipe.output_sha256 and pixels_sha256(pixels) != lossless:
        raise IntegrityError(f"{path}: not the image that was sent, its digests are others")
    return pixels


def _as_sent(pixels: npt.NDArray[np.uint8], output_format: str) -> npt.NDArray[np.uint8]:
    """Return the pixels that a reader of the file sees: JPEG loses the same each time."""
    from modelops.serving.provenance.images import encode_image

    if output_format != "jpeg":
        return pixels
    return _decode(encode_image(pixels, output_format, {}), Path("the image made again"))


def _decode(data: bytes, path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not a readable image") from error


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path}: over {_MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
