"""The registry of formats: ours are its folder's files, others come from packages and cannot stand in for ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_megatron.convert import FORMATS, convert, recognise, targets
from minicpm_megatron.convert import formats as home
from minicpm_megatron.errors import UserError
from tests.convert.conftest import MakeCheckpoint
from tests.plugins import install_plugin

ROOT = Path(__file__).resolve().parents[2]
GROUP = "minicpm_megatron.formats"
# as a package would write it: a published format under another name, for programs that know it by that
RENAMED = """
import dataclasses
from minicpm_megatron.convert.formats import granite
FORMAT = dataclasses.replace(granite.FORMAT, name={name!r}, model_type={kind!r}, architecture="OtherForCausalLM")
"""


def folder_of(tmp_path: Path, **config: object) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_file_of_the_folder_is_a_format() -> None:
    files = {path.stem for path in Path(str(home.__file__)).parent.glob("*.py")} - {"__init__"}
    assert files == set(FORMATS) and all(FORMATS[name].name == name for name in files)


def test_the_documents_name_every_format() -> None:
    lists = [
        line.partition("--to ")[2].split()[0].split("|")
        for page in ("README.md", "docs/interop.md")
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if "--to minicpm|" in line
    ]
    assert len(lists) == 2 and all(set(names) == set(targets()) for names in lists)
    table = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8").partition("## Which format for what")[2]
    assert all(f"\n| `{name}` |" in table for name in targets())


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, minicpm_megatron.convert as c; print(c.targets()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(targets())


def test_a_format_of_a_package(checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RENAMED.format(name="renamed", kind="renamed-type")
    install_plugin(tmp_path, monkeypatch, "a_format", source, {GROUP: "renamed = a_format:FORMAT"})
    assert "renamed" in targets()
    convert(checkpoint(), tmp_path / "out", "renamed", dtype="fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "renamed-type"
    assert recognise(tmp_path / "out") == "renamed"
    assert convert(tmp_path / "out", tmp_path / "back", "megatron").source_format == "renamed"


@pytest.mark.parametrize("taken", ["granite", "megatron"])
def test_a_package_cannot_take_a_name_of_ours(
    taken: str, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = targets()
    source = RENAMED.format(name=taken, kind="a-type-of-theirs")
    install_plugin(tmp_path, monkeypatch, f"takes_{taken}", source, {GROUP: f"{taken} = takes_{taken}:FORMAT"})
    assert targets() == before
    convert(checkpoint(), tmp_path / "out", taken)
    assert recognise(tmp_path / "out") == taken


def test_a_folder_that_ours_explains_is_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RENAMED.format(name="a-second-llama", kind="llama").replace("OtherFor", "LlamaFor")
    install_plugin(tmp_path, monkeypatch, "second_llama", source, {GROUP: "a-second-llama = second_llama:FORMAT"})
    assert recognise(folder_of(tmp_path, model_type="llama")) == "llama"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("FORMAT = {}", "TypeError: an export format must be a Format, not dict"),
        (RENAMED.format(name="another", kind="x"), "ValueError: the export format calls itself 'another'"),
        (
            RENAMED.format(name="broken", kind="x") + "FORMAT = dataclasses.replace(FORMAT, rows=FORMAT.rows[1:])",
            "TypeError: an export format needs a table with rows for embedding and head",
        ),
    ],
)
def test_a_broken_package_is_named_and_disturbs_nobody(
    module: str, reason: str, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path, monkeypatch, "broken_format", module, {GROUP: "broken = broken_format:FORMAT"})
    monkeypatch.delitem(sys.modules, "broken_format", raising=False)
    named = f"plugin broken_format cannot provide the export format 'broken' (broken_format:FORMAT): {reason}"
    with pytest.raises(UserError) as caught:
        convert(checkpoint(), tmp_path / "out", "broken")
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert recognise(folder_of(tmp_path, model_type="llama")) == "llama"
    with pytest.raises(UserError, match="known are .*llama") as caught:
        recognise(folder_of(tmp_path, model_type="what-the-package-may-know"))
    assert named in str(caught.value) and "\n" not in str(caught.value)
