"""Parts of a script for Megatron-LM's `pretrain`: datasets, batches, forward step, loss; and `main`, which starts it.

The paper has nothing to say about any of it: this is causal language modelling on Megatron-Core's GPTDataset.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.megatron_lm.arguments import add_minicpm_args
from minicpm_megatron.megatron_lm.models import minicpm_model_config_from_args
from minicpm_megatron.megatron_lm.trainer import use_minicpm_training
from minicpm_megatron.parallel import device

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def build_datasets(sizes: list[int | None], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test set of as many samples, on the ranks that read them."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,  # `document_starts` says where documents begin, without a mask of the sequence
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )

    def reads() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    train, validation, test = BlendedMegatronDatasetBuilder(kind, sizes, reads, config).build()
    return train, validation, test


# every rank calls it; otherwise Megatron-LM would call it on tensor-parallel rank 0 alone
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def document_starts(tokens: Tensor, end_of_document: int) -> Tensor:
    """Return the `starts` of `document_attention`; an end-of-document token belongs to the document that it ends.

    Args:
        tokens: int64 [b, s].

    Returns:
        int64 [b, s].
    """
    places = torch.arange(tokens.size(1), device=tokens.device)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = (tokens[:, :-1] == end_of_document) * places[1:]
    return begins.cummax(1).values


def next_batch(data: Iterator[dict[str, Tensor]] | None, vp_stage: int | None) -> dict[str, Tensor | None]:
    """This rank's part of the next micro-batch.

    Returns:
        `tokens`, `labels` int64 and `loss_mask` fp32 [b, s / context-parallel ranks], each None on a stage without use
        for it; `attention_mask` None, or with --reset-attention-mask the `starts` of documents [b, s / ranks].
    """
    args = get_args()
    names = ("tokens", "labels", "loss_mask", "position_ids")
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys((*names, "attention_mask"))
    batch: dict[str, Tensor | None] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert data is not None
        read = next(data)
        batch = {name: read[name].cuda(non_blocking=True) for name in names}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    if args.reset_attention_mask:
        assert batch["tokens"] is not None
        batch["position_ids"] = document_starts(batch["tokens"], get_tokenizer().eod)
    batch = get_batch_on_this_cp_rank(
        {name: batch[name] for name in names},
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    # RoPE needs no positions; under this name Megatron-Core has divided the starts as it divides the tokens
    starts = batch.pop("position_ids")
    return batch | {"attention_mask": starts if args.reset_attention_mask else None}


def sum_of_losses(mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One micro-batch as Megatron-LM reads it.

    Args:
        mask: [b, s], a factor on each token's loss.
        losses: fp32 [b, s] in nats.

    Returns:
        The sum over tokens, the number of tokens, and both for the log.
    """
    assert mask is not None, "the last stage has labels"
    total = (losses.float() * mask).sum()
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=total,
            rejection_func=lambda loss: not torch.isfinite(loss).item(),
            message="the loss of a micro-batch is not finite",
            tolerance=0.0,
            fatal=True,
        )
    count = mask.sum().detach().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.to(total.dtype)])}


def forward_step(data: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    """Forward pass of one micro-batch: the output of this stage, and the loss as a function of it."""
    batch = next_batch(data, get_attr_wrapped_model(model, "vp_stage"))
    output = model(batch["tokens"], position_ids=None, attention_mask=batch["attention_mask"], labels=batch["labels"])
    return output, functools.partial(sum_of_losses, batch["loss_mask"])


def main() -> None:
    """Run examples/megatron_lm/pretrain_minicpm.py.

    Raises:
        UserError: this machine has no GPU, or see `train`.
    """
    args = parse_and_validate_args(extra_args_provider=add_minicpm_args)
    if device.on_cpu():
        raise UserError(
            "Megatron-LM's trainer needs CUDA, and this machine has no CUDA device",
            fix="train on CPUs with examples/train.py",
        )
    train(args)


def train(args: argparse.Namespace, datasets: Callable[..., tuple[Any, Any, Any]] = build_datasets) -> None:
    """Train as the command line says.

    Args:
        args: of `parse_and_validate_args`, with those of `add_minicpm_args`.
        datasets: provider of the training, validation and test set.

    Raises:
        UserError: arguments that MiniCPM cannot follow.
    """
    model_config = minicpm_model_config_from_args(args)
    use_minicpm_training(model_config)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
