"""What marking an image costs: C2PA manifest with read-back, and its signed receipt.

    python bench/bench_provenance.py [--repeats 30]

Prints medians in milliseconds per image, beside the encoding that is needed anyway. A photograph
(scikit-image's astronaut) at three sizes, the node's own code path, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image

from modelops.base.pixels import pixels_sha256
from modelops.serving.provenance.images import encode_image
from modelops.serving.provenance.manifests import Marker, read_mark
from modelops.serving.provenance.receipts import (
    ReceiptLog,
    new_receipt_id,
    sign_receipt,
    text_digest,
    utc_now,
)
from modelops.serving.provenance.signing import development_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    photograph = Image.fromarray(skimage.data.astronaut())
    with tempfile.TemporaryDirectory() as folder:
        key = development_key(Path(folder) / "signing")
        marker = Marker(key, software=("bench", "1"))
        log = ReceiptLog(Path(folder) / "receipts", max_bytes=64_000_000)
        print(
            f"{'size':>5} {'format':>6} {'encode':>8} {'mark':>7} {'of it read':>10} "
            f"{'receipt':>8} {'added':>6} {'bytes':>7}"
        )
        for size in (32, 512, 1024):
            pixels = np.asarray(photograph.resize((size, size)))
            for name in ("png", "jpeg", "webp"):
                said = {"seed": 1, "pixels_sha256": pixels_sha256(pixels), "receipt": "0" * 32}
                encoded = encode_image(pixels, name, {"seed": "1"})
                marked = marker.embed(encoded, name, said)
                few = max(3, repeats // 6) if size == 1024 else repeats

                def write_receipt(pixels: Any = pixels) -> None:
                    log.write(sign_receipt(content(pixels), key))

                encode = milliseconds(partial(encode_image, pixels, name, {"seed": "1"}), few)
                mark = milliseconds(partial(marker.embed, encoded, name, said), repeats)
                read = milliseconds(partial(read_mark, marked, name), repeats)
                receipt = milliseconds(write_receipt, repeats)
                added = 100 * (mark + receipt) / encode
                print(
                    f"{size:>5} {name:>6} {encode:>8.2f} {mark:>7.2f} {read:>10.2f} "
                    f"{receipt:>8.2f} {added:>5.0f}% {len(marked) - len(encoded):>7}"
                )
        log.close()


def content(pixels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A receipt of the usual size; hashing the pixels is part of its cost."""
    digest = pixels_sha256(pixels)
    prompt = "a photograph of an astronaut"
    return {
        "kind": "receipt", "schema_version": 1, "id": new_receipt_id(), "created": utc_now(),
        "request": {"prompt": prompt, "prompt_sha256": text_digest(prompt), "seed": 1, "steps": 30},
        "batch_rows": [16] * 30, "model_sha256": digest, "pixels_sha256": digest,
        "output_sha256": digest, "runtime": "torch-cpu", "precision": "float32",
    }  # fmt: skip


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


if __name__ == "__main__":
    main()
