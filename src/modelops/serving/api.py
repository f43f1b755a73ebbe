"""Request, response and error of the OpenAI Images API, with modelops' documented extensions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from modelops.base.guidance import guidance_scale
from modelops.base.seeding import MAX_SEED
from modelops.serving.failures import NodeError

log = logging.getLogger("modelops.serving")

MAX_IMAGES = 4
MAX_PARTIAL_IMAGES = 3
MAX_STEPS = 200
MAX_GUIDANCE = 20.0
MAX_PROMPT_CHARACTERS = 1000

_Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)]
_Integer = Annotated[int, Field(strict=True)]


class ImagesRequest(BaseModel):
    """Body of POST /v1/images/generations. Unknown fields are refused.

    Extensions to OpenAI's request (its client sends them through `extra_body`): `seed`, `steps`,
    `guidance`, `negative_prompt`. Image k of a request is made from seed + k.

    With `stream` the answer is server-sent events of one image (`modelops.serving.http.streaming`):
    OpenAI's events have no field that would say which of several images an image belongs to.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    prompt: Annotated[_Text, Field(min_length=1)]
    model: str | None = None
    n: Annotated[_Integer, Field(ge=1, le=MAX_IMAGES)] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    user: Annotated[str, Field(max_length=256)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    partial_images: Annotated[_Integer, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None

    seed: Annotated[_Integer, Field(ge=0, le=MAX_SEED)] | None = None
    steps: Annotated[_Integer, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, Field(strict=True, ge=0.0, le=MAX_GUIDANCE)] | None = None
    negative_prompt: _Text | None = None

    # Fields of OpenAI's own models. Their values are accepted, and `ignored` says which had no
    # effect; but a transparent background is refused, as the caller would get another image.
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    output_compression: Annotated[_Integer, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None

    @property
    def ignored(self) -> list[str]:
        """Names of the parameters that ask for something and have no effect."""
        nothing = {"quality": ("auto", "standard"), "moderation": ("auto",)}
        return [
            name
            for name in ("quality", "style", "output_compression", "moderation", "user")
            if (value := getattr(self, name)) is not None and value not in nothing.get(name, ())
        ]

    @field_validator("guidance")
    @classmethod
    def _off_or_on(cls, value: float | None) -> float | None:
        return None if value is None else guidance_scale(value)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _clean_text(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("is not valid Unicode text") from error
        if "\0" in value:
            raise ValueError("must not hold null characters")
        return value

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be blank")
        return value


class ImageData(BaseModel):
    """One image of a response."""

    b64_json: str
    x_modelops: dict[str, Any]


class ImagesResponse(BaseModel):
    """Body of a successful answer."""

    created: int
    data: list[ImageData]
    output_format: str
    size: str


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape.

    Args:
        status: HTTP status.
        code: OpenAI's machine-readable code, or ours where it has none.
        message: one line for a person.
        param: the field at fault.
        retry_after_s: seconds for a Retry-After header.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """OpenAI's error type for the status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def failure_to_api_error(error: BaseException) -> ApiError:
    """Return the answer to a client whose work ended without an image."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, NodeError):
        return ApiError(NodeError.status, NodeError.code, NodeError.answer)
    return ApiError(
        error.status, error.code, error.answer or error.message, retry_after_s=error.retry_after_s
    )


@contextmanager
def as_api_errors() -> Iterator[None]:
    """Turn failures in the block into answers to the client."""
    try:
        yield
    except NodeError as error:
        if error.answer:  # the client is told less
            log.error("%s: %s", error.code, error.message)
        raise failure_to_api_error(error) from error


def parse_request(body: bytes) -> ImagesRequest:
    """Parse JSON bytes into a request.

    Raises:
        ApiError: 400 that names the field at fault and what it may be.
    """
    try:
        request = ImagesRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [str(part) for part in first["loc"] if not str(part).startswith("function")]
        param = where[0] if where else None
        kind = first["type"]
        if kind == "json_invalid":
            raise ApiError(400, "invalid_json", f"the body is not JSON: {first['msg']}") from error
        if kind == "extra_forbidden":
            raise ApiError(
                400, "unknown_parameter", f"unknown parameter: {_printable(param)}",
                param=_printable(param),
            ) from error  # fmt: skip
        message = first["msg"].removeprefix("Value error, ")
        subject = f"{param}: " if param else "the body: "
        code = "missing_required_parameter" if kind == "missing" else "invalid_value"
        raise ApiError(400, code, subject + message, param=param) from error
    if request.response_format == "url":
        raise ApiError(
            400, "unsupported_value",
            "response_format: url is not supported, images are not stored; use b64_json",
            param="response_format",
        )  # fmt: skip
    if request.stream and (request.n or 1) > 1:
        raise ApiError(
            400, "unsupported_value",
            "n: one image can be streamed at a time; ask several times, or without stream",
            param="n",
        )  # fmt: skip
    if request.partial_images and not request.stream:
        raise ApiError(
            400, "unsupported_value", "partial_images: needs stream: true", param="partial_images"
        )  # fmt: skip
    return request


def _printable(name: str | None) -> str:
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in (name or ""))[:64]
