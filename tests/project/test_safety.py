"""Nothing untrusted is executed: the tree is read for every call that could."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for part in ("minicpm_megatron", "tools", "examples") for path in (ROOT / part).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
    """What in a source could run code that came with data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS or name.startswith("pickle."):
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in ("yaml.load", "yaml.load_all") and "Safe" not in ast.unparse(node):
                found.append(name)
            if name.startswith("yaml.unsafe") or name.startswith("yaml.full"):
                found.append(name)
            if keywords.get("trust_remote_code") == "True" or keywords.get("shell") == "True":
                found.append(f"{name} with trust_remote_code or shell")
            if name.endswith("np.load") and keywords.get("allow_pickle") == "True":
                found.append("np.load with allow_pickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_what_it_reads(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval('1')",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
    ],
)
def test_the_check_sees_what_it_is_for(source):
    assert offences(source)
