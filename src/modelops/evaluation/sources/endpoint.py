"""Model source that is a running service with the OpenAI Images API."""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

from modelops.base.errors import EvaluationError, ImageBlockedError, ModelopsError, UsageError
from modelops.evaluation.sources.client import Answer, ServiceClient
from modelops.models.request import Image, ImageRequest
from modelops.models.sources import ModelSource
from modelops.records.evaluation import SourceInfo

BLOCKED_CODES = ("content_policy_violation", "content_filter", "moderation_blocked")

ENDPOINT = "/v1/images/generations"

TIMEOUT_S = 120.0  # for the answer to one request

TIMEOUTS = 2  # of one image: a service that hung twice will hang again

# Bytes of an answer beside its image, of an image of unknown size, and of a text.
MORE, MAX_IMAGE, MAX_TEXT = 4_000_000, 64_000_000, 8_000_000
# What an image can be asked for without; a service may refuse fields that it does not know.
DISPENSABLE = ("response_format", "output_format", "seed")
_SUFFIXES = {
    b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp",
    b"II*\0": "tiff", b"MM\0*": "tiff",
}  # fmt: skip
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class EndpointSource(ModelSource):
    """Running service with the OpenAI Images API and modelops' seed, steps, guidance.

    Args:
        base: URL, with or without /v1. A model among several is named by #model=NAME at its end.
        timeout_s: for the answer to one request.
        attempts: tries for an image when the service answers 429 or 503, or cannot be reached;
            waits follow Retry-After, at most `max_wait_s` each. After `TIMEOUTS` requests without
            an answer in time there is no further retry.
        api_key: see `ServiceClient`.

    Raises:
        UsageError: the service cannot be reached, no key may be sent to it, or what it says of its
            model cannot be.
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
        address, _, fragment = base.partition("#")
        self.base = address.rstrip("/").removesuffix(ENDPOINT).removesuffix("/v1")
        self.attempts, self.max_wait_s = max(1, attempts), max_wait_s
        self.timeout_s = timeout_s
        self.batch_size = max(1, concurrency)
        self._client = ServiceClient(self.base, timeout_s=timeout_s, api_key=api_key)
        self._left_out: list[str] = []
        listed = self._models()
        named = parse_qs(fragment).get("model", [None])[0]
        if fragment and (named is None or len(parse_qs(fragment)) > 1):
            raise UsageError(f"{base}: #{fragment} is not understood", hint="#model=NAME")
        model = next((entry for entry in listed if entry.get("id") == named), None)
        if named is None and len(listed) == 1:
            model = listed[0]
        about = self._about(model or {})
        # A service that says what it serves needs no name.
        self.model = named or (str(model["id"]) if model and not about and "id" in model else None)
        self._known = [str(entry.get("id", ""))[:60] for entry in listed[:20]]
        self._size = _parse_size(about.get("size"))
        self.info = SourceInfo(
            kind="endpoint", uri=self.base + (f"#{fragment}" if fragment else ""),
            sha256=about.get("release_sha256"),
            runtime=about.get("runtime") or "service", precision="",
            details={
                "model": named or str((model or {}).get("id", ""))[:200],
                "model_sha256": about.get("model_sha256"),
            },
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

    def _models(self) -> list[dict[str, Any]]:
        """Return the models that the service lists; [] if it lists none."""
        import httpx

        try:
            answer = self._client.get(f"{self.base}/v1/models", limit=MAX_TEXT, timeout_s=10.0)
            listed = answer.json().get("data") if answer.status == 200 else []
        except httpx.HTTPError as error:
            raise UsageError(
                f"{self.base}: cannot be reached: {type(error).__name__}: {error}",
                hint="start it with `modelops serve RELEASE`, or correct the URL",
            ) from error
        except EvaluationError:
            return []
        return (
            [entry for entry in listed if isinstance(entry, dict)]
            if isinstance(listed, list)
            else []
        )

    def _about(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return what a modelops service says of its release; {} for another service.

        Raises:
            UsageError: it says what cannot be.
        """
        about = model.get("x_modelops")
        if about is None:
            return {}
        if not isinstance(about, dict):
            raise UsageError(f"{self.base}/v1/models: x_modelops is not an object")
        for name in ("release_sha256", "model_sha256"):
            value = about.get(name)
            if value is not None and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
                raise UsageError(f"{self.base}/v1/models: x_modelops.{name} is not a sha256")
        runtime, size = about.get("runtime"), about.get("size")
        if runtime is not None and not (isinstance(runtime, str) and len(runtime) <= 100):
            raise UsageError(f"{self.base}/v1/models: x_modelops.runtime is not a short text")
        if size is not None and _parse_size(size) == (None, None):
            raise UsageError(f"{self.base}/v1/models: x_modelops.size is not WIDTHxHEIGHT")
        return about

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
        if self.model is not None:
            body["model"] = self.model
        return self._decode(self._post(body, _most_bytes(request)), request)

    def _post(self, body: dict[str, Any], limit: int) -> dict[str, Any]:
        import httpx

        last, timeouts, attempt = "", 0, 0
        while attempt < self.attempts:
            wait = min(2.0**attempt * 0.5, self.max_wait_s)
            asked = {name: value for name, value in body.items() if name not in self._left_out}
            attempt += 1
            try:
                answer = self._client.post(f"{self.base}{ENDPOINT}", asked, limit=limit)
            except httpx.TimeoutException:
                last, timeouts = f"timed out after {self.timeout_s:g} s", timeouts + 1
                if timeouts == TIMEOUTS:
                    break
                continue  # the wait has been long enough
            except httpx.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                if answer.status == 200:
                    return answer.json()
                code, message = _error_of(answer)
                if code in BLOCKED_CODES:
                    raise ImageBlockedError(f"{self.base}: blocked: {message}")
                if self._leave_out(answer, asked):
                    attempt -= 1
                    continue
                last = f"HTTP {answer.status} {code}: {message}"
                if answer.status not in (429, 502, 503, 504):
                    break
                wait = min(_retry_after(answer, wait), self.max_wait_s)
            if attempt < self.attempts:
                time.sleep(wait)
        raise EvaluationError(f"{self.base}: no image: {last}{self._way_out(last)}")

    def _leave_out(self, answer: Answer, asked: dict[str, Any]) -> bool:
        """Leave a field out from now on if the service refused it, and images can do without."""
        if answer.status not in (400, 422):
            return False
        text = answer.body[:10_000].decode("utf-8", "replace")
        refused = [n for n in DISPENSABLE if n in asked and re.search(rf"\b{n}\b", text)]
        for name in refused[:1]:
            if name not in self._left_out:
                self._left_out.append(name)
                self.info.details["refused"] = ", ".join(self._left_out)
                if name == "seed":
                    _log.warning("%s: takes no seed; another run makes other images", self.base)
        return bool(refused)

    def _way_out(self, last: str) -> str:
        if re.search(r"\bmodel\b", last) and self.model is None and self._known:
            return f"; add #model=NAME to the URL, one of {', '.join(self._known)}"
        return ""

    def _decode(self, answer: dict[str, Any], request: ImageRequest) -> Image:
        from modelops.base.images import decode_image

        try:
            entry = answer["data"][0]
            data = self._bytes_of(entry)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise EvaluationError(f"{self.base}: an answer without an image") from error
        made_by = _release_of(entry)
        if made_by and self.info.sha256 and made_by != self.info.sha256:
            raise EvaluationError(
                f"{self.base}: release {made_by[:12]} made this image, a canary or a new one; "
                f"{self.info.sha256[:12]} is evaluated"
            )
        kind = next((kind for start, kind in _SUFFIXES.items() if data.startswith(start)), "png")
        if kind != "png":
            self.info.details["image_format"] = kind
        image = decode_image(data, f"answer.{kind}")
        wanted = (request.height, request.width)
        if None not in wanted and image.shape[:2] != wanted:
            raise EvaluationError(
                f"{self.base}: an image of {image.shape[1]}x{image.shape[0]} pixels, "
                f"{request.width}x{request.height} were asked for"
            )
        return image

    def _bytes_of(self, entry: dict[str, Any]) -> bytes:
        """Return the bytes of the image in an entry of an answer, or behind its link."""
        import httpx

        if isinstance(text := entry.get("b64_json"), str):
            if text.startswith("data:"):
                text = text.partition(",")[2]
            return _unpacked(text)
        link = entry["url"]
        if link.startswith("data:"):
            return _unpacked(link.partition(",")[2])
        url = urljoin(f"{self.base}/", link)
        here, there = urlsplit(self.base), urlsplit(url)
        if there.scheme != "https" and (there.scheme, there.netloc) != (here.scheme, here.netloc):
            raise EvaluationError(f"{self.base}: an image at {url[:200]}, which is not fetched")
        plain = ServiceClient(url, timeout_s=self.timeout_s, api_key=None, with_key=False)
        try:
            answer = plain.get(url, limit=MAX_IMAGE)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EvaluationError(f"{url[:200]}: {type(error).__name__}: {error}") from error
        finally:
            plain.close()
        if answer.status != 200:
            raise EvaluationError(f"{url[:200]}: HTTP {answer.status}")
        return answer.body


