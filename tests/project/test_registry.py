"""Entries of other packages: found by name, loaded when asked for, and named when they are broken."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import PRESETS, build
from minicpm_megatron.registry import Registry
from tests.recipe.fields import minimal_fields


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a package with entry points importable, the way an installer lays it out."""

    def installed(package: str, module: str, entries: dict[str, str]) -> None:
        site = tmp_path / package
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        groups = "".join(f"[{group}]\n{line}\n" for group, line in entries.items())
        (info / "entry_points.txt").write_text(groups)
        (site / f"{package}.py").write_text(module)
        monkeypatch.syspath_prepend(str(site))

    return installed


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
        ("import not_there_at_all", "ModuleNotFoundError"),
        ("other = 1", "AttributeError"),
        ("size = 3", "TypeError: a preset must be a ModelRecipe, not int"),
        ("def size(): return {'num_layers': 2}", "TypeError: a preset must be a ModelRecipe, not dict"),
        ("def size(needed): return needed", "TypeError"),
        ("syntax error here", "SyntaxError"),
        ("import sys; sys.exit('not on this machine')", "SystemExit: not on this machine"),
    ],
)
def test_broken_preset_plugin_is_named_in_one_line(install, module: str, reason: str, request) -> None:
    package = f"broken_{zlib.crc32(request.node.name.encode())}"
    install(package, module, {"minicpm_megatron.presets": f"broken-size = {package}:size"})
    assert "broken-size" in PRESETS, "listing presets must not load them"
    with pytest.raises(UserError) as caught:
        build(minimal_fields(preset="broken-size"))
    line = str(caught.value)
    assert f"plugin {package} cannot provide the preset 'broken-size'" in line
    assert reason in line
    assert "\n" not in line


def test_two_packages_with_one_name(install) -> None:
    for package in ("first_owner", "second_owner"):
        install(package, "", {"minicpm_megatron.presets": f"twice = {package}:size"})
    with pytest.raises(UserError, match="'twice' is provided by first_owner and second_owner; uninstall all but one"):
        build(minimal_fields(preset="twice"))


def test_broken_plugins_do_not_disturb_others(install) -> None:
    install("noisy", "raise SystemExit(3)", {"minicpm_megatron.presets": "noisy-size = noisy:size"})
    assert build(minimal_fields()).preset == "minicpm-nano"


def test_a_broken_optimizer_does_not_disturb_a_mistyped_key(install) -> None:
    """The line looks through the options of all optimizers for the key."""
    install("broken_optimizer", "raise SystemExit(3)", {"minicpm_megatron.optimizers": "noisy = broken_optimizer:it"})
    with pytest.raises(UserError, match=r"unknown key optimizer.momentum; did you mean optimizer.options.momentum"):
        build(minimal_fields(optimizer={"momentum": 0.9}))
    with pytest.raises(UserError, match="unknown key optimizer.lerning_rate"):
        build(minimal_fields(optimizer={"lerning_rate": 0.9}))


def test_a_name_cannot_be_taken_twice() -> None:
    registry: Registry[int] = Registry("number", "tests.numbers")
    registry.add("one", 1)
    registry.add("two", 2)
    assert (registry.names(), registry.get("two")) == (["one", "two"], 2)
    with pytest.raises(ValueError, match="number 'one' is registered twice"):
        registry.add("one", 3)
    with pytest.raises(UserError, match="unknown number 'three'; known are one, two"):
        registry.get("three")


def test_a_folder_is_a_home_of_one_entry_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home_of_numbers" / "numbers"
    home.mkdir(parents=True)
    (home.parent / "__init__.py").touch()
    (home / "__init__.py").touch()
    (home / "twenty_one.py").write_text("NUMBER = 21")
    (home / "broken.py").write_text("raise RuntimeError('read without being asked for')")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[int] = Registry("number", "tests.numbers", home="home_of_numbers.numbers", attribute="NUMBER")
    assert (registry.names(), registry.get("twenty-one")) == (["broken", "twenty-one"], 21)
    with pytest.raises(UserError, match="unknown number 'twenty-two'; did you mean twenty-one"):
        registry.check("twenty-two", where="here")
