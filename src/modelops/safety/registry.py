"""Filters by name: `open_nsfw`, `transformers:PATH`, `words:DIR`, or one that a package adds.

A name is `NAME[:TARGET][,option=value]...`. A target of the hub is pinned by `revision=COMMIT`:
serving refuses it without, and an evaluation says which commit it took. Another package adds
filters with entry points:

    [project.entry-points."modelops.image_filters"]
    mine = "my_package.filters:open_image_filter"      # (FilterName, *, threshold) -> ImageFilter
    [project.entry-points."modelops.prompt_filters"]
    mine = "my_package.filters:open_prompt_filter"     # (FilterName) -> PromptFilter

This module loads no weights and imports nothing heavy until a filter is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.base.errors import ModelopsError, UsageError
from modelops.base.files import canonical_json

if TYPE_CHECKING:
    from modelops.safety.image import ImageFilter
    from modelops.safety.prompt import PromptFilter

IMAGE_GROUP = "modelops.image_filters"
PROMPT_GROUP = "modelops.prompt_filters"
_OPTION = re.compile(r"([a-z_]+)=(.+)")
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TARGET = "path or hub id"


@dataclass(frozen=True, slots=True)
class FilterName:
    """Name of a filter, its target, and its options; an option may be given many times."""

    name: str
    target: str = ""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def only(self, *known: str) -> None:
        """Refuse other options.

        Raises:
            UsageError: there is one.
        """
        for option in self.options:
            if option not in known:
                raise UsageError(
                    f"filter {self.name!r} has no option {option!r}",
                    hint=f"its options: {', '.join(known) or 'none'}",
                )


def parse_filter(text: str) -> FilterName:
    """Parse `NAME[:TARGET][,option=value]...` into its parts.

    Raises:
        UsageError: there is no name.
    """
    parts = text.split(",")
    options: dict[str, tuple[str, ...]] = {}
    while len(parts) > 1 and (match := _OPTION.fullmatch(parts[-1])):
        options[match[1]] = (match[2], *options.get(match[1], ()))
        parts.pop()
    name, _, target = ",".join(parts).partition(":")
    if not name:
        raise UsageError(f"{text!r}: not the name of a filter", hint="such as open_nsfw")
    return FilterName(name, target, options)


def _open_nsfw(name: FilterName, *, threshold: float, store: Path | None = None) -> ImageFilter:
    from modelops.safety.image import OpenNsfwFilter

    return OpenNsfwFilter(threshold=threshold)


def _transformers(name: FilterName, *, threshold: float, store: Path | None = None) -> ImageFilter:
    from modelops.models.pretrained import fetch_directory
    from modelops.safety.checkers import TransformersFilter

    directory = fetch_directory(name.target, revision=name.options.get("revision", (None,))[-1])
    return TransformersFilter(
        directory, threshold=threshold, unsafe=name.options.get("unsafe", ()), store=store
    )


def _diffusers(name: FilterName, *, threshold: float, store: Path | None = None) -> ImageFilter:
    from modelops.models.pretrained import fetch_directory
    from modelops.safety.checkers import DiffusersSafetyCheckerFilter

    directory = fetch_directory(name.target, revision=name.options.get("revision", (None,))[-1])
    return DiffusersSafetyCheckerFilter(directory, threshold=threshold, store=store)


def _blocklist(name: FilterName, *, threshold: float, store: Path | None = None) -> ImageFilter:
    from modelops.safety.blocklist import BlockListFilter, read_blocklist

    return BlockListFilter(read_blocklist(Path(name.target)), threshold=threshold)


def _words(name: FilterName) -> PromptFilter:
    from modelops.safety.prompt import WordListFilter, read_exceptions, read_lists

    if not name.target:
        return WordListFilter()
    directory = Path(name.target)
    return WordListFilter(read_lists(directory), read_exceptions(directory))


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    factory: Callable[..., Any]
    target: str  # "", "path", "path?" or "path or hub id"
    options: tuple[str, ...] = ()


_IMAGE_FILTERS = {
    "open_nsfw": _BuiltIn(_open_nsfw, ""),
    "transformers": _BuiltIn(_transformers, _HUB_TARGET, ("unsafe", "revision")),
    "diffusers-safety-checker": _BuiltIn(_diffusers, _HUB_TARGET, ("revision",)),
    "blocklist": _BuiltIn(_blocklist, "path"),
}
_PROMPT_FILTERS = {"words": _BuiltIn(_words, "path?")}


def image_filter_names() -> list[str]:
    """Names of the image filters that can be opened here, built in or from packages."""
    return [*_IMAGE_FILTERS, *sorted({e.name for e in entry_points(group=IMAGE_GROUP)})]


def prompt_filter_names() -> list[str]:
    """Names of the prompt filters that can be opened here, built in or from packages."""
    return [*_PROMPT_FILTERS, *sorted({e.name for e in entry_points(group=PROMPT_GROUP)})]


def check_image_filter(text: str, *, pinned: bool = False) -> FilterName:
    """Check an image filter's name and return its parts; loads nothing.

    Args:
        pinned: refuse a repository of the hub without `revision=` and a commit, as whoever owns it
            could change what the filter lets through.

    Raises:
        UsageError: no such filter, what it shall open is not there or not pinned, or its labels do
            not say what is unsafe.
    """
    name = _checked(text, _IMAGE_FILTERS, IMAGE_GROUP, "image")
    revisions = name.options.get("revision", ())
    if len(revisions) > 1:
        raise UsageError(f"image filter {text!r}: {len(revisions)} revisions", hint="name one")
    own = _IMAGE_FILTERS.get(name.name)
    if own is None or own.target != _HUB_TARGET:
        return name
    if not _of_the_hub(name):
        if revisions:
            raise UsageError(
                f"image filter {text!r}: {name.target} is a directory, which has no revisions",
                hint="leave revision= out",
            )
        if name.name == "transformers":
            from modelops.safety.checkers import check_labels

            check_labels(Path(name.target), name.options.get("unsafe", ()))
    elif pinned and not (revisions and _COMMIT.fullmatch(revisions[0])):
        raise UsageError(
            f"image filter {text!r}: no directory, and as a repository of the hub it is not pinned",
            hint="add ,revision= and the 40 hex digits of a commit (`git ls-remote "
            f"https://huggingface.co/{name.target} HEAD` says the newest), or name a directory",
        )
    return name


def pin_image_filter(text: str) -> str:
    """Return the name of an image filter with the commit to which its revision resolves now; a
    filter that is not of the hub keeps its name.

    Raises:
        UsageError: no such filter.
        MissingWeightsError: the hub does not give it.
    """
    name = check_image_filter(text)
    revision = name.options.get("revision", (None,))[-1]
    if not _of_the_hub(name) or (revision and _COMMIT.fullmatch(revision)):
        return text
    from modelops.models.pretrained import fetch_directory

    commit = fetch_directory(name.target, revision=revision).name
    unsafe = "".join(f",unsafe={label}" for label in name.options.get("unsafe", ()))
    return f"{name.name}:{name.target}{unsafe},revision={commit}"


def check_prompt_filter(text: str) -> FilterName:
    """Check a prompt filter's name and return its parts; loads nothing.

    Raises:
        UsageError: no such filter, or what it shall open is not there.
    """
    return _checked(text, _PROMPT_FILTERS, PROMPT_GROUP, "prompt")


def open_image_filter(
    text: str, *, threshold: float = 0.5, store: Path | None = None
) -> ImageFilter:
    """Load an image filter by name.

    Args:
        threshold: a score at or above it is blocked; 0.5 is each filter's own.
        store: folder of several processes, which then share the weights of modelops' own filters.

    Raises:
        UsageError: no such filter.
        ModelopsError: it cannot be loaded.
    """
    name = check_image_filter(text)
    arguments: dict[str, Any] = {"threshold": threshold}
    if name.name in _IMAGE_FILTERS:
        arguments["store"] = store
    found: ImageFilter = _open(name, _IMAGE_FILTERS, IMAGE_GROUP, "image", **arguments)
    return found


def open_prompt_filter(text: str) -> PromptFilter:
    """Load a prompt filter by name.

    Raises:
        UsageError: no such filter.
        ModelopsError: it cannot be loaded.
    """
    name = check_prompt_filter(text)
    found: PromptFilter = _open(name, _PROMPT_FILTERS, PROMPT_GROUP, "prompt")
    return found


def _checked(text: str, builtin: Mapping[str, _BuiltIn], group: str, kind: str) -> FilterName:
    name = parse_filter(text)
    own = builtin.get(name.name)
    if own is None:
        _entry_point(name.name, builtin, group, kind)
        return name
    name.only(*own.options)
    if own.target == "" and name.target:
        raise UsageError(f"{kind} filter {text!r}: {name.name} takes nothing after a colon")
    if own.target.startswith("path") and not own.target.endswith("?") and not name.target:
        raise UsageError(
            f"{kind} filter {text!r} does not say what to open",
            hint=f"write {name.name}:{own.target.upper().replace(' ', '_')}",
        )
    hub = own.target == _HUB_TARGET and _HUB_ID.fullmatch(name.target)
    if name.target and not hub and not Path(name.target).exists():
        raise UsageError(f"{kind} filter {text!r}: {name.target}: no such file or directory")
    return name


def _of_the_hub(name: FilterName) -> bool:
    own = _IMAGE_FILTERS.get(name.name)
    return own is not None and own.target == _HUB_TARGET and not Path(name.target).exists()


def _entry_point(name: str, builtin: Mapping[str, _BuiltIn], group: str, kind: str) -> EntryPoint:
    found = [entry for entry in entry_points(group=group) if entry.name == name]
    # The same package found twice on the path is no conflict.
    if len({entry.value for entry in found}) > 1:
        raise UsageError(
            f"{kind} filter {name!r} comes from {len(found)} installed packages",
            hint="uninstall all but one",
        )
    if not found:
        others = sorted({entry.name for entry in entry_points(group=group)} - set(builtin))
        raise UsageError(
            f"no {kind} filter {name!r}",
            hint=f"one of {', '.join([*builtin, *others])}; packages add more ({group})",
        )
    return found[0]


def _open(
    name: FilterName, builtin: Mapping[str, _BuiltIn], group: str, kind: str, **arguments: Any
) -> Any:
    from modelops.safety.image import SafetyFilterError

    own = builtin.get(name.name)
    try:
        factory = own.factory if own else _entry_point(name.name, builtin, group, kind).load()
        found = factory(name, **arguments)
        info = dict(found.info)
        canonical_json(info)  # it goes into records
    except ModelopsError:
        raise
    except Exception as error:
        raise SafetyFilterError(
            f"{kind} filter {name.name!r} cannot start: {type(error).__name__}: {error}"
        ) from error
    if not info.get("filter"):
        raise SafetyFilterError(f"{kind} filter {name.name!r}: its info has no name ('filter')")
    return found
