"""Recipe -> DeepSpeed's JSON, and a user's own JSON laid over it.

DeepSpeed leaves "auto" in place and lets a scheduler block overwrite muP's rates, so both are decided here: "auto"
takes our value, and whatever contradicts the recipe is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import Layout, Recipe
from minicpm_megatron.recipe.deepspeed_json import read_deepspeed_json
from minicpm_megatron.recipe.memory import reduce_bucket_size

# what a run is, is said by the recipe alone: key of DeepSpeed's JSON -> key of the recipe
OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
    "data_types.grad_accum_dtype": "training.precision",
    "communication_data_type": "training.precision",
    "pipeline.pipe_partitioned": "parallel.sequence_parallel",
    "pipeline.grad_partitioned": "parallel.sequence_parallel",
}
REFUSED = {
    "scheduler": "DeepSpeed's schedulers set one rate for all muP groups; use the recipe's schedule section",
    "optimizer": "DeepSpeed would build groups without muP's rates; use the recipe's optimizer section",
    "amp": "use training.precision of the recipe",
}
# ZeRO++'s quantization (arXiv 2306.10209); its hierarchical partition needs nothing
ON_CUDA = tuple(f"zero_optimization.zero_quantized_{what}" for what in ("weights", "nontrainable_weights", "gradients"))
ROUND_ROBIN = "zero_optimization.round_robin_gradients"
# what divides the optimizer's state between devices, where checkpoints would not find it: key -> all that is accepted
DIVIDED = {
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}
ZENFLOW = "zero_optimization.zenflow."
OFFLOADED = ("offload_optimizer", "offload_param")
NO_REPORT = 1_000_000_000  # steps between DeepSpeed's own progress lines: ours say more


def clips_itself(recipe: Recipe) -> bool:
    """Whether gradients are clipped by `engine.step`, not by DeepSpeed.

    At ZeRO 0 in fp32 DeepSpeed steps before anyone can see that a gradient is not finite, and reports no norm.
    """
    return recipe.deepspeed.zero_stage == 0 and recipe.training.precision == "fp32"


def deepspeed_config(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """The resolved DeepSpeed JSON of a run, nothing in it left to "auto".

    Raises:
        UserError: the user's JSON cannot be read, or contradicts the recipe.
    """
    ours = _from_recipe(recipe, layout)
    path = recipe.deepspeed.config
    return ours if path is None else _overlay(ours, read_deepspeed_json(Path(path)), path)


def _from_recipe(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    stage, training = recipe.deepspeed.zero_stage, recipe.training
    config: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.gradient_accumulation_steps[0],
        "gradient_clipping": 0.0 if clips_itself(recipe) else training.gradient_clipping,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": False},
        # DeepSpeed 0.19 otherwise takes the training dtype, to which ZeRO 1 casts the sums that it kept in fp32
        "communication_data_type": "fp32",
        # torch's AdamW takes exactly the groups it is given; overlapping needs streams, which CPU does not have
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": reduce_bucket_size(recipe, layout),
        },
        "zero_force_ds_cpu_optimizer": False,
        # those of another package, too; DeepSpeed lists the few that it has tried
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NO_REPORT,
    }
    for part in OFFLOADED:
        if (place := getattr(recipe.deepspeed, part)) != "none":
            # page-locked memory is what makes the copies fast, and only CUDA has it
            config["zero_optimization"][part] = {"device": place, "pin_memory": not device.on_cpu()}
    if stage > 0 and training.precision == "bf16":
        # sums of many bf16 gradients lose the small ones
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.parallel.pipeline_model_parallel_size > 1:
        # DeepSpeed sends each tensor-parallel rank's share of a hidden state that it takes for the same on all of
        # them, which under sequence parallelism it is not
        alike = recipe.parallel.tensor_model_parallel_size > 1 and not recipe.parallel.sequence_parallel
        config["pipeline"] = {"pipe_partitioned": alike, "grad_partitioned": alike}
    return config


def _overlay(ours: dict[str, Any], theirs: dict[str, Any], path: str) -> dict[str, Any]:
    for key, reason in REFUSED.items():
        if key in theirs:
            raise UserError(f"a {key!r} block is not accepted", where=path, fix=reason)
    merged = copy.deepcopy(ours)
    for dotted, value in _leaves(theirs):
        mine = _get(ours, dotted)
        if mine is None and dotted in (f"zero_optimization.{part}.device" for part in OFFLOADED):
            mine = "none"
        if value == "auto":
            if mine is None:
                raise UserError(f'{dotted} is "auto", for which there is no value', where=path, fix="give a value")
            continue
        if dotted in OWNED and value != (mine if mine is not None else value):
            raise UserError(
                f"{dotted} is {value!r}, but {OWNED[dotted]} of the recipe makes it {mine!r}",
                where=path,
                fix=f"remove it, or change {OWNED[dotted]}",
            )
        if dotted in ON_CUDA and value and device.on_cpu():
            raise UserError(f"{dotted} has kernels for CUDA only", where=path, fix="remove it, or run on GPUs")
        if dotted == ROUND_ROBIN and value:
            # 0.19.8's _link_all_hp_params takes the parameters of a group in their old order: checkpoints would hold
            # master weights under the names of others. Accept it once the orders agree.
            raise UserError(
                f"{dotted} mixes up which weights are whose in DeepSpeed 0.19.8, and so in every checkpoint",
                where=path,
                fix="remove it",
            )
        if DIVIDED.get(dotted, value) != value or dotted.startswith(ZENFLOW):
            raise UserError(
                f"{dotted} divides the optimizer's state between devices, and checkpoints would hold a part of it",
                where=path,
                fix="remove it",
            )
        _set(merged, dotted, value)
    return merged


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _get(config: dict[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value
