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
LEAVES = {"errors", "versions", "storage"}
# room -> rooms it may import besides itself and the leaves
ALLOWED = {
    "errors": set(),
    "versions": set(),
    "storage": set(),
    "recipe": set(),
    "methods": {"recipe"},
    "data": {"recipe"},
    "parallel": {"recipe"},
    "model": {"methods", "parallel", "recipe"},
    "engine": {"model", "methods", "parallel", "recipe"},
    "checkpoint": {"engine", "model", "methods", "parallel", "recipe"},
    "convert": {"methods", "recipe"},
    "training": {"checkpoint", "engine", "model", "methods", "parallel", "recipe", "data"},
    "cli": {"training", "checkpoint", "engine", "model", "methods", "parallel", "recipe", "data", "convert"},
}
MEGATRON = {"model", "parallel", "engine", "training", "data"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a file imports; with `at_import` only those loaded when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below_it(path):
    here = room(path)
    if here == "__init__":
        return
    for module in imported(path):
        top, *rest = module.split(".")
        if top == "minicpm_megatron" and rest and rest[0] != here:
            assert rest[0] in ALLOWED[here] | LEAVES, f"{path}: {here} may not import {rest[0]}"
        if top == "deepspeed":
            assert here == "engine", f"{path}: only engine imports deepspeed"
        if top == "megatron":
            assert here in MEGATRON, f"{path}: {here} may not import megatron"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in ("data", "recipe")], ids=lambda p: p.stem)
def test_data_and_recipe_start_without_torch(path):
    assert not [module for module in imported(path, at_import=True) if module.split(".")[0] in ("torch", "megatron")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("minicpm_megatron", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.recipe", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.data.preprocess", {"torch", "megatron", "deepspeed"}),
        ("minicpm_megatron.convert", {"megatron", "deepspeed", "transformers"}),
        ("minicpm_megatron.cli.train", {"torch", "megatron", "deepspeed"}),
    ],
)
def test_what_is_loaded_when_it_is_imported(module, absent):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & absent
