"""Arguments that a pipeline's call takes, read from its signature and its parts' configurations."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelops.base.errors import UsageError

Subject = Literal["prompt", "class", "nothing"]
DENOISERS = ("transformer", "unet")
_GUIDANCE = re.compile(r"(\w+_)?(guidance|cfg)_scale")
# Scales of something else than the distance of an image from its prompt.
_OTHER_SCALES = re.compile(r"(image|img|audio|pag|skip_layer|prior|decoder|min|max|sld)_.*|.*pag.*")
# Defaults that a pipeline of modelops states in its configuration.
_STATED = {"num_inference_steps": "default_steps", "guidance_scale": "default_guidance"}
_CLASS_COUNTS = ("num_class_embeds", "num_embeds_ada_norm")


@dataclass(frozen=True)
class CallForm:
    """Arguments of one pipeline's call.

    Attributes:
        pipeline: name of its class.
        defaults: every argument's default; `inspect.Parameter.empty` where it must be given.
        subject: what an image is made of: a prompt, a class, or nothing but noise.
        classes: class name to number.
        n_classes: number of classes; 0 where it makes none.
        guidance: names of arguments that may be the guidance scale, the likeliest first.
        bare_prompt: whether a prompt is given as it is, for the call takes no lists.
    """

    pipeline: str
    defaults: Mapping[str, Any]
    subject: Subject
    classes: Mapping[str, int]
    n_classes: int
    guidance: tuple[str, ...]
    bare_prompt: bool = False

    def takes(self, name: str) -> bool:
        """Return whether the call has an argument of this name."""
        return name in self.defaults

    @property
    def required(self) -> list[str]:
        """Arguments without a default."""
        return [name for name, value in self.defaults.items() if value is inspect.Parameter.empty]

    def default(self, name: str) -> Any:
        """Return an argument's default; None where there is none, or no such argument."""
        value = self.defaults.get(name)
        return None if value is inspect.Parameter.empty else value

    def class_number(self, text: str) -> int:
        """Return the class that a prompt means: a number, or a name without regard to case.

        Raises:
            UsageError: there is no such class.
        """
        wanted = text.strip()
        names = {name.strip().lower(): number for name, number in self.classes.items()}
        if wanted.lower() in names:
            return names[wanted.lower()]
        if re.fullmatch(r"[0-9]{1,9}", wanted) and int(wanted) < self.n_classes:
            return int(wanted)
        raise UsageError(
            f"{self.pipeline} makes images of classes, and {text[:60]!r} is none",
            hint=self._classes_in_words(wanted.lower(), names),
        )

    def _classes_in_words(self, wanted: str, names: Mapping[str, int]) -> str:
        numbers = f"a number from 0 to {self.n_classes - 1}"
        if not names:
            return f"give {numbers} as the prompt"
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or list(names)[:3]
        return f"give {numbers} as the prompt, or a name such as {', '.join(near)}"


def read_form(pipeline: Any) -> CallForm:
    """Read the arguments of a pipeline's call."""
    found = inspect.signature(pipeline.__call__).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    defaults = {item.name: item.default for item in found if item.kind not in kinds}
    for name, stated in _STATED.items():
        if name in defaults and pipeline.config.get(stated) is not None:
            defaults[name] = pipeline.config[stated]
    labels = getattr(pipeline, "labels", None)
    classes = {str(k): int(v) for k, v in labels.items()} if isinstance(labels, Mapping) else {}
    count = _class_count(pipeline) or 1 + max(classes.values(), default=-1)
    subject: Subject = "prompt" if "prompt" in defaults else "nothing"
    if subject == "nothing" and "class_labels" in defaults and count:
        subject = "class"
    scales = [
        name for name in defaults if _GUIDANCE.fullmatch(name) and not _OTHER_SCALES.fullmatch(name)
    ]
    return CallForm(
        pipeline=type(pipeline).__name__,
        defaults=defaults,
        subject=subject,
        classes=classes,
        n_classes=count if subject == "class" else 0,
        guidance=tuple(sorted(scales, key=lambda name: name != "guidance_scale")),
    )


def denoiser_of(pipeline: Any) -> Any:
    """Return a pipeline's transformer or UNet; None if it has neither."""
    parts = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((part for part in parts if part is not None), None)


def _class_count(pipeline: Any) -> int:
    config = getattr(denoiser_of(pipeline), "config", None) or {}
    counts = (config.get(name) for name in _CLASS_COUNTS)
    return next((int(count) for count in counts if isinstance(count, int)), 0)
