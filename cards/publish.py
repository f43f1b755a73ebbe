"""Publish the cards of a finished demo: python cards/publish.py DEMO_DIR

Copies what its release holds, except the model, to cards/openmoji-pilot/: the cards with their
pictures, and every record they print, in the same layout, so that links and `card check` hold.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from modelops.files import atomic_directory, tree_files
from modelops.release import MODEL_FOLDER, verify_release

PUBLISHED = Path(__file__).parent / "openmoji-pilot"


def publish(release: Path) -> int:
    """Copy a verified release without its model; returns the number of files."""
    verify_release(release)
    files = tree_files(release, exclude=[MODEL_FOLDER])
    with atomic_directory(PUBLISHED) as target:
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return len(files)


if __name__ == "__main__":
    print(f"{publish(Path(sys.argv[1]) / 'release')} files in {PUBLISHED}")
