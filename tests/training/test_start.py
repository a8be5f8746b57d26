"""What may change between two starts of a run, and what would rewrite its past."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.training.run_data import check_unchanged, keep_order, open_data
from minicpm_megatron.training.start import Published, branch_recipe, check_same_past, initial_weights
from tests.training import nano

DONE = 12  # steps: two of them in the decay
REFUSED = {
    "model.scale_depth=1.5": "model.scale_depth: was 1.4 in the 12 steps already done, and is 1.5 now",
    "data.sequence_length=16": "data.sequence_length: was 32",
    "data.train=[{prefix: elsewhere}]": "data.train",
    "training.seed=5": "training.seed",
    "training.precision=bf16": "training.precision: was 'fp32'",
    "training.gradient_clipping=0.5": "training.gradient_clipping",
    "optimizer.lr=0.004": "optimizer.lr: was 0.005",
    "optimizer.betas=[0.9, 0.99]": "optimizer.betas",
    "training.global_batch_size=16": "would have made step 1 read other samples",
    "training.batch_growth=[{after_tokens: 2560, global_batch_size: 16}]": "would have made step 11 read other samples",
    "schedule.warmup=3": "would have given step 1 the rate factor",
    "schedule.total=30": "would have given step 11 the rate factor",
    "schedule.decay_shape=cosine": "would have given step 11 the rate factor",
}
ALLOWED = [
    "training.batch_growth=[{after_tokens: 3072, global_batch_size: 16}]",
    "training.micro_batch_size=4",
    "training.stop_after=15",
    "training.attention_kernel=reference",
    "deepspeed.zero_stage=3",
    "parallel.tensor_model_parallel_size=2",
    "checkpoint.interval=1",
    "evaluation.interval=null",
    "logging.interval=7",
]


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_have_made_other_steps_is_refused_by_name(change: str, tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    before, now = (load_recipe(path, ["name=x", *overrides]) for overrides in ([], [change]))
    with pytest.raises(UserError) as refusal:
        check_same_past(before, now, DONE)
    assert REFUSED[change] in str(refusal.value)
    # where nothing was done yet, only the schedule and the batches are still free
    if "would have" in REFUSED[change]:
        check_same_past(before, now, 0)


@pytest.mark.parametrize("change", ALLOWED)
def test_what_decides_only_the_future_may_change(change: str, tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    before, now = (load_recipe(path, ["name=x", *overrides]) for overrides in ([], [change]))
    assert before != now
    check_same_past(before, now, DONE)


def test_the_stable_stage_may_be_made_longer_until_the_decay_has_begun(tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    before, now = (load_recipe(path, ["name=x", f"schedule.total={total}"]) for total in (20, 500))
    check_same_past(before, now, 10)
    with pytest.raises(UserError, match="--from RUN@STEP"):
        check_same_past(before, now, 11)


@pytest.mark.parametrize("key", ["schedule.total", "training.stop_after"])
def test_a_run_cannot_end_before_the_steps_that_are_done(key: str, tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    trunk, longer, shorter = (
        load_recipe(path, ["name=x", "schedule.decay=0", *ends])
        for ends in ([], [f"{key}={DONE}"], [f"{key}={DONE - 1}"])
    )
    check_same_past(trunk, longer, DONE)
    with pytest.raises(UserError, match=f"{key}: ends the run after step 11, and 12 steps are already done"):
        check_same_past(trunk, shorter, DONE)


def test_equal_data_under_another_path_is_the_same_past(tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    before, now = (load_recipe(path, ["name=x", f"data.train=[{{prefix: {prefix}}}]"]) for prefix in ("old", "new"))
    check_same_past(before, now, DONE, data=({"old": "1"}, {"new": "1"}))
    for data in (({"old": "1"}, {"new": "2"}), ({}, {}), ({"old": "1"}, {}), ({}, {"new": "1"})):
        with pytest.raises(UserError, match=r"data\.train: was"):
            check_same_past(before, now, DONE, data=data)
    heavier = load_recipe(path, ["name=x", "data.train=[{prefix: new, weight: 2.0}]"])
    with pytest.raises(UserError, match=r"data\.train: was"):
        check_same_past(before, heavier, DONE, data=({"old": "1"}, {"new": "1"}))


def test_a_run_goes_on_in_the_order_that_it_has_begun_with(tmp_path: Path) -> None:
    path = nano.write_recipe(tmp_path)
    prefix = str(tmp_path / "data" / "train")
    few, many = (
        load_recipe(path, ["name=x", f"data.train={json.dumps([{'prefix': prefix, 'weight': w} for w in weights])}"])
        for weights in ([9.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0])
    )

    def order(recipe: Recipe, manifest: dict[str, Any] | None) -> list[tuple[int, int]]:
        data = open_data(recipe)
        if manifest is not None:
            keep_order(manifest, recipe, data)
        return [data.train.source(sample) for sample in range(400)]

    saved = {"recipe": many.model_dump(mode="json")}
    jitter, tree = order(many, saved | {"mixture": "jitter"}), order(many, saved | {"mixture": "tree"})
    assert order(many, saved) == jitter != tree == order(many, None), "manifests once had no method"
    with pytest.raises(UserError, match="data.train: corpora were mixed by 'dice'"):
        order(many, saved | {"mixture": "dice"})
    # a decay that reads other data begins another mixture
    assert order(many, {"recipe": few.model_dump(mode="json"), "mixture": "jitter"}) == tree


def test_changed_data_is_refused_by_its_prefix() -> None:
    check_unchanged({"a": "1", "b": "2"}, {"a": "1", "c": "3"})
    with pytest.raises(UserError, match="b: the data changed since the checkpoint was saved"):
        check_unchanged({"a": "1", "b": "2"}, {"a": "1", "b": "3"})


def test_a_published_folder_is_opened_when_its_weights_are_needed(tmp_path: Path) -> None:
    recipe, given = load_recipe(nano.write_recipe(tmp_path), ["name=x"]), tmp_path / "hf"
    given.mkdir()
    opened: list[Path] = []

    def open_folder(folder: Path) -> Published:
        opened.append(folder)
        return Published(recipe.model, reader, {"eos_token_id": [2, 5]})

    reader: Any = object()
    for done in (False, True):
        if done:
            checkpoint = recipe.run_directory / "checkpoints" / "step-3"
            checkpoint.mkdir(parents=True)
            state = {"step": 3, "origin": {"run": str(given), "step": 0}}
            write_manifest(checkpoint, [], state=state, facts={"recipe": recipe.model_dump(mode="json")})
        opened.clear()
        origin = initial_weights(recipe, str(given), open_folder)
        # a model that does not fit is refused at once, and a run that has a checkpoint may not need the folder
        assert opened == ([] if done else [given])
        assert (origin.folder, origin.step, origin.goes_on) == (given, 0, False)
        assert origin.published is not None and origin.published().weights is reader
        origin.published()
        assert opened == [given]
    shutil.rmtree(given)
    # the verification at the start has more to say of a damaged checkpoint
    (checkpoint / "manifest.json").write_text("{damaged")
    initial_weights(recipe, str(given), open_folder)
    checkpoint.rename(f"{checkpoint}.corrupt")
    origin = initial_weights(recipe, str(given), open_folder)
    shutil.rmtree(recipe.run_directory)
    for start in (origin.published, lambda: initial_weights(recipe, str(given), open_folder)):
        with pytest.raises(UserError) as refusal:
            start()
        assert str(refusal.value) == (
            f"{given}: no such folder, and not of the form RUN@STEP;"
            " give a Hugging Face folder, or for instance quickstart@300"
        )


def test_a_run_whose_checkpoint_came_from_megatron_lm_is_one_of_its_own(tmp_path: Path) -> None:
    recipe = load_recipe(nano.write_recipe(tmp_path), ["name=x"])
    checkpoint = recipe.run_directory / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    state = {"step": 3, "origin": {"format": "torch_dist", "folder": "elsewhere", "iteration": 3}}
    write_manifest(checkpoint, [], state=state, facts={"recipe": recipe.model_dump(mode="json")})
    with pytest.raises(UserError, match="has checkpoints already, and is a run of its own"):
        branch_recipe(recipe, "trunk@3")
