"""Check of a running endpoint: it must answer OpenAI's own client, twice with the same image."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from modelops.base.errors import ServingError, UsageError
from modelops.base.extras import require_module
from modelops.base.files import sha256_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointCheck:
    """Result of `check_endpoint`.

    Attributes:
        pixels: the image, [H, W, 3] uint8 RGB.
        png: its bytes as they were sent, with metadata.
        receipt: the image's `x_modelops`.
        text_chunks: the PNG's text chunks.
        first_s, second_s: seconds of the two requests, seen by the client.
        metrics: number of /metrics samples that modelops itself writes.
    """

    pixels: npt.NDArray[np.uint8]
    png: bytes
    receipt: dict[str, Any]
    text_chunks: dict[str, str]
    model: str
    first_s: float
    second_s: float
    metrics: int


def check_endpoint(
    url: str,
    prompt: str = "red heart",
    seed: int = 1,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    api_key: str = "none",
    timeout_s: float = 120.0,
) -> EndpointCheck:
    """Check health and metrics, generate twice with the official client, compare the pixels.

    Raises:
        MissingExtraError: the `openai` package is not installed.
        UsageError: not an address of the web.
        ServingError: names the first fault.
    """
    base = url.rstrip("/")
    for path in ("/livez", "/readyz", "/metrics"):
        status, _ = get(base + path)
        if status != 200:
            raise ServingError(f"{base}{path} answered {status}", hint="look into the server's log")
    extra = {"seed": seed, "steps": steps, "guidance": guidance}
    wanted = {"prompt": prompt} | {key: one for key, one in extra.items() if one is not None}
    model, pictures, times = _ask_twice(base, wanted, api_key=api_key, timeout_s=timeout_s)
    try:
        receipt = dict(pictures[0].model_extra["x_modelops"])
        first, second = (base64.b64decode(picture.b64_json) for picture in pictures)
        pixels, chunks = _decoded(first)
        again, _ = _decoded(second)
        stated = receipt["output_sha256"]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ServingError(f"{base}: no image with a receipt, so no modelops node") from error
    if sha256_bytes(first) != stated:
        raise ServingError("the receipt's output_sha256 is not that of the image")
    if pixels.shape != again.shape:
        raise ServingError(f"the same request gave {pixels.shape} and {again.shape} pixels")
    difference = int(np.abs(pixels.astype(np.int16) - again.astype(np.int16)).max())
    if difference > 1:
        raise ServingError(f"the same seed gave two images, {difference} grey levels apart")
    _, text = get(base + "/metrics")
    samples = [line for line in text.splitlines() if line.startswith("modelops_")]
    if not any(line.startswith("modelops_images_total") for line in samples):
        raise ServingError(f"{base}/metrics does not count images")
    return EndpointCheck(
        pixels=pixels,
        png=first,
        receipt=receipt,
        text_chunks=chunks,
        model=model,
        first_s=times[0],
        second_s=times[1],
        metrics=len(samples),
    )


def _ask_twice(
    base: str, wanted: dict[str, Any], *, api_key: str, timeout_s: float
) -> tuple[str, list[Any], list[float]]:
    """Return (model, two images, their seconds) of the same request, by the official client."""
    openai = require_module("openai", needed_for="checking an endpoint")
    pictures, times = [], []
    extra = {key: value for key, value in wanted.items() if key != "prompt"}
    with openai.OpenAI(
        base_url=f"{base}/v1", api_key=api_key, timeout=timeout_s, max_retries=0
    ) as client:
        try:
            model: str = client.models.list().data[0].id
            for _ in range(2):
                began = time.monotonic()
                answer = client.images.generate(
                    model=model, prompt=wanted["prompt"], response_format="b64_json",
                    extra_body=extra,
                )  # fmt: skip
                times.append(time.monotonic() - began)
                pictures.append(answer.data[0])
        except openai.OpenAIError as error:
            raise ServingError(f"{base}: {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ServingError(f"{base}: does not answer as OpenAI's Images API does") from error
    return model, pictures, times


def _decoded(file: bytes) -> tuple[npt.NDArray[np.uint8], dict[str, str]]:
    """Return ([H, W, 3] RGB, text chunks) of an image.

    Raises:
        OSError: it is none.
    """
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        chunks = {key: str(value) for key, value in getattr(image, "text", {}).items()}
        return np.asarray(image.convert("RGB")), chunks


def get(url: str, *, timeout_s: float = 30.0) -> tuple[int, str]:
    """Return (status, body) of a GET.

    Raises:
        UsageError: not an address of the web.
        ServingError: nobody answers, or not in HTTP.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UsageError(f"{url}: not an http:// or https:// address")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise ServingError(f"{url}: no answer ({error})", hint="is the server running?") from error
    except ValueError as error:
        raise UsageError(f"{url}: not an address ({error})") from error


def curl_line(url: str, prompt: str, *, out: str = "picture.png") -> str:
    """Return a shell command that makes one image and writes it to `out`."""
    body = json.dumps({"prompt": prompt, "seed": 1}).replace("'", "'\\''")
    return (
        f"curl -s {url.rstrip('/')}/v1/images/generations -H 'Content-Type: application/json' "
        f"-d '{body}' | python -c \"import sys,json,base64; "
        f"open('{out}','wb').write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
    )
