"""CLIPScore in its two definitions, and CLIP and SigLIP embeddings, through open_clip.

The paper's (Hessel et al., 2021) is 2.5 * max(0, cos(image, "A photo depicts " + prompt)) for each
image. torchmetrics' "CLIP score" is 100 * cos with the bare prompt, its mean over images clamped at
0: another number, under another name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import MissingWeightsError
from modelops.base.files import sha256_file, sha256_tree
from modelops.models.devices import full_float32, open_device
from modelops.models.pretrained import no_code_offered

Image = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
PREFIX = "A photo depicts "
WEIGHT = 2.5


def clipscores(images: Embeddings, texts: Embeddings) -> Floats:
    """The paper's CLIPScore of each image [N], in [0, 2.5].

    Args:
        images, texts: normalised embeddings [N, E], row for row; the texts with `PREFIX`.
    """
    return np.asarray(WEIGHT * np.maximum(0.0, _cosines(images, texts)))


def torchmetrics_clip_scores(images: Embeddings, texts: Embeddings) -> Floats:
    """100 * cosine of each image [N], in [-100, 100]; torchmetrics clamps only their mean, at 0.

    Args:
        images, texts: normalised embeddings [N, E], row for row; the texts without a prefix.
    """
    return np.asarray(100.0 * _cosines(images, texts))


class ClipModel:
    """One open_clip model (CLIP, SigLIP and their kin) with its weights from a file or directory.

    Args:
        weights: path of an open_clip state dict (safetensors, or a pickle-free torch file); or of
            a directory with open_clip_config.json, weights and, where the model has its own, the
            tokenizer, as open_clip saves them.
        model_name: open_clip's name of the architecture; not used for a directory.
        device: of torch, where it runs.

    Raises:
        MissingWeightsError: no such file, it does not fit the architecture, or the architecture's
            tokenizer is not on this machine.
    """

    def __init__(
        self, weights: Path, model_name: str = "ViT-B-32-quickgelu", *, device: str = "cpu"
    ) -> None:
        import open_clip

        self._device = open_device(device)
        path = Path(weights)
        if not path.exists():
            raise MissingWeightsError(f"{weights}: no such file", hint="give open_clip weights")
        name = f"local-dir:{path}" if path.is_dir() else model_name
        try:
            with no_code_offered():
                self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                    name, pretrained=None if path.is_dir() else str(path), require_pretrained=True,
                    **({} if path.is_dir() else _preprocessing(model_name)),
                )  # fmt: skip
        except Exception as error:  # there is one for each way to be wrong
            why = (str(error) or type(error).__name__).splitlines()[0]
            if "weights_only" in why:  # torch's text, which advises to unpickle it
                why = "not a file of tensors"
            raise MissingWeightsError(
                f"{weights}: does not load as {name}: {why}",
                hint="name the architecture with --clip-model",
            ) from error
        try:
            with no_code_offered():
                self.tokenizer = open_clip.get_tokenizer(name)
        except (RuntimeError, ValueError, OSError) as error:
            raise MissingWeightsError(
                f"{name}: its tokenizer is not on this machine",
                hint="give a directory that holds open_clip_config.json, weights and tokenizer",
            ) from error
        self.model.eval().requires_grad_(False).to(self._device)
        # The sigmoid loss needs a bias; only SigLIP and its kin have one.
        self.is_siglip = getattr(self.model, "logit_bias", None) is not None
        self.protocol: dict[str, Any] = {
            "extractor": "open_clip directory" if path.is_dir() else f"open_clip {model_name}",
            "weights_sha256": sha256_tree(path) if path.is_dir() else sha256_file(path),
            "preprocess": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in self.model.visual.preprocess_cfg.items()
            },
            "context_length": self.tokenizer.context_length,
            "dtype": "float32",
        }

    def images_to_embeddings(self, images: Iterable[Image], *, batch: int = 32) -> Embeddings:
        """Images uint8 [H, W, 3] of any sizes to normalised embeddings [N, E] float32."""
        import torch
        from PIL import Image as Picture

        found, rest = [], iter(images)
        while block := list(islice(rest, batch)):
            pixels = torch.stack([self.preprocess(Picture.fromarray(image)) for image in block])
            with torch.no_grad(), full_float32():
                made = self.model.encode_image(pixels.to(self._device), normalize=True)
            found.append(made.float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.model.visual.output_dim)

    @property
    def is_vit_l_14_336(self) -> bool:
        """Return whether it is the architecture that CMMD is defined on."""
        visual = self.model.visual
        pixels, patch = getattr(visual, "image_size", None), getattr(visual, "patch_size", None)
        return (pixels, patch, self.dim) == ((336, 336), (14, 14), 768) and not self.is_siglip

    def images_to_features(
        self, images: Iterable[Image], *, on_progress: Callable[[int], None] | None = None
    ) -> Embeddings:
        """`images_to_embeddings`, under the name that every extractor of features has."""
        features = self.images_to_embeddings(images)
        if on_progress:
            on_progress(len(features))
        return features

    def texts_to_embeddings(self, texts: Sequence[str], *, batch: int = 64) -> Embeddings:
        """Texts to normalised embeddings [N, E] float32; a long text is cut at the model's
        context length."""
        import torch

        found = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[start : start + batch])).to(self._device)
            with torch.no_grad(), full_float32():
                made = self.model.encode_text(tokens, normalize=True)
            found.append(made.float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def cut_texts(self, texts: Sequence[str]) -> int:
        """Count the texts that fill the context to its end: they were cut, or are just as long."""
        tokens = self.tokenizer(list(texts))
        return int((tokens[:, -1] != tokens[:, -1].new_tensor(self._padding())).sum())

    def _padding(self) -> int:
        """The id that the tokenizer fills short texts with."""
        return int(self.tokenizer([""])[0, -1])


def _preprocessing(model_name: str) -> dict[str, Any]:
    """Return the preprocessing of open_clip's own weights of an architecture, if they agree on it.

    For weights from a file open_clip takes CLIP's mean, spread and crop, which are not SigLIP's.
    """
    import open_clip

    wanted = ("mean", "std", "interpolation", "resize_mode")
    known = [
        {f"image_{key}": config[key] for key in wanted if key in config}
        for tag in open_clip.list_pretrained_tags_by_model(model_name)
        if (config := open_clip.get_pretrained_cfg(model_name, tag))
    ]
    return known[0] if known and all(config == known[0] for config in known) else {}


def _cosines(images: Embeddings, texts: Embeddings) -> Floats:
    return np.asarray((images.astype(np.float64) * texts.astype(np.float64)).sum(axis=1))
