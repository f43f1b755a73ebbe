"""requirements.lock has a version for every direct dependency of what it locks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_direct_dependency_is_locked() -> None:
    with (ROOT / "pyproject.toml").open("rb") as handle:
        project = tomllib.load(handle)["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *extras["demo"], *extras["dev"], *extras["eval"]]
    locked = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M)
    missing = {_name(line) for line in direct} - {name.lower() for name in locked} - {"modelops"}
    assert missing == set()
