"""Settings of a node: the one place that reads its MODELOPS_* variables.

Plain pydantic, not pydantic-settings, whose constructor reads the process's environment: what a
test or a program says in Python must not depend on what happens to be exported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from modelops.base.errors import UsageError
from modelops.export.graphs.graph import RuntimeName

PREFIX = "MODELOPS_"
MAX_WORKERS = 64
# Variables that are not a node's: read by commands and clients.
OF_COMMANDS = {
    "MODELOPS_ADMIN_KEY": "Admin key that `modelops serve swap` sends.",
    "MODELOPS_API_KEY": "API key that `modelops eval URL` and other clients send.",
    "MODELOPS_CACHE": "Folder of modelops' caches, in place of ~/.cache/modelops.",
    "MODELOPS_DEBUG": "1 shows the traceback of an error.",
    "MODELOPS_TRUST_CODE": "1 is --trust-code: run code that comes with a model.",
}
_SECRET = {"api_keys"}  # never printed: somebody may have put a key there
_TYPES = {bool: "0 or 1", int: "a whole number", float: "a number"}

Positive = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
FromZero = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=1_000_000)]
Rate = Annotated[int, Field(ge=1, le=1_000_000)]
TextOrDigest = Literal["digest", "text"]
Words = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: v.replace(",", " ").split() if isinstance(v, str) else v),
]


class NodeSettings(BaseModel):
    """Settings of a node; `from_environment` reads each field from MODELOPS_<NAME>.

    Raises:
        UsageError: a value is of another type, out of range or none of the choices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    release: str = ""
    """Release to serve, or a folder of releases whose active one is served."""
    releases: str = ""
    """Folder of releases that may be swapped in while the node runs; empty turns that off."""
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 1
    """Worker processes, each with its own engine and device."""
    run_directory: str = ""
    """Folder that the workers share; set by the node itself, not by an operator."""

    runtime: Literal["auto", RuntimeName] = "auto"
    """Runtime of an exported artifact; auto takes the fastest that gives the gated numbers."""
    device: str = "cpu"
    """Device of a checkpoint: cpu, cuda (each worker takes one of its own), cuda:1 or auto."""
    threads: Annotated[int, Field(ge=0, lt=1_000_000)] = 0
    """CPU threads of the model; 0 is all cores of the process, divided by the workers."""
    max_rows: Annotated[int, Field(ge=2, lt=1_000_000)] = 16
    """Rows of a forward pass; a guided request takes two."""
    profile_s: FromZero = 5.0
    """Seconds to spend at the start on measuring which batch widths pay; 0 measures nothing and
    batches up to MODELOPS_MAX_ROWS."""
    golden_every_s: FromZero = 600.0
    """Seconds after which a check of readiness makes the golden image again; 0 makes it at the
    start only."""
    queue_limit: Count = 64
    """Requests that may wait for a place."""
    deadline_s: Positive = 120.0
    """Seconds after which a request is dropped."""
    stalled_s: Positive = 60.0
    """Seconds of one network evaluation after which the engine counts as dead."""
    client_timeout_s: Positive = 30.0
    """Seconds that a client may take for a request's head, for its body, or without reading of its
    answer."""
    max_connections: Count = 2000
    """Connections open at once in one worker; one more is closed unanswered."""
    stream_write_timeout_s: Positive = 30.0
    """Seconds that the reader of a stream may take for one event; a slower one is dropped."""

    prompt_filter: str = "words"
    """Prompt filter by name, as in `modelops eval`; serving has no `none`."""
    image_filter: str = "open_nsfw"
    """Image filter by name, as in `modelops eval`; serving has no `none`."""
    filter_timeout_s: Positive = 10.0
    """Seconds that a safety filter may take."""

    api_keys: Words = ()
    """Hex sha256 digests of API keys, separated by commas."""
    api_keys_file: str = ""
    """File of API keys, made by `modelops serve key create`."""
    insecure: bool = False
    """Serve without keys on an address that others can reach."""
    allowed_origins: Words = ()
    """Origins of browser clients on other sites, separated by commas, as https://studio.example."""
    requests_per_minute: Rate | None = None
    """Requests per minute of each caller, unless its key says otherwise."""
    images_per_minute: Rate | None = None
    """Images per minute of each caller, unless its key says otherwise; one of more or fewer steps
    than the release makes by default counts more or less."""
    page: bool = True
    """Answer / with a page on which the node can be tried."""

    signing_key: str = ""
    """P-256 key (PEM) that signs images and receipts; without it a development key of this machine
    signs."""
    signing_chain: str = ""
    """Certificate of that key, then those of its issuers (PEM)."""
    watermark_key: str = ""
    """Key file of the invisible watermark; empty embeds none."""
    receipts: str = ""
    """Folder where signed receipts are kept; empty keeps none."""
    receipts_mb: Count = 256
    """Megabytes of that folder, at most; the oldest receipts go first."""
    receipts_failure: Literal["send", "refuse"] = "send"
    """Send or refuse the image when its receipt cannot be written."""
    receipts_prompts: TextOrDigest = "digest"
    """Keep receipts with the prompt's text, or with its digest alone."""

    quarantine: str = ""
    """Folder where blocked images are kept for review; empty keeps none."""
    quarantine_mb: Count = 256
    """Megabytes of that folder, at most; the oldest entries go first."""
    quarantine_days: Positive = 30.0
    """Days after which an entry is deleted."""
    quarantine_stages: Literal["images", "all"] = "images"
    """Keep what the image filter blocked, or also what the prompt filter blocked."""
    quarantine_prompts: TextOrDigest = "digest"
    """Keep entries with the prompt's text, or with its digest alone."""
    quarantine_key: str = ""
    """Reviewer's X25519 public key (PEM), to which entries are encrypted."""

    evaluate_every_days: FromZero = 0.0
    """Age in days above which the evaluation of the released model is overdue; 0 takes what the
    released policy says, or 30."""
    drift_log: str = ""
    """Folder of the drift log, which `modelops monitor` reads; empty keeps none."""
    drift_sample: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    """Share of the requests that the drift log has."""
    drift_log_mb: Count = 64
    """Megabytes of that folder, at most; the oldest rows go first."""
    log_file: str = ""
    """File that the log is appended to; empty is stderr."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of the log: one JSON object a line, or text; auto is text on a terminal."""
    log_mb: FromZero | None = None
    """Megabytes of the log file and its older ones, at most: 100 where the folder can be written;
    0 rotates nothing."""
    log_keep: Annotated[int, Field(ge=1, le=1000)] = 4
    """Older log files to keep."""
    log_prompts: bool = False
    """Write prompts into the log, which otherwise leaves them out."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(error) from None

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        if not all(re.fullmatch(r"[0-9a-fA-F]{64}", digest) for digest in self.api_keys):
            raise UsageError(
                f"{variable('api_keys')}: holds something that is no sha256 in hex",
                hint="give the digests of the keys (sha256sum), separated by commas",
            )
        for origin in self.allowed_origins:
            url = urlsplit(origin)
            if url.scheme not in ("http", "https") or not url.netloc or url.path or url.query:
                raise UsageError(
                    f"{variable('allowed_origins')}: {origin!r} is no origin",
                    hint="such as https://studio.example",
                )
        return self

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> NodeSettings:
        """Read settings from environment variables; an empty one is not set.

        Raises:
            UsageError: see the class.
        """
        return cls(
            **{
                name: text
                for name in cls.model_fields
                if (text := environment.get(variable(name), "").strip())
            }
        )

    def to_environment(self) -> dict[str, str]:
        """Return the variables of the fields that were given, as `from_environment` reads them."""
        return {variable(name): as_text(getattr(self, name)) for name in self.model_fields_set}

    @property
    def shared_directory(self) -> Path | None:
        """Return the directory that the workers of a node share; None for a node of one."""
        return Path(self.run_directory) if self.run_directory and self.workers > 1 else None

    def table(self) -> list[dict[str, str | bool]]:
        """Return a row per variable: `variable`, `value`, `default`, `set` and `about`."""
        return [
            {
                "variable": variable(name),
                "value": "(set)" if name in _SECRET and given else as_text(getattr(self, name)),
                "default": as_text(field.default),
                "set": given,
                "about": " ".join((field.description or "").split()),
            }
            for name, field in type(self).model_fields.items()
            for given in [name in self.model_fields_set]
        ]


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + name.upper()


def known_variables() -> set[str]:
    """Return every MODELOPS_ variable that modelops reads."""
    return {*map(variable, NodeSettings.model_fields), *OF_COMMANDS}


def as_text(value: object) -> str:
    """Return a setting's value as its variable holds it; empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).removesuffix(".0")


def _refusal(error: ValidationError) -> UsageError:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if name not in NodeSettings.model_fields:
        return UsageError(f"{name}: no such setting of a node")
    shown = "" if name in _SECRET else f"={first['input']!r}"
    why = first["msg"].removeprefix("Input ")
    for kind, words in _TYPES.items():
        if first["type"].startswith(kind.__name__):
            why = f"is not {words}"
    return UsageError(f"{variable(name)}{shown} {why}")
