"""Licences of a card's front matter, as the Hugging Face Hub accepts them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from modelops.base.errors import ConfigError

# The ids that the Hub's validation of README.md listed in May 2026:
# https://github.com/huggingface/huggingface_hub/issues/4218
HUB_LICENCES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl",
    "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0",
    "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4", "grok2-community", "gemma", "unknown", "other",
)  # fmt: skip
UNKNOWN, OTHER = "unknown", "other"
_OWN = re.compile(r"licenseref-[a-z0-9.-]+")  # SPDX's way to name a licence that it does not list


def licence_id(text: str) -> str:
    """Return a licence as the Hub spells it: `CC BY-SA 4.0` -> `cc-by-sa-4.0`."""
    return "-".join(text.casefold().split())


def front_matter_id(licence: str) -> str:
    """Return the id for the front matter: `other` for a licence that the Hub does not know."""
    return licence_id(licence) if licence_id(licence) in HUB_LICENCES else OTHER


def check_licence(licence: str, name: str, link: str, *, key: str, source: str) -> None:
    """Check a licence that somebody states, with the keys `KEY_name` and `KEY_link`.

    Raises:
        ConfigError: the Hub does not know it and it is neither `other` nor a LicenseRef, one of
            these has no link or name, or a name or link is given for a licence that needs none.
    """
    found = licence_id(licence)
    own = _OWN.fullmatch(found) is not None
    if own or found == OTHER:
        missing = f"{key}_name" if not (own or name) else "" if link else f"{key}_link"
        if missing:
            raise ConfigError(
                f"{source}: {missing}: missing, for {key}: {licence} names no licence by itself",
                hint="give its name and where its text is: a file such as LICENSE, or an address",
            )
        if not re.fullmatch(r"https://\S+|(?![/.])[^\s:\\]+", link) or ".." in link.split("/"):
            raise ConfigError(
                f"{source}: {key}_link: {link!r} is neither a file beside the card nor an https "
                "address"
            )
    elif found not in HUB_LICENCES:
        close = difflib.get_close_matches(found, HUB_LICENCES, n=3, cutoff=0.5)
        close = [item for item in HUB_LICENCES if item.startswith(found)][:3] or close
        raise ConfigError(
            f"{source}: {key}: the Hugging Face Hub knows no licence {licence!r}",
            hint=(f"did you mean {' or '.join(close)}? Else write" if close else "write")
            + f" {key}: other, {key}_name and {key}_link",
        )
    elif name or link:
        raise ConfigError(
            f"{source}: {key}_{'name' if name else 'link'}: has no effect, for {key} is {licence}",
            hint=f"leave it out, or write {key}: other",
        )


def data_licences(stated: str, counts: Mapping[str, int], *, source: str) -> list[str]:
    """Return the licences of a data set: those that its manifest names, if none is stated.

    Args:
        stated: licence of the data set as a whole; `other` may stand for several.
        counts: licence as the manifest names it -> number of images.
        source: file of the counts, for messages.

    Raises:
        ConfigError: the manifest names another licence than the one that is stated.
    """
    if licence_id(stated) == UNKNOWN:
        return sorted({licence_id(name) for name in counts}) or [UNKNOWN]
    others = [name for name in counts if licence_id(name) != licence_id(stated)]
    if others and licence_id(stated) != OTHER:
        raise ConfigError(
            f"{source}: {counts[others[0]]:,} images are under {others[0]}, dataset_license says "
            f"{stated}",
            hint="state the licence that the manifest names, none, or `other` with "
            "dataset_license_name and dataset_license_link for several; or mend the manifest",
        )
    return [stated]
