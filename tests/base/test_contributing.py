"""docs/CONTRIBUTING.md: every behaviour is where the table says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import modelops
import modelops.trainer

ROOT = Path(__file__).parents[2]
PLACES = {"../../trainer/": Path(modelops.trainer.__file__).parent}


def test_every_file_of_the_table_defines_its_name() -> None:
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| (\S+\.py) \| (\w+) \|$", text, re.M)
    assert len(rows) >= 20
    for behaviour, file, name in rows:
        path = Path(modelops.__file__).parent / file
        for prefix, folder in PLACES.items():
            if file.startswith(prefix):
                path = folder / file.removeprefix(prefix)
        assert path.is_file(), f"{behaviour}: no {file}"
        defined = {
            node.name
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert name in defined, f"{behaviour}: {file} does not define {name}"
