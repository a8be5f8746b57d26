"""The example plugin, installed for real into a folder of its own, works in a process that sees the folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from minicpm_megatron import registry
from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.recipe import OptimizerRecipe
from minicpm_megatron.registry import ATTENTION_KERNELS, DECAY_SHAPES, OPTIMIZERS, SCHEDULES
from tests.methods.contracts import check_decay_shape, check_schedule, recipe_of
from tests.model.attention_contract import check_attention_kernel

ROOT = Path(__file__).parents[2]
DRY_RUN = """
import sys
from minicpm_megatron.cli.dry_run import format_dry_run
from minicpm_megatron.cli.entry import run
from minicpm_megatron.recipe import load_recipe
run(lambda: print(format_dry_run(load_recipe(sys.argv[1], sys.argv[2:]), 1)))
"""
OVERRIDES = [
    "preset=my-wide-tiny",
    "schedule.decay_shape=square",
    "schedule.half_life=",
    "logging.observers=[metrics-jsonl, best-loss]",
    "training.objective=focal",
]

TOKENIZER = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from minicpm_megatron.convert import convert
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.text_bytes import TextBytes
from minicpm_megatron.data.tokenizers import load_tokenizer
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import random_tensors, small_model
from tests.data.conftest import write_jsonl
from tests.data.preprocess_helpers import run
from tests.data.test_tokenizer import HARD

here = Path(sys.argv[1])
(here / "bytes").mkdir()
(here / "bytes" / "bytes.json").write_text(json.dumps({"begin": "<s>", "end": "</s>"}))
tokenizer = load_tokenizer(here / "bytes")
for text in HARD:
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
documents = [text for text in HARD if text.strip() and chr(0) not in text]
metadata = run([write_jsonl(here / "texts.jsonl", documents)], here / "bytes", here / "tokens", workers=2)
assert metadata.tokens == metadata.text_bytes + 2 * len(documents) and metadata.vocab_size == 258
dataset, count = TokenDataset(here / "tokens", 1, 0), TextBytes(tokenizer).of_labels
assert sum(count(dataset, metadata, n) for n in range(dataset.samples_per_epoch)) == metadata.text_bytes

model = small_model(num_layers=2, vocab_size=258)
write_single(here / "ours", random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0, "tokens": 0})
done = convert(here / "ours", here / "out", "granite", tokenizer=here / "bytes")
assert done.notes == ("no tokenizer.model: llama.cpp's MiniCPM converter needs it",), done.notes
assert (here / "out" / "bytes.json").is_file()
theirs = AutoTokenizer.from_pretrained(here / "out")
for text in HARD:
    assert theirs.encode(text, add_special_tokens=False) == list(text.encode()), text
assert (theirs.bos_token_id, theirs.eos_token_id, theirs("a")["input_ids"]) == (256, 257, [256, 97])
convert(here / "out", here / "back", "megatron", tokenizer=here / "bytes")
ids = [Generator(here / name).encode("a text") for name in ("back", "out")]
assert ids[0] == ids[1] == [256, *b"a text"]
assert Generator(here / "back").decode(ids[0]) == "a text"
print("done")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin installed; built from a copy, because setuptools builds inside the source."""
    source = shutil.copytree(ROOT / "examples" / "my_plugin", tmp_path_factory.mktemp("source") / "my_plugin")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as this process finds it, for one test."""
    monkeypatch.syspath_prepend(str(site))
    for kind in (DECAY_SHAPES, SCHEDULES, OPTIMIZERS, ATTENTION_KERNELS):
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))


def test_every_group_is_declared() -> None:
    groups = {value.group for value in vars(registry).values() if isinstance(value, registry.Registry)}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert groups == set(re.findall(r'"(minicpm_megatron\.\w+)": \[\]', setup))
    plugin = tomllib.loads((ROOT / "examples" / "my_plugin" / "pyproject.toml").read_text(encoding="utf-8"))
    assert groups == set(plugin["project"]["entry-points"])


def dry_run(*paths: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    recipe = ROOT / "examples" / "recipes" / "quickstart.yaml"
    return subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(recipe), *OVERRIDES],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_preset_and_decay_shape_are_found(site: Path) -> None:
    done = dry_run(site)
    assert done.returncode == 0, done.stderr
    # 2 x (4 x 512^2 + 3 x 512 x 1280 + 2 x 512) + 512
    assert "6,031,872" in done.stdout
    assert "square decay over 75" in done.stdout
    # half-way through the decay: 1 - 0.9 / 4
    assert "0.775" in done.stdout
    assert "objective: focal" in done.stdout and "observers: [metrics-jsonl, best-loss]" in done.stdout


LOADED = """
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.recipe import OptimizerRecipe
from minicpm_megatron.registry import OBJECTIVES, OBSERVERS
for found in (OBSERVERS.get("best-loss"), OBJECTIVES.get("focal")):
    print(type(found(None)).__name__)
