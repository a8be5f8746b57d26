"""MiniCPM's arguments for Megatron-LM's command line, and presets as defaults of Megatron-LM's own.

    args = parse_and_validate_args(extra_args_provider=add_minicpm_args)

Whatever is written on the command line wins over a preset.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.recipe import ModelRecipe
from minicpm_megatron.recipe.presets import get_preset

# what all MiniCPM models share, as destinations of Megatron-LM 0.19's arguments
FAMILY: dict[str, Any] = {
    "swiglu": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": ModelRecipe.model_fields["init_method_std"].default,
    "transformer_impl": "local",
}
FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "init_method_std",
    "parametrization",
    "embedding_role",
)
EXPERT_FIELDS = (
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_router_pre_softmax",
)


def preset_defaults(model: ModelRecipe) -> dict[str, Any]:
    """A model's shape as destinations and values of Megatron-LM's and MiniCPM's arguments."""
    require(
        model.rotary_base == int(model.rotary_base),
        "rotary_base",
        f"Megatron-LM takes whole numbers, not {model.rotary_base}",
    )
    found = {name: getattr(model, name) for name in FIELDS}
    found |= {
        "group_query_attention": True,
        "layernorm_epsilon": model.norm_epsilon,
        "rotary_base": int(model.rotary_base),
        "minicpm_rope_scaling_type": model.rope_scaling.type,
        "minicpm_rope_scaling_factor": model.rope_scaling.factor,
    }
    if model.num_moe_experts is not None:
        found |= {name: getattr(model, name) for name in EXPERT_FIELDS}
        found |= {
            "num_experts": model.num_moe_experts,
            "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
        }
    return found


def _preset_on_command_line() -> str | None:
    # defaults must be known before Megatron-LM parses, and it hands its extra_args_provider the parser only
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--minicpm-preset")
    found: str | None = early.parse_known_args(sys.argv[1:])[0].minicpm_preset
    return found


def add_minicpm_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `minicpm`, and make MiniCPM's the defaults of Megatron-LM's arguments.

    This is an `extra_args_provider` of Megatron-LM.

    Raises:
        UserError: --minicpm-preset names no preset.
    """
    defaults = {name: field.default for name, field in ModelRecipe.model_fields.items()}
    group = parser.add_argument_group(title="minicpm")
    group.add_argument(
        "--minicpm-preset", help="A preset of minicpm_megatron.presets as defaults of the sizes, e.g. minicpm-2.4b."
    )
    group.add_argument(
        "--scale-emb", type=float, default=defaults["scale_emb"], help="Factor on the output of the word embedding."
    )
    group.add_argument(
        "--scale-depth",
        type=float,
        default=defaults["scale_depth"],
        help="Every block's output is multiplied by this / sqrt(transformer layers).",
    )
    group.add_argument(
        "--dim-model-base",
        type=int,
        default=defaults["dim_model_base"],
        help="Width that --init-method-std and --lr are meant for; muP scales them by hidden size / this.",
    )
    group.add_argument(
        "--parametrization",
        choices=("mup", "standard"),
        default=defaults["parametrization"],
        help="mup: learning rates, initial weights and logits scale with width; standard: none of them.",
    )
    group.add_argument(
        "--embedding-role",
        choices=("vector", "matrix"),
        default=defaults["embedding_role"],
        help="What muP takes the embedding and the LM head for.",
    )
    group.add_argument(
        "--minicpm-rope-scaling-type",
        choices=("none", "dynamic", "ntk", "product"),
        default="none",
        help="How the base of the rotary positions grows with the context.",
    )
    group.add_argument("--minicpm-rope-scaling-factor", type=float, help="How many times as long the context becomes.")
    group.add_argument(
        "--no-minicpm-fused-loss",
        action="store_false",
        dest="fused_loss",
        help="Make whole logits before the loss instead of joining LM head and loss chunk by chunk.",
    )
    group.add_argument(
        "--wsd-decay-shape",
        default="exponential",
        help="Curve of the decay of --lr-decay-style WSD: exponential (with --wsd-half-life-*), linear, cosine, "
        "1-sqrt, megatron-exponential, or one that another package registered.",
    )
    group.add_argument(
        "--wsd-half-life-iters", type=float, help="Exponential decay: iterations in which the learning rate halves."
    )
    group.add_argument(
        "--wsd-half-life-samples", type=float, help="The same in samples, for training by --train-samples."
    )
    parser.set_defaults(**FAMILY, minicpm_training=False)
    preset = _preset_on_command_line()
    if preset is not None:
        parser.set_defaults(**preset_defaults(get_preset(preset)))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments with which MiniCPM's optimizer groups, initial weights or schedule would be others.

    The settings of the model itself are checked where it is built (`model.supported`).

    Args:
        args: of `parse_and_validate_args`, with those of `add_minicpm_args`.

    Raises:
        UserError: naming the first such argument and what to write instead.
    """
    where = "Megatron-LM's arguments"
    refusals = (
        (args.use_mup, "--use-mup scales widths a second time", "leave it out; MiniCPM's muP is --dim-model-base"),
        (
            args.optimizer != "adam",
            f"muP's learning rates are Adam's, not those of {args.optimizer}",
            "--optimizer adam",
        ),
        (
            args.decoupled_lr is not None,
            "--decoupled-lr gives the embedding a learning rate of its own",
            "leave it out",
        ),
        (args.embedding_init_method_std is not None, "--embedding-init-method-std is not used", "--init-method-std"),
        (args.init_method_xavier_uniform, "--init-method-xavier-uniform is not used", "--init-method-std"),
        (args.init_model_with_meta_device, "--init-model-with-meta-device leaves no weights to set", "leave it out"),
        (args.lr_warmup_init != 0, "--lr-warmup-init is one learning rate for all groups of muP", "leave it out"),
        (
            args.step_batch_size_schedule is not None,
            "the batch grows in mid-run",
            "leave out --step-batch-size-schedule",
        ),
        (
            args.lr_wsd_decay_style != "exponential",
            f"--lr-wsd-decay-style {args.lr_wsd_decay_style} is not used",
            "name the curve with --wsd-decay-shape",
        ),
        (
            args.use_checkpoint_opt_param_scheduler,
            "--use-checkpoint-opt_param-scheduler: a checkpoint of Megatron-LM does not hold the decay of a schedule",
            "repeat the schedule's arguments, or change them with --override-opt_param-scheduler",
        ),
        (
            args.reset_attention_mask and args.pipeline_model_parallel_size > 1,
            "--reset-attention-mask: only the first pipeline stage sees where documents end",
            "--pipeline-model-parallel-size 1",
        ),
    )
    for wrong, what, fix in refusals:
        if wrong:
            raise UserError(what, where=where, fix=fix)
