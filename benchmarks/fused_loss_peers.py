"""The peers of benchmarks/fused_loss.py, each as its own project would be used. Imported only when it is measured."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class Unfit(Exception):
    """A peer that cannot run this case, and why."""


Step = Callable[[], torch.Tensor]


def _alone(inputs: Any) -> None:
    if inputs.group is not None:
        raise Unfit("does not divide the vocabulary")


def _on(inputs: Any, device: str) -> None:
    if inputs.hidden.device.type != device:
        raise Unfit(f"runs on {device} only")


def naive(inputs: Any) -> Step:
    """Linear layer, logits in fp32, torch's cross_entropy."""
    _alone(inputs)
    return lambda: F.cross_entropy(F.linear(inputs.hidden, inputs.weight).float(), inputs.labels)


def torch_own(inputs: Any, **options: Any) -> Step:
    """torch.nn.functional.linear_cross_entropy."""
    _alone(inputs)
    if not hasattr(F, "linear_cross_entropy"):
        raise Unfit("not in this version of torch")
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda: F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, options=chosen)


def deepspeed_tiled(inputs: Any) -> Step:
    """TiledFusedLogitsLoss in tiles of 128 tokens."""
    _alone(inputs)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    head = types.SimpleNamespace(weight=inputs.weight)

    def tile(module: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, module.weight).float()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))

    def step() -> torch.Tensor:
        return TiledFusedLogitsLoss.apply(
            tile,
            head,
            inputs.hidden[None],
            inputs.labels[None],
            None,
            -(-inputs.tokens // 128),
            [inputs.weight],
            "mean",
        )

    return step


def cut_cross_entropy(inputs: Any, impl: str) -> Step:
    """Apple's, compiled by torch or in Triton."""
    _alone(inputs)
    if impl == "cce":
        _on(inputs, "cuda")
    elif "triton" not in sys.modules and inputs.hidden.device.type == "cpu":
        _without_triton()
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, impl=impl)


def _without_triton() -> None:
    """Let cut_cross_entropy be imported where there is no Triton: its compiled form does not use the kernels."""
    try:
        import triton  # noqa: F401
    except ImportError:
        sys.modules["cut_cross_entropy.cce"] = types.ModuleType("cut_cross_entropy.cce")
        sys.modules["cut_cross_entropy.cce"].cce_linear_cross_entropy = None  # type: ignore[attr-defined]


def liger(inputs: Any) -> Step:
    """Liger-Kernel's."""
    _alone(inputs)
    _on(inputs, "cuda")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(inputs.weight, inputs.hidden, inputs.labels)


def megatron(inputs: Any, *, fused: bool) -> Step:
    """Megatron-Core's head and vocabulary-parallel loss, without tensor parallelism on a group of one."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    if inputs.group is None:
        raise Unfit("is the naive one without tensor parallelism")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(inputs.group.size())
    group = parallel_state.get_tensor_model_parallel_group()

    def step() -> torch.Tensor:
        logits = linear_with_grad_accumulation_and_async_allreduce(
            inputs.hidden[:, None], inputs.weight, None, False, True, False, tp_group=group
        )
        labels = inputs.labels[:, None]
        if fused:
            return fused_vocab_parallel_cross_entropy(logits, labels, group).mean()
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels).mean()

    return step


CANDIDATES: dict[str, Callable[[Any], Step]] = {
    "naive": naive,
    "torch linear_cross_entropy": torch_own,
    "DeepSpeed TiledFusedLogitsLoss": deepspeed_tiled,
    "cut-cross-entropy torch_compile": lambda inputs: cut_cross_entropy(inputs, "torch_compile"),
    "cut-cross-entropy cce": lambda inputs: cut_cross_entropy(inputs, "cce"),
    "Liger": liger,
    "Megatron unfused": lambda inputs: megatron(inputs, fused=False),
    "Megatron fused": lambda inputs: megatron(inputs, fused=True),
}
