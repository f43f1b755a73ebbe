"""CLIPScore in its paper's definition, through open_clip (Hessel et al., 2021).

2.5 * max(0, cos(image, "A photo depicts " + prompt)) for each image. torchmetrics' "CLIP score" is
100 * cos with no prefix, clamped after the mean: another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.errors import MissingWeightsError
from modelops.files import sha256_file

PREFIX = "A photo depicts "
WEIGHT = 2.5


class ClipScorer:
    """One open_clip model with its weights from a file.

    Args:
        weights: path of an open_clip state dict (safetensors, or a pickle-free torch file).
        model_name: open_clip's name of the architecture.

    Raises:
        MissingWeightsError: no such file, or it does not fit the architecture.
    """

    def __init__(self, weights: Path, model_name: str = "ViT-B-32-quickgelu") -> None:
        import open_clip

        if not Path(weights).is_file():
            raise MissingWeightsError(f"{weights}: no such file", hint="give open_clip weights")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model_name, pretrained=str(weights)
            )
            self.tokenizer = open_clip.get_tokenizer(model_name)
        except (RuntimeError, ValueError, OSError) as error:
            raise MissingWeightsError(
                f"{weights}: does not load as {model_name}: {str(error).splitlines()[0]}",
                hint="name the architecture with --clip-model",
            ) from error
        self.model.eval()
        self.protocol: dict[str, Any] = {
            "extractor": f"open_clip {model_name}",
            "weights_sha256": sha256_file(weights),
            "prompt_template": PREFIX + "{}",
            "formula": "2.5 * max(0, cos), per image",
            "resize": str(self.preprocess),
            "dtype": "float32",
        }

    def scores(
        self, images: Sequence[npt.NDArray[np.uint8]], prompts: Sequence[str], *, batch: int = 32
    ) -> npt.NDArray[np.float64]:
        """CLIPScore [N] of each image [H, W, 3] uint8 with its own prompt."""
        import torch
        from PIL import Image

        results = []
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            pixels = torch.stack([self.preprocess(Image.fromarray(i)) for i in images[rows]])
            tokens = self.tokenizer([PREFIX + prompt for prompt in prompts[rows]])
            with torch.no_grad():
                a = self.model.encode_image(pixels, normalize=True)
                b = self.model.encode_text(tokens, normalize=True)
            results.append(WEIGHT * (a * b).sum(dim=1).clamp(min=0).double().numpy())
        return np.concatenate(results) if results else np.zeros(0)
