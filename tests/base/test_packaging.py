"""pyproject.toml names every package and every data file: a wheel lacks what it does not name."""

from __future__ import annotations

import fnmatch
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"modelops": ROOT / "src/modelops", "modelops.trainer": ROOT / "trainer"}


@pytest.fixture(scope="module")
def setuptools() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as handle:
        found: dict[str, object] = tomllib.load(handle)["tool"]["setuptools"]
    return found


def _tracked(folder: Path) -> list[Path]:
    """What git knows or would add below a folder; a wheel is built from a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_every_package_is_listed(setuptools: dict[str, object]) -> None:
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in PACKAGES.items()
        for path in _tracked(folder)
        if path.suffix == ".py"
    }
    assert found == set(setuptools["packages"])  # type: ignore[call-overload]


def test_every_data_file_is_packaged(setuptools: dict[str, object]) -> None:
    patterns: dict[str, list[str]] = setuptools["package-data"]  # type: ignore[assignment]
    for name, folder in PACKAGES.items():
        for path in _tracked(folder):
            if path.suffix == ".py" or not path.is_file():
                continue
            owner = max(
                (p for p in setuptools["packages"]  # type: ignore[attr-defined]
                 if path.is_relative_to(_folder(p))),
                key=len,
            )  # fmt: skip
            relative = path.relative_to(_folder(owner)).as_posix()
            assert any(fnmatch.fnmatch(relative, p) for p in patterns.get(owner, [])), (
                f"{name}: {path.relative_to(ROOT)} is in no package-data pattern of {owner}"
            )


def _folder(package: str) -> Path:
    if package == "modelops.trainer":
        return ROOT / "trainer"
    return ROOT / "src" / Path(*package.split("."))
