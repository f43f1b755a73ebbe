"""Client of /admin/swap: asks a server, waits for it, and describes its answer."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from modelops.base.errors import GateFailedError, GateUndecidedError, ServingError, UsageError

POLL_S = 1.0
_MOST = 10_000_000  # bytes of an answer
_CODES = {
    "load_failed": ServingError.exit_code,
    "rolled_back_worse": GateFailedError.exit_code,
    "rolled_back_red": GateFailedError.exit_code,
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refusal of redirects, which would send the key to another server."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


class SwapClient:
    """Client of one server.

    Args:
        url: its base URL, without a path.
        key: an admin key.

    Raises:
        UsageError: the URL is not valid, or would send the key over a network unencrypted.
    """

    def __init__(self, url: str, key: str, *, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise UsageError(f"{url}: not a server's URL", hint="such as http://127.0.0.1:3000")
        if parts.scheme == "http" and not _local(parts.hostname):
            raise UsageError(
                f"{url}: the admin key would go over the network for everybody to read",
                hint="use https, or a tunnel to the server's loopback address",
            )
        self.url = url.rstrip("/")
        self._key = key
        self._timeout_s = timeout_s
        # No proxy either: it would receive the key.
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))

    def status(self) -> dict[str, Any]:
        """Return the answer of GET /admin/swap."""
        return self._ask("", None)

    def post(self, action: str, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order (canary, promote or rollback) and return the status."""
        return self._ask(f"/{action}", order)

    def wait(
        self, done: Callable[[dict[str, Any]], bool], timeout_s: float, *, what: str = "loaded"
    ) -> dict[str, Any]:
        """Wait for the first status that is `done`.

        Raises:
            GateUndecidedError: there is none in time.
        """
        end = time.monotonic() + timeout_s
        while True:
            found = self.status()
            if done(found):
                return found
            if time.monotonic() > end:
                verdict = found["verdict"]
                said = f": {verdict['sentence']}" if verdict else ""
                raise GateUndecidedError(f"not {what} in {timeout_s:g} s{said}")
            time.sleep(POLL_S)

    def _ask(self, path: str, order: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/admin/swap{path}",
            None if order is None else json.dumps(order).encode(),
            {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                found: dict[str, Any] = json.loads(answer.read(_MOST))
                return found
        except urllib.error.HTTPError as error:
            raise _refused(self.url, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(f"{self.url}: no answer ({error})", hint="is it running?") from error
        except (ValueError, RecursionError) as error:
            raise ServingError(f"{self.url}: not an answer of a modelops node") from error


def _refused(url: str, error: urllib.error.HTTPError) -> Exception:
    try:
        said = json.loads(error.read(_MOST))["error"]
        code, message = str(said["code"]), str(said["message"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return ServingError(f"{url}: answered {error.code}", hint="is it a modelops node?")
    if code == "canary_worse":
        return GateFailedError(f"{url}: {message}")
    if code == "canary_undecided":
        return GateUndecidedError(f"{url}: {message}")
    if error.code in (400, 401, 403):
        return UsageError(f"{url}: {message}")
    return ServingError(f"{url}: {message}")


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exit_code(found: dict[str, Any]) -> int:
    """Return a status's exit code: 1 if the release could not be loaded, 3 worse, 4 undecided."""
    ended = [entry["event"] for entry in found["events"] if entry["event"] != "drained"]
    if found["canary"] is None:
        return _CODES.get(ended[-1], 0) if ended else 0
    answer = found["verdict"]["answer"] if found["verdict"] else "undecided"
    return {"worse": GateFailedError.exit_code, "undecided": GateUndecidedError.exit_code}.get(
        answer, 0
    )


def trial_exit_code(ordered: dict[str, Any], found: dict[str, Any]) -> int:
    """Return a canary's exit code: 0 while it is one, and when it was promoted.

    1 when it could not be loaded, 3 when it was rolled back by anyone.

    Args:
        ordered: the status that answered the order.
        found: a later status.

    Raises:
        ServingError: the server was restarted meanwhile, so the canary is gone.
    """
    order = [entry for entry in ordered["events"] if entry["event"] == "loading"][-1]
    if order not in found["events"]:
        raise ServingError(
            f"{order['release']}: the server was started again, which ended the trial; it serves "
            f"{found['stable']['release']}",
            hint="order the canary again",
        )
    since = found["events"][found["events"].index(order) :]
    ended = [entry["event"] for entry in since if entry["event"] != "drained"]
    return GateFailedError.exit_code if ended[-1] == "rolled_back" else _CODES.get(ended[-1], 0)


def describe_status(found: dict[str, Any]) -> str:
    """Describe a status for a person."""
    lines = [f"stable   {_release(found['stable'])}"]
    if found["after_restart"] != found["stable"]["release"]:
        lines.append(
            f"         but a restart serves {found['after_restart']}: MODELOPS_RELEASE names"
        )
        lines.append("         it; let that name the folder of releases")
    if found["swap"] != "on":
        lines.append(f"swapping is off: {found['swap']}")
    if found["loading"]:
        lines.append(f"loading  {found['loading']}")
    if canary := found["canary"]:
        how = "decides by itself" if canary["auto"] else "decided by you"
        lines.append(f"canary   {_release(canary)}: {canary['share']:.0%} of the requests, {how}")
        lines += [f"         {problem}" for problem in canary["problems"]]
        lines += [f"         so far {_counts(canary['so_far'][arm])}" + (
            f"; the next look at {canary['next_look']}" if arm == "canary" else " of the stable one"
        ) for arm in ("canary", "stable")]  # fmt: skip
    lines += [
        f"drains   {_release(slot)}: {slot['in_hand']} requests in progress"
        for slot in found["draining"]
    ]
    if verdict := found["verdict"]:
        lines.append(f"verdict  {verdict['sentence']}")
        lines += [f"         {_finding(finding)}" for finding in verdict["findings"]]
    for entry in found["events"][-5:]:
        who = f" by {entry['by']}" if "by" in entry else ""
        why = f": {entry['reason']}" if "reason" in entry else ""
        lines.append(f"{entry['time'][:19]}  {entry['event']} {entry['release']}{who}{why}")
    return "\n".join(lines)


def _release(about: dict[str, Any]) -> str:
    return f"{about['release']} ({about['sha256'][:12]})"


def _counts(outcomes: dict[str, int]) -> str:
    said = [f"{count} {name.replace('_', ' ')}" for name, count in outcomes.items() if count]
    return ", ".join(said) or "nothing"


def _finding(finding: dict[str, Any]) -> str:
    name = f"{finding['measure'].replace('_', ' '):<14} {finding['answer']:<13}"
    if finding["canary"]:
        (new, n_new), (old, n_old) = finding["canary"], finding["stable"]
        text = f"{new} of {n_new} against {old} of {n_old}"
        if finding["high"] is None:
            return f"{name} {text}"
        return f"{name} {text}: at most {finding['high']:+.2%}, margin {finding['margin']:+.2%}"
    if finding["value"] is None:
        return f"{name} no evaluations yet that compare"
    low, high = ("?" if finding[k] is None else f"{finding[k]:.2f}" for k in ("low", "high"))
    return f"{name} x {finding['value']:.2f} [{low}, {high}], margin x {finding['margin']:g}"
