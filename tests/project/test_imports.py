"""Imports point one way, read from the source (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minicpm_megatron"
LEAVES = {"errors", "versions", "storage", "registry", "__version__"}
# room -> rooms it may import besides itself and the leaves
ALLOWED = {
    "__main__": {"cli"},
    "errors": set(),
    "versions": set(),
    "storage": set(),
    "registry": set(),
    "recipe": set(),
    "planning": {"recipe"},
    "methods": {"recipe"},
    "data": {"recipe"},
    "parallel": {"recipe"},
    "model": {"methods", "parallel", "recipe"},
    "engine": {"model", "methods", "parallel", "recipe"},
    "checkpoint": {"recipe"},
    "megatron_lm": {"model", "methods", "parallel", "recipe"},
    "convert": {"checkpoint", "methods", "recipe", "data"},
    "derive": {"training", "checkpoint", "convert", "methods", "recipe"},
    "evaluation": {"convert", "methods", "recipe", "data"},
    "training": {"checkpoint", "convert", "engine", "model", "methods", "parallel", "recipe", "data"},
    "windtunnel": {"training", "checkpoint", "engine", "model", "methods", "parallel", "recipe", "data"},
    "cli": {
        "windtunnel",
        "derive",
        "planning",
        "training",
        "checkpoint",
        "engine",
        "model",
        "methods",
        "parallel",
        "recipe",
        "data",
        "convert",
        "evaluation",
    },
}
MEGATRON = {"model", "parallel", "engine", "training", "data", "megatron_lm"}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*.py")])


def imported(source: str, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a source imports, `from a import b` as a.b; with `at_import` only those loaded when it is imported.

    Relative imports are not told apart from their room here; the tree has none (see the test).
    """
    tree = ast.parse(source)
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if at_import and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def faults(here: str, source: str) -> list[str]:
    """What a source in room `here` imports and may not."""
    found = []
    for module in imported(source):
        top, *rest = module.split(".")
        if not top:
            found.append(f"{module}: write the whole name")
        if top == "minicpm_megatron" and rest and rest[0] != here and rest[0] not in ALLOWED[here] | LEAVES:
            found.append(f"{here} may not import {rest[0]}")
        if top == "deepspeed" and here != "engine":
            found.append("only engine imports deepspeed")
        if top == "megatron" and here not in MEGATRON:
            found.append(f"{here} may not import megatron")
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) != "__init__"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_room_imports_only_what_lies_below_it(path):
    assert faults(room(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_reach_the_substrate_through_the_package(path):
    tops = {module.split(".")[0] for module in imported(path.read_text(encoding="utf-8"))}
    assert not tops & {"deepspeed", "megatron", "torch"}


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("recipe", "from minicpm_megatron import training"),
        ("recipe", "import minicpm_megatron.model.config"),
        ("data", "def f():\n    from minicpm_megatron.engine.engine import Engine"),
        ("convert", "from megatron.core import parallel_state"),
        ("checkpoint", "import deepspeed.comm"),
        ("methods", "from ..parallel import groups"),
        ("storage", "from minicpm_megatron.recipe import Recipe"),
        ("training", "from minicpm_megatron.windtunnel.cells import Cell"),
        ("windtunnel", "def f():\n    import deepspeed"),
        ("windtunnel", "from megatron.core import parallel_state"),
    ],
)
def test_the_check_sees_what_it_is_for(here, source):
    assert faults(here, source)


def test_every_room_is_known():
    assert {room(path) for path in FILES} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in ("data", "recipe")], ids=lambda p: p.stem)
def test_data_and_recipe_start_without_torch(path):
    loaded = imported(path.read_text(encoding="utf-8"), at_import=True)
    assert not [module for module in loaded if module.split(".")[0] in ("torch", "megatron", "deepspeed")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("minicpm_megatron", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.recipe", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.planning", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.data.preprocess", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.convert.operation", {"megatron", "deepspeed", "transformers"}),
        ("minicpm_megatron.derive.untie", {"megatron", "deepspeed", "transformers"}),
        ("minicpm_megatron.checkpoint.run_state", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.cli.train", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.methods", {"torch", "scipy"}),
        ("minicpm_megatron.engine.optimizers.adamw", {"torch", "megatron", "deepspeed"}),
        # published laws can be asked without what it takes to fit new ones
        ("minicpm_megatron.methods.scaling_law_bootstrap", {"torch", "scipy"}),
        ("minicpm_megatron.methods.batch_size_law", {"torch", "scipy"}),
    ],
)
def test_what_is_loaded_when_it_is_imported(module, absent):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & absent
