"""Stand-ins for what asks a device, data or ranks that are not there; those of kernels read and write as much."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.fake_cuda.machine import patch


def install() -> None:
    """Lay all of them."""
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    from minicpm_megatron.model import block_attention, document_attention, fused_loss_chunks
    from minicpm_megatron.model.attention_kernels import auto

    # torch asks the device which kernel of attention it has
    F.scaled_dot_product_attention = _attention
    # counts must not depend on whether flash-attn is installed
    auto.flash_attn_func = document_attention.flash_attn_varlen_func = None
    block_attention._flash_attn_forward = block_attention._flash_attn_backward = None
    # Triton's kernels cannot be started here; test_kernels.py compiles them
    triton = ModuleType("minicpm_megatron.model.fused_loss_triton")
    triton.statistics, triton.differentiate_ = _statistics, _differentiate_  # type: ignore[attr-defined]
    sys.modules[triton.__name__] = triton
    # the same kernels whether Triton is installed or not: the loss asks whether it could be imported
    finder = SimpleNamespace(find_spec=lambda name: name)
    patch(fused_loss_chunks, importlib=SimpleNamespace(util=finder))
    # compiled in a minute, and made for numbers; the moments are those of DeepSpeed's own class
    operation = SimpleNamespace(create_adam=_ignore, adam_update=_ignore, destroy_adam=_ignore)
    CPUAdamBuilder.load = lambda builder: operation
    # ZeRO 3 of DeepSpeed 0.19 compares numbers with those of ranks that are not there
    for module in (stage3, partition_parameters, partitioned_param_coordinator):
        module.assert_ints_same_as_other_ranks = lambda numbers: None
    # objects of ranks that are not there: cases say where they would be this rank's
    dist.all_gather_object = _everyone_alike


def _everyone_alike(objects: list[Any], mine: Any, group: Any = None) -> None:
    objects[:] = [mine] * len(objects)


def _ignore(*_: Any) -> None:
    return None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The operation that `scaled_dot_product_attention` runs on an H200: flash in half precision, else the
    memory-efficient one, for which it repeats keys and values."""
    assert attn_mask is None and dropout_p == 0.0
    operations: Any = torch.ops.aten
    if query.dtype in (torch.bfloat16, torch.float16):
        flash = operations._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (each.repeat_interleave(query.size(1) // each.size(1), 1) for each in (key, value))
    efficient = operations._scaled_dot_product_efficient_attention
    return efficient(query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


@torch.library.custom_op("fake_cuda::statistics", mutates_args=("found",))
def _read_logits(logits: Tensor, labels: Tensor, found: Tensor) -> None:
    raise AssertionError("only fake tensors come here")


@torch.library.custom_op("fake_cuda::differentiate_", mutates_args=("logits",))
def _change_logits(logits: Tensor, labels: Tensor, log_sum: Tensor, softmax_factor: Tensor, factor: Tensor) -> None:
    raise AssertionError("only fake tensors come here")


_read_logits.register_fake(lambda logits, labels, found: None)
_change_logits.register_fake(lambda logits, labels, log_sum, softmax_factor, factor: None)


def _statistics(logits: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    _read_logits(logits, labels, found)
    return found


def _differentiate_(logits: Tensor, labels: Tensor, log_sum: Tensor, softmax_factor: Tensor, factor: Tensor) -> Tensor:
    _change_logits(logits, labels, log_sum, softmax_factor, factor)
    return logits
