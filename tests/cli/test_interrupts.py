"""Ctrl-C while a command imports its libraries: one line. The signal comes from the import itself, not from a clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import ROOT
from tests.recipe.fields import minimal_fields

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tools").glob("*.py"))
# Python imports sitecustomize at its start: this one sends SIGINT when a module is looked for
INTERRUPTING = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


def interrupted(at: str, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(INTERRUPTING)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"INTERRUPT_AT": at, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("script", [*SCRIPTS, Path("examples/train.py")], ids=lambda script: script.stem)
def test_a_command_that_is_interrupted_at_its_start_says_one_line(script: Path, tmp_path: Path) -> None:
    done = interrupted("minicpm_megatron.errors", tmp_path, script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("words", [[], ["generate"]], ids=["minicpm", "minicpm generate"])
def test_so_does_the_front_door(words: list[str], tmp_path: Path) -> None:
    done = interrupted("minicpm_megatron.errors", tmp_path, "-m", "minicpm_megatron", *words)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "words",
    [
        "convert --input nowhere --to llama --output out",
        "convert --input nowhere --to megatron --untie --output out",
        "evaluate-positions --checkpoint nowhere --data nothing --length 8 --output out",
        "evaluate-retrieval --checkpoint nowhere --set nothing --output out",
        "generate --checkpoint nowhere --prompt text",
        "info",
        "upcycle --input nowhere --output out",
    ],
)
def test_so_does_a_command_that_loads_torch_once_its_arguments_are_read(words: str, tmp_path: Path) -> None:
    done = interrupted("torch", tmp_path, "-m", "minicpm_megatron", *words.split())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_so_does_training_before_its_slow_imports(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(minimal_fields()))
    # swallowed as KeyboardInterrupt by whoever tries an optional import, this one would come to nothing
    done = interrupted("torch.distributed", tmp_path, "examples/train.py", "--recipe", recipe)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_script_that_imports_our_code_keeps_its_own_way_with_signals() -> None:
    code = "import signal; before = signal.getsignal(signal.SIGINT); from minicpm_megatron.cli import entry, train"
    code += "; assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
