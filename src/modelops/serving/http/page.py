"""Page at / on which a node can be tried: one HTML file, with its style and script inside.

It calls nothing but the node's own API, and its Content-Security-Policy enforces that: the style
and the script are allowed by their digests, and nothing else. MODELOPS_PAGE=0 leaves it out.

Content Security Policy: https://www.w3.org/TR/CSP3/
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from modelops.base.seeding import MAX_SEED
from modelops.serving.api import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_PROMPT_CHARACTERS,
    MAX_STEPS,
    ApiError,
)


@dataclass(frozen=True, slots=True)
class Page:
    """Bytes of the page (UTF-8 HTML) and the headers that it is sent with."""

    body: bytes
    headers: Mapping[str, str]


def add_page(app: FastAPI, *, shown: bool = True) -> None:
    """Answer GET / with the page, or 404 where it is not to be shown."""
    page = build_page() if shown else None

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def try_it() -> Response:
        if page is None:
            raise ApiError(404, "not_found", "there is no such route")
        return HTMLResponse(page.body, headers=page.headers)


def build_page() -> Page:
    """Build the page, with the API's limits in its fields and its parts' digests in its policy."""
    folder = resources.files("modelops.serving.http") / "static"
    html, style, script = (
        (folder / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js")
    )
    limits = {
        "max_prompt": str(MAX_PROMPT_CHARACTERS),
        "max_seed": str(MAX_SEED),
        "max_steps": str(MAX_STEPS),
        "max_guidance": f"{MAX_GUIDANCE:g}",
        "max_images": str(MAX_IMAGES),
    }
    for name, value in limits.items():
        html = html.replace("{{" + name + "}}", value)
    body = html.replace("{{style}}", style).replace("{{script}}", script)
    policy = {
        "default-src": "'none'",
        "script-src": _digest(script),
        "style-src": _digest(style),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return Page(
        body.encode("utf-8"),
        {
            "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
        },
    )


def _digest(text: str) -> str:
    """Return the policy source that allows exactly this text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
