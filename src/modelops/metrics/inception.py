"""Inception-v3 of 2015-12-05, the network behind FID, KID and Inception Score.

The blocks are clean-fid's and torchvision's: average pools that leave the padding out of the mean,
a max pool in the last block, 1008 logits. On a CPU, folded batch norms and channels-last tensors
leave little but the convolutions themselves.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, IntegrityError, MissingWeightsError, UsageError
from modelops.base.files import sha256_file
from modelops.base.seeding import numpy_generator
from modelops.metrics.features import Features, Image, in_threads
from modelops.metrics.inception_resize import MODES, RESIZE, Floats
from modelops.metrics.intervals import Interval

DIM = 2048
CLASSES = 1008
SPLITS = 10  # of the Inception Score
DTYPES = ("float32", "float64")
KNOWN_WEIGHTS = {
    # One file under two names: pytorch-fid's and torch-fidelity's weights-inception-....pth
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2":
        "pt_inception-2015-12-05-6726825d.pth",
    # A TorchScript archive: StyleGAN2-ADA's, which clean-fid uses too
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4":
        "inception-2015-12-05.pt",
}  # fmt: skip
_WHICH = "give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity's, or clean-fid's"


class InceptionExtractor:
    """Pooled features of Inception, from weights that the user names.

    Args:
        weights: a state dict as pytorch-fid and torch-fidelity publish it (.pth, read without
            pickled code, or .safetensors), or clean-fid's TorchScript archive. The latter is code:
            use only a file you trust. Its sha256 is part of the protocol.
        mode: how images come to 299 x 299: "clean", "legacy_pytorch" or "legacy_tensorflow".
        dtype: "float64" computes in double precision, for audits; features are float32 either way.
        device: of torch, where the network runs; images are resized on the CPU. Not part of the
            protocol: features differ by rounding.
        sha256: if given, the digest that the file must have.

    Raises:
        MissingWeightsError: no such file; or, at the first use, not these weights.
        IntegrityError: another digest than the argument, or the file's own name, says.
    """

    dim = DIM

    def __init__(
        self,
        weights: Path,
        *,
        mode: str = "clean",
        dtype: str = "float32",
        sha256: str | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        device: str = "cpu",
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"FID mode {mode!r}: one of {', '.join(MODES)}")
        if dtype not in DTYPES:
            raise UsageError(f"extractor dtype {dtype!r}: one of {', '.join(DTYPES)}")
        self.weights = Path(weights)
        if not self.weights.is_file():
            raise MissingWeightsError(f"{weights}: no such file", hint=_WHICH)
        self.mode, self.dtype = mode, dtype
        self.batch_size, self.device = batch_size, device
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.sha256 = sha256_file(self.weights)
        named = "6726825d" if "6726825d" in self.weights.name else ""
        for expected in (sha256, named):
            if expected and not self.sha256.startswith(expected):
                raise IntegrityError(
                    f"{weights}: sha256 {self.sha256[:12]}, expected {expected[:12]}",
                    hint="fetch the file again",
                )
        self._network: Any = None
        self._classifier: npt.NDArray[np.float64] | None = None
        pytorch = mode == "legacy_pytorch"
        self.protocol: dict[str, Any] = {
            "extractor": "inception-2015-12-05",
            "weights_sha256": self.sha256,
            "layer": "pool3",
            "dim": DIM,
            "mode": mode,
            "resize": RESIZE[mode],
            "clamp": "[0, 255]",
            "quantised": False,
            "normalisation": "2 x / 255 - 1" if pytorch else "(x - 128) / 128",
            "dtype": dtype if dtype == "float32" else "float64, features rounded to float32",
        }

    @property
    def warnings(self) -> list[str]:
        """Warnings for a reader of a value from these weights."""
        if self.sha256 in KNOWN_WEIGHTS:
            return []
        return ["the Inception weights are none of the published files; no published FID compares"]

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Features:
        """Images [H, W, 3] uint8 RGB of any sizes to features [N, 2048] float32.

        Images are resized in threads while the network runs.
        """
        import torch

        from modelops.models.devices import full_float32

        network, _ = self._load()
        features: list[Features] = []
        pending: list[Floats] = []

        def flush() -> None:
            if not pending:
                return
            batch = torch.from_numpy(np.stack(pending)).to(getattr(torch, self.dtype))
            if self.mode == "legacy_pytorch":
                batch = batch.div_(255.0).mul_(2.0).sub_(1.0)
            else:
                batch = batch.sub_(128.0).div_(128.0)
            batch = batch.to(self.device).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), full_float32():
                output = network(batch)
            features.append(output.reshape(len(pending), DIM).float().cpu().numpy())
            pending.clear()
            if on_progress:
                on_progress(sum(map(len, features)))

        ahead = self.batch_size + self.workers
        for pixels in in_threads(MODES[self.mode], images, workers=self.workers, ahead=ahead):
            pending.append(pixels)
            if len(pending) == self.batch_size:
                flush()
        flush()
        return np.concatenate(features) if features else np.zeros((0, DIM), np.float32)

    def features_to_logits(self, features: Floats) -> npt.NDArray[np.float64]:
        """Features [N, 2048] to the 1008 logits without their bias, [N, 1008], as the score's
        reference code takes them.

        Raises:
            EvaluationError: the weights hold no classifier.
        """
        _, classifier = self._load()
        if classifier is None:
            raise EvaluationError(f"{self.weights}: no {CLASSES} x {DIM} classifier in it")
        return np.asarray(np.asarray(features, np.float64) @ classifier.T)

    def _load(self) -> tuple[Any, npt.NDArray[np.float64] | None]:
        if self._network is None:
            from modelops.models.devices import open_device

            network, self._classifier = load_inception(self.weights, dtype=self.dtype)
            self._network = network.to(open_device(self.device))
        return self._network, self._classifier


def logits_to_inception_score(
    logits: Floats,
    *,
    splits: int = SPLITS,
    order: npt.NDArray[np.integer] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """exp of the mean divergence of p(y|x) from p(y), as the mean over splits (Salimans et al.,
    2016), with the t interval over splits: it is for the expectation at n / splits images.

    Args:
        logits: [N, C]; torch-fidelity's and the reference code's carry no bias.
        order: the permutation [N] before splitting; None leaves the images as they are.
            (torch-fidelity's is `RandomState(2020).permutation(N)`.)

    Raises:
        EvaluationError: fewer than two images a split, or logits that are not finite.
    """
    from scipy.special import log_softmax

    values = np.asarray(logits, np.float64)
    if not np.isfinite(values).all():
        raise EvaluationError("logits are not finite")
    n = len(values)
    if n < 2 * splits:
        raise EvaluationError(f"{n} images are too few for {splits} splits of the Inception Score")
    if order is not None:
        values = values[order]
    scores = []
    for split in range(splits):
        log_p = log_softmax(values[split * n // splits : (split + 1) * n // splits], axis=1)
        p = np.exp(log_p)
        marginal = np.log(np.clip(p.mean(axis=0), np.finfo(np.float64).tiny, None))
        scores.append(float(np.exp((p * (log_p - marginal)).sum(axis=1).mean())))
    return _scores_to_interval(scores, confidence)


def streamed_inception_score(
    extractor: InceptionExtractor,
    features: Features,
    *,
    splits: int = SPLITS,
    order: npt.NDArray[np.integer] | None = None,
    confidence: float = 0.95,
    chunk: int = 1024,
) -> Interval:
    """`logits_to_inception_score` from features [N, 2048] that may lie in a file: equal but for
    rounding, with logits of `chunk` images in memory at a time.

    Raises:
        EvaluationError: fewer than two images a split, or logits that are not finite.
    """
    from scipy.special import log_softmax

    n = len(features)
    if n < 2 * splits:
        raise EvaluationError(f"{n} images are too few for {splits} splits of the Inception Score")
    places = np.arange(n) if order is None else order
    scores = []
    for split in range(splits):
        rows = np.sort(places[split * n // splits : (split + 1) * n // splits])
        negentropy, mass = 0.0, np.zeros(CLASSES)
        for start in range(0, len(rows), chunk):
            logits = extractor.features_to_logits(features[rows[start : start + chunk]])
            if not np.isfinite(logits).all():
                raise EvaluationError("logits are not finite")
            log_p = log_softmax(logits, axis=1)
            p = np.exp(log_p)
            negentropy += float((p * log_p).sum())
            mass += p.sum(axis=0)
        mean = mass / len(rows)
        marginal = np.log(np.clip(mean, np.finfo(np.float64).tiny, None))
        scores.append(float(np.exp(negentropy / len(rows) - (mean * marginal).sum())))
    return _scores_to_interval(scores, confidence)


def _scores_to_interval(scores: list[float], confidence: float) -> Interval:
    """The mean of the splits' scores with the t interval over them."""
    from scipy.stats import t

    value, splits = float(np.mean(scores)), len(scores)
    if splits == 1:
        return Interval(value, value, value, "one split, no interval")
    error = float(np.std(scores, ddof=1)) / np.sqrt(splits)
    half = float(t.ppf(0.5 + confidence / 2, splits - 1)) * error
    method = f"mean of {splits} splits, t interval over splits"
    return Interval(value, max(1.0, float(value - half)), float(value + half), method)


def shuffled_order(n: int, seed: int) -> npt.NDArray[np.int64]:
    """The permutation [n] in which images are dealt to the splits."""
    return np.asarray(numpy_generator(seed, "inception-score").permutation(n), np.int64)


def load_inception(
    path: Path, *, dtype: str = "float32"
) -> tuple[Any, npt.NDArray[np.float64] | None]:
    """Return (network, classifier) from a weights file.

    The network takes [N, 3, 299, 299], normalised, channels last or not, and gives 2048 pooled
    features; the classifier is the weight of the logits [1008, 2048], or None if there is none.

    Raises:
        MissingWeightsError: the file does not hold these weights.
    """
    import torch

    torch_dtype = getattr(torch, dtype)
    if _is_torchscript(path):
        return _from_torchscript(path, torch_dtype)
    state = _read_state_dict(path)
    network = build_network()
    missing, unexpected = _load_state(network, state, path)
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}"
        raise MissingWeightsError(f"{path}: not the Inception weights: it {what}", hint=_WHICH)
    classifier = network.fc.weight.detach().double().numpy()
    network.fc = torch.nn.Identity()
    fold_batch_norms(network.double())
    network.eval().requires_grad_(False).to(torch_dtype)
    return network.to(memory_format=torch.channels_last), classifier


