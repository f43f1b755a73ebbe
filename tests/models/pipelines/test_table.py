"""docs/pipelines.md is printed from what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_table_is_that_of_the_measurements() -> None:
    spec = importlib.util.spec_from_file_location(
        "bench_pipelines", ROOT / "bench" / "bench_pipelines.py"
    )
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(bench)
    sys.path[:] = before
    found = json.loads((ROOT / "bench" / "pipelines.json").read_text())
    assert (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8") == bench.table(found)
    assert set(found) <= {family.name for family in bench.FAMILIES}
