"""Models that Megatron-LM's own builders make of a command line with --spec, compared with MiniCPMModel.

The workers run inside `tests.distributed.forked`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import import_module
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.global_vars import unset_global_variables
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.models.hybrid import HybridModelBuilder

import minicpm_megatron as library
from minicpm_megatron.errors import UserError
from minicpm_megatron.megatron_lm import (
    add_minicpm_args,
    minicpm_config_from_args,
    minicpm_model_config_from_args,
    pretrain,
    use_minicpm_training,
)
from minicpm_megatron.megatron_lm.optimizer import group_multipliers
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import ModelRecipe
from tests.megatron_lm import on_cpu

VOCABULARY = 512  # a multiple of 128, so that no model has padding
LAYER = "minicpm_megatron.model.layer_spec"
HYBRID = "minicpm_megatron.model.hybrid get_minicpm_hybrid_stack_spec"
# every size is another one than the preset's, as are the constants
SHAPE = {
    "num_layers": 3,
    "hidden_size": 96,
    "ffn_hidden_size": 160,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
    "max_position_embeddings": 64,
    "scale_emb": 7.0,
    "scale_depth": 1.7,
    "dim_model_base": 40,
    "vocab_size": VOCABULARY,
    "rotary_base": 5000,
}
SIZES = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SHAPE.items())
COMMON = f"--minicpm-preset minicpm-nano {SIZES} --seq-length 32 --micro-batch-size 2 --lr 0.01"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 72 --moe-router-dtype fp32"


def parse(text: str) -> Any:
    """Megatron-LM's arguments of a command line."""
    length = "" if "--train-samples" in text else "--train-iters 4"
    on_cpu.command_line(f"{COMMON} {length} --mock-data {text}")
    return parse_and_validate_args(extra_args_provider=add_minicpm_args)


def by_builder(args: Any) -> torch.nn.Module:
    """Models that pretrain_gpt.py of megatron-core 0.19 builds from --spec, and pretrain_hybrid.py from a pattern."""
    pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    if args.hybrid_layer_pattern is not None:
        return HybridModelBuilder(hybrid_config_from_args(args)).build_model(pg_collection)
    return GPTModelBuilder(gpt_config_from_args(args)).build_model(pg_collection)


def as_it_is(args: Any, spec: Any = None) -> torch.nn.Module:
    """Build as the model providers of Megatron-LM's other scripts do: the named object goes to GPTModel."""
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=import_module(args.spec) if spec is None else spec(config),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=True,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )


WAYS: dict[str, Callable[..., torch.nn.Module]] = {"builder": by_builder, "as it is": as_it_is}


def _reference(experts: bool, **changes: Any) -> tuple[torch.nn.Module, Any]:
    fields: dict[str, Any] = {**SHAPE, "rotary_base": 5000.0}
    if experts:
        fields |= {"num_moe_experts": 4, "moe_ffn_hidden_size": 72, "moe_aux_loss_coeff": 0.0}
    config = library.MiniCPMConfig.from_recipe(
        ModelRecipe(**fields), moe_token_dispatcher_type="allgather", fused_loss=False, **changes
    )
    model = library.MiniCPMModel(config)
    library.initialize_parameters(model, config, seed=5)
    return model, config


def _tokens() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:]


def worker(rank: int, case: dict[str, Any]) -> Any:
    """The function of this module that the case names, with the case's arguments."""
    on_cpu.start({}, 1)
    return globals()[case["function"]](**case.get("arguments", {}))


def equal_models(text: str, experts: bool) -> dict[str, list[bool]]:
    """Return, for every way to build one, whether logits, losses and gradients equal MiniCPMModel's in every bit."""
    reference, config = _reference(experts)
    inputs, labels = _tokens()
    wanted = {name: (parameter, None) for name, parameter, _ in named_shards(reference, config)}
    loss = reference(inputs, labels=labels)
    loss.mean().backward()
    logits = reference(inputs)
    found = {}
    builds: dict[str, Callable[[], torch.nn.Module]] = {}
    if "pattern" in text:
        builds["hybrid builder"] = lambda: by_builder(parse(f"{text} --spec {HYBRID}"))
    else:
        for spec in ("get_minicpm_layer_spec", "get_minicpm_block_spec"):
            for way, build in WAYS.items():
                builds[f"{way}, {spec}"] = lambda spec=spec, build=build: build(parse(f"{text} --spec {LAYER} {spec}"))
            builds[f"called, {spec}"] = lambda spec=spec: as_it_is(parse(text), getattr(library, spec))
    for name, build in builds.items():
        model = build()
        assert not isinstance(model, library.MiniCPMModel | library.MiniCPMHybridModel)
        with torch.no_grad():
            for key, parameter, _ in named_shards(model, config):
                parameter.copy_(wanted[key][0])
        other = model(inputs, None, None, labels=labels)
        other.mean().backward()
        gradients = all(
            torch.equal(parameter.grad, wanted[key][0].grad) for key, parameter, _ in named_shards(model, config)
        )
        found[name] = [torch.equal(model(inputs, None, None), logits), torch.equal(other, loss), gradients]
    return found


