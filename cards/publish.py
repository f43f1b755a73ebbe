"""Publish the cards of a demo: python cards/publish.py DEMO_DIR

Copies to cards/openmoji-pilot/ the cards with their pictures, every record they print and the
verdict, in the project's own layout, so that links and `modelops card check` hold.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from modelops.demo.project import CITED, POLICY, VERDICT
from modelops.files import atomic_directory, tree_files

PUBLISHED = Path(__file__).parent / "openmoji-pilot"


def publish(project: Path) -> int:
    """Copy a demo's cards and records; returns the number of files."""
    cards = {f"cards/{name}": path for name, path in tree_files(project / "cards").items()}
    records = {name: project / name for name in (*CITED, VERDICT, POLICY)}
    files = {**cards, **records}
    with atomic_directory(PUBLISHED) as target:
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return len(files)


if __name__ == "__main__":
    print(f"{publish(Path(sys.argv[1]))} files in {PUBLISHED}")
