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
ALLOWED = {
    "base": set(),
    "records": {"base"},
    "models": {"base", "records"},
    "training": {"base", "records"},
    "releases": {"base", "records"},
    "metrics": {"base", "records", "models"},
    "safety": {"base", "records", "models"},
    "data": {"base", "records", "models"},
    "export": {"base", "records", "models", "metrics"},
    "evaluation": {"base", "records", "models", "data", "metrics", "safety", "export"},
    "abtest": {"base", "records", "data", "metrics", "evaluation"},
    "monitoring": {"base", "records", "metrics", "releases"},
    "gates": {"base", "records", "metrics", "export", "evaluation", "monitoring"},
    "cards": {"base", "records", "data", "export", "evaluation", "gates"},
    "serving": {
        "base", "records", "models", "safety", "export", "metrics", "monitoring", "releases",
    },
    "service": {"base", "serving"},
    "trainer": {"base", "records", "models", "data", "metrics", "evaluation", "training"},
    "doctor": {"base", "models", "export", "serving"},
    "demo": {
        "base", "records", "models", "training", "data", "metrics", "safety", "export",
        "evaluation", "monitoring", "gates", "cards", "releases", "serving",
    },
}  # fmt: skip
# Inside a room, from bottom to top: a part imports parts before it alone.
FLOORS = {
    "serving": (
        "settings", "failures", "api", "workers", "engine", "telemetry", "provenance", "moderation",
        "node", "rollout", "http", "deploy",
    ),
    "export": (
        "timing", "graphs", "tensorrt", "onnx", "runtimes", "components",
        "pictures", "calibration", "parity", "artifact", "lora", "source", "bench", "exporting",
        "int8", "to_onnx", "to_int8", "to_tensorrt", "to_torchscript",
    ),
    "evaluation": (
        "grids", "lit", "per_image", "inputs", "prompts", "reference", "settings", "sources",
        "workers", "samples", "sampling", "compare", "workbench", "overfitting", "report",
        "measures", "evaluate",
    ),
    "data": (
        "folders", "manifest", "neighbours", "rates", "candidates", "check", "corpora",
        "embeddings", "units", "calibration", "dedup", "split", "shards", "stats", "smoke",
    ),
}  # fmt: skip


def module_name(path: Path) -> str:
    """Dotted name below `modelops` of a file of the package or of the trainer."""
    top, below = (TRAINER, ("trainer",)) if path.is_relative_to(TRAINER) else (ROOT, ())
    parts = (*below, *path.relative_to(top).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for top in (ROOT, TRAINER)
    for path in sorted(top.rglob("*.py"))
    if module_name(path)
}


def imported_by(name: str) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("modelops.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:  # of the trainer, which is flat
            assert node.level == 1 and name.startswith("trainer"), name
            found |= {f"trainer.{node.module}"} if node.module else set()
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("modelops").removeprefix(".")
            if node.module.split(".")[0] == "modelops":
                inside = {f"{module}.{alias.name}".strip(".") for alias in node.names}
                found |= (inside & FILES.keys()) or {module}
    return (found & FILES.keys()) - {name}


ARROWS = {name: imported_by(name) for name in FILES}


@pytest.mark.parametrize("room", sorted({name.split(".")[0] for name in FILES} - {"cli"}))
def test_imports_point_one_way(room: str) -> None:
    assert room in ALLOWED, f"{room}: a new room needs an entry in this table"
    for name in (name for name in FILES if name.split(".")[0] == room):
        others = {imported.split(".")[0] for imported in ARROWS[name]} - {room}
        assert others <= ALLOWED[room], f"{name}: {others - ALLOWED[room]}"


@pytest.mark.parametrize("room", FLOORS)
def test_inside_a_room_imports_point_one_way_too(room: str) -> None:
    floors = {part: height for height, part in enumerate(FLOORS[room])}
    for name in (name for name in FILES if name.startswith(f"{room}.")):
        part = name.split(".")[1]
        assert part in floors, f"{name}: a new part needs a place in this table"
        for imported in ARROWS[name]:
            other = imported.removeprefix(f"{room}.").split(".")[0]
            if imported.startswith(f"{room}.") and other != part:
                assert floors[other] < floors[part], f"{name} imports {imported}"


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Sets of names that reach each other."""
    above: dict[str, set[str]] = {}
    for start in arrows:
        reached, ahead = set(), [start]
        while ahead:
            for name in arrows.get(ahead.pop(), set()) - reached:
                reached.add(name)
                ahead.append(name)
        above[start] = reached
    return [{n for n in above[name] if name in above[n]} for name in above if name in above[name]]


def test_no_circle_of_files_or_folders_at_any_level() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}] * 2
    assert circles(ARROWS) == []
    for depth in (1, 2, 3):
        folders: dict[str, set[str]] = {}
        for name, imports in ARROWS.items():
            here = name.split(".")
            for there in (imported.split(".") for imported in imports):
                if here[: depth - 1] == there[: depth - 1] and here[:depth] != there[:depth]:
                    folders.setdefault(".".join(here[:depth]), set()).add(".".join(there[:depth]))
        assert circles(folders) == [], f"at level {depth}"


def test_no_file_or_class_is_too_long_to_read_at_once() -> None:
    for name, path in FILES.items():
        text = path.read_text("utf-8")
        assert text.count("\n") <= 450, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 300, f"{name}: {node.name}"


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
