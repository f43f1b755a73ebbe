"""The optimizers a config can name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from modelops.training.config import TrainingSection

# Keller Jordan 2024, "Muon: An optimizer for hidden layers in neural networks": a quintic
# Newton-Schulz iteration whose slope at 0 is as large as stability allows.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95
# Liu et al. 2025 (arXiv:2502.16982), section 2.2: gives an orthogonal update the root mean square
# of a typical AdamW update, so that both kinds of parameter share one learning rate.
_RMS_SCALE = 0.2
_EDGES = ("conv_in.", "conv_out.")  # the first and last layer are not hidden layers


class MuonAdamW(torch.optim.AdamW):
    """Muon on the weights of hidden layers, AdamW on everything else, at one learning rate.

    A convolution's weight counts as the matrix [out, in * height * width]. (torch.optim.Muon takes
    matrices only.)

    Args:
        hidden: weights with two or more dimensions.
        rest: parameter groups of everything else.
        **options: of AdamW; Muon shares `lr` and `weight_decay`, its momentum is 0.95.
    """

    def __init__(
        self,
        hidden: Iterable[torch.nn.Parameter],
        rest: Iterable[dict[str, Any]],
        **options: Any,
    ) -> None:
        groups = [{"params": list(hidden), "orthogonal": True}]
        groups += [{**group, "orthogonal": False} for group in rest]
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update. Gradients of the hidden weights are consumed (set to None)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["orthogonal"]:
                continue
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - _MOMENTUM)
                ahead = weight.grad.lerp(momentum, _MOMENTUM).flatten(1)
                update = orthogonalise(ahead).view_as(weight)
                scale = _RMS_SCALE * math.sqrt(max(ahead.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)
                weight.grad = None
        super().step()
        return loss


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Map [M, N] to the same row and column space with singular values near 1 (0.7 to 1.2).

    Long matrices iterate on their small Gram matrix, in float32 because it squares the singular
    values; the others on themselves, on a GPU in bfloat16, as Muon's authors do. On a CPU bfloat16
    gained nothing (256 x 256: 7 ms in both) and took 14 times as long without its instructions.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    if x.shape[1] >= 2 * x.shape[0]:
        x = _orthogonalise_long(x)
    else:
        x = _orthogonalise(x.bfloat16() if x.is_cuda else x)
    return x.mT if tall else x


def _orthogonalise(x: torch.Tensor) -> torch.Tensor:
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _orthogonalise_long(x: torch.Tensor) -> torch.Tensor:
    """The same polynomial, with all factors gathered before the one product with x."""
    a, b, c = _QUINTIC
    gram = x @ x.mT
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


def make_optimizer(network: torch.nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """The optimizer that the config names; norms and biases are not decayed."""
    named = list(network.named_parameters())
    vectors = {"params": [weight for _, weight in named if weight.ndim < 2], "weight_decay": 0.0}
    common: dict[str, Any] = {
        "lr": training.lr, "betas": training.betas, "weight_decay": training.weight_decay,
        "fused": True,
    }  # fmt: skip
    if training.optimizer == "muon":
        matrices = [(name, weight) for name, weight in named if weight.ndim >= 2]
        hidden = [weight for name, weight in matrices if not name.startswith(_EDGES)]
        edges = [weight for name, weight in matrices if name.startswith(_EDGES)]
        return MuonAdamW(hidden, [{"params": edges}, vectors], **common)
    matrices_only: dict[str, Any] = {"params": [weight for _, weight in named if weight.ndim >= 2]}
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind([matrices_only, vectors], **common)