def build_network() -> Any:
    """The architecture without weights: torchvision's Inception-v3 with clean-fid's blocks."""
    from cleanfid import inception_pytorch as blocks
    from torchvision.models.inception import inception_v3

    network = inception_v3(
        weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False,
        transform_input=False,
    )  # fmt: skip
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network.eval()


def fold_batch_norms(network: Any) -> None:
    """Put each batch norm's scale and shift into the convolution before it, in place."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    from torchvision.models.inception import BasicConv2d

    for module in network.eval().modules():
        if isinstance(module, BasicConv2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()


def _load_state(network: Any, state: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    """(missing, unexpected) names after loading; counters and the auxiliary head do not matter."""
    wanted = {
        name: value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked") and not name.startswith("AuxLogits.")
    }
    try:
        found = network.load_state_dict(wanted, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise MissingWeightsError(
            f"{path}: not the Inception weights: {reason}", hint=_WHICH
        ) from error
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    return missing, list(found.unexpected_keys)


def _read_state_dict(path: Path) -> dict[str, Any]:
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise MissingWeightsError(f"{path}: not the Inception weights", hint=_WHICH) from error
    except Exception as error:
        # safetensors has an exception of its own, which is not public.
        if type(error).__name__ != "SafetensorError":
            raise
        raise MissingWeightsError(f"{path}: not the Inception weights", hint=_WHICH) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise MissingWeightsError(f"{path}: not a state dict", hint=_WHICH)
    return state


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _from_torchscript(path: Path, dtype: Any) -> tuple[Any, npt.NDArray[np.float64] | None]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated is no news to the user
            archive = torch.jit.load(str(path), map_location="cpu").eval()
        layers = archive.layers.to(dtype).to(memory_format=torch.channels_last)
    except (RuntimeError, AttributeError) as error:
        raise MissingWeightsError(
            f"{path}: not the Inception TorchScript archive", hint=_WHICH
        ) from error
    # The archive names its parts as its maker did; the classifier is the only tensor of its shape.
    found = [v for v in archive.state_dict().values() if tuple(v.shape) == (CLASSES, DIM)]
    found += [v.T for v in archive.state_dict().values() if tuple(v.shape) == (DIM, CLASSES)]
    classifier = found[0].double().numpy() if len(found) == 1 else None
    return layers, classifier
