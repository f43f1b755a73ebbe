"""Access check of a request: caller, address and rate limit."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator

from modelops.base.errors import UsageError
from modelops.serving.api import ApiError
from modelops.serving.http.keys import (
    Caller,
    KeyRing,
    KeysUnavailableError,
    UnknownKeyError,
)
from modelops.serving.http.limits import ImageRate, RateLimitError, RateLimits, Work
from modelops.serving.settings import NodeSettings


class Access:
    """Keys and rate limits of one process.

    Without keys, only requests that came in on a loopback address are answered. The address is
    checked for each request, as `bentoml serve` takes it from its own command line.

    Args:
        insecure: let everybody in on every address.
    """

    def __init__(self, keys: KeyRing, limits: RateLimits, *, insecure: bool = False) -> None:
        self.keys = keys
        self.limits = limits
        self.insecure = insecure

    @classmethod
    def from_settings(cls, settings: NodeSettings) -> Access:
        """Make the keys and limits that a node's settings describe.

        Raises:
            UsageError: the file of keys cannot be read.
        """
        return cls(
            KeyRing(digests=settings.api_keys, path=settings.api_keys_file or None),
            RateLimits.from_settings(settings),
            insecure=settings.insecure,
        )

    def identify(self, authorization: str, server_host: str | None) -> Caller:
        """Return the caller.

        Args:
            authorization: the header's value.
            server_host: the address at which the connection came in; None for a Unix socket.

        Raises:
            ApiError: 401 for an unknown key, 403 without keys on an open address, 503 when the keys
                cannot be read.
        """
        if not self.keys.required and not self.insecure and not is_loopback(server_host):
            raise ApiError(
                403, "api_keys_not_configured",
                "this server has no API keys and answers on its loopback address only; "
                "its operator can set MODELOPS_API_KEYS_FILE, or MODELOPS_INSECURE=1",
            )  # fmt: skip
        try:
            return self.keys.identify(authorization)
        except UnknownKeyError as error:
            raise ApiError(401, "invalid_api_key", error.message) from error
        except KeysUnavailableError as error:
            raise ApiError(
                503, "api_keys_unavailable", error.message, retry_after_s=30
            ) from error  # fmt: skip

    async def take(self, caller: Caller, work: Work) -> Charge:
        """Count a request.

        Raises:
            ApiError: 429 with the seconds to wait, or 400 for more images, or steps of them, at
                once than a minute allows.
        """
        try:
            rate = await self.limits.take(caller, work)
        except RateLimitError as error:
            if error.wait_s is None:
                param = "n" if work.images > 1 else "steps"
                raise ApiError(400, "invalid_value", error.message, param=param) from error
            raise ApiError(
                429, "rate_limit_exceeded", error.message, retry_after_s=error.wait_s
            ) from error  # fmt: skip
        return Charge(self.limits, caller, work.cost, rate)


class Charge:
    """Images that were counted for a request, which may be tried on more than one release.

    Attributes:
        rate: of the caller's images, with what this request left; None when they are not limited.
    """

    def __init__(
        self, limits: RateLimits, caller: Caller, images: float, rate: ImageRate | None = None
    ) -> None:
        self.rate = rate
        self._limits = limits
        self._caller = caller
        self._images = images
        self._returned = False

    @contextlib.asynccontextmanager
    async def attempt(self) -> AsyncIterator[None]:
        """Within the block, give back the images that the node did not make (full or failed)."""
        if self._returned:
            await self._limits.give_back_images(self._caller, -self._images)
            self._returned = False
        try:
            yield
        except Exception as error:
            if not isinstance(error, ApiError) or error.status == 429 or error.status >= 500:
                await self._limits.give_back_images(self._caller, self._images)
                self._returned = True
            raise


def is_loopback(host: str | None) -> bool:
    """Return whether an address is reachable from its own machine only; true of a name or None."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def check_open_address(host: str, settings: NodeSettings) -> None:
    """Refuse to listen on an open address without keys.

    Raises:
        UsageError: no keys, not loopback and not `insecure`; or the file of keys cannot be read.
    """
    access = Access.from_settings(settings)
    if not (is_loopback(host) or settings.insecure or access.keys.required):
        raise UsageError(
            f"{host}: everybody who reaches this address could use the model: there are no API "
            "keys",
            hint="make one with `modelops serve key create`, or add --insecure",
        )
