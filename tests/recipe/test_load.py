"""Reading recipes: every mistake is one line that names the key, where it stands and what was meant."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpm_megatron.cli import entry
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build, build_saved, build_section, dump_recipe, load_recipe
from minicpm_megatron.recipe.load import known_keys
from minicpm_megatron.recipe.yaml_text import parse
from tests.recipe.fields import minimal_fields

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
MISTYPES = {
    "dropped": lambda key: key[:-1],
    "doubled": lambda key: key + key[-1],
    "swapped": lambda key: key[1] + key[0] + key[2:],
    "capitals": str.upper,
    "replaced": lambda key: key[:1] + "q" + key[2:],
}


def keys_of(fields: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every key that the schema owns (names of validation sets are the user's)."""
    items = fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    for key, value in items:
        if isinstance(key, str):
            yield (*path, key)
        if (*path, key) != ("data", "validation"):
            yield from keys_of(value, (*path, key))


def every_key(fields: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every key that a recipe can have."""
    full = yaml.safe_load(dump_recipe(build(fields)))
    full["training"]["batch_growth"] = [
        {"after_tokens": 10**6, "global_batch_size": 2 * full["training"]["global_batch_size"]}
    ]
    full["data"]["curriculum"] = [{"until": 10, "sequence_length": full["data"]["sequence_length"] // 2}]
    return full


@pytest.mark.parametrize("style", MISTYPES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_every_recipe_mistyped(path: Path, style: str) -> None:
    written = parse(path.read_text(), source=path.name).value | {"name": path.stem}
    fields = every_key(load_recipe(path).model_dump(mode="json")) if path.stem == "quickstart" else written
    build(fields)
    for keys in keys_of(fields):
        broken = copy.deepcopy(fields)
        section = broken
        for key in keys[:-1]:
            section = section[key]
        typo = MISTYPES[style](keys[-1])
        if typo == keys[-1]:
            continue
        section[typo] = section.pop(keys[-1])
        prefix = "".join(f"{key}." for key in keys[:-1])
        with pytest.raises(UserError) as caught:
            build(broken)
        assert f"unknown key {prefix}{typo};" in str(caught.value)
        assert str(caught.value).endswith(f"did you mean {prefix}{keys[-1]}?")


def test_the_typo_test_meets_every_key_there_is() -> None:
    fields = every_key(load_recipe(RECIPES[0].with_name("quickstart.yaml")).model_dump(mode="json"))
    met = {".".join("*" if isinstance(key, int) else key for key in keys) for keys in keys_of(fields)}
    assert set(known_keys()) <= met


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.seed=yes", "training.seed: 'yes' is refused, it must be a whole number"),
        ("training.seed=1.5", "training.seed: 1.5 is refused"),
        ("training.seed=true", "training.seed: True is refused"),
        ("training.seed='7'", "training.seed: '7' is refused"),
        ("training.seed=-1", "training.seed: -1 is refused, it must be greater than or equal to 0"),
        ("logging.tensorboard=yes", "logging.tensorboard: 'yes' is refused, it must be true or false"),
        ("logging.tensorboard=1", "logging.tensorboard: 1 is refused"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is refused"),
        ("optimizer.lr=.inf", "optimizer.lr: inf is refused"),
        ("optimizer.lr=0", "optimizer.lr: 0 is refused, it must be greater than 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: 1.0 is refused, it must be less than 1"),
        ("training.precision=fp16", "training.precision: 'fp16' is refused, it must be 'fp32' or 'bf16'"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage: 4 is refused, it must be less than or equal to 3"),
        ("schedule.total=1.5", "schedule.total: 1.5 is refused"),
        ("data.train=[]", "data.train: [] is refused, it must have 1 entries or more"),
        ("data.train=corpus", "data.train: 'corpus' is refused, it must be a list"),
        ("data.train.0.weight=0", "data.train.0.weight: 0 is refused"),
        ("data.sequence_length=", "data.sequence_length: None is refused"),
        ("data=", "data: missing"),
        ("model=big", "model: 'big' is refused, it must be a mapping"),
        ("name=../elsewhere", "name: '../elsewhere' is refused, it must begin with a letter or digit"),
        ("run.directory=7", "run.directory: 7 is refused, it must be text"),
        ("run.directory=''", "run.directory: '' is refused, it must not be empty"),
        ('run.directory="\\ud800"', "is refused, it must be text that UTF-8 has bytes for"),
        ('run.directory="a\\0b"', "run.directory: 'a\\x00b' is refused, it must not contain the character NUL"),
        ('data.train.0.prefix="\\0"', "data.train.0.prefix: '\\x00' is refused, it must not contain"),
        ('data.validation={a: "\\0"}', "data.validation.a: '\\x00' is refused, it must not contain"),
        ("data.validation={a b: x}", "data.validation.a b: 'a b' is refused, it must begin with a letter or digit"),
        ("data.validation=[x]", "data.validation: ['x'] is refused, it must be a mapping"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "is refused, it must have 2 entries or fewer"),
        ("optimizer.lr=1e999", "optimizer.lr: inf is refused, it must be finite"),
        (
            "training.hang_timeout=1e300",
            "hang_timeout: 1e+300 is refused, it must be less than or equal to 1,000,000,000",
        ),
        ("training.global_batch_size=9000000000000000000", "it must be less than or equal to 2,147,483,647"),
        ("model.vocab_size=9000000000000000000", "it must be less than or equal to 2,147,483,647"),
        ("faults.spike_window=9000000000000000000", "it must be less than or equal to 2,147,483,647"),
        (f"schedule.total={10**40}", "it must be less than or equal to 9,007,199,254,740,992"),
        ("schedule.total=1e40", "it must be less than or equal to 9,007,199,254,740,992"),
        ("preset=minicpm-nanno", "unknown preset 'minicpm-nanno'; did you mean minicpm-nano?"),
        ("preset=MiniCPM-NANO", "unknown preset 'MiniCPM-NANO'; did you mean minicpm-nano?"),
        ("preset=3", "preset: 3 is refused"),
        ("lr=0.1", "unknown key lr; did you mean optimizer.lr?"),
        ("LR=0.1", "unknown key LR; did you mean optimizer.lr?"),
        ("schedule.exponent=0.5", "did you mean schedule.options.exponent, of schedule.shape=power?"),
        ("optimizer.ns_steps=6", "did you mean optimizer.options.ns_steps, of optimizer.name=muon?"),
        ("TRAINING.SEED=7", "unknown key TRAINING; did you mean training?"),
        ("xyzzy.plugh=1", "unknown key xyzzy; known here are name, preset, model"),
        ("seed", "not of the form section.key=value"),
        ("training..seed=1", "not of the form section.key=value"),
        ("data.train.1.prefix=x", "data.train is a list of 1, without an entry 1"),
        ("name.first=x", "name is a single value"),
        ("training.seed=[1", "not valid YAML"),
    ],
)
def test_bad_override_is_one_line_that_names_it(tmp_path: Path, override: str, line: str) -> None:
    path = tmp_path / "nano.yaml"
    path.write_text(yaml.safe_dump(minimal_fields()))
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert line in str(caught.value)
    assert f"override {override!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistake_in_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "nano.yaml"
    path.write_text("preset: minicpm-nano\ndata:\n  train: [{prefix: a}]\n  sequence_lenght: 64\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:4: unknown key data.sequence_lenght; did you mean data.sequence_length?"


def test_the_command_line_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.run(lambda: load_recipe(tmp_path / "none.yaml") and None)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/none.yaml: cannot read the recipe: No such file or directory\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xfe", "not UTF-8 text"),
        (b"- a\n", "not a mapping of sections"),
        (b"", "not a mapping of sections"),
        (b"name: x\n", "missing"),
    ],
)
def test_unfit_files(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=line):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path)


def test_overrides_are_typed_merged_and_applied_in_order(tmp_path: Path) -> None:
    path = tmp_path / "named-by-file.yaml"
    fields = minimal_fields()
    del fields["name"], fields["parallel"]
    path.write_text(yaml.safe_dump(fields))
    recipe = load_recipe(
        path,
        [
            "data.train=[{prefix: a}, {prefix: b, weight: 2}]",
            "data.train.1.prefix=c",
            "data.validation.en=held/out",
            "model.num_layers=3",
            "optimizer.lr=2e-3",
            "training.seed=1",
            "training.seed=2",
            "schedule.total=1e3",
            "parallel.tensor_model_parallel_size=2",
            "training.stop_after=",
        ],
    )
    assert recipe.name == "named-by-file"
    assert [(source.prefix, source.weight) for source in recipe.data.train] == [("a", 1.0), ("c", 2.0)]
    assert recipe.data.validation == {"en": "held/out"}
    assert (recipe.model.num_layers, recipe.model.hidden_size) == (3, 64)
    assert (recipe.optimizer.lr, recipe.training.seed, recipe.schedule.total) == (0.002, 2, 1000)
    assert recipe.parallel.tensor_model_parallel_size == 2
    assert recipe.training.stop_after is None


def test_model_without_preset_needs_its_sizes() -> None:
    fields = minimal_fields(preset=None)
    with pytest.raises(UserError, match=r"model.num_layers: missing.*give it, or a preset"):
        build(fields)


def test_one_section_from_plain_values() -> None:
    shape = {"num_layers": 2, "hidden_size": 96, "ffn_hidden_size": 240, "num_attention_heads": 4, "vocab_size": 100}
    model = build_section(ModelRecipe, shape, where="manifest.json")
    assert (model.kv_channels, model.num_query_groups) == (24, 4)
    with pytest.raises(UserError, match="manifest.json: unknown key num_layer; did you mean num_layers"):
        build_section(ModelRecipe, {"num_layer": 2}, where="manifest.json")
    with pytest.raises(UserError, match="manifest.json: vocab_size: missing"):
        build_section(ModelRecipe, {k: v for k, v in shape.items() if k != "vocab_size"}, where="manifest.json")


def test_recipes_are_read_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from minicpm_megatron.recipe import load_recipe; load_recipe(sys.argv[1]);"
        "print(sorted({'torch', 'megatron', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES[0])], capture_output=True, text=True, cwd=RECIPES[0].parents[2]
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("saved", "kept"), [(0.5, 1.0), (1e10, 1e9), (30.0, 30.0)])
def test_a_run_from_before_hang_timeout_had_bounds_can_be_read(saved: float, kept: float) -> None:
    fields = build(minimal_fields()).model_dump(mode="json")
    fields["training"]["hang_timeout"] = saved
    assert build_saved(fields).training.hang_timeout == kept
    assert fields["training"]["hang_timeout"] == saved
