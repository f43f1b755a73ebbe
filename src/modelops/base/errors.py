"""The exception tree. A user's mistake prints one line and a way out; see `modelops.cli.errors`.

ModelopsError                exit 1  a known failure
├── UsageError               exit 2  an option, a config key, a file the user named
│   ├── ConfigError          exit 2  a config or policy file
│   └── ManifestError        exit 2  a manifest row or column
├── ImageError               exit 1  an image that cannot be read or is unsafe to read
├── IntegrityError           exit 1  bytes that are not the bytes their digest promised
├── InUseError               exit 1  an output that another process is writing
├── MissingExtraError        exit 1  an optional package is not installed
├── MissingWeightsError      exit 1  model weights are neither here nor fetchable
├── TrainingError            exit 1  a run that cannot go on (non-finite loss, no data)
├── EvaluationError          exit 1  a measurement that could not be made
├── ProcessDiedError         exit 1  one of several processes is gone
├── ExportError              exit 1  an export that failed or is not equal to its source
│   └── NotReproducedError   exit 1  no runtime here gives an artifact's numbers
├── ServingError             exit 1  a server that cannot start (port in use, bad release)
├── GateFailedError          exit 3  the gate says no
└── GateUndecidedError       exit 4  the gate cannot decide
"""

from __future__ import annotations

import re
from typing import ClassVar

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class ModelopsError(Exception):
    """A failure that modelops understands.

    Args:
        message: one line that names the file, row or option at fault. Control characters in it,
            which others' texts may hold, are made visible.
        hint: the way out, also one line; printed after the message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = printable(message)
        super().__init__(message)
        self.message = message
        self.hint = hint and printable(hint)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(ModelopsError):
    """Wrong argument on the command line, or a wrong file that it names."""

    exit_code = 2


class ConfigError(UsageError):
    """A config or policy file has an unknown key or a value out of range."""


class ManifestError(UsageError):
    """A manifest lacks a column, or a row lacks a required value."""


class ImageError(ModelopsError):
    """An image is truncated, mislabelled, too large or otherwise unreadable."""


class IntegrityError(ModelopsError):
    """A file's bytes differ from the digest a record gives for it."""


class InUseError(ModelopsError):
    """Another process is writing the output; its files are not touched."""


class MissingExtraError(ModelopsError):
    """An optional package is not installed; the hint is the pip command that adds it."""


class MissingWeightsError(ModelopsError):
    """Model weights are not on this machine and cannot be fetched from here."""


class TrainingError(ModelopsError):
    """A training run cannot start or cannot go on."""


class EvaluationError(ModelopsError):
    """A measurement could not be made; its record says `failed`."""


class ProcessDiedError(ModelopsError):
    """A process that shared the work has died; finished work is kept."""


class ExportError(ModelopsError):
    """A component cannot be exported, or its export differs from its source."""


class NotReproducedError(ExportError):
    """No runtime on this machine gives the numbers that an artifact was gated with."""


class ServingError(ModelopsError):
    """A server cannot start, or a release cannot be served."""


class GateFailedError(ModelopsError):
    """At least one criterion of the policy is not met."""

    exit_code = 3


class GateUndecidedError(ModelopsError):
    """At least one criterion could not be decided and none failed."""

    exit_code = 4


class ImageBlockedError(EvaluationError):
    """A service's own safety filter refused the prompt or the image."""


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: escapes for control characters.

    Line ends and tabs stay. The other controls (Unicode's Cc), separators of lines and paragraphs,
    marks that turn the direction of writing and halves of surrogate pairs are written as in JSON.
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says anything, or the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
