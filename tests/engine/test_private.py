"""Every name inside DeepSpeed that the engine relies on is in the table, and in the installed version."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicpm_megatron.engine.private import PRIVATE, Private, private_names

ENGINE = Path(inspect.getfile(Private)).parent
SOURCES = sorted(ENGINE.rglob("*.py"))
# of torch's optimizers, which DeepSpeed's have, too
PUBLIC = {"param_groups", "state", "step", "zero_grad"}
OTHERS = {"_foreach_mul_", "_foreach_norm"}  # torch's


def _attributes(source: str, *, of_self: bool) -> Iterator[str]:
    """Attributes that a source uses, or `of_self`, sets on self."""
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
            if own or not of_self:
                yield node.attr


def missing(row: Private) -> list[str]:
    """Names of a row that the installed version has no longer."""
    module_name, _, class_name = row.place.partition(":")
    try:
        module = importlib.import_module(module_name)
        place = getattr(module, class_name) if class_name else module
    except (ImportError, AttributeError) as error:
        return [f"{row.place}: {error}"]
    known: set[str] = set(getattr(place, "__annotations__", ()))
    for each in place.__mro__[:-1] if class_name else [place]:
        if inspect.getmodule(each).__name__.startswith("deepspeed"):
            known |= set(_attributes(inspect.getsource(each), of_self=bool(class_name)))
    return [
        f"{row.place} has no {name} any more ({row.used})"
        for name in row.names
        if not hasattr(place, name) and name not in known
    ]


@pytest.mark.parametrize("row", PRIVATE, ids=lambda row: f"{row.place}-{row.names[0]}")
def test_the_installed_version_has_it(row: Private) -> None:
    assert missing(row) == []


def test_the_check_sees_a_name_that_is_gone() -> None:
    for place in ("deepspeed.runtime.engine:DeepSpeedEngine", "deepspeed.utils.groups", "deepspeed.nowhere"):
        assert missing(Private(place, ("micro_stepz",), "here", "", ""))


def _uses(source: str) -> Iterator[tuple[str, str]]:
    """(expression, attribute of it) wherever a source uses one, by a dot or by getattr with a constant."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            yield ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")


def private_in(source: str, ours: set[str]) -> set[str]:
    """Attributes of others that a source uses and that look private, or are taken from DeepSpeed's optimizer."""
    found = set()
    for owner, name in _uses(source):
        hidden = name.startswith(("_", "ds_")) and not name.endswith("__")
        optimizer = owner.endswith("optimizer") and not owner.endswith("recipe.optimizer")
        if (hidden or optimizer) and name not in ours | PUBLIC | OTHERS:
            found.add(name)
    return found


def _defined(source: str) -> set[str]:
    """What the source's own classes and functions are called and hold."""
    tree = ast.parse(source)
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = (each for each in node.body if isinstance(each, ast.Assign | ast.AnnAssign))
            names |= {name.id for each in fields for name in ast.walk(each) if isinstance(name, ast.Name)}
    return names | set(_attributes(source, of_self=True))


def test_the_engine_uses_no_other() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    ours = set().union(*map(_defined, texts)) - private_names()
    used = set().union(*(private_in(text, ours) for text in texts))
    assert used - private_names() == set()
    # by name alone: what a subclass of DeepSpeed's has on self, and what an object of DeepSpeed's hands out
    mentioned = {name for text in texts for _, name in _uses(text)}.union(*map(_defined, texts))
    classes = {"DeepSpeedZeroOptimizer", "FP16_UnfusedOptimizer"}
    assert private_names() - mentioned - classes == set(), "rows that nothing uses"


def test_it_sees_what_it_is_for() -> None:
    source = "def f(self, p):\n    self.optimizer.flat\n    p._hp\n    p.ds_shape\n    self._mine\n    optimizer.groups"
    source += "\n    getattr(p, '_padding', 0)"
    assert private_in(source, {"_mine"}) == {"flat", "_hp", "ds_shape", "groups", "_padding"}


def test_nothing_of_deepspeed_is_probed_or_turned_into_another_class() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "hasattr(" not in text and "__class__" not in text, path
