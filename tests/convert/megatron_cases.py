"""Cases for `megatron_core.worker`, without importing Megatron: models, constants, and how they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicpm_megatron.recipe import ModelRecipe
from tests.convert.conftest import small_model
from tests.distributed.forked import run_forked

SEED, ITERATION = 3, 7  # of `random_tensors`, and what a saved checkpoint says of itself
PADDING = 7.0  # in every row of padding: Megatron-LM draws those rows as it draws the others
LEARNING_RATE, BETAS, WEIGHT_DECAY, UPDATES = 0.01, (0.9, 0.95), 0.1, 2
SAMPLES_A_STEP, LENGTH = 4, 32

EXPERTS: dict[str, Any] = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 72}
UNTIED: dict[str, Any] = {"untie_embeddings_and_output_weights": True}


def fields_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model of two layers, unless `fields` say more."""
    return {"num_layers": 2} | fields


def model_of(fields: dict[str, Any]) -> ModelRecipe:
    """The model with these fields."""
    return small_model(**fields_of(fields))


def case(do: str, folder: Path, fields: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """One case, on one rank unless `how` says more; see `megatron_core.worker`."""
    return {"do": do, "folder": str(folder), "model": fields_of(fields), "ranks": 1, **how}


def run(cases: list[dict[str, Any]]) -> list[list[Any]]:
    """Results of the ranks of every case."""
    outcomes = run_forked("tests.convert.megatron_core:worker", cases)
    for each, ranks in zip(cases, outcomes, strict=True):
        for rank in ranks:
            assert rank.status == 0, f"{each}\n{rank.log[-3000:]}"
    return [[rank.result for rank in ranks] for ranks in outcomes]
