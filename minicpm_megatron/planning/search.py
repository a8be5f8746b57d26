"""Every legal layout of a recipe on a cluster, fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from minicpm_megatron.errors import UserError
from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.planning.step import Prediction, predict
from minicpm_megatron.recipe.checks import check_recipe, refuse_unless
from minicpm_megatron.recipe.flops import flops_per_token, head_flops_per_token
from minicpm_megatron.recipe.schema import ModelRecipe, ParallelRecipe, Recipe

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
ZERO_STAGES = (1, 2, 3)  # 0 in bf16 adds gradients up in bf16, which loses the small ones
RECOMPUTE = ("none", "full")  # selective saves nothing here (see recipe.memory)
CP_COMM_TYPES: tuple[Literal["p2p", "a2a"], ...] = ("p2p", "a2a")


@dataclass(frozen=True)
class Plan:
    """What the search found.

    Attributes:
        layouts: for each layout that fits its fastest settings, by falling tokens/s.
        do_not_fit: legal layouts that need more memory whatever the settings.
        least_bytes: what the smallest of all needs on a rank.
    """

    layouts: tuple[Prediction, ...]
    do_not_fit: int
    least_bytes: int


def find_layouts(
    recipe: Recipe,
    cluster: Cluster,
    *,
    recompute: Sequence[str] = RECOMPUTE,
    zero_stages: Sequence[int] = ZERO_STAGES,
) -> Plan:
    """Try all tensor, pipeline, context and expert parallel sizes; of each, micro-batch size, ZeRO and recompute.

    The recipe's own parallel sizes, micro-batch size, ZeRO stage and recompute are not looked at.

    Raises:
        UserError: nothing is legal, or nothing fits; the line says how far it is off.
    """
    fitting, do_not_fit, least = [], 0, 0
    for parallel in _parallel_sizes(recipe, cluster):
        tried = [predict(each, cluster) for each in _settings(recipe, cluster, parallel, recompute, zero_stages)]
        if not tried:
            continue
        smallest = min(each.memory.total for each in tried)
        least = min(least or smallest, smallest)
        fits = [each for each in tried if each.memory.total <= cluster.usable_memory]
        if fits:
            fitting.append(min(fits, key=_rank))
        else:
            do_not_fit += 1
    refuse_unless(
        least > 0,
        "--gpus",
        f"no layout on {cluster.gpus} GPUs is legal for {recipe.training.global_batch_size} samples of"
        f" {recipe.data.sequence_length} tokens",
        "change the number of GPUs, the batch, or the settings that are fixed",
    )
    refuse_unless(
        bool(fitting),
        "--gpus",
        f"none of {do_not_fit} layouts fits: the smallest needs {least / 2**30:.1f} GiB a GPU of"
        f" {cluster.usable_memory / 2**30:.1f} usable",
        "take more GPUs, GPUs with more memory, or leave --recompute and --zero-stage free",
    )
    return Plan(tuple(sorted(fitting, key=_rank)), do_not_fit, least)


def _rank(prediction: Prediction) -> tuple[float, int, int]:
    """Time to six digits; of equals first what is split least, then what needs least memory."""
    layout = prediction.layout
    pieces = layout.world_size // layout.data_parallel_size * layout.expert_model_parallel_size
    return float(f"{prediction.step_seconds:.6g}"), pieces, prediction.memory.total


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _parallel_sizes(recipe: Recipe, cluster: Cluster) -> Iterator[ParallelRecipe]:
    model, length = recipe.model, recipe.data.sequence_length
    for tp in _divisors(cluster.gpus):
        for pp in (size for size in _divisors(cluster.gpus // tp) if size <= model.num_layers):
            layers = balanced_layers(model, pp, length) if pp > 1 else None
            for cp, ep in product(_divisors(cluster.gpus // (tp * pp)), _divisors(model.num_moe_experts or 1)):
                yield ParallelRecipe(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    pipeline_layers=layers,
                    context_parallel_size=cp,
                    expert_model_parallel_size=ep,
                    sequence_parallel=tp > 1,
                )


def _settings(
    recipe: Recipe,
    cluster: Cluster,
    parallel: ParallelRecipe,
    recompute: Sequence[str],
    zero_stages: Sequence[int],
) -> Iterator[Recipe]:
    """`recipe` with everything that is legal of the rest."""
    cp_comm_types = CP_COMM_TYPES if parallel.context_parallel_size > 1 else CP_COMM_TYPES[:1]
    for zero, micro_batch_size, again, cp_comm_type in product(
        zero_stages, MICRO_BATCH_SIZES, recompute, cp_comm_types
    ):
        training: dict[str, Any] = {"micro_batch_size": micro_batch_size, "recompute": again}
        # copies are not validated, which `check_recipe` makes up for
        candidate = recipe.model_copy(
            update={
                "parallel": parallel.model_copy(update={"cp_comm_type": cp_comm_type}),
                "training": recipe.training.model_copy(update=training),
                "deepspeed": recipe.deepspeed.model_copy(update={"zero_stage": zero}),
            }
        )
        try:
            check_recipe(candidate)
            candidate.check_world_size(cluster.gpus)
        except UserError:
            continue
        yield candidate


def balanced_layers(model: ModelRecipe, stages: int, sequence_length: int) -> tuple[int, ...]:
    """Layers on each of `stages` > 1 stages so that the slowest has least to do, where the last also has the LM head.

    Stages that must differ grow towards the end: the first keep activations of more micro-batches.
    """
    head = head_flops_per_token(model)
    layer = (flops_per_token(model, sequence_length) - head) / model.num_layers
    before = stages - 1

    def slowest(last: int) -> float:
        return max(-(-(model.num_layers - last) // before), last + head / layer)

    last = min(range(1, model.num_layers - before + 1), key=slowest)
    each, more = divmod(model.num_layers - last, before)
    return (*[each] * (before - more), *[each + 1] * more, last)