def masked() -> dict[str, float]:
    """Largest logit difference with the mask that Megatron-LM's data loader makes, relative to the largest logit."""
    model, _ = _reference(False)
    inputs, _ = _tokens()
    hidden = torch.ones(32, 32).tril().logical_not()[None, None].expand(2, 1, 32, 32).clone()
    whole = model(inputs)
    causal = model(inputs, None, hidden)
    hidden[:, :, 13:, :13] = True  # as --reset-attention-mask does for a document that ends with token 12
    starts = torch.where(torch.arange(32) >= 13, 13, 0).expand(2, 32)
    documents, expected = model(inputs, None, hidden), model(inputs, None, starts)
    size = whole.abs().max()
    return {
        "causal": float((causal - whole).abs().max() / size),
        "documents": float((documents - expected).abs().max() / size),
        "apart": float((documents - whole).abs().max() / size),
    }


def refusals(texts: list[str]) -> list[str]:
    """Last line of each command line."""
    said = []
    for text in texts:
        try:
            args = parse(text)
            (by_builder if "--by-builder" in text else as_it_is)(args)
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def virtual_stages() -> list[Any]:
    """Two virtual stages on each of two pipeline ranks: layers of the first rank's, and the message without one."""
    args = parse("--num-layers 4")
    args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size = 2, 2
    config = core_transformer_config_from_args(args)
    found: list[Any] = []
    for spec in (library.get_minicpm_layer_spec, library.get_minicpm_block_spec):
        found.append([len(spec(config, vp_stage=stage).layer_specs) for stage in (0, 1)])
        for without in (lambda spec=spec: spec.layer_specs, lambda spec=spec: spec(config).layer_specs):
            try:
                without()
            except UserError as error:
                found.append(str(error))
    return found


def in_the_wrong_container() -> str:
    """Message of the spec where Megatron-LM's model config is given a MiniCPMConfig."""
    args = parse(f"--spec {LAYER} get_minicpm_block_spec")
    try:
        GPTModelBuilder(gpt_config_from_args(args, minicpm_config_from_args(args))).build_model(
            ProcessGroupCollection.use_mpu_process_groups()
        )
    except UserError as error:
        return str(error)
    return ""


def without_a_gpu() -> str:
    """Output of the example script on this machine."""
    on_cpu.command_line(f"{COMMON} --train-iters 4 --mock-data")
    try:
        pretrain.main()
    except UserError as error:
        return str(error)
    return ""


def without_our_arguments() -> str:
    """Message of the spec where the script has no extra_args_provider of ours."""
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64 --swiglu"
    family = "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope --hidden-dropout 0"
    on_cpu.command_line(
        f"{shape} {family} --attention-dropout 0 --vocab-size 512 --seq-length 32 --micro-batch-size 2 --train-iters 4 "
        f"--transformer-impl local --spec {LAYER} get_minicpm_block_spec"
    )
    args = parse_and_validate_args()
    try:
        by_builder(args)
    except UserError as error:
        return str(error)
    return ""


class _Groups:
    """As much of an optimizer as a scheduler knows."""

    def __init__(self, args: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"name": name} for name in group_multipliers(args)]


def schedules(texts: list[str]) -> list[list[list[float]]]:
    """Learning rates of all groups at every update of every command line, as the trainer's scheduler sets them."""
    found = []
    for text in texts:
        args = parse(text)
        use_minicpm_training(minicpm_model_config_from_args(args))
        optimizer = _Groups(args)
        scheduler = training.get_optimizer_param_scheduler(optimizer)
        steps = args.train_iters or args.train_samples // args.global_batch_size
        rates = []
        for _ in range(steps + 2):
            rates.append([group["lr"] for group in optimizer.param_groups])
            scheduler.step(args.global_batch_size)
        found.append(rates)
    return found


