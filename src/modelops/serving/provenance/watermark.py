"""Invisible watermark that says "made by the owner of this key", and nothing else.

It is found without the original, and survives changes that strip a manifest: another encoding,
another size, some noise. It carries no text and no id. The owner of the key can find it, put it on
other images and remove it; without the key it can still be destroyed by cropping, rotating or
generating the image anew. A missing watermark proves nothing.

How: sums of L mid-frequency DCT coefficients of the luma, with keyed signs, are moved to the
nearest point of a lattice with a keyed offset (spread-transform dither modulation: Chen and
Wornell, "Quantization index modulation", IEEE Trans. Inf. Theory 47(4), 2001). Unlike adding a
pattern (Cox et al., "Secure spread spectrum watermarking for multimedia", IEEE Trans. Image Proc.
6(12), 1997) the image itself is then no noise to the detector, which is what makes 32 x 32
pixels enough. The DCT is of the whole image, so a coefficient keeps its index when the image is
resized, and the lattice's step is searched for, which takes in any change of contrast.

How sure: with n offsets d drawn by the key, z = sqrt(2 / n) sum cos(2 pi (x / step - d)) has mean
0 and variance 1 for *any* image that knows nothing of the key, and
E exp(t z) = I0(t sqrt(2 / n))^n <= exp(t^2 / 2). So P(z >= s) <= exp(-s^2 / 2), and the best of
`looks` searches is at least s with at most `looks` times that: a bound, not a fit.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import read_text, sha256_bytes, write_bytes
from modelops.base.private import require_private

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

METHOD = "modelops-stdm-1"
MAX_FALSE_ALARM = 1e-6  # of one image; the verdict's limit
MIN_PSNR = 40.0  # dB
RELIABLE_SIDE = 32  # pixels; below, an untouched image may not be found (bench_watermark.py)
_LINE = re.compile(r"modelops-watermark-key-1:([0-9a-f]{64})\s*")

_BAND = (3, 96)  # half-periods an image, radially
_REACH = 0.85  # of the shorter side: higher frequencies are left alone
_LENGTH = 6  # coefficients in a sum
_RING = 2.0  # the coefficients of a sum come from a ring this wide
_CUTS = (14.0, 27.0, 41.0, 60.0, 96.0)  # detection also tries low frequencies only
_STEPS = np.exp(np.arange(math.log(0.04), math.log(2.2), 0.02))  # grey levels over sqrt(H W)
_LUMA = np.array([0.299, 0.587, 0.114])  # BT.601, as JPEG


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Result of a search for the watermark.

    Attributes:
        z: the statistic, in standard deviations of images without the watermark.
        p_value: at most this share of keys would give such a z for an image that is not marked.
        found: p_value <= 1e-6.
        looks: number of steps and bands that were tried; p_value is corrected for them.
    """

    z: float
    p_value: float
    found: bool
    looks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Image with the watermark; `detection` is the result of a search in these pixels."""

    pixels: Pixels
    psnr_db: float
    detection: Detection


@dataclass(frozen=True, slots=True)
class _Plan:
    """Values derived from the key: `index` [N, L] into the DCT, `signs` [N, L], `offsets` [N] in
    [0, 1).
    """

    index: npt.NDArray[np.intp]
    signs: Floats
    offsets: Floats
    radius: Floats  # [N]: the highest frequency in each sum


class Watermark:
    """Watermark of one key: embeds and finds it. Thread-safe.

    Args:
        key: 32 random bytes.

    Raises:
        UsageError: the key is too short.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise UsageError("a watermark key has at least 16 bytes")
        self.key_id = sha256_bytes(b"modelops watermark key id" + key)
        self._plan = _make_plan(key)

    def embed(self, pixels: Pixels) -> Embedded:
        """Embed the watermark in an image [H, W, 3] uint8 RGB, at 40 dB PSNR or more.

        The same pixels and key give the same pixels on the same machine (sums of floats are rounded
        to grey levels). If there is no room, as in a plain white image, `found` is False.

        Raises:
            UsageError: the pixels have another shape or dtype.
        """
        _check(pixels)
        plan, (height, width) = self._plan, pixels.shape[:2]
        used = plan.radius <= _REACH * min(height, width)
        side = min(height, width) / RELIABLE_SIDE
        wanted = min(45.0, 40.5 + 0.9 * max(0.0, math.log2(side)))
        error = 255.0**2 / 10 ** (wanted / 10)
        # A sum is moved by a uniform share of a step: variance step^2 / 12.
        step = math.sqrt(12 * height * width * error / max(1, int(used.sum())))
        sums = _sums(_luma(pixels), plan)
        while True:
            marked = _move(pixels, plan, used, step * (_rounded(sums, step, plan) + plan.offsets))
            distance = _psnr(pixels, marked)
            if distance >= max(MIN_PSNR, wanted - 0.3) or step < 1e-3:
                break
            step *= min(0.97, 10 ** ((distance - wanted) / 20))
        return Embedded(pixels=marked, psnr_db=distance, detection=self.detect(marked))

    def detect(self, pixels: Pixels) -> Detection:
        """Search for the watermark in an image [H, W, 3] uint8 RGB of any size.

        Raises:
            UsageError: the pixels have another shape or dtype.
        """
        _check(pixels)
        plan, (height, width) = self._plan, pixels.shape[:2]
        used = plan.radius <= _REACH * min(height, width)
        sums = _sums(_luma(pixels), plan)[used] / math.sqrt(height * width)
        waves = np.cos(2 * np.pi * (sums / _STEPS[:, None] - plan.offsets[used]))
        best, looks, seen = -math.inf, 0, 0
        for cut in _CUTS:
            inside = plan.radius[used] <= cut
            count = int(inside.sum())
            if count <= seen:
                continue
            seen = count
            best = max(best, float(waves[:, inside].sum(axis=1).max() * math.sqrt(2 / count)))
            looks += len(_STEPS)
        if not looks:
            return Detection(z=0.0, p_value=1.0, found=False, looks=0)
        p_value = min(1.0, looks * math.exp(-(best**2) / 2)) if best > 0 else 1.0
        return Detection(z=best, p_value=p_value, found=p_value <= MAX_FALSE_ALARM, looks=looks)


