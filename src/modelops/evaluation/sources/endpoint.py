"""Model source that is a running service with the OpenAI Images API."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modelops.base.errors import EvaluationError, ImageBlockedError, ModelopsError, UsageError
from modelops.models.request import Image, ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.evaluation import SourceInfo

BLOCKED_CODES = ("content_policy_violation", "content_filter", "moderation_blocked")

ENDPOINT = "/v1/images/generations"

TIMEOUT_S = 120.0  # for the answer to one request

TIMEOUTS = 2  # of one image: a service that hung twice will hang again


class EndpointSource(ModelSource):
    """Running service with the OpenAI Images API and modelops' seed, steps, guidance.

    Args:
        base: URL, with or without /v1.
        timeout_s: for the answer to one request.
        attempts: tries for an image when the service answers 429 or 503, or cannot be reached;
            waits follow Retry-After, at most `max_wait_s` each. After `TIMEOUTS` requests without
            an answer in time there is no further retry.
        api_key: sent as a bearer token; read from MODELOPS_API_KEY when not given.
    """

    scheduler_name = "service"

    def __init__(
        self,
        base: str,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = 5,
        max_wait_s: float = 30.0,
        concurrency: int = 4,
        api_key: str | None = None,
    ) -> None:
        import os

        import httpx

        self.base = base.rstrip("/").removesuffix(ENDPOINT).removesuffix("/v1")
        self.attempts, self.max_wait_s = max(1, attempts), max_wait_s
        self.timeout_s = timeout_s
        self.batch_size = max(1, concurrency)
        key = api_key or os.environ.get("MODELOPS_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=timeout_s, headers=headers, follow_redirects=False)
        model = self._model()
        about: dict[str, Any] = model.get("x_modelops") or {}
        self._size = _parse_size(about.get("size"))
        self.info = SourceInfo(
            kind="endpoint", uri=self.base, sha256=about.get("release_sha256"),
            runtime=str(about.get("runtime") or "service"), precision="",
            details={"model": str(model.get("id", "")), "model_sha256": about.get("model_sha256")},
        )  # fmt: skip

    @property
    def defaults(self) -> ImageRequest:
        height, width = self._size
        return ImageRequest(prompt="", seed=0, height=height, width=width)

    def generate(self, requests: Sequence[ImageRequest]) -> list[Image]:
        images: list[Image] = []
        for made in self.generate_each(requests):
            if isinstance(made, ModelopsError):
                raise made
            images.append(made)
        return images

    def generate_each(self, requests: Sequence[ImageRequest]) -> list[Image | ModelopsError]:
        """Ask for each image once, `batch_size` of them at a time."""
        if self.batch_size == 1 or len(requests) == 1:
            return [self.generate_one(request) for request in requests]
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self.generate_one, requests))

    def generate_one(self, request: ImageRequest) -> Image | ModelopsError:
        try:
            return self._one(request)
        except ModelopsError as error:
            return error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _model(self) -> dict[str, Any]:
        """Return the first model that the service lists; {} if it lists none."""
        import httpx

        try:
            answer = self._client.get(f"{self.base}/v1/models", timeout=10.0)
            listed = answer.json()["data"][0] if answer.status_code == 200 else {}
        except httpx.HTTPError as error:
            raise UsageError(
                f"{self.base}: cannot be reached: {type(error).__name__}: {error}",
                hint="start it with `modelops serve RELEASE`, or correct the URL",
            ) from error
        except (ValueError, KeyError, IndexError, TypeError):
            return {}
        return listed if isinstance(listed, dict) else {}

    def _one(self, request: ImageRequest) -> Image:
        body: dict[str, Any] = {
            "prompt": request.prompt, "n": 1, "seed": request.seed,
            "response_format": "b64_json", "output_format": "png",
        }  # fmt: skip
        if request.width and request.height:
            body["size"] = f"{request.width}x{request.height}"
        for name in ("steps", "guidance"):
            if getattr(request, name) is not None:
                body[name] = getattr(request, name)
        if request.negative_prompt:
            body["negative_prompt"] = request.negative_prompt
        answer = self._post(body)
        return self._decode(answer, request)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        last, timeouts = "", 0
        for attempt in range(self.attempts):
            wait = min(2.0**attempt * 0.5, self.max_wait_s)
            try:
                answer = self._client.post(f"{self.base}{ENDPOINT}", json=body)
            except httpx.TimeoutException:
                last, timeouts = f"timed out after {self.timeout_s:g} s", timeouts + 1
                if timeouts == TIMEOUTS:
                    break
                continue  # the wait has been long enough
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code == 200:
                    return _json_object(answer)
                code, message = _error_of(answer)
                if code in BLOCKED_CODES:
                    raise ImageBlockedError(f"{self.base}: blocked: {message}")
                last = f"HTTP {answer.status_code} {code}: {message}"
                if answer.status_code not in (429, 502, 503, 504):
                    break
                wait = min(_retry_after(answer, wait), self.max_wait_s)
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise EvaluationError(f"{self.base}: no image: {last}")

    def _decode(self, answer: dict[str, Any], request: ImageRequest) -> Image:
        from modelops.data.images import decode_image

        try:
            entry = answer["data"][0]
            data = base64.b64decode(entry["b64_json"], validate=True)
        except (KeyError, IndexError, TypeError, binascii.Error) as error:
            raise EvaluationError(f"{self.base}: an answer without an image") from error
        made_by = _release_of(entry)
        if made_by and self.info.sha256 and made_by != self.info.sha256:
            raise EvaluationError(
                f"{self.base}: release {made_by[:12]} made this image, a canary or a new one; "
                f"{self.info.sha256[:12]} is evaluated"
            )
        image = decode_image(data, "answer.png")
        wanted = (request.height, request.width)
        if None not in wanted and image.shape[:2] != wanted:
            raise EvaluationError(
                f"{self.base}: an image of {image.shape[1]}x{image.shape[0]} pixels, "
                f"{request.width}x{request.height} were asked for"
            )
        return image


def _release_of(entry: dict[str, Any]) -> str | None:
    """Return the digest of the release that made an image, if its receipt names it."""
    try:
        return str(entry["x_modelops"]["release"]["sha256"])
    except (KeyError, TypeError):
        return None


def _parse_size(text: Any) -> tuple[int | None, int | None]:
    """Parse "64x32" (width x height) into (height, width)."""
    width, _, height = str(text or "").partition("x")
    if width.isdigit() and height.isdigit():
        return int(height), int(width)
    return None, None


def _json_object(answer: Any) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError as error:
        raise EvaluationError("the service's answer is not JSON") from error
    if not isinstance(body, dict):
        raise EvaluationError("the service's answer is not a JSON object")
    return body


def _error_of(answer: Any) -> tuple[str, str]:
    """Return (code, message) of an OpenAI error body."""
    try:
        error = answer.json()["error"]
        return str(error.get("code") or ""), str(error.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", answer.text[:200]


def _retry_after(answer: Any, default: float) -> float:
    try:
        return max(0.0, float(answer.headers.get("Retry-After", default)))
    except ValueError:
        return default
