"""Runs that were moved or copied, data under another path, and runs that begin with a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.data.metadata import data_fingerprint
from minicpm_megatron.derive.upcycle import upcycle
from minicpm_megatron.methods.upcycling import Upcycling
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.storage.checksum import file_sha256
from minicpm_megatron.storage.manifest import read_manifest
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano
from tests.training.text_run import write_text_recipe

# of a model that somebody else has released
SETTINGS = {"do_sample": False, "top_k": 20, "bos_token_id": 1, "eos_token_id": [2, 5, 7]}
TOKENS = {"bos_token_id": 1, "eos_token_id": [2, 5]}


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` after what rank 0 does to folders."""
    if rank == 0:
        for what, *given in case.get("before", []):
            {
                "move": shutil.move,
                "copy": shutil.copytree,
                "export": _export,
                "remove": shutil.rmtree,
                "upcycle": _upcycle,
            }[what](*given)
    dist.barrier()
    return nano.train(rank, case)


def _export(run: str, output: str) -> None:
    convert(find_source(run), Path(output), "minicpm", dtype="fp32")
    config = Path(output) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | TOKENS))
    (Path(output) / "generation_config.json").write_text(json.dumps(SETTINGS))


def _upcycle(run: str, output: str) -> None:
    upcycle(find_source(f"{run}@4"), Path(output), Upcycling(copies=2, top_k=2))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("elsewhere")
    recipe = write_text_recipe(folder, "first")
    runs, moved, copied, other = (str(folder / name) for name in ("runs", "moved/second", "copied/third", "other-data"))
    stop = "training.stop_after={}"
    elsewhere = f"data.train=[{{prefix: {other}/text}}]"

    def of(run: str, *overrides: str, **extra: Any) -> dict[str, Any]:
        return {"arguments": ["--recipe", f"{run}/recipe.yaml", *overrides], "run": "", **extra}

    begin = [f"data.validation={{text: {moved}/data/text}}", f"data.tokenizer={moved}/tokenizer"]
    weights = ["--init-from", str(folder / "hf"), f"data.train=[{{prefix: {moved}/data/text}}]", *begin]
    cases = {
        "whole": nano.case(recipe, "whole", stop.format(8)),
        "first": nano.case(recipe, "first", stop.format(4)),
        "copied": of(copied, stop.format(8), before=[["copy", f"{runs}/first", copied]]),
        "renamed": of(copied, "name=fourth", stop.format(1)),
        # the old place has the data no more
        "moved": of(moved, stop.format(8), before=[["move", f"{runs}/first", moved]]),
        # the checkpoint was saved where the run no longer is
        "upcycled": of(str(folder / "moe"), stop.format(5), before=[["upcycle", moved, str(folder / "moe")]]),
        "paths": of(f"{runs}/whole", stop.format(12), elsewhere, *begin, before=[["copy", f"{moved}/data", other]]),
        "other data": of(
            moved, stop.format(12), f"data.train=[{{prefix: {folder}/data/train}}]", "data.tokenizer=null"
        ),
        "weights": nano.case(recipe, "stage", *weights, stop.format(3), before=[["export", moved, str(folder / "hf")]]),
        "weights tp2": nano.case(
            recipe, "stage-tp2", *weights, stop.format(3), "parallel.tensor_model_parallel_size=2"
        ),
        "weights pp2 zero1": nano.case(
            recipe, "stage-pp2", *weights, stop.format(3), "parallel.pipeline_model_parallel_size=2"
        ),
        "weights zero3": nano.case(recipe, "stage-zero3", *weights, stop.format(3), "deepspeed.zero_stage=3"),
        "other model": nano.case(recipe, "other", *weights, "model.num_layers=3", "model.scale_depth=1.5"),
        "again": nano.case(recipe, "stage", *weights, stop.format(4), before=[["remove", str(folder / "hf")]]),
    }
    outcomes = run_forked("tests.training.test_elsewhere:worker", list(cases.values()))
    return folder, dict(zip(cases, outcomes, strict=True))


Jobs = tuple[Path, dict[str, list[Outcome]]]