def _unpacked(text: str) -> bytes:
    """Bytes of base64, which some services break into lines or leave without its padding."""
    joined = "".join(text.split()).rstrip("=")
    return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)


def _most_bytes(request: ImageRequest) -> int:
    """Return the size of the largest answer to expect: pixels as they are, in base64, and text."""
    if not (request.width and request.height):
        return MAX_IMAGE
    return request.width * request.height * 4 * 4 // 3 + MORE


def _release_of(entry: dict[str, Any]) -> str | None:
    """Return the digest of the release that made an image, if its receipt names it."""
    try:
        return str(entry["x_modelops"]["release"]["sha256"])
    except (KeyError, TypeError):
        return None


def _parse_size(text: Any) -> tuple[int | None, int | None]:
    """Parse "64x32" (width x height) into (height, width)."""
    found = (
        re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
        if isinstance(text, str)
        else None
    )
    return (int(found[2]), int(found[1])) if found else (None, None)


def _error_of(answer: Answer) -> tuple[str, str]:
    """Return (code, message) of an OpenAI error body, both short."""
    if 300 <= answer.status < 400:
        place = str(answer.headers.get("Location", "another place"))[:200]
        return "", f"it redirects to {place}; redirects are not followed"
    try:
        error = answer.json()["error"]
        return str(error.get("code") or "")[:100], str(error.get("message") or "")[:500]
    except (EvaluationError, KeyError, TypeError, AttributeError):
        return "", answer.body[:800].decode("utf-8", "replace")[:200]


def _retry_after(answer: Answer, default: float) -> float:
    try:
        return max(0.0, float(answer.headers.get("Retry-After", default)))
    except ValueError:
        return default
