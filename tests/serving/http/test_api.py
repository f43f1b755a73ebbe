"""Bodies that OpenAI's client sends are understood; all others get OpenAI's error."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modelops.serving.api import ApiError, parse_request
from modelops.serving.provenance.images import SOURCE_TYPE, encode_image


def test_a_plain_request_has_the_defaults() -> None:
    request = parse_request(b'{"prompt": "red heart"}')
    assert (request.n, request.size, request.output_format) == (1, "auto", "png")
    assert request.seed is None and request.steps is None


def test_a_full_request() -> None:
    body = {"prompt": "é 🎈", "n": 4, "size": "64x64", "seed": 2**53 - 1, "steps": 8,
            "guidance": 1, "negative_prompt": "blue", "user": "me", "quality": "auto",
            "response_format": "b64_json", "output_format": "webp", "model": "tiny"}  # fmt: skip
    assert parse_request(json.dumps(body).encode()).seed == 2**53 - 1


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ({}, []),
        ({"quality": "auto", "moderation": "auto", "background": "opaque", "style": None}, []),
        ({"quality": "standard", "output_compression": None, "user": None}, []),
        ({"quality": "hd", "style": "vivid"}, ["quality", "style"]),
        ({"quality": "low", "output_compression": 100}, ["quality", "output_compression"]),
        ({"user": "me", "moderation": "low"}, ["moderation", "user"]),
    ],
)
def test_parameters_of_other_models_are_accepted_and_named(
    body: dict[str, Any], ignored: list[str]
) -> None:
    assert parse_request(json.dumps({"prompt": "sun"} | body).encode()).ignored == ignored


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 1001}, "prompt", "invalid_value"),
        ({"prompt": 7}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": "a\0b"}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 5}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**53}, "seed", "invalid_value"),
        ({"seed": 1e3}, "seed", "invalid_value"),
        ({"steps": 0}, "steps", "invalid_value"),
        ({"steps": 10**9}, "steps", "invalid_value"),
        ({"guidance": 0.5}, "guidance", "invalid_value"),
        ({"guidance": 1e9}, "guidance", "invalid_value"),
        ({"size": "big"}, "size", "invalid_value"),
        ({"size": "64x-64"}, "size", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"response_format": "url"}, "response_format", "unsupported_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"style": "loud"}, "style", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"moderation": "none"}, "moderation", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"input_fidelity": "high"}, "input_fidelity", "unknown_parameter"),
        ({"stepz": 3}, "stepz", "unknown_parameter"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_request(json.dumps({"prompt": "red heart"} | change).encode())
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == param
    assert error.value.body["error"]["code"] == code
    assert error.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"prompt": "x"', b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}',
     b'{"prompt": "x", "guidance": NaN}', b'{"prompt": "x", "guidance": Infinity}', b"{}",
     b'{"prompt": "x", "n": 1e400}', b"[" * 5000],
)  # fmt: skip
def test_bad_bodies_are_400(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse_request(body)
    assert error.value.status == 400
    json.dumps(error.value.body).encode("ascii")


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_every_format_says_what_made_it(output_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = encode_image(pixels, output_format, {"seed": "7", "Notice": 'AI "generated" <&>'})
    assert SOURCE_TYPE.encode() in data
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format or "").lower() == output_format
        decoded = np.asarray(image.convert("RGB"))
        if output_format == "png":
            assert image.text["seed"] == "7"  # type: ignore[attr-defined]
            assert image.text["Comment"] == "AI generated"  # type: ignore[attr-defined]
    if output_format == "jpeg":
        assert np.abs(decoded.astype(int) - pixels).mean() < 8
    else:
        assert np.array_equal(decoded, pixels)
