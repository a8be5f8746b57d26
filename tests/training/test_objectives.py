"""Objectives: the contract of every registered one, what data they may ask for, and whole runs under them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.cli import entry
from minicpm_megatron.cli.train import main
from minicpm_megatron.engine.objective import mean_token_loss
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.registry import OBJECTIVES
from minicpm_megatron.training import report
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.datasets import train_reader
from minicpm_megatron.training.objective import Objective, check_needs
from minicpm_megatron.training.run_data import RunData
from minicpm_megatron.training.trainer import Trainer
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "my_plugin"


class Weighted(Objective):
    """The mean over the tokens that count, as fine-tuning has it."""

    needs = frozenset({"loss_mask"})

    def __init__(self, recipe: Recipe) -> None:
        pass

    def __call__(self, token_losses: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (token_losses * fields["loss_mask"]).mean()


class Masked:
    """A reader whose tokens count where their id is even, or all of them; the mean of the weights is 1 a step."""

    sequences = 1
    fields = ("loss_mask",)

    def __init__(self, reader: BatchReader, *, everything: bool) -> None:
        self.reader, self.everything = reader, everything

    def micro_batches(self, first: int, size: int, row_length: int | None = None) -> Iterator[tuple[Any, ...]]:
        whole = BatchReader(self.reader.samples, micro_batch_size=size, rank=0, size=1)
        share = torch.cat([self.mask(batch[1]) for batch in whole.micro_batches(first, size, row_length)]).mean()
        for batch in self.reader.micro_batches(first, size, row_length):
            yield (*batch, {"loss_mask": self.mask(batch[1]) / share})

    def mask(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(labels).float() if self.everything else (labels % 2 == 0).float()


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """A run with the objective of the plugin, with `Weighted`, or with the recipe's."""
    report.finish = lambda folder, recipe: None
    entry.RANK_0_GRACE = 0.0
    make_trainer: Any = Trainer
    if case["objective"] == "focal":
        sys.path.insert(0, str(PLUGIN))
        from minicpm_my_plugin.objective import Focal

        make_trainer = functools.partial(Trainer, objective=Focal)
    elif case["objective"] != "plain":

        def read(recipe: Recipe, data: RunData) -> Masked:
            return Masked(train_reader(recipe, data), everything=case["objective"] == "all count")

        make_trainer = functools.partial(Trainer, objective=Weighted, read=read)
    try:
        entry.run(lambda: main(case["arguments"], make_trainer))
    except SystemExit as end:
        return {"status": end.code}
    return {"status": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("objectives")
    recipe = nano.write_recipe(folder, evaluation={"interval": 20}, checkpoint={"interval": None})
    cases = {}
    for name, (objective, ranks) in {
        "plain": ("plain", 1),
        "all": ("all count", 1),
        "masked-1": ("masked", 1),
        "masked-2": ("masked", 2),
        "focal": ("focal", 1),
    }.items():
        cases[name] = nano.case(recipe, name, objective=objective, ranks=ranks)
    return folder / "runs", dict(zip(cases, run_forked(f"{__name__}:worker", list(cases.values())), strict=True))


def losses(run: Path) -> list[float]:
    return [loss for loss, _ in nano.steps(run).values()]


def test_the_whole_mean_is_the_same_to_the_bit_however_it_is_asked_for(runs: Any) -> None:
    folder, outcomes = runs
    for name in ("plain", "all"):
        nano.check(outcomes[name])
    assert losses(folder / "plain") == losses(folder / "all") and len(losses(folder / "plain")) == nano.STEPS


@pytest.mark.cpu_only("two ranks over gloo")
def test_a_loss_mask_gives_the_same_losses_on_one_rank_and_on_two(runs: Any) -> None:
    folder, outcomes = runs
    for name in ("masked-1", "masked-2"):
        nano.check(outcomes[name])
    one, two = losses(folder / "masked-1"), losses(folder / "masked-2")
    assert two == pytest.approx(one, rel=1e-5) and one != pytest.approx(losses(folder / "plain"), rel=1e-3)


def test_the_objective_of_the_example_trains(runs: Any) -> None:
    folder, outcomes = runs
    nano.check(outcomes["focal"])
    found, plain = losses(folder / "focal"), losses(folder / "plain")
    assert found[0] == pytest.approx(plain[0], rel=0.01) and found[0] < plain[0], "at first every token has p near 0"
    assert sum(found[-5:]) / 5 < found[0] - 1.5
    # its validation loss is the cross-entropy, and has fallen, too
    assert nano.held_out(folder / "focal", 20) < plain[0] - 1.5


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_registered_objective_is_a_scalar_with_a_gradient(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(nano.write_recipe(tmp_path), ["name=x", f"training.objective={name}"])
    objective = OBJECTIVES.get(name)(recipe)
    assert isinstance(objective, Objective)
    generator = torch.Generator().manual_seed(0)
    token_losses = (3 * torch.rand(4 * objective.sequences, 32, generator=generator)).requires_grad_()
    fields = {need: torch.ones_like(token_losses) for need in objective.needs}
    value = objective(token_losses, fields)
    value.backward()
    assert value.shape == () and value.isfinite() and token_losses.grad is not None
    assert token_losses.grad.isfinite().all() and token_losses.grad.any()


def test_the_mean_token_loss_is_the_engines_own() -> None:
    token_losses = torch.rand(3, 65)
    mean = OBJECTIVES.get("mean-token-loss")(None)
    assert mean(token_losses, {}) == mean_token_loss(token_losses, {}) == token_losses.mean()


class Pairs(Weighted):
    needs = frozenset()
    sequences = 2


@pytest.mark.parametrize(
    ("objective", "fields", "stages", "line"),
    [
        (Weighted, (), 1, "training.objective: mean-token-loss needs loss_mask, which the training data do not have"),
        (Pairs, (), 1, "training.objective: mean-token-loss needs 2 sequences a sample, and the training data have 1"),
        (Weighted, ("loss_mask",), 2, "parallel.pipeline_model_parallel_size: mean-token-loss needs loss_mask, which"),
        (Weighted, ("loss_mask", "reference_loss"), 1, None),
    ],
)
def test_an_objective_is_refused_that_needs_what_the_data_do_not_have(
    objective: Any, fields: tuple[str, ...], stages: int, line: str | None, tmp_path: Path
) -> None:
    overrides = ["name=x", f"parallel.pipeline_model_parallel_size={stages}"]
    recipe = load_recipe(nano.write_recipe(tmp_path), overrides)
    reader = Masked(None, everything=True)  # type: ignore[arg-type]
    reader.fields = fields
    if line is None:
        check_needs(objective(recipe), reader, recipe)
        return
    with pytest.raises(UserError) as refusal:
        check_needs(objective(recipe), reader, recipe)
    assert str(refusal.value).startswith(line)


def test_an_unknown_objective_is_refused_with_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown objective 'mean-token-los'; did you mean mean-token-loss"):
        load_recipe(nano.write_recipe(tmp_path), ["name=x", "training.objective=mean-token-los"])
