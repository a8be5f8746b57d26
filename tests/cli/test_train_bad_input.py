"""examples/train.py with input that is wrong: one line that says what, where and what to do, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.cli.train import main
from minicpm_megatron.errors import UserError
from tests.training.nano import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def _truncate(folder: Path) -> list[str]:
    path = folder / "data" / "train.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    return []


def _garbage_index(folder: Path) -> list[str]:
    (folder / "data" / "train.idx").write_bytes(b"not an index")
    (folder / "data" / "train.json").unlink()
    return []


def _no_index(folder: Path) -> list[str]:
    (folder / "data" / "train.idx").unlink()
    return []


def _other_tokenizer(folder: Path) -> list[str]:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"another model")
    return [f"data.tokenizer={folder / 'tokenizer'}"]


def _no_folder(folder: Path) -> list[str]:
    (folder / "a-file").write_text("x")
    return [f"run.directory={folder / 'a-file'}"]


def _bad_deepspeed(folder: Path) -> list[str]:
    (folder / "ds.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    return [f"deepspeed.config={folder / 'ds.json'}"]


def _deepspeed(content: bytes) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "ds.json").write_bytes(content)
        return [f"deepspeed.config={folder / 'ds.json'}"]

    return write


def _foreign_json(folder: Path) -> list[str]:
    (folder / "data" / "train.json").write_text("[]")
    return []


def _recipe(content: str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "recipe.yaml").write_text(content)
        return []

    return write


CASES: dict[str, tuple[list[str] | Callable[[Path], list[str]], str]] = {
    "mistyped key": (["training.micro_batchsize=2"], "did you mean training.micro_batch_size?"),
    "wrong type": (["training.micro_batch_size=two"], "training.micro_batch_size"),
    "no such preset": (["preset=minicpm-huge"], "minicpm-huge"),
    "heads that TP does not divide": (["parallel.tensor_model_parallel_size=3"], "parallel.tensor_model_parallel_size"),
    "TP on too few ranks": (["parallel.tensor_model_parallel_size=2"], "rank"),
    "a pipeline on too few ranks": (["parallel.pipeline_model_parallel_size=2"], "1 ranks do not divide"),
    "more stages than layers": (["parallel.pipeline_model_parallel_size=3"], "3 stages are more than the 2 layers"),
    "stages that do not add up": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layers=[2, 2]"],
        "[2, 2] are 4 layers on 2 stages, and the model has 2 on 2",
    ),
    "a pipeline with ZeRO 3": (
        ["parallel.pipeline_model_parallel_size=2", "deepspeed.zero_stage=3"],
        "a pipeline cannot run with ZeRO 3",
    ),
    "context parallelism in a pipeline": (
        ["parallel.context_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        "DeepSpeed's pipeline has no place for context-parallel ranks",
    ),
    "sequences that context parallelism does not divide": (
        ["parallel.context_parallel_size=2", "data.sequence_length=30"],
        "30 tokens do not divide over 2 context-parallel ranks",
    ),
    "heads that Ulysses does not divide": (
        ["parallel.context_parallel_size=8", "parallel.cp_comm_type=a2a"],
        "parallel.cp_comm_type: Ulysses divides the 4 heads",
    ),
    "expert parallelism, not yet trainable": (["parallel.expert_model_parallel_size=2"], "expert_model_parallel_size"),
    "vocabulary smaller than the data's": (["model.vocab_size=300"], "train.bin: made for a vocabulary of 512"),
    "no such data": (["data.train=[{prefix: nowhere/at-all}]"], "nowhere/at-all"),
    "samples longer than the model": (["data.sequence_length=4096"], "data.sequence_length"),
    "samples longer than the data": (
        ["data.sequence_length=30000", "model.max_position_embeddings=30000"],
        "fewer than one sample",
    ),
    "another tokenizer": (_other_tokenizer, "made with another tokenizer"),
    "truncated .bin": (_truncate, "train.bin"),
    "garbage .idx": (_garbage_index, "train.idx"),
    "missing .idx": (_no_index, "train.idx"),
    "a file where runs go": (_no_folder, "cannot write checkpoints"),
    "a scheduler in the DeepSpeed JSON": (_bad_deepspeed, "a 'scheduler' block is not accepted"),
    "an unreadable DeepSpeed JSON": (["deepspeed.config=nowhere.json"], "nowhere.json"),
    "a DeepSpeed JSON that is none": (_deepspeed(b"\xff\xfe{"), "ds.json: not valid JSON"),
    "a DeepSpeed JSON cut off": (_deepspeed(b'{"zero_optimization": {'), "ds.json: not valid JSON"),
    "a DeepSpeed JSON without keys": (_deepspeed(b"[]"), "ds.json: the DeepSpeed JSON is not an object"),
    "a DeepSpeed JSON of another stage": (_deepspeed(b'{"zero_optimization": {"stage": 3}}'), "deepspeed.zero_stage"),
    "a DeepSpeed JSON of another batch": (_deepspeed(b'{"train_batch_size": 7}'), "training.global_batch_size"),
    "a tokenizer that is not there": (["data.tokenizer=nowhere"], "nowhere: no such tokenizer"),
    "a train.json that is not ours": (_foreign_json, "train.json: not of the form"),
    "a batch that does not divide": (["training.micro_batch_size=3"], "training.micro_batch_size 3"),
    "a schedule longer than the run": (["schedule.warmup=1000"], "schedule"),
    "a weight that is none": (["data.train.0.weight=-1"], "data.train.0.weight"),
    "a recipe that is no YAML": (_recipe("a: [1"), "recipe.yaml"),
    "a recipe that would run code": (_recipe("name: !!python/object/apply:os.getcwd []"), "recipe.yaml"),
    "an empty recipe": (_recipe(""), "recipe.yaml"),
    "a branch of nothing": (["--from", "nothing@3"], "no run 'nothing' with checkpoints"),
    "a reference that is none": (["--from", "nothing"], "not of the form RUN@STEP"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_line(case, tmp_path):
    recipe = write_recipe(tmp_path)
    changes, message = CASES[case]
    arguments = changes(tmp_path) if callable(changes) else changes
    with pytest.raises(UserError) as refusal:
        main(["--recipe", str(recipe), *arguments])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] if (tmp_path / "runs").exists() else []
    assert not [path for path in left if path.name != ".lock"]


# a dry run makes no folder, and does not look whether it could
@pytest.mark.parametrize("case", [case for case in CASES if case != "a file where runs go"])
def test_a_dry_run_refuses_what_the_start_refuses(case, tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    changes, message = CASES[case]
    arguments = changes(tmp_path) if callable(changes) else changes
    with pytest.raises(UserError) as refusal:
        main(["--recipe", str(recipe), "--dry-run", "--world-size", "1", *arguments])
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_it_read(tmp_path, capsys):
    (tmp_path / "ds.json").write_text('{"wall_clock_breakdown": false}')
    recipe = write_recipe(tmp_path)
    assert main(["--recipe", str(recipe), "--dry-run", f"deepspeed.config={tmp_path / 'ds.json'}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "the data are there: " in last and last.endswith(f"{tmp_path / 'ds.json'} agrees with the recipe")


def test_a_decay_that_hardly_decays_says_so_at_start_and_in_a_dry_run(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    decay = ["schedule={total: 40, warmup: 2, decay: 20, half_life: 15}", "training.stop_after=1"]
    note = "note: the decay ends at 0.397 of the learning rate: 20 steps are 1.3 half-lives of 15"
    main(["--recipe", str(recipe), "--dry-run", *decay])
    assert note in capsys.readouterr().out
    # what is refused at the start, so that nothing has to be trained
    with pytest.raises(UserError):
        main(["--recipe", str(recipe), "data.train=[{prefix: nowhere}]", *decay])
    assert note in capsys.readouterr().out


def test_a_missing_recipe_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        main(["--recipe", "nowhere.yaml"])


def test_the_command_prints_it_and_exits_2(tmp_path):
    recipe = write_recipe(tmp_path)
    done = subprocess.run(
        [sys.executable, "examples/train.py", "--recipe", str(recipe), "model.vocab_size=300"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] != []
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