def make_key(path: str | Path) -> str:
    """Write a new key that only its owner can read; return its id.

    Raises:
        UsageError: the file exists, and a lost key cannot be made again.
        ModelopsError: the file cannot be written.
    """
    target, key = Path(path), secrets.token_bytes(32)
    whole = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_bytes(whole, f"modelops-watermark-key-1:{key.hex()}\n".encode(), private=True)
        os.link(whole, target)  # unlike a renamed file, a link never replaces one
    except FileExistsError as error:
        raise UsageError(f"{path}: is there already", hint="choose another name") from error
    except OSError as error:
        raise ModelopsError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        whole.unlink(missing_ok=True)
    return Watermark(key).key_id


def open_watermark(path: str | Path) -> Watermark:
    """Open the watermark of a key file that `make_key` wrote.

    Raises:
        UsageError: the file is unreadable, not a key file, or others can read it.
    """
    found = _LINE.fullmatch(read_text(path))
    if not found:
        raise UsageError(f"{path}: no watermark key", hint="modelops watermark key FILE makes one")
    require_private(path)
    return Watermark(bytes.fromhex(found[1]))


def _make_plan(key: bytes) -> _Plan:
    low, high = _BAND
    rows, columns = np.indices((high, high))
    radius = np.hypot(rows, columns).ravel()
    band = np.flatnonzero((radius >= low) & (radius < high))
    stream = hashlib.shake_256(b"modelops watermark 1" + key).digest(16 * len(band))
    order, rest = np.frombuffer(stream, "<u8").reshape(2, -1)
    band = band[np.lexsort((order, radius[band] // _RING))]
    count = len(band) // _LENGTH
    index = band[: count * _LENGTH].reshape(count, _LENGTH)
    signs = (rest[: count * _LENGTH] & 1).astype(np.float64).reshape(count, _LENGTH) * 2 - 1
    # Bits that neither the order nor the signs have used.
    offsets = (rest[:count] >> np.uint64(11)).astype(np.float64) / 2.0**53
    return _Plan(index, signs / math.sqrt(_LENGTH), offsets, radius[index].max(axis=1))


def _sums(luma: Floats, plan: _Plan) -> Floats:
    """Compute signed sums [N] of DCT coefficients (orthonormal) of a luma [H, W] in grey levels."""
    height, width = luma.shape
    top = _BAND[1]
    spectrum = np.zeros((top, top))
    vertical, horizontal = _basis(height, top), _basis(width, top)
    spectrum[: len(vertical), : len(horizontal)] = vertical @ luma @ horizontal.T
    return np.asarray((spectrum.ravel()[plan.index] * plan.signs).sum(axis=1))


def _move(pixels: Pixels, plan: _Plan, used: npt.NDArray[np.bool_], goal: Floats) -> Pixels:
    """Return pixels whose sums are near `goal` [N], in spite of rounding and clipping."""
    height, width = pixels.shape[:2]
    top = _BAND[1]
    vertical, horizontal = _basis(height, top), _basis(width, top)
    moved, change, pull = pixels, np.zeros_like(goal), 1.0
    for _ in range(6):
        change = np.where(used, change + pull * (goal - _sums(_luma(moved), plan)), 0.0)
        spectrum = np.zeros(top * top)
        spectrum[plan.index] = change[:, None] * plan.signs  # no coefficient is in two sums
        added = (
            vertical.T @ spectrum.reshape(top, top)[: len(vertical), : len(horizontal)] @ horizontal
        )
        moved = np.clip(np.rint(pixels + added[..., None]), 0, 255).astype(np.uint8)
        pull = 0.7
    return moved


def _rounded(sums: Floats, step: float, plan: _Plan) -> Floats:
    return np.asarray(np.rint(sums / step - plan.offsets))


@functools.lru_cache(maxsize=16)
def _basis(length: int, count: int) -> Floats:
    """Return the first `count` rows [count, length] of the orthonormal DCT-II."""
    frequency = np.arange(min(length, count))[:, None]
    basis = np.cos(np.pi * (2 * np.arange(length) + 1) * frequency / (2 * length))
    basis *= math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return np.asarray(basis)


def _luma(pixels: Pixels) -> Floats:
    return np.asarray(pixels @ _LUMA)


def _psnr(one: Pixels, other: Pixels) -> float:
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def _check(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UsageError(f"pixels of shape {pixels.shape} and type {pixels.dtype}, not RGB uint8")
