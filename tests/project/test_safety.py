"""Nothing untrusted is executed: the tree is read for every call that could."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for part in ("minicpm_megatron", "tools", "examples") for path in (ROOT / part).rglob("*.py"))
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "runpy.run_path"}
YAML_LOADERS = {"yaml.load", "yaml.load_all"}
UNSAFE_YAML = {f"yaml.{name}" for name in ("Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader")}


def full_names(tree: ast.AST) -> dict[str, str]:
    """Name in the source -> what it stands for, so that `import yaml as y` hides nothing."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """What an expression names, aliases resolved."""
    head, dot, rest = ast.unparse(node).partition(".")
    return (names.get(head, head) + dot + rest).removeprefix("builtins.")


def offences(source: str) -> list[str]:
    """What in a source could run code that came with data."""
    tree = ast.parse(source)
    names, found = full_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute | ast.Name) and full_name(node, names) in UNSAFE_YAML:
            found.append(full_name(node, names))
        elif isinstance(node, ast.Call):
            name = full_name(node.func, names)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS or name.endswith("read_pickle"):
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in YAML_LOADERS and not keywords.get("Loader", "").endswith("SafeLoader"):
                found.append(name)
            if name.startswith(("yaml.unsafe_", "yaml.full_")):
                found.append(name)
            for option in ("trust_remote_code", "shell", "allow_pickle"):
                if keywords.get(option, "False") != "False":
                    found.append(f"{name} with {option}")
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
        "AutoModel.from_pretrained(f, trust_remote_code=flag)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f, weights_only=0)",
        "import yaml as y\ny.load(f, y.UnsafeLoader)",
        "from yaml import unsafe_load as read\nread(f)",
        "import builtins\nbuiltins.exec('1')",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "subprocess.run(f, shell=True)",
        "import _pickle",
        "class Mine(yaml.Loader): pass",
        "from yaml import FullLoader\nclass Mine(FullLoader): pass",
    ],
)
def test_the_check_sees_what_it_is_for(source):
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(f)",
        "import re\nre.compile('a')",
        "model.eval()",
        "AutoTokenizer.from_pretrained(f, trust_remote_code=False)",
        "subprocess.run(['ls'])",
    ],
)
def test_the_check_lets_the_rest_pass(source):
    assert offences(source) == []
