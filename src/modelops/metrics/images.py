"""Distances of two images: PSNR, SSIM and LPIPS, by the packages that define them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, MissingWeightsError
from modelops.base.extras import require_module
from modelops.base.files import sha256_file

Image = npt.NDArray[np.uint8]
SSIM_WINDOW = 11  # pixels; Gaussian with sigma 1.5
# Backbone, and the side in pixels from which its last layer has an output.
LPIPS_NETS = {"alex": 31, "vgg": 16, "squeeze": 17}
_LAYER = re.compile(r"net\.slice\d+\.(\d+\..+)")


def psnr(first: Image, second: Image) -> float:
    """Peak signal to noise ratio in dB over all channels; infinite for equal images.

    Args:
        first, second: uint8 [H, W, 3] of one size.

    Raises:
        EvaluationError: the sizes differ.
    """
    metrics = require_module("skimage.metrics", needed_for="PSNR")
    _check_sizes(first, second)
    if np.array_equal(first, second):
        return float("inf")
    return float(metrics.peak_signal_noise_ratio(first, second, data_range=255))


def ssim(first: Image, second: Image) -> float:
    """Structural similarity of Wang et al. (2004), averaged over the channels; 1 for equal images.

    scikit-image's, with the paper's settings: an 11-pixel Gaussian window of sigma 1.5, population
    covariance, whole windows only. torchmetrics 1.9 counts a mirrored border too: other values.

    Raises:
        EvaluationError: the sizes differ, or a side is shorter than the window.
    """
    metrics = require_module("skimage.metrics", needed_for="SSIM")
    _check_sizes(first, second)
    if min(first.shape[:2]) < SSIM_WINDOW:
        raise EvaluationError(f"SSIM needs {SSIM_WINDOW} pixels a side, not {first.shape[:2]}")
    return float(
        metrics.structural_similarity(
            first, second, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
    )  # fmt: skip


class Lpips:
    """LPIPS 0.1 (Zhang et al., 2018): the lpips package with a backbone's weights from a file.

    The package brings the linear heads; the backbone is torchvision's ImageNet classifier, which
    the package would download.

    Args:
        weights: torchvision's state dict of the backbone (`alexnet-owt-7be5be79.pth`), as a
            pickle-free torch file or safetensors.
        net: "alex" (the authors' choice for comparisons), "vgg" or "squeeze".

    Raises:
        MissingWeightsError: no such file, or it is not that backbone's.
        MissingExtraError: the lpips package is not installed.
    """

    def __init__(self, weights: Path, net: str = "alex") -> None:
        if net not in LPIPS_NETS:
            raise EvaluationError(f"LPIPS with {net!r}: one of {', '.join(LPIPS_NETS)}")
        if not Path(weights).is_file():
            raise MissingWeightsError(
                f"{weights}: no such file", hint=f"give torchvision's weights of {net}"
            )
        lpips = require_module("lpips", needed_for="LPIPS")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision by a deprecated argument
            self.model: Any = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self._net = net
        _load_backbone(self.model, Path(weights), net)
        self.model.eval().requires_grad_(False)
        self.protocol: dict[str, Any] = {
            "metric": "lpips 0.1", "net": net, "weights_sha256": sha256_file(weights),
            "input": "the image's own size, scaled to [-1, 1]", "dtype": "float32",
        }  # fmt: skip

    def distances(self, first: Sequence[Image], second: Sequence[Image]) -> npt.NDArray[np.float64]:
        """LPIPS [N] of pairs of uint8 [H, W, 3]; each pair of one size; 0 for equal images.

        Raises:
            EvaluationError: the two of a pair differ in size, or are too small for the backbone.
        """
        import torch

        results = []
        for one, other in zip(first, second, strict=True):
            _check_sizes(one, other)
            height, width = one.shape[:2]
            if min(height, width) < LPIPS_NETS[self._net]:
                raise EvaluationError(
                    f"LPIPS with {self._net} takes images of {LPIPS_NETS[self._net]} pixels a side "
                    f"and more, and one is {width}x{height}"
                )
            pair = torch.from_numpy(np.stack([one, other])).permute(0, 3, 1, 2).float()
            a, b = (pair / 127.5 - 1.0).split(1)
            with torch.no_grad():
                results.append(float(self.model(a, b)))
        return np.array(results, np.float64)


def _load_backbone(model: Any, weights: Path, net: str) -> None:
    """Put torchvision's `features.K.*` where the lpips package keeps layer K of its slices."""
    wrong = MissingWeightsError(
        f"{weights}: not torchvision's weights of {net}",
        hint="give the file that torchvision downloads for it",
    )
    state = read_state_dict(weights)
    wanted = {
        name: f"features.{found[1]}"
        for name in model.state_dict()
        if (found := _LAYER.fullmatch(name))
    }
    if not wanted or not set(wanted.values()) <= state.keys():
        raise wrong
    try:
        model.load_state_dict({ours: state[theirs] for ours, theirs in wanted.items()},
                              strict=False)  # fmt: skip
    except RuntimeError as error:  # another shape
        raise wrong from error


def read_state_dict(path: Path) -> dict[str, Any]:
    """Tensors by name from safetensors, or from a torch file without pickled code.

    Raises:
        MissingWeightsError: the file holds something else.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(str(path)))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own for a damaged or foreign file
        raise MissingWeightsError(
            f"{path}: not a file of tensors", hint="give a state dict"
        ) from error
    if not isinstance(found, dict):
        raise MissingWeightsError(f"{path}: not a state dict", hint="give tensors by name")
    return found


def _check_sizes(first: Image, second: Image) -> None:
    if first.shape != second.shape:
        raise EvaluationError(f"images of {first.shape} and {second.shape} are not compared")
