"""Routes: the node of a rollout that makes a request, and how that ended."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from modelops.serving.api import ApiError, ImagesRequest

if TYPE_CHECKING:
    from modelops.serving.node.node import InferenceNode
    from modelops.serving.rollout.trial import Arm, Trial


class Slot:
    """Place of a node in a rollout, with its number of requests in progress."""

    def __init__(self, node: InferenceNode) -> None:
        self.node = node
        self.name = node.model_id
        self.label = f"{node.model_id}@{node.release.version}"
        self.sha256 = node.release_sha256
        self.model_sha256 = node.opened.sha256
        self.in_hand = 0

    def about(self) -> dict[str, Any]:
        """Describe the slot for a status, also after it was vacated."""
        return {
            "release": self.label,
            "sha256": self.sha256,
            "model_sha256": self.model_sha256,
            "in_hand": self.in_hand,
        }

    def vacate(self) -> None:
        """Drop a closed node, even if others still hold this slot."""
        del self.node


class Route:
    """Route of a request through one node of a rollout.

    Attributes:
        node: the node that makes it.
        request: for `node.submit`; the model it named has been found.
        arm: whether that node is the canary.
        dealt: whether chance chose the node, not the request.
    """

    def __init__(
        self, node: InferenceNode, request: ImagesRequest, *, arm: Arm, dealt: bool
    ) -> None:
        self.node = node
        self.request = request.model_copy(update={"model": None})
        self.arm = arm
        self.dealt = dealt
        self.began = time.monotonic()
        self.answered = False
        self._error: BaseException | None = None

    def note(self, error: BaseException) -> None:
        """Note the error that ended the request without an image."""
        self._error = self._error or error

    def outcome(self) -> str:
        """One of OUTCOMES."""
        error = self._error
        if error is None:
            return "ok" if self.answered else "left"
        if not isinstance(error, ApiError):
            left = isinstance(error, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt))
            return "left" if left else "failed"
        if error.code == "content_policy_violation":
            return "prompt_blocked" if error.param else "image_blocked"
        if error.status >= 500:
            return "failed"
        return "rejected" if error.status == 429 else "client_error"

    def may_be_rescued(self, error: BaseException) -> bool:
        """Return whether the stable release should make it instead: chance dealt it to a canary,
        and that failed or had no room.
        """
        if self.arm != "canary" or not self.dealt:
            return False
        if isinstance(error, ApiError):
            return error.status == 429 or error.status >= 500
        return isinstance(error, Exception)


def choose_slot(
    model: str | None,
    stable: Slot,
    canary: Slot | None,
    *,
    trial: Trial | None,
    key: str,
    rescue: bool,
) -> tuple[Slot, bool]:
    """Return (slot, whether chance chose it) of a request; see `Rollout.route`.

    A bare name means the stable release if it has that name; "name@version" means exactly that
    release, ready or not. A caller without a key has no key to stick to, so its requests are dealt
    one by one.

    Raises:
        ApiError: 404 for a model that is neither.
    """
    if canary is None or trial is None:
        if model in (None, stable.name, stable.label):
            return stable, False
        raise _unknown(stable, canary)
    shared = model == stable.name == canary.name and trial.rules.named
    if model is None or shared:
        if rescue:
            return stable, False
        dealt = trial.deal(key)
        # A canary that has turned red is on its way out. Requests that the stable one makes in its
        # place are no random sample.
        if dealt and canary.node.problems():
            return stable, False
        return (canary if dealt else stable), True
    if model in (stable.name, stable.label):
        return stable, False
    if model in (canary.name, canary.label):
        return canary, False
    raise _unknown(stable, canary)


def _unknown(stable: Slot, canary: Slot | None) -> ApiError:
    other = f" and {canary.label!r}" if canary else " only"
    return ApiError(
        404, "model_not_found",
        f"this server has the model {stable.name!r}{other}; see /v1/models", param="model",
    )  # fmt: skip
