"""Random Inception weights in the published formats, real images, and the peers' code on both.

Shared by bench_parity.py, bench_fid.py and tests/metrics/test_inception.py. Nothing is
downloaded: the networks that clean-fid and torch-fidelity build are given the same local weights.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from modelops.data.corpora.openmoji import list_drawings, render_drawing
from modelops.metrics.inception import build_network
from modelops.metrics.inception_resize import clean

Features = npt.NDArray[np.float32]
KINDS = ("RGBA png", "RGB jpg", "L png", "RGB png", "L jpg", "LA png")
SIZES = (48, 64, 97, 160, 299, 420)


def write_pictures(folder: Path, count: int, *, offset: int = 0, size: int | None = None) -> Path:
    """OpenMoji drawings as files of mixed size, mode and format; with `size`, RGB PNG of one."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = list_drawings()
    for index in range(count):
        drawing = drawings[(offset + index * 37) % len(drawings)]
        pixels = size or SIZES[(index * 5 + index // 6) % len(SIZES)]
        colour = np.array(Image.open(io.BytesIO(render_drawing(drawing.id, pixels))).convert("RGB"))
        drawn = (colour < 250).any(axis=2, keepdims=True)
        if not size:  # transparent, and not white beneath: dropping alpha is not laying on white
            colour = np.where(drawn, colour, np.array([200, 230, 255], np.uint8))
        rgba = np.dstack([colour, 255 * drawn.astype(np.uint8)])
        mode, suffix = ("RGB", "png") if size else KINDS[index % len(KINDS)].split()
        Image.fromarray(rgba).convert(mode).save(folder / f"{index:05d}.{suffix}")
    return folder


def write_photographs(folder: Path, count: int, *, largest: int = 512) -> Path:
    """Crops of scikit-image's data images, in RGB and grey, PNG and JPEG."""
    import skimage.data

    folder.mkdir(parents=True, exist_ok=True)
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "hubble_deep_field",
             "retina", "immunohistochemistry")  # fmt: skip
    pictures = [np.asarray(getattr(skimage.data, name)()) for name in names]
    generator = np.random.default_rng(0)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(generator.integers(60, min(largest, *picture.shape[:2])))
        top = int(generator.integers(0, picture.shape[0] - side))
        left = int(generator.integers(0, picture.shape[1] - side))
        crop = Image.fromarray(picture[top : top + side, left : left + side])
        crop.save(folder / f"{index:05d}.{('png', 'jpg')[index // len(pictures) % 2]}")
    return folder


def read_as_peers(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] as clean-fid and torch-fidelity decode: an alpha channel is dropped.

    (`modelops.base.images.read_image` lays it on white, as viewers do.)
    """
    return np.array(Image.open(path).convert("RGB"))


def picture_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def random_weights(folder: Path, *, calibration: list[Path] | None = None, seed: int = 0) -> Path:
    """`inception-random.pth`: He weights, batch norms fitted to images so that features vary.

    In the older, not zipped format, as the published file is.
    """
    torch.manual_seed(seed)
    network = build_network()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = None  # plain averages
    torch.nn.init.normal_(network.fc.weight, std=0.2)
    torch.nn.init.normal_(network.fc.bias, std=1.0)
    if calibration:
        pixels = np.stack([clean(read_as_peers(path)) for path in calibration])
        with torch.no_grad():
            network.train()(torch.from_numpy(pixels).sub_(128.0).div_(128.0))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inception-random.pth"
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


class _Archive(torch.nn.Module):
    """Has the parts of StyleGAN2-ADA's archive that clean-fid's `clean` mode touches."""

    def __init__(self, layers: Any, classifier: torch.Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.output = torch.nn.Linear(2048, 1008)
        self.output.weight = torch.nn.Parameter(classifier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.output(self.layers(x)), dim=1)


def write_torchscript(weights: Path, folder: Path) -> Path:
    """The same network as `inception-2015-12-05.pt`, the name that clean-fid looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    network = _eager_network(weights)
    classifier = network.fc.weight.detach()
    network.fc = torch.nn.Identity()
    path = folder / "inception-2015-12-05.pt"
    with torch.no_grad(), quiet():
        layers = torch.jit.trace(network, torch.zeros(2, 3, 299, 299), check_trace=False)
        torch.jit.script(_Archive(layers, classifier)).save(str(path))
    return path


def _eager_network(weights: Path) -> Any:
    network = build_network()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    return network.eval().requires_grad_(False)


def cleanfid_model(mode: str, weights: Path, archive: Path | None = None) -> Any:
    """clean-fid's model for `clean` (from an archive) or `legacy_pytorch` (from a state dict)."""
    from cleanfid import features, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    if mode == "clean":
        assert archive is not None
        with quiet():
            model = InceptionV3W(str(archive.parent), download=False).eval()
        return model
    state = torch.load(weights, weights_only=True)
    old, inceptions = inception_pytorch._inception_v3, []

    def without_pretrained(**kwargs: Any) -> Any:  # torchvision has dropped the argument
        kwargs.pop("pretrained", None)
        inceptions.append(old(**kwargs))
        return inceptions[-1]

    with (
        mock.patch.object(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state),
        mock.patch.object(inception_pytorch, "_inception_v3", without_pretrained),
    ):
        return features.build_feature_extractor(
            mode, device=torch.device("cpu"), use_dataparallel=False
        )


def cleanfid_features(
    folder: Path, mode: str, model: Any, *, batch_size: int = 8, num_workers: int = 0
) -> Features:
    """clean-fid's own features of a folder, [N, 2048]."""
    from cleanfid import fid

    with quiet():
        made = fid.get_folder_features(
            str(folder), model, num_workers=num_workers, batch_size=batch_size,
            device=torch.device("cpu"), mode=mode, verbose=False,
        )  # fmt: skip
    return np.asarray(made, np.float32)


def cleanfid_frechet(first: Features, second: Features) -> float:
    """clean-fid's FID of two feature sets; with `sqrtm` as it was where scipy has changed it."""
    from cleanfid import fid

    with quiet(), sqrtm_with_disp():
        return float(fid.fid_from_feats(first, second))


@contextlib.contextmanager
def sqrtm_with_disp() -> Iterator[bool]:
    """Lets clean-fid's `sqrtm(..., disp=False)` run where scipy no longer takes `disp`.

    Yields whether that was needed.
    """
    from cleanfid import fid
    from scipy import linalg

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            linalg.sqrtm(np.eye(2), disp=False)
    except TypeError:

        def sqrtm(matrix: Any, disp: bool = True) -> Any:
            root = linalg.sqrtm(matrix)
            return root if disp else (root, 0.0)

        with mock.patch.object(fid, "linalg", mock.Mock(sqrtm=sqrtm)):
            yield True
    else:
        yield False


def fidelity_metrics(
    generated: Path, real: Path, weights: Path, *, batch_size: int = 1, **settings: Any
) -> dict[str, float]:
    """torch-fidelity's own metrics of two folders; batches of 1 let sizes be mixed."""
    import torch_fidelity

    with quiet():
        made = torch_fidelity.calculate_metrics(
            input1=str(generated), input2=str(real), batch_size=batch_size, cuda=False,
            cache=False, verbose=False, feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(weights), **settings,
        )  # fmt: skip
    return dict(made)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers warn and print."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
