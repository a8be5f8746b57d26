"""Megatron-LM's trainer (megatron-core 0.19.2) on a CPU: every patch that `pretrain()` needs for it, and nothing else.

`parallel.device` has laid its own patches (`torch.cuda.current_device`, the generators). The list here is the distance
between `pretrain()` and a machine without CUDA:

1. `initialize_megatron` asserts CUDA unless it is told otherwise, and makes process groups only with CUDA: it is told,
   and finds the groups made.
2. `set_jit_fusion_options` compiles fused kernels: left out, as no module of MiniCPM calls them.
3. device="cuda" and .cuda() stand in the trainer's code: tensors stay where they are.
4. Gradient clipping asserts that gradients are 'torch.cuda.FloatTensor': tensors say so of themselves.
5. Streams, events and `synchronize` do nothing; the generators that are saved and restored have no state.
6. With tensor or context parallelism `validate_args` asks which GPU it is: a Hopper.

Command lines add --distributed-backend gloo, --disable-gloo-process-groups and --num-workers 0.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import arguments, training
from megatron.training.global_vars import unset_global_variables
from torch.overrides import TorchFunctionMode

from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Layout

ARGUMENTS = """
    --tokenizer-type NullTokenizer --use-cpu-initialization --distributed-backend gloo --disable-gloo-process-groups
    --num-workers 0 --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
    --eval-iters 0 --eval-interval 1000 --log-interval 1
"""


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1:
            return function(*args).replace("torch.", "torch.cuda.")
        return function(*args, **kwargs)


class _Nothing:
    """A stream, an event, or the context of one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def start(layout: dict[str, int], world: int) -> None:
    """Make Megatron-Core's groups; torch.distributed has been initialised.

    Args:
        layout: tp, pp, cp, ep (default 1), sp, and vp, the virtual stages of a pipeline rank.
    """
    sizes = {"tp": 1, "pp": 1, "cp": 1, "ep": 1} | layout
    data_parallel = world // (sizes["tp"] * sizes["pp"] * sizes["cp"])
    groups.initialize(Layout(world, sizes["tp"], sizes["pp"], sizes["cp"], sizes["ep"], data_parallel, (1,)))
    if "vp" in layout:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(layout["vp"])
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)


def command_line(text: str) -> None:
    """Let `text` be the arguments of this process, and forget those that were parsed before."""
    unset_global_variables()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as examples/gpu_environment.sh sets it
    sys.argv = ["pretrain_minicpm.py", *ARGUMENTS.split(), *text.split()]


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Patches 1 to 6; for processes that end afterwards."""
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda **_: None
    arguments.get_device_arch_version = lambda: 9
    for name in ("Stream", "stream", "current_stream", "Event"):
        setattr(torch.cuda, name, _Nothing)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_rng_state"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    with _CudaIsCpu():
        yield
