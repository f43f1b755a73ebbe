"""Caption embeddings, computed once at the start and looked up by caption."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from modelops.base.files import atomic_path, sha256_json
from modelops.models.encoders import MAX_TOKENS, texts_to_embeddings
from modelops.records.train import CaptionLengths

_LONGEST = 5  # captions that are named
_TEXTS = 4096  # captions of a call


class TextTable:
    """Embeddings of a set of captions and of the empty caption.

    Args:
        captions: the captions; duplicates are embedded once.
        tokenizer, text_encoder: as from `load_text_encoder`.
        keep_tokens: also keep every token's embedding, for cross-attention.
        cache: a safetensors file that holds the embeddings of exactly these captions, or will.

    Attributes:
        encoder_sha256: digest of the encoder's weights and vocabulary.
    """

    def __init__(
        self,
        captions: Iterable[str],
        tokenizer: Any,
        text_encoder: Any,
        *,
        keep_tokens: bool,
        cache: Path,
    ) -> None:
        unique = sorted({"", *captions})
        self._rows = {caption: row for row, caption in enumerate(unique)}
        self.encoder_sha256 = _encoder_sha256(tokenizer, text_encoder)
        key = sha256_json(
            [unique, keep_tokens, str(text_encoder.config.to_json_string()), self.encoder_sha256]
        )
        stored = _read(cache, key)
        if stored is None:
            pooled, tokens, mask = texts_to_embeddings(unique, tokenizer, text_encoder)
            stored = {"pooled": torch.from_numpy(pooled)}
            if keep_tokens:
                stored |= {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
            _write(cache, stored, key)
        self._stored = stored

    @property
    def dim(self) -> int:
        """D, the width of an embedding."""
        return int(self._stored["pooled"].shape[1])

    def lookup(
        self, captions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(pooled [N, D], tokens [N, L, D] or None, mask [N, L] or None) of known captions."""
        rows = torch.tensor([self._rows[caption] for caption in captions])
        tokens, mask = self._stored.get("tokens"), self._stored.get("mask")
        return (
            self._stored["pooled"][rows],
            None if tokens is None else tokens[rows],
            None if mask is None else mask[rows],
        )


def measure_captions(captions: dict[str, str], tokenizer: Any) -> CaptionLengths:
    """Count the captions that have more tokens than the model reads; it reads only their beginning.

    Args:
        captions: {id: caption}.
        tokenizer: that of the text encoder.
    """
    lengths: dict[str, int] = {}
    whole: set[int] = set()
    read: set[int] = set()
    texts = sorted(set(captions.values()))
    for start in range(0, len(texts), _TEXTS):
        part = texts[start : start + _TEXTS]
        rows = tokenizer(part, truncation=False, verbose=False)["input_ids"]
        cut = tokenizer(part, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        lengths |= dict(zip(part, map(len, rows), strict=True))
        whole |= {hash(tuple(row)) for row in rows}
        read |= {hash(tuple(row)) for row in cut}
    long = {name: lengths[text] for name, text in captions.items() if lengths[text] > MAX_TOKENS}
    longest = sorted(long, key=lambda name: (-long[name], name))[:_LONGEST]
    return CaptionLengths(
        max_tokens=MAX_TOKENS,
        n=len(captions),
        n_cut=len(long),
        n_made_equal=len(whole) - len(read),
        longest={name: long[name] for name in longest},
    )


def _encoder_sha256(tokenizer: Any, text_encoder: Any) -> str:
    digest = hashlib.sha256(sha256_json(tokenizer.get_vocab()).encode())
    for weight in text_encoder.parameters():
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            if (handle.metadata() or {}).get("key") != key:
                return None
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"key": key})
