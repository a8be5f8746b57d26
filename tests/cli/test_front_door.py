"""`minicpm`: every command under one name, and the scripts that are the same."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from minicpm_megatron import __main__, __version__
from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.main import COMMANDS, main
from minicpm_megatron.cli.windtunnel.main import SUBCOMMANDS
from tests.cli.commands import ROOT, command

SLOW = ("torch", "deepspeed", "megatron", "transformers", "matplotlib", "scipy", "optuna")
HELP = f"""
import contextlib, io, sys
from minicpm_megatron.cli.main import main
for words in {[[], *([name] for name in COMMANDS), *(["windtunnel", name] for name in SUBCOMMANDS)]}:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert said.getvalue().startswith(" ".join(["usage: minicpm", *words])), words
    loaded = [name for name in {SLOW} if name in sys.modules]
    assert not loaded, (words, loaded)
"""


def minicpm(*words: str) -> int:
    """Exit status of the command, run in this process as its entry point runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["minicpm", *words])
        with pytest.raises(SystemExit) as ended:
            run(main)
    return int(ended.value.code or 0)


def test_no_help_loads_what_takes_seconds() -> None:
    subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, check=True, timeout=120)


def test_every_script_is_a_command_of_the_same_code() -> None:
    scripts = {each.script: each.module for each in COMMANDS.values() if each.script}
    assert set(scripts) == {
        "examples/train.py",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py")),
    }
    for script, module in scripts.items():
        found = runpy.run_path(str(ROOT / script), run_name="imported")["main"]
        assert found is import_module(f"minicpm_megatron.cli.{module}").main


def test_its_help_lists_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert minicpm() == 0
    said = capsys.readouterr().out
    assert minicpm("--help") == 0
    assert capsys.readouterr().out == said
    listed = re.findall(r"^  ([a-z][a-z-]+)  +(\S.*)$", said, re.M)
    assert listed == [(name, each.summary) for name, each in COMMANDS.items()]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("generat",), "minicpm: no command 'generat'; did you mean generate?"),
        (("Train", "--recipe", "R.yaml"), "minicpm: no command 'Train'; did you mean train?"),
        (("convert_checkpoint",), "minicpm: no command 'convert_checkpoint'; did you mean convert?"),
        (("preprocess_data.py",), "minicpm: no command 'preprocess_data.py'; did you mean preprocess?"),
        (("build_retrieval_set",), "minicpm: no command 'build_retrieval_set'; did you mean build-retrieval-set?"),
        (("qqq",), "minicpm: no command 'qqq'; minicpm --help lists all"),
        (("--no-such-option",), "minicpm: unrecognized arguments: --no-such-option; --help says more"),
        (("plan", "--no-such-option"), "minicpm plan: the following arguments are required: --gpu, --gpus"),
        (("windtunnel", "lr"), "minicpm windtunnel lr: the following arguments are required: --recipe"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert minicpm(*words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {line}") and said.err.count("\n") == 1


def test_the_deepspeed_launcher_may_start_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed 0.19 runs `python -m minicpm_megatron --local_rank=0 train ...`."""
    assert minicpm("--local_rank=0", "train", "--recipe", str(tmp_path / "none.yaml")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.yaml: cannot read the recipe")


def test_a_command_and_its_script_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--recipe", str(ROOT / "examples/recipes/minicpm-1.2b.yaml"), "--gpu", "h100", "--gpus", "1")
    assert command("plan.py", *words) == 0
    said = capsys.readouterr().out
    assert minicpm("plan", *words) == 0
    assert capsys.readouterr().out == said != ""


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minicpm_megatron", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"minicpm_megatron {__version__}\n", "")


def test_the_installed_command_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, list[str]]] = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    assert found["entry_points"]["console_scripts"] == ["minicpm = minicpm_megatron.__main__:script"]
    assert callable(__main__.script)


def test_info_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert minicpm("info") == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["minicpm_megatron"] == __version__ and {"torch", "deepspeed", "megatron-core", "machine"} <= said.keys()


def test_the_wind_tunnel_starts_a_file_that_trains() -> None:
    from minicpm_megatron.cli.train import main as train
    from minicpm_megatron.cli.windtunnel.main import TRAINER

    assert runpy.run_path(str(TRAINER), run_name="imported")["main"] is train
    # Python puts a script's folder first on its path, where no other file of ours may be found as a module
    assert [path.name for path in sorted(Path(TRAINER).parent.glob("*.py"))] == ["__init__.py", "train.py"]
