"""Number of tokens that a pipeline reads of a prompt; what is longer, it cuts."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

_NO_LIMIT = 100_000  # a tokenizer that states more has none
_LONG = 512  # tokens where nothing states a limit


class PromptReader:
    """The tokenizer of a pipeline that reads the most of a prompt. Thread-safe.

    Attributes:
        max_tokens: longest prompt that is read to its end, in tokens; 0 without a tokenizer.
    """

    def __init__(self, pipeline: Any) -> None:
        accepts = inspect.signature(pipeline.__call__).parameters
        stated = (
            accepts["max_sequence_length"].default if "max_sequence_length" in accepts else None
        )
        best, self.max_tokens = None, 0
        self._all: list[Any] = []
        for part in pipeline.components.values():
            tokenizer = getattr(part, "tokenizer", part)  # of a processor of images and text
            if not hasattr(tokenizer, "model_max_length"):
                continue
            self._all.append(copy.deepcopy(tokenizer))
            limit = int(getattr(tokenizer, "model_max_length", _LONG))
            if limit > _NO_LIMIT:
                limit = stated if isinstance(stated, int) else _LONG
            if limit > self.max_tokens:
                best, self.max_tokens = self._all[-1], limit
        own = pipeline.config.get("max_text_tokens")  # modelops' own pipeline
        if best is not None and own is not None:
            self.max_tokens = int(own)
        self._tokenizer = best
        self._lock = threading.Lock()  # fast tokenizers keep padding as mutable state

    def count(self, text: str) -> int:
        """Return the number of a text's tokens, with those that mark its ends."""
        return 0 if self._tokenizer is None else self._count(self._tokenizer, text)

    def lengths(self, text: str) -> tuple[int, ...]:
        """Return the number of a text's tokens by each tokenizer."""
        return tuple(self._count(tokenizer, text) for tokenizer in self._all)

    def _count(self, tokenizer: Any, text: str) -> int:
        with self._lock:
            encoded = tokenizer(text, padding=False, truncation=False, verbose=False)
        return len(encoded["input_ids"])

    def is_cut(self, text: str) -> bool:
        """Return whether the pipeline does not read a text to its end."""
        return self.count(text) > self.max_tokens
