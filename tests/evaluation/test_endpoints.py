"""Services of others: their images, their refusals, and what they must not get or do."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foreign_service
from modelops.base.errors import EvaluationError, UsageError
from modelops.evaluation.sources import endpoint
from modelops.evaluation.sources.endpoint import EndpointSource
from modelops.models.request import ImageRequest

REQUEST = ImageRequest(prompt="red heart", seed=7)


def encoded(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


def answer(**entry: Any) -> foreign_service.Reply:
    return 200, {"data": [entry]}, {}


def good(_body: dict[str, Any]) -> foreign_service.Reply:
    return answer(b64_json=base64.b64encode(encoded()).decode())


def refusal(message: str, code: str = "invalid_request_error") -> foreign_service.Reply:
    return 400, {"error": {"message": message, "code": code}}, {}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_an_image_of_any_known_format_is_measured(kind: str, prefix: str) -> None:
    data = prefix + base64.b64encode(encoded(kind)).decode()
    with foreign_service.serve(lambda body: answer(b64_json=data)) as service:
        source = EndpointSource(service.url)
        image = source.generate([REQUEST])[0]
    assert image.shape == (16, 24, 3)
    assert np.abs(image.astype(int) - (200, 40, 90)).max() <= 8
    expected = {"JPEG": "jpg"}.get(kind, kind.lower()) if kind != "PNG" else None
    assert source.info.details.get("image_format") == expected


def test_base64_in_lines_or_without_padding_is_read() -> None:
    data = base64.encodebytes(encoded("PNG")).decode()
    for text in (data, data.replace("\n", "\r\n"), data.rstrip("=\n")):
        with foreign_service.serve(lambda body, text=text: answer(b64_json=text)) as service:
            assert EndpointSource(service.url).generate([REQUEST])[0].shape == (16, 24, 3)


def test_an_image_behind_a_link_is_fetched_without_the_key() -> None:
    pages = {"/files/1.png": encoded()}
    with foreign_service.serve(lambda body: answer(url="/files/1.png"), pages=pages) as service:
        image = EndpointSource(service.url, api_key="secret").generate([REQUEST])[0]
    assert image.shape == (16, 24, 3)
    assert service.requests[1][2]["Authorization"] == "Bearer secret"
    assert "Authorization" not in service.requests[2][2]


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/a.png", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "ftp://x/y"]
)
def test_a_link_to_another_place_is_not_fetched(url: str) -> None:
    with (
        foreign_service.serve(lambda body: answer(url=url)) as service,
        pytest.raises(EvaluationError, match="which is not fetched"),
    ):
        EndpointSource(service.url).generate([REQUEST])


def test_fields_that_a_service_refuses_are_left_out_and_named() -> None:
    def strict(body: dict[str, Any]) -> foreign_service.Reply:
        for name in ("response_format", "output_format"):
            if name in body:
                return refusal(f"Unknown parameter: '{name}'.", "unknown_parameter")
        if "seed" in body:
            detail = [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]
            return 422, {"detail": detail}, {}
        return good(body)

    with foreign_service.serve(strict) as service:
        source = EndpointSource(service.url, attempts=1)
        source.generate([REQUEST])
        source.generate([REQUEST])
    assert len(service.posted) == 5  # each is refused once, and never sent again
    assert service.posted[-1] == {"prompt": "red heart", "n": 1}
    assert source.info.details["refused"] == "response_format, output_format, seed"


def test_what_was_asked_for_is_not_left_out() -> None:
    with (
        foreign_service.serve(lambda body: refusal("Unknown parameter: 'steps'.")) as service,
        pytest.raises(EvaluationError, match="Unknown parameter: 'steps'"),
    ):
        EndpointSource(service.url).generate([ImageRequest(prompt="x", seed=0, steps=4)])


def wants_a_model(body: dict[str, Any]) -> foreign_service.Reply:
    return good(body) if body.get("model") == "painter" else refusal("you must provide a model")


@pytest.mark.parametrize(
    ("listed", "fragment"),
    [(["painter"], ""), (["writer", "painter"], "#model=painter"), ([], "#model=painter")],
)
def test_a_model_is_named_where_it_must_be(listed: list[str], fragment: str) -> None:
    models = {"data": [{"id": name} for name in listed]}
    with foreign_service.serve(wants_a_model, models=models) as service:
        source = EndpointSource(f"{service.url}/v1{fragment}")
        source.generate([REQUEST])
    assert source.info.details["model"] == "painter"
    assert source.info.uri == service.url + fragment  # part of the name of what was measured


def test_several_models_are_named_with_the_way_to_choose() -> None:
    models = {"data": [{"id": "writer"}, {"id": "painter"}]}
    with (
        foreign_service.serve(wants_a_model, models=models) as service,
        pytest.raises(EvaluationError, match="#model=NAME to the URL, one of writer, painter"),
    ):
        EndpointSource(service.url).generate([REQUEST])


@pytest.mark.parametrize(
    "url", ["http://example.com", "http://192.0.2.1/v1", "http://[2001:db8::1]"]
)
def test_a_key_is_not_sent_over_plain_http(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_API_KEY", "secret")
    with pytest.raises(UsageError, match="not sent over plain http") as caught:
        EndpointSource(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://a:b",
        "https://user:word@example.com",
    ],
)
def test_what_is_no_url_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        EndpointSource(url)
    assert "word" not in caught.value.message.replace("password", "")


def test_a_key_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_API_KEY", "secret")
    with foreign_service.serve(good) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with foreign_service.serve(good) as service:
            EndpointSource(service.url).generate([REQUEST])
        with pytest.raises(UsageError, match="cannot be reached"):
            EndpointSource("https://127.0.0.1:9")
    assert service.requests and not proxy.requests


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with foreign_service.serve(good) as other:
        there = {"Location": f"{other.url}/v1/images/generations"}
        with (
            foreign_service.serve(lambda body: (status, {}, there)) as service,
            pytest.raises(EvaluationError, match=f"it redirects to {other.url}"),
        ):
            EndpointSource(service.url, api_key="secret").generate([REQUEST])
    assert not other.requests


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_an_answer_has_a_limit_before_and_after_unpacking(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_IMAGE", 1_000_000)
    data = json.dumps({"data": "x" * 3_000_000}).encode()
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding](data)
    headers = {"Content-Encoding": encoding}
    with (
        foreign_service.serve(lambda body: (200, packed, headers)) as service,
        pytest.raises(EvaluationError, match="more than 1,000,000 bytes"),
    ):
        EndpointSource(service.url).generate([REQUEST])


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        (gzip.compress(b"{}")[:-12], {"Content-Encoding": "gzip"}, "not JSON"),
        (b"{}", {"Content-Encoding": "gzip"}, "packing is broken"),
        (b"{}", {"Content-Encoding": "br"}, "packed as br"),
        (b"[" * 100_000, {}, "nested too deeply|not JSON"),
        (b'{"data": ' + b"9" * 5000 + b"}", {}, "digits"),
        (b"\xff\xfe", {}, "not JSON"),
        (b"[]", {}, "not a JSON object"),
        (b'{"data": [{"b64_json": "\xc3\xa9"}]}', {}, "without an image"),
        (b'{"data": [[]]}', {}, "without an image"),
        (b'{"data": {"0": 1}}', {}, "without an image"),
    ],
)
def test_an_answer_that_is_none_is_one_line(
    body: bytes, headers: dict[str, str], said: str
) -> None:
    with (
        foreign_service.serve(lambda _: (200, body, headers)) as service,
        pytest.raises(EvaluationError, match=said) as caught,
    ):
        EndpointSource(service.url).generate([REQUEST])
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ([], "x_modelops is not an object"),
        ("text", "x_modelops is not an object"),
        ({"size": "²x²"}, "size is not WIDTHxHEIGHT"),
        ({"size": 64}, "size is not"),
        ({"size": "0x64"}, "size is not"),
        ({"size": "9" * 5000 + "x1"}, "size is not"),
        ({"release_sha256": ["a"]}, "release_sha256 is not a sha256"),
        ({"release_sha256": "../../x"}, "release_sha256 is not a sha256"),
        ({"model_sha256": {"a": 1}}, "model_sha256 is not a sha256"),
        ({"runtime": {"a": 1}}, "runtime is not a short text"),
        ({"runtime": "x" * 5000}, "runtime is not a short text"),
    ],
)
def test_what_a_service_says_of_itself_is_checked(about: Any, said: str) -> None:
    models = {"data": [{"id": "pilot", "x_modelops": about}]}
    with (
        foreign_service.serve(good, models=models) as service,
        pytest.raises(UsageError, match=said),
    ):
        EndpointSource(service.url)


@pytest.mark.parametrize("models", [[], {"data": {}}, {"data": [1, None]}, {"data": None}, "x"])
def test_a_list_of_models_in_another_form_is_none(models: Any) -> None:
    with foreign_service.serve(good, models=models) as service:
        assert EndpointSource(service.url).info.sha256 is None


def test_a_services_message_moves_no_cursor() -> None:
    with (
        foreign_service.serve(lambda body: refusal("\x1b[2Jcleared \x9b31m")) as service,
        pytest.raises(EvaluationError, match=r"\\u001b\[2Jcleared") as caught,
    ):
        EndpointSource(service.url).generate([REQUEST])
    assert caught.value.message.isprintable()
