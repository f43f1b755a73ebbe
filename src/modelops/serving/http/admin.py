"""/admin/swap: load a release beside the stable one, promote it, roll it back.

Only keys made with `modelops serve key create NAME --admin` are allowed, on every address. There is
no exception for loopback: other users of the machine, a proxy in front of the node and a web page
in its operator's browser all use it, and a swap outlives the process. So a server without keys has
no administration.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelops.base.errors import UsageError
from modelops.serving.api import ApiError
from modelops.serving.http.answers import check_key, read_body
from modelops.serving.http.keys import Caller
from modelops.serving.rollout.rollout import Rollout
from modelops.serving.rollout.trial import CanaryRules
from modelops.serving.telemetry.tracing import SCOPE_KEY

log = logging.getLogger("modelops.serving")

ADMIN_ROUTES = (
    "/admin/swap", "/admin/swap/canary", "/admin/swap/promote", "/admin/swap/rollback",
)  # fmt: skip
Order = TypeVar("Order", bound=BaseModel)
_Number = Annotated[float, Field(strict=True)]


class CanaryOrder(BaseModel):
    """Body of POST /admin/swap/canary; missing fields have the defaults of CanaryRules."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    release: Annotated[str, Field(min_length=1, max_length=512)]
    share: _Number | None = None
    auto: Annotated[bool, Field(strict=True)] | None = None
    sticky: str | None = None
    named: Annotated[bool, Field(strict=True)] | None = None
    requests: Annotated[int, Field(strict=True)] | None = None
    seconds: _Number | None = None
    error_margin: _Number | None = None
    filter_margin: _Number | None = None
    latency_margin: _Number | None = None
    block_s: _Number | None = None


class PromoteOrder(BaseModel):
    """Body of POST /admin/swap/promote. `force`: even if worse or undecided."""

    model_config = ConfigDict(extra="forbid")

    force: Annotated[bool, Field(strict=True)] = False


class RollbackOrder(BaseModel):
    """Body of POST /admin/swap/rollback."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(max_length=200)] = ""


def add_admin_routes(app: FastAPI) -> None:
    """Add the routes; they are not in the public OpenAPI document."""

    @app.get("/admin/swap", include_in_schema=False)
    async def status(request: Request) -> Response:
        rollout, _ = _let_in(app, request)
        return JSONResponse(await asyncio.to_thread(rollout.status))

    @app.post("/admin/swap/canary", include_in_schema=False)
    async def canary(request: Request) -> Response:
        rollout, caller = _let_in(app, request)
        order = await _order(request, CanaryOrder)
        wanted = order.model_dump(exclude_none=True, exclude={"release"})
        try:
            rules = CanaryRules(**wanted)
        except UsageError as error:
            param = error.message.split(":")[0]
            raise ApiError(400, "invalid_value", error.message, param=param) from error
        await asyncio.to_thread(rollout.start_canary, order.release, rules, by=caller.name)
        return JSONResponse(await asyncio.to_thread(rollout.status), status_code=202)

    @app.post("/admin/swap/promote", include_in_schema=False)
    async def promote(request: Request) -> Response:
        rollout, caller = _let_in(app, request)
        order = await _order(request, PromoteOrder)
        await asyncio.to_thread(rollout.promote, by=caller.name, force=order.force)
        return JSONResponse(await asyncio.to_thread(rollout.status))

    @app.post("/admin/swap/rollback", include_in_schema=False)
    async def roll_back(request: Request) -> Response:
        rollout, caller = _let_in(app, request)
        order = await _order(request, RollbackOrder)
        await asyncio.to_thread(rollout.roll_back, by=caller.name, reason=order.reason)
        return JSONResponse(await asyncio.to_thread(rollout.status))


def _let_in(app: FastAPI, request: Request) -> tuple[Rollout, Caller]:
    """Return the rollout and the caller, who must be an admin.

    Raises:
        ApiError: 401 for an unknown key, 403 for one without the role and on a server without keys,
            503 while the server starts.
    """
    if not app.state.access.keys.required:
        raise ApiError(
            403, "admin_key_required",
            "this server has no API keys, so nobody may administer it; its operator can set "
            "MODELOPS_API_KEYS_FILE to a file with a key of `modelops serve key create NAME "
            "--admin`",
        )  # fmt: skip
    caller = check_key(app, request)
    if not caller.admin:
        raise ApiError(
            403, "admin_key_required",
            "this key may not swap releases; one of `modelops serve key create NAME --admin` may",
        )  # fmt: skip
    request.scope[SCOPE_KEY].fields["key"] = caller.name
    if app.state.rollout is None:
        raise ApiError(503, "not_ready", "the server is starting", retry_after_s=5)
    rollout: Rollout = app.state.rollout
    return rollout, caller


async def _order(request: Request, kind: type[Order]) -> Order:
    body: Any = await read_body(request)
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        where = "".join(c if c.isprintable() and c.isascii() else "?" for c in where)[:64]
        text = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
        raise ApiError(400, "invalid_value", text, param=where or None) from error