"""


def test_observer_and_objective_are_loaded_by_name(site: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))}
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["BestLoss", "Focal"], done.stderr


def test_without_the_plugin_both_names_are_unknown() -> None:
    done = dry_run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: override 'preset=my-wide-tiny': preset: unknown preset 'my-wide-tiny'")
    assert done.stderr.count("\n") == 1


def test_a_broken_plugin_is_one_line_that_names_it(site: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / "minicpm_my_plugin" / "decay.py").write_text("raise RuntimeError('not today')\n")
    done = dry_run(broken)
    assert done.returncode == 2
    assert "plugin minicpm-my-plugin cannot provide the decay shape 'square'" in done.stderr
    assert "RuntimeError: not today" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("installed")
def test_the_decay_shape_keeps_the_contract() -> None:
    assert "square" in DECAY_SHAPES.names()
    check_decay_shape("square")


@pytest.mark.usefixtures("installed")
def test_the_schedule_keeps_the_contract_and_its_formula() -> None:
    assert "my-step-decay" in SCHEDULES.names()
    check_schedule("my-step-decay")
    schedule = build_schedule(recipe_of("my-step-decay", options={"shares": [0.5, 0.75], "ratio": 0.5}))
    for step in range(1, 1001):
        expected = min(step / 100, 1.0) if step <= 500 else 0.5 if step <= 750 else 0.25
        assert schedule.factor(schedule.total * step / 1000) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.usefixtures("installed")
def test_the_optimizer_keeps_the_contract_and_its_formula() -> None:
    from tests.engine.test_optimizers import test_the_state_is_as_declared

    assert "lion" in OPTIMIZERS.names()
    test_the_state_is_as_declared("lion")
    recipe = OptimizerRecipe(lr=0.25, betas=(0.5, 0.75))
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = OPTIMIZERS.get("lion").build([{"params": [parameter], "lr": 0.25, "weight_decay": 0.5}], recipe, False)
    # by hand: the momentum is (1, -1), then (1.75, 0.25) of which a quarter is new
    for gradient, expected in (((4.0, -4.0), (0.625, 1.125)), ((4.0, 4.0), (0.296875, 0.734375))):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        assert parameter.tolist() == list(expected)
    assert optimizer.state[parameter]["momentum"].tolist() == [1.75, 0.25]


@pytest.mark.usefixtures("installed")
def test_the_attention_kernel_keeps_the_contract() -> None:
    assert "my-rows" in ATTENTION_KERNELS.names()
    check_attention_kernel("my-rows")


@pytest.mark.parametrize("name", ["docs/extending.md"])
def test_the_diffs_on_the_page_are_the_plugins(name: str) -> None:
    """Each block of added lines stands in the file that its diff names; a line of dots stands for lines left out."""
    page = (ROOT / name).read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n(.*?)^```", page, re.S | re.M)
    assert diffs
    for diff in diffs:
        for _, path, body in re.findall(r"^--- (.*)\n\+\+\+ b/(.*)\n((?:[-+@ ].*\n)+?)(?=--- |\Z)", diff, re.M):
            text = (ROOT / path).read_text(encoding="utf-8")
            for block in re.findall(r"^(?:\+(?! *\.\.\.$).*\n)+", body, re.M):
                added = "".join(f"{line[1:]}\n" for line in block.splitlines())
                assert added in text, f"{path}: {added}"


def test_the_contract_of_formats_holds_for_the_plugins(site: Path) -> None:
    """Round trip, table and stock transformers' logits: the tests run over whatever is registered."""
    tests = [str(ROOT / "tests" / "convert" / f"test_{name}.py") for name in ("round_trip", "mapping", "logits")]
    which = "mistral and (untied or powers or once)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", *tests, "-k", which],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    for test in ("unfolds", "come_back_in_every_bit", "stock_transformers_agrees", "in_the_table_once"):
        assert f"{test}[" in done.stdout, done.stdout


def test_the_tokenizer_of_the_plugin(site: Path, tmp_path: Path) -> None:
    """From text to an export whose tokenizer.json gives stock transformers the same ids."""
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZER, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
