"""The commands of the guides in docs/, run in the directory of a smoke demo: pytest --demo DIR."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GUIDES = [path.name for path in PAGES if "<!-- run -->" in path.read_text("utf-8")]
BLOCK = re.compile(r"<!-- run -->\n *```bash\n(.*?)\n *```", re.DOTALL)


@pytest.mark.parametrize("guide", GUIDES)
def test_its_commands_run_as_they_stand(
    guide: str, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    demo = pytestconfig.getoption("--demo")
    if demo is None:
        pytest.skip("no --demo DIR of `modelops demo --budget smoke` was given")
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder)
    script = "set -euo pipefail\n" + "\n".join(
        textwrap.dedent(block) for block in BLOCK.findall((DOCS / guide).read_text("utf-8"))
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_guide_is_linked_from_the_readme() -> None:
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    assert {path.name for path in PAGES} == set(re.findall(r"\(docs/([\w-]+\.md)\)", readme))
