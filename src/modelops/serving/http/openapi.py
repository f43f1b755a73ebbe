"""OpenAPI document: what FastAPI derives from the routes, and every answer that a route may give.

Each operation states its errors, all in OpenAI's shape, and their headers, so that a client
generated from the document, or a fuzzer, knows them.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from modelops.serving.http.streaming import COMPLETED, PARTIAL
from modelops.serving.telemetry.metrics import CODES

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
_EVENT = {  # OpenAPI 3.2's word for what each event of a stream is
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": [PARTIAL, COMPLETED, "error"]},
        "data": {
            "type": "string",
            "contentMediaType": JSON,
            "contentSchema": {"type": "object", "required": ["type"]},
        },
    },
}
_REASONS = {
    400: "The request is wrong, or against the content policy",
    401: "No valid API key",
    403: "This server has no API keys and answers on its loopback address only",
    404: "No such model",
    405: "Another HTTP method is needed",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not plain JSON in UTF-8",
    429: "Too many requests: of this key, or in the queue",
    421: "Without API keys a node answers to its loopback names only",
    500: "The node failed",
    503: "Not ready, shutting down, or a filter gave no answer",
}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    405: {"Allow": {"required": True, "schema": {"type": "string"}}},
    429: {
        "Retry-After": {
            "required": True,
            "description": "Seconds, by the measured length of the queue",
            "schema": {"type": "integer", "minimum": 1},
        },
        "Retry-After-Ms": {"required": True, "schema": {"type": "integer", "minimum": 1}},
    },
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}},
}
IGNORED_HEADER = "X-Modelops-Ignored"
LIMIT_HEADER = "X-RateLimit-Limit-Image-Steps"
REMAINING_HEADER = "X-RateLimit-Remaining-Image-Steps"
ANSWER_HEADERS = ["X-Request-Id", IGNORED_HEADER, LIMIT_HEADER, REMAINING_HEADER, "Retry-After"]
_OF_IMAGES: dict[str, Any] = {
    IGNORED_HEADER: {
        "description": "Parameters of OpenAI's models that this one has not, with commas",
        "schema": {"type": "string"},
    },
    LIMIT_HEADER: {
        "description": "Images x steps that this key may make in a minute, if they are limited",
        "schema": {"type": "integer", "minimum": 0},
    },
    REMAINING_HEADER: {
        "description": "What is left of them",
        "schema": {"type": "integer", "minimum": 0},
    },
}
_EVERYWHERE = (400, 403, 405, 421, 500)  # by the middleware, before a route is asked
_WITH_KEY = (401, 403, 503)
_WITH_BODY = (404, 408, 413, 415, 429)


class ErrorDetail(BaseModel):
    """Description of a failure, for a person and for a program."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Body of every answer that is an error."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class ModelEntry(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    x_modelops: dict[str, Any]


class ModelList(BaseModel):
    """Body of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Readiness(BaseModel):
    """Body of GET /readyz."""

    ready: bool
    problems: list[str]
    golden_pixels_sha256: str | None = None
    golden_mean_difference: float | None = None


def describe(app: FastAPI) -> None:
    """Let `app.openapi()`, and so /openapi.json, state every answer."""
    derive = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            complete(derive())
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]


def complete(document: dict[str, Any]) -> None:
    """Add errors, headers and keys to a derived document, in place."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for model in (ErrorBody, ModelList, Readiness):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    schemas["ErrorDetail"]["properties"]["code"]["examples"] = sorted(CODES)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is never sent
        schemas.pop(name, None)
    components.setdefault("securitySchemes", {})["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `modelops serve key create`; a node without keys asks for none.",
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    answers = document["paths"]
    _says(answers, "/v1/models", 200, JSON, _ref("ModelList"))
    _says(answers, "/v1/models/{name}", 200, JSON, _ref("ModelEntry"))
    for status in (200, 503):
        _says(answers, "/readyz", status, JSON, _ref("Readiness"))
        _says(answers, "/livez", status, TEXT, {"type": "string"})
    _says(answers, "/metrics", 200, TEXT, {"type": "string"})
    for operations in answers.values():
        for operation in operations.values():
            stream = operation["responses"].get("200", {}).get("content", {}).get(EVENTS)
            if stream is not None:
                stream["itemSchema"] = _EVENT
                stream.pop("schema", None)


def _complete(path: str, operation: dict[str, Any]) -> None:
    keyed = path.startswith("/v1/")
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    wanted = {*_EVERYWHERE, *(_WITH_KEY if keyed else (503,))}
    if "{" in path:
        wanted.add(404)
    if "requestBody" in operation:
        wanted.update(_WITH_BODY)
    for status in sorted(wanted):
        responses.setdefault(
            str(status),
            {"description": _REASONS[status], "content": {JSON: {"schema": _ref("ErrorBody")}}},
        )
    for status, answer in responses.items():
        answer.setdefault("headers", {})["X-Request-Id"] = {
            "required": True,
            "description": "The caller's own if it sent a plain one",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
        }
        answer["headers"] |= _HEADERS.get(int(status), {})
        if "requestBody" in operation and int(status) == 200:
            answer["headers"] |= _OF_IMAGES
    if keyed:
        operation["security"] = [{"key": []}, {}]


def _says(paths: dict[str, Any], path: str, status: int, kind: str, schema: Any) -> None:
    for operation in paths.get(path, {}).values():
        operation["responses"][str(status)]["content"] = {kind: {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
