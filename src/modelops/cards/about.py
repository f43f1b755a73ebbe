"""Facts that are in no record: purpose, limits and licences, written by the people responsible."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from modelops.base.errors import ConfigError
from modelops.base.files import read_yaml
from modelops.cards.escape import code, link, markdown
from modelops.cards.licences import check_licence

TEMPLATES = Path(__file__).parent / "templates"


class About(BaseModel):
    """Texts of a model card and of its dataset card; each is one paragraph of plain text.

    Attributes:
        name: of the model.
        summary: two sentences at the top of the model card.
        license: of the weights: a licence id of the Hugging Face Hub, or `other` or a LicenseRef
            with `license_link` (and, for `other`, `license_name`).
        license_reason: reason for that licence.
        dataset_id, dataset_name, dataset_summary, dataset_license: of the images; their licence as
            that of the weights, with `dataset_license_name` and `dataset_license_link`.
        attribution: lines that the licences ask to be shown.
        openness: the parts that are open: weights, code, data, documentation.
        example_prompt: of the how-to-use snippets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    license: str
    license_name: str = ""
    license_link: str = ""
    license_reason: str
    language: list[str] = ["en"]
    tags: list[str] = []
    contact: str = ""
    code_url: str = ""
    dataset_id: str
    dataset_name: str
    dataset_summary: str
    dataset_license: str
    dataset_license_name: str = ""
    dataset_license_link: str = ""
    dataset_creator: str = ""
    dataset_url: str = ""
    attribution: list[str]
    intended_use: list[str] = []
    out_of_scope: list[str] = []
    limitations: list[str] = []
    mitigations: list[str] = []
    collection: list[str] = []
    biases: list[str] = []
    personal_data: str = ""
    openness: dict[str, str] = {}
    example_prompt: str = "red heart"


def parse_about(data: dict[str, Any], *, source: str) -> About:
    """Check the words of an about file.

    Raises:
        ConfigError: an unknown key (with a suggestion), a missing one, another type, or a licence
            that the Hub does not know.
    """
    try:
        about = About.model_validate(data)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")[0]
        key = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, About.model_fields, n=1, cutoff=0.5)
            known = ", ".join(About.model_fields)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {known}"
            raise ConfigError(f"{source}: {key}: unknown key", hint=hint) from error
        raise ConfigError(f"{source}: {key}: {found['msg'].lower()}") from error
    for key in ("license", "dataset_license"):
        licence, name, link = (getattr(about, f"{key}{end}") for end in ("", "_name", "_link"))
        check_licence(licence, name, link, key=key, source=source)
    return about


def licence_words(about: About, key: str) -> Markup:
    """Return a licence for people: its id, and name and text of one that the Hub does not know."""
    licence, name, address = (getattr(about, f"{key}{end}") for end in ("", "_name", "_link"))
    words = code(licence)
    if name:
        words += Markup(" ") + markdown(name)
    return words + (Markup(" (") + link("its text", address) + Markup(")") if address else "")


def load_about(path: str | Path) -> About:
    """Read the words from YAML.

    Raises:
        ConfigError: see `parse_about`.
    """
    return parse_about(read_yaml(path), source=str(path))


def read_about(about: About | str | Path | None) -> About:
    """Return the words, read from their file if it is one; those of `unstated_about` for None."""
    if about is None:
        return unstated_about()
    return about if isinstance(about, About) else load_about(about)


def openmoji_about() -> About:
    """The words for a model trained on OpenMoji."""
    return load_about(TEMPLATES / "openmoji_about.yaml")


def unstated_about() -> About:
    """The words for a model of which nobody has said anything: "not stated", licence unknown."""
    return load_about(TEMPLATES / "unstated_about.yaml")
