"""Rules that join several fields of a recipe. Each is refused by the field to change and how to change it.

Kept apart from the schema so that a rule reads as a rule: `check_recipe` holds for every recipe that exists,
`layout` needs the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicpm_megatron.errors import UserError
from minicpm_megatron.registry import ATTENTION_KERNELS, DECAY_SHAPES, OBJECTIVES, OBSERVERS, OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:
    from minicpm_megatron.recipe.schema import ModelRecipe, Recipe


@dataclass(frozen=True)
class Layout:
    """How the ranks of one run are divided.

    Attributes:
        gradient_accumulation_steps: micro-batches a rank runs in one step, one entry for the first batch size and
            one for each entry of training.batch_growth.
        micro_batch_size: samples a forward pass on one rank, `auto` resolved.
    """

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    expert_model_parallel_size: int
    data_parallel_size: int
    gradient_accumulation_steps: tuple[int, ...]
    micro_batch_size: int = 1


def refuse_unless(holds: bool, where: str, what: str, fix: str) -> None:
    """Raise the `UserError` for `where` unless the rule `holds`."""
    if not holds:
        raise UserError(what, where=where, fix=fix)


def check_model(model: ModelRecipe) -> None:
    """Rules of the model alone.

    Raises:
        UserError: query heads do not divide into groups, rotary channels are odd, or a token wants more experts than
            there are.
    """
    refuse_unless(
        model.num_attention_heads % model.num_query_groups == 0,
        "model.num_query_groups",
        f"{model.num_attention_heads} attention heads do not divide into {model.num_query_groups} query groups",
        "give a divisor of model.num_attention_heads",
    )
    refuse_unless(
        model.kv_channels % 2 == 0,
        "model.kv_channels",
        f"rotary embedding turns channels in pairs, and {model.kv_channels} is odd or zero",
        "give an even number of channels a head",
    )
    if model.num_moe_experts is not None:
        refuse_unless(
            model.moe_router_topk <= model.num_moe_experts,
            "model.moe_router_topk",
            f"{model.moe_router_topk} experts a token of only {model.num_moe_experts}",
            "give at most model.num_moe_experts",
        )
        refuse_unless(
            model.moe_router_topk > 1 or model.moe_router_pre_softmax,
            "model.moe_router_pre_softmax",
            "the weight of a token's only expert would always be 1, and its router would learn nothing",
            "set it to true, or model.moe_router_topk above 1",
        )


def check_recipe(recipe: Recipe) -> None:
    """Every rule that does not need the number of ranks.

    Raises:
        UserError: naming the dotted field at fault and what to do.
    """
    _check_tensor_parallel(recipe)
    _check_pipeline(recipe)
    _check_offload(recipe)
    _check_context_parallel(recipe)
    _check_expert_parallel(recipe)
    ATTENTION_KERNELS.check(recipe.training.attention_kernel, where="training.attention_kernel")
    refuse_unless(
        recipe.data.sequence_length <= recipe.model.longest_sequence,
        "data.sequence_length",
        f"{recipe.data.sequence_length} tokens exceed {_longest(recipe.model)}",
        "shorten the samples or raise model.max_position_embeddings",
    )
    _check_curriculum(recipe)
    _check_batches(recipe)
    check_schedule(recipe)
    OPTIMIZERS.check(recipe.optimizer.name, where="optimizer.name")
    _check_gradient_statistics(recipe)
    _check_observers(recipe)
    OBJECTIVES.check(recipe.training.objective, where="training.objective")
    for field, answer in (("non_finite", recipe.faults.non_finite), ("spike", recipe.faults.spike)):
        refuse_unless(
            answer != "rollback" or recipe.checkpoint.interval is not None,
            f"faults.{field}",
            "there are no checkpoints to go back to",
            "give checkpoint.interval, or choose skip",
        )


def _check_observers(recipe: Recipe) -> None:
    names = recipe.logging.observers
    for name in names:
        OBSERVERS.check(name, where="logging.observers")
    twice = [name for name in names if names.count(name) > 1]
    refuse_unless(not twice, "logging.observers", f"names {', '.join(sorted(set(twice)))} twice", "give each once")


def _longest(model: ModelRecipe) -> str:
    named = f"model.max_position_embeddings {model.max_position_embeddings}"
    if model.longest_sequence == model.max_position_embeddings:
        return named
    return f"the {model.longest_sequence} that dynamic scaling makes of {named}"


def _check_tensor_parallel(recipe: Recipe) -> None:
    model, size = recipe.model, recipe.parallel.tensor_model_parallel_size
    for field, count in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.num_query_groups),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.moe_ffn_hidden_size", model.mlp_width),
    ):
        refuse_unless(
            count % size == 0,
            "parallel.tensor_model_parallel_size",
            f"{size} does not divide {field} {count}",
            f"give a divisor of {count}",
        )
    if recipe.parallel.sequence_parallel:
        refuse_unless(
            size > 1,
            "parallel.sequence_parallel",
            "it splits the sequence over the tensor-parallel ranks, of which there is one",
            "set parallel.sequence_parallel=false or parallel.tensor_model_parallel_size above 1",
        )
        refuse_unless(
            recipe.data.sequence_length % size == 0,
            "data.sequence_length",
            f"{recipe.data.sequence_length} tokens do not divide over {size} tensor-parallel ranks,"
            " as parallel.sequence_parallel wants",
            f"give a multiple of {size}",
        )


def _check_pipeline(recipe: Recipe) -> None:
    stages, layers = recipe.parallel.pipeline_model_parallel_size, recipe.parallel.pipeline_layers
    refuse_unless(
        stages <= recipe.model.num_layers,
        "parallel.pipeline_model_parallel_size",
        f"{stages} stages are more than the {recipe.model.num_layers} layers",
        f"give at most {recipe.model.num_layers}",
    )
    if layers is not None:
        refuse_unless(
            len(layers) == stages and sum(layers) == recipe.model.num_layers,
            "parallel.pipeline_layers",
            f"{list(layers)} are {sum(layers)} layers on {len(layers)} stages, and the model has"
            f" {recipe.model.num_layers} on {stages}",
            "give one number a stage that add up, or null",
        )
    if stages > 1:
        refuse_unless(
            not recipe.data.reset_attention_mask,
            "data.reset_attention_mask",
            "pipeline stages pass on hidden states, and not where documents begin",
            "set it to false, or parallel.pipeline_model_parallel_size to 1",
        )
        bf16 = recipe.training.precision == "bf16"
        refuse_unless(
            recipe.deepspeed.zero_stage <= 1 and not (bf16 and recipe.deepspeed.zero_stage == 0),
            "deepspeed.zero_stage",
            f"a pipeline cannot run with ZeRO {recipe.deepspeed.zero_stage} in {recipe.training.precision}",
            "set it to 1",
        )


def _check_offload(recipe: Recipe) -> None:
    deepspeed = recipe.deepspeed
    refuse_unless(
        deepspeed.offload_optimizer == "none" or deepspeed.zero_stage >= 1,
        "deepspeed.offload_optimizer",
        "ZeRO 0 keeps no optimizer state of its own that could be offloaded",
        "set deepspeed.zero_stage to 1 or more",
    )
    refuse_unless(
        deepspeed.offload_param == "none" or (deepspeed.zero_stage == 3 and deepspeed.offload_optimizer != "none"),
        "deepspeed.offload_param",
        "weights are offloaded by ZeRO 3, together with the optimizer",
        "set deepspeed.zero_stage to 3 and deepspeed.offload_optimizer to cpu",
    )


def _check_context_parallel(recipe: Recipe) -> None:
    parallel, length = recipe.parallel, recipe.data.sequence_length
    ranks = parallel.context_parallel_size
    if ranks == 1:
        return
    refuse_unless(
        parallel.pipeline_model_parallel_size == 1,
        "parallel.context_parallel_size",
        "DeepSpeed's pipeline has no place for context-parallel ranks",
        "set one of the two sizes to 1",
    )
    refuse_unless(
        recipe.training.attention_kernel == "auto",
        "training.attention_kernel",
        f"{recipe.training.attention_kernel} attends on one rank, and context-parallel ranks attend with each other",
        "set it to auto, or parallel.context_parallel_size to 1",
    )
    tensor = parallel.tensor_model_parallel_size
    unit = 2 * ranks * (tensor if parallel.sequence_parallel else 1)
    refuse_unless(
        length % unit == 0,
        "data.sequence_length",
        f"{length} tokens do not divide over {ranks} context-parallel ranks with two chunks each",
        f"give a multiple of {unit}",
    )
    heads = recipe.model.num_attention_heads // tensor
    refuse_unless(
        parallel.cp_comm_type == "p2p" or heads % ranks == 0,
        "parallel.cp_comm_type",
        f"Ulysses divides the {heads} heads of a tensor-parallel rank over {ranks} context-parallel ranks",
        f"use p2p, or a divisor of {heads} ranks",
    )


def _check_expert_parallel(recipe: Recipe) -> None:
    parallel, experts = recipe.parallel, recipe.model.num_moe_experts
    size = parallel.expert_model_parallel_size
    if experts is None:
        refuse_unless(
            size == 1,
            "parallel.expert_model_parallel_size",
            f"{size} ranks would divide experts, and the model has none",
            "set it to 1 or give model.num_moe_experts",
        )
        return
    refuse_unless(
        experts % size == 0,
        "parallel.expert_model_parallel_size",
        f"{size} does not divide model.num_moe_experts {experts}",
        f"give a divisor of {experts}",
    )
    refuse_unless(
        parallel.tensor_model_parallel_size == 1 or parallel.sequence_parallel,
        "parallel.sequence_parallel",
        "tensor-parallel ranks would each send every token to the experts",
        "set it to true, or parallel.tensor_model_parallel_size to 1",
    )
    if size > 1:
        deepspeed = recipe.deepspeed
        refuse_unless(
            deepspeed.zero_stage <= 2,
            "deepspeed.zero_stage",
            f"ZeRO 3 divides every weight over all data-parallel ranks, and experts are on {size} different ones",
            "set it to 1 or 2, or parallel.expert_model_parallel_size to 1",
        )
        refuse_unless(
            deepspeed.offload_optimizer == "none",
            "deepspeed.offload_optimizer",
            "DeepSpeed does not take the norm of offloaded experts over their ranks",
            "set it to none, or parallel.expert_model_parallel_size to 1",
        )


def _check_curriculum(recipe: Recipe) -> None:
    parallel, whole = recipe.parallel, recipe.data.sequence_length
    unit = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if parallel.context_parallel_size > 1:
        unit *= 2 * parallel.context_parallel_size
    until = 0
    for index, part in enumerate(recipe.data.curriculum):
        field = f"data.curriculum.{index}"
        refuse_unless(
            whole % part.sequence_length == 0 and part.sequence_length % unit == 0,
            f"{field}.sequence_length",
            f"{part.sequence_length} tokens do not divide data.sequence_length {whole}, or not over the ranks that"
            " share a sequence",
            f"give a divisor of {whole} that is a multiple of {unit}",
        )
        refuse_unless(
            part.until > until,
            f"{field}.until",
            f"{part.until:,} does not come after {until:,}",
            "list the parts in the order they happen",
        )
        until = part.until


def _check_gradient_statistics(recipe: Recipe) -> None:
    asked = recipe.logging.gradient_statistics
    refuse_unless(
        asked.last_step is None or asked.first_step <= asked.last_step,
        "logging.gradient_statistics.last_step",
        f"{asked.last_step} is before the first step, {asked.first_step}",
        "give a later one, or null for the end of the run",
    )


def batch_sizes(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """(dotted field, samples) of every batch size of the run, in order."""
    yield "training.global_batch_size", recipe.training.global_batch_size
    for index, growth in enumerate(recipe.training.batch_growth):
        yield f"training.batch_growth.{index}.global_batch_size", growth.global_batch_size


def _check_batches(recipe: Recipe) -> None:
    micro = recipe.training.micro_batch_size
    before = 0
    for field, samples in batch_sizes(recipe):
        refuse_unless(
            micro == "auto" or samples % micro == 0,
            field,
            f"{samples} samples are not a multiple of training.micro_batch_size {micro}",
            "change either",
        )
        refuse_unless(
            samples > before, field, f"{samples} samples do not exceed the {before} before", "let the batch only grow"
        )
        before = samples
    before = 0
    for index, growth in enumerate(recipe.training.batch_growth):
        refuse_unless(
            growth.after_tokens > before,
            f"training.batch_growth.{index}.after_tokens",
            f"{growth.after_tokens:,} does not come after {before:,}",
            "list the growths in the order they happen",
        )
        before = growth.after_tokens


def check_schedule(recipe: Recipe) -> None:
    """Lengths that fit into each other, and only settings that the schedule uses.

    Raises:
        UserError: naming the dotted field at fault and what to do.
    """
    schedule = recipe.schedule
    SCHEDULES.check(schedule.shape, where="schedule.shape")
    kind = SCHEDULES.get(schedule.shape)
    name, half_life = schedule.shape, "half_life" in kind.uses
    if "decay_shape" in kind.uses:
        name = f"{name} with {schedule.decay_shape} decay"
        DECAY_SHAPES.check(schedule.decay_shape, where="schedule.decay_shape")
        half_life = half_life and DECAY_SHAPES.get(schedule.decay_shape).uses_half_life
    for field in ("decay", "half_life", "period", "min_lr_ratio"):
        given, used = getattr(schedule, field), half_life if field == "half_life" else field in kind.uses
        refuse_unless(
            used or given is None,
            f"schedule.{field}",
            f"{given} is given but the schedule {name} has no use for it",
            f"set schedule.{field}=null",
        )
    refuse_unless(
        schedule.decay is not None or "decay" not in kind.uses,
        "schedule.decay",
        f"the schedule {schedule.shape} needs the length of its decay",
        f"give about 10 % of the run ({schedule.total // 10:,} {schedule.unit}), or 0 for a trunk that only branches",
    )
    refuse_unless(
        schedule.decay == 0 or schedule.half_life is not None or not half_life,
        "schedule.half_life",
        f"{schedule.decay_shape} decay needs its half-life",
        f"give the {schedule.unit} in which the rate halves",
    )
    refuse_unless(
        schedule.warmup + (schedule.decay or 0) <= schedule.total,
        "schedule.total",
        f"warmup {schedule.warmup:,} and decay {schedule.decay or 0:,} do not fit into {schedule.total:,}"
        f" {schedule.unit}",
        "lengthen the run or shorten them",
    )
    try:
        built = kind.from_recipe(schedule, recipe)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # of a plugin's
        what = f"{schedule.shape!r} cannot be built: {type(error).__name__}: {error}"
        raise UserError(what, where="schedule.shape") from error
    built.check_curve()


def layout(recipe: Recipe, world_size: int) -> Layout:
    """How `world_size` ranks are divided, with data parallelism taking what the model leaves.

    Raises:
        UserError: one copy of the model does not fit the ranks, or a batch does not divide over the copies.
    """
    parallel = recipe.parallel
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    refuse_unless(
        world_size > 0 and world_size % copy == 0,
        "parallel",
        f"{world_size} ranks do not divide into copies of the model on {copy}"
        " (tensor x pipeline x context parallel sizes)",
        f"start a multiple of {copy} ranks or change the sizes",
    )
    data_parallel = world_size // copy
    replicas = data_parallel * parallel.context_parallel_size
    refuse_unless(
        replicas % parallel.expert_model_parallel_size == 0,
        "parallel.expert_model_parallel_size",
        f"{parallel.expert_model_parallel_size} does not divide the {replicas} data- and context-parallel ranks",
        "give a divisor of them",
    )
    micro = _micro_batch_size(recipe, data_parallel)
    steps = tuple(samples // (micro * data_parallel) for _, samples in batch_sizes(recipe))
    return Layout(
        world_size=world_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        data_parallel_size=data_parallel,
        gradient_accumulation_steps=steps,
        micro_batch_size=micro,
    )


def _micro_batch_size(recipe: Recipe, data_parallel: int) -> int:
    """Samples of a micro-batch that divides every batch size over `data_parallel` ranks; `auto` is the largest.

    Raises:
        UserError: a batch size does not divide.
    """
    given, most = recipe.training.micro_batch_size, recipe.training.max_micro_batch_size
    sizes = [samples for _, samples in batch_sizes(recipe)]
    divide = all(samples % data_parallel == 0 for samples in sizes)
    fits = largest_micro_batch(math.gcd(*sizes) // data_parallel, most if given == "auto" else given) if divide else 0
    unit, told = (data_parallel, "") if given == "auto" else (given * data_parallel, f" in micro-batches of {given}")
    other = f", or training.micro_batch_size={fits} (auto takes the largest that divides)" if fits else ""
    for field, samples in batch_sizes(recipe):
        refuse_unless(
            samples % unit == 0,
            field,
            f"{samples} samples do not divide over {data_parallel} data-parallel ranks{told}",
            f"give a multiple of {unit}{other}",
        )
    return fits if given == "auto" else given


def largest_micro_batch(samples: int, at_most: int) -> int:
    """The largest divisor of `samples` that is not above `at_most`, nor above 4,096."""
    return next(size for size in range(min(samples, at_most, 4096), 0, -1) if samples % size == 0)
