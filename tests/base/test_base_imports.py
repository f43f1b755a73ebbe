"""The house's arrows: who may import whom, and what help must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modelops
import modelops.trainer
from modelops.cli.main import COMMANDS

ROOT = Path(modelops.__file__).parent
TRAINER = Path(modelops.trainer.__file__).parent
BASE = {
    "config",
    "environment",
    "errors",
    "extras",
    "files",
    "launch",
    "processor",
    "records",
    "release",
    "scaffold",
    "seeding",
    "steps",
}
ALLOWED = {
    "models": BASE,
    "data": BASE | {"models"},
    "metrics": BASE | {"models"},
    "safety": BASE | {"models"},
    "export": BASE | {"models", "data", "metrics"},
    "evaluation": BASE | {"models", "data", "metrics", "safety", "export"},
    "monitoring": BASE | {"metrics"},
    "gates": BASE | {"evaluation", "export", "metrics", "monitoring"},
    "cards": BASE | {"data", "evaluation", "export", "gates"},
    "serving": BASE | {"models", "safety", "export", "metrics", "monitoring"},
    "service": BASE | {"safety", "serving"},
    "trainer": BASE | {"models", "data", "evaluation", "metrics"},
    "doctor": BASE | {"models"},
    "demo": BASE
    | {"models", "data", "metrics", "safety", "export", "evaluation", "gates", "cards", "serving"}
    | {"monitoring"},
}


def imported_packages(path: Path) -> set[str]:
    """Names directly below `modelops` that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
            if node.module == "modelops":
                modules = [f"modelops.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {m.split(".")[1] for m in modules if m.startswith("modelops.")}
    return names - {"__version__"}


def rooms() -> list[tuple[str, Path]]:
    found = [("trainer", path) for path in sorted(TRAINER.rglob("*.py"))]
    for path in sorted(ROOT.rglob("*.py")):
        found.append((path.relative_to(ROOT).parts[0].removesuffix(".py"), path))
    return found


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_imports_point_one_way(room: str, path: Path) -> None:
    imports = imported_packages(path) - {room}
    assert room == "trainer" or "trainer" not in imports, "nothing imports trainer"
    assert room == "cli" or "cli" not in imports, "nobody imports cli"
    if room in BASE | {"__init__"}:
        assert imports <= BASE
    elif room in ALLOWED:
        assert imports <= ALLOWED[room], f"{path.name}: {imports - ALLOWED[room]}"
    else:
        assert room == "cli", f"{room}: a new room needs an entry in this table"


def test_the_pipeline_that_checkpoints_carry_imports_only_torch_and_diffusers() -> None:
    tree = ast.parse((ROOT / "models" / "pipeline.py").read_text("utf-8"))
    tops = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert tops <= {"collections", "diffusers", "functools", "torch", "typing"}


HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnxruntime",
    "bentoml",
    "matplotlib",
    "scipy",
    "rich",
    "pydantic",
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    code = (
        "import sys; from modelops.cli.main import main\n"
        f"code = main({arguments!r})\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stderr.strip().splitlines()[-1]
    allowed = [] if not command else ["pydantic"]
    assert [m for m in ast.literal_eval(loaded) if m not in allowed] == []


@pytest.mark.parametrize(
    "modules",
    [
        "modelops.records.base, modelops.training.config, modelops.base.environment",
        "modelops.service",  # BentoML's arbiter imports it too, beside every worker
    ],
)
def test_records_config_and_the_service_need_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