@pytest.mark.parametrize(("name", "place"), [("copied", "copied/third"), ("moved", "moved/second")])
def test_a_run_goes_on_where_it_lies(name: str, place: str, jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[name])
    run = folder / place
    assert f"resuming from {run}/checkpoints/step-4" in outcomes[name][0].log
    assert nano.tensors(run / "checkpoints" / "step-8") == nano.tensors(
        folder / "runs" / "whole" / "checkpoints" / "step-8"
    )
    assert set(nano.losses(run)) < set(nano.losses(folder / "runs" / "whole"))  # which has gone on since
    written = load_recipe(run / "recipe.yaml")
    assert written.run_directory == run
    # a copy reads what is still where it was; what was moved with the run is read from inside it
    home = run if name == "moved" else folder / "runs" / "first"
    assert (written.data.train[0].prefix, written.data.tokenizer) == (f"{home}/data/text", f"{home}/tokenizer")


def test_what_is_made_of_a_moved_run_reads_its_data_where_they_lie(jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["upcycled"])
    run = folder / "moved" / "second"
    recipe, manifest = (
        load_recipe(folder / "moe" / "recipe.yaml"),
        read_manifest(folder / "moe" / "checkpoints" / "step-4"),
    )
    assert (recipe.data.train[0].prefix, recipe.data.tokenizer) == (f"{run}/data/text", f"{run}/tokenizer")
    assert manifest["data"] == {f"{run}/data/text": data_fingerprint(run / "data" / "text")}


def test_another_name_is_another_run(jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["renamed"])
    assert list(nano.steps(folder / "copied" / "fourth")) == [1]


def test_equal_data_may_lie_under_another_path(jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["paths"])
    assert "step-8 at step 8" in outcomes["paths"][0].log
    nano.check(outcomes["other data"], 2, 2)
    assert "data.train: was" in outcomes["other data"][0].log


def test_a_moved_run_is_exported_with_its_tokenizer(jobs: Jobs, tmp_path: Path) -> None:
    folder, _ = jobs
    run = folder / "moved" / "second"
    assert find_source(f"{run}@8") == find_source(str(run)) == run / "checkpoints" / "step-8"
    done = convert(find_source(f"{run}@4"), tmp_path / "hf", "llama")  # its manifest names the old place
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (run / "tokenizer" / "tokenizer.model").read_bytes()
    assert not any("tokenizer" in note for note in done.notes)


def test_a_tokenizer_is_known_by_its_checksum(jobs: Jobs, tmp_path: Path) -> None:
    folder, _ = jobs
    shutil.copytree(folder / "moved" / "second", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == file_sha256(tmp_path / "run" / "tokenizer" / "tokenizer.model")
    assert open_source(checkpoint).tokenizer == tmp_path / "run" / "tokenizer"
    with open(tmp_path / "run" / "tokenizer" / "tokenizer.model", "ab") as file:
        file.write(b"\n")
    source = open_source(checkpoint)
    assert source.tokenizer is None and "another tokenizer than the run's" in source.notes[0]


@pytest.mark.parametrize("name", ["weights", "weights tp2", "weights pp2 zero1", "weights zero3"])
def test_a_run_begins_with_the_weights_of_a_published_folder(name: str, jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[name])
    run = folder / "runs" / name.replace("weights", "stage").removesuffix(" zero1").replace(" ", "-")
    assert f"starting with the weights of {folder / 'hf'}" in outcomes[name][0].log
    assert nano.held_out(run, 0) == pytest.approx(nano.held_out(folder / "moved" / "second", 8), rel=1e-6)
    assert list(nano.steps(run))[0] == 1
    state = nano.state(run / "checkpoints" / "step-3")
    assert (state["updates"], state["origin"]) == (3, {"run": str(folder / "hf"), "step": 0})
    assert state["text"] == TOKENS | {"generation_config": SETTINGS}


def test_such_a_run_goes_on_without_the_folder(jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["again"])
    assert "resuming from" in outcomes["again"][0].log and list(nano.steps(folder / "runs" / "stage")) == [1, 2, 3, 4]


def test_such_a_run_is_exported_with_the_end_tokens_of_the_folder(jobs: Jobs, tmp_path: Path) -> None:
    folder, _ = jobs
    convert(find_source(f"{folder / 'runs' / 'stage'}@4"), tmp_path / "out", "llama")  # after a resumption
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in TOKENS} == TOKENS
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == SETTINGS


def test_another_model_is_refused_with_all_that_is_other(jobs: Jobs) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["other model"], 2, 2)
    (line,) = [line for line in outcomes["other model"][0].log.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: model: is another model than the one in {folder / 'hf'}: num_layers is 3, scale_depth is 1.5;"
        " give model.num_layers=2 model.scale_depth=1.4"
    )