def loaded(text: str, changes: str) -> dict[str, Any]:
    """A scheduler with `changes` to the command line that loads what one without them has saved after 3 updates.

    Returns:
        `said`: the refusal; `rates`: of the groups at the next update, with --override-opt_param-scheduler; `plain`:
        what is said of a group of Megatron-LM's own.
    """

    def scheduler(text: str) -> tuple[Any, Any]:
        args = parse(text)
        use_minicpm_training(minicpm_model_config_from_args(args))
        optimizer = _Groups(args)
        return optimizer, training.get_optimizer_param_scheduler(optimizer)

    _, saving = scheduler(text)
    for _ in range(3):
        saving.step(saving._args.global_batch_size)
    state, found = saving.state_dict(), {}
    try:
        scheduler(f"{text} {changes}")[1].load_state_dict(state)
    except UserError as error:
        found["said"] = str(error)
    optimizer, meant = scheduler(f"{text} {changes} --override-opt_param-scheduler")
    for group in optimizer.param_groups:
        group["max_lr"] = group["lr"] = 123.0  # as a checkpoint of another learning rate would leave it
    meant.load_state_dict(state)
    found["rates"] = {group["name"]: group["lr"] for group in optimizer.param_groups}
    optimizer.param_groups[0]["name"] = None
    try:
        meant.step(1)
    except UserError as error:
        found["plain"] = str(error)
    return found


def training_refusals(texts: list[str]) -> list[str]:
    """Messages of `use_minicpm_training`, the trainer's scheduler and the model config on each command line."""
    said = []
    for text in texts:
        try:
            args = parse(text)
            use_minicpm_training(minicpm_model_config_from_args(args))
            training.get_optimizer_param_scheduler(_Groups(args))
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def example(arguments: list[str]) -> dict[str, Any]:
    """Numbers of the example script's arguments on 8 GPUs that a recipe has as well."""
    os.environ["WORLD_SIZE"] = "8"
    unset_global_variables()
    # data, tokenizer and devices are another machine's
    sys.argv = ["pretrain_minicpm.py", *arguments, "--tokenizer-type", "NullTokenizer", "--use-cpu-initialization"]
    args = parse_and_validate_args(extra_args_provider=add_minicpm_args)
    use_minicpm_training(minicpm_model_config_from_args(args))
    optimizer = _Groups(args)
    schedule = training.get_optimizer_param_scheduler(optimizer).schedule
    config = minicpm_config_from_args(args)
    return {
        "model": {name: getattr(config, name) for name in ("num_layers", "hidden_size", "vocab_size", "scale_depth")},
        "bf16": config.bf16,
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "sequence_length": args.seq_length,
        "optimizer": [args.lr, args.adam_beta1, args.adam_beta2, args.adam_eps, args.weight_decay, args.clip_grad],
        "schedule": schedule.describe(),
        "recompute": [config.recompute_granularity, config.recompute_modules],
    }


def page(blocks: list[str]) -> dict[str, Any]:
    """Run the code of docs/megatron_lm.md, and build what its first block has prepared as `pretrain()` would."""
    on_cpu.command_line(
        "--minicpm-preset minicpm-nano --seq-length 32 --micro-batch-size 2 --train-iters 4 --lr 0.01 --mock-data "
        f"--seed 1234 --spec {LAYER} get_minicpm_block_spec"
    )
    groups.destroy()  # the page makes its own
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/megatron_lm.md", "exec"), names)
    model_config = names["model_cfg"]
    (built,) = model_config.get_builder_cls()(model_config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    config = library.MiniCPMConfig.from_recipe(library.presets["minicpm-nano"])
    same = library.MiniCPMModel(config)
    library.initialize_parameters(same, config, seed=1234)
    wanted = dict(same.named_parameters())
    return {
        "kind": type(built).__name__,
        "weights": [torch.equal(parameter, wanted[name]) for name, parameter in built.named_parameters()],
        "hybrid": type(names["model"]).__name__,
        "scheduler": training.OptimizerParamScheduler.__name__,
    }


def preset_configs() -> dict[str, dict[str, list[Any]]]:
    """Fields in which the config of each preset's command line differs from MiniCPMConfig.from_recipe's."""
    found = {}
    for name, recipe in library.presets.items():
        on_cpu.command_line(f"--minicpm-preset {name} --seq-length 32 --micro-batch-size 2 --train-iters 4 --lr 0.01")
        args = parse_and_validate_args(extra_args_provider=add_minicpm_args)
        ours, wanted = minicpm_config_from_args(args), library.MiniCPMConfig.from_recipe(recipe)
        fields = ModelRecipe.model_fields.keys() & vars(wanted).keys() | {
            "layernorm_epsilon", "activation_func", "gated_linear_unit", "normalization", "hidden_dropout",
            "attention_dropout", "add_bias_linear", "num_moe_experts", "moe_router_dtype", "moe_z_loss_coeff",
        }  # fmt: skip
        found[name] = {
            field: [repr(getattr(ours, field)), repr(getattr(wanted, field))]
            for field in fields
            if getattr(ours, field) != getattr(wanted, field)
        } | {"sizes compared": [len(fields)]}
    return found
