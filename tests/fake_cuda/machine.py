"""The pretended machine: one H200 a rank, as torch, Megatron-Core and DeepSpeed ask for it.

Only for processes that `launch.run` starts: what is patched here stays patched. No patch touches the project's code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.fake_cuda import synchronisations
from tests.fake_cuda.launch import SHIM

NAME, MEMORY, MULTIPROCESSORS = "NVIDIA H200", 141 * 10**9, 132
MOST_DEVICES = 127  # of which torch asks some when backward starts; one more than 127 would be negative in C


class Stream:
    """A torch.cuda.Stream on which nothing runs."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        """As torch.cuda.Stream."""

    def synchronize(self) -> None:
        synchronisations.note("synchronize")

    def wait_stream(self, stream: Any) -> None:
        """Streams wait for each other on the device; the host goes on."""

    def wait_event(self, event: Any) -> None:
        """As `wait_stream`."""

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    """A torch.cuda.Event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """As torch.cuda.Event."""

    def record(self, stream: Any = None) -> None:
        """Nothing to do."""

    def wait(self, stream: Any = None) -> None:
        """Nothing to do."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronisations.note("synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def pretend() -> None:
    """Lay all patches of torch."""
    _answer_as_runtime()
    _answer_as_generators()
    _run_backward_as_if_devices_were_there()
    synchronisations.watch()
    from torch._subclasses import fake_tensor

    # without a device torch would make fake CUDA tensors of meta tensors only, and else initialise a context
    patch(fake_tensor.FakeTensorMode, avoid_device_init=property(lambda self: True))
    patch(fake_tensor, init_gpu_context=lambda device: None)
    patch(torch.nn.Module, _apply=_apply)
    # it takes torch's own streams alone
    patch(torch.Tensor, record_stream=lambda tensor, stream: None)
    _do_without_pinned_memory()


def patch(owner: Any, **attributes: Any) -> None:
    """Set attributes of a module or class."""
    for name, value in attributes.items():
        setattr(owner, name, value)


def _answer_as_runtime() -> None:
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=MULTIPROCESSORS, total_memory=MEMORY
    )
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: synchronisations.note("synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for kind in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[kind] = lambda device=None: 0
    patch(torch.cuda, **answers)
    torch._C._ensureCUDADeviceGuardSet()


def _answer_as_generators() -> None:
    """CUDA generators have no state here: numbers drawn from them would be fake, too."""
    from megatron.core.tensor_parallel import random as megatron_random

    state = torch.zeros(16, dtype=torch.uint8)

    def get(*_: Any, **__: Any) -> torch.Tensor:
        return state

    def ignore(*_: Any, **__: Any) -> None:
        return None

    for module in (torch.cuda, torch.cuda.random):
        patch(module, get_rng_state=get, set_rng_state=ignore, manual_seed=ignore, manual_seed_all=ignore)
    # Megatron-Core has its own, which reach into torch's C++
    patch(megatron_random, _get_cuda_rng_state=get, _set_cuda_rng_state=ignore)


def _do_without_pinned_memory() -> None:
    """Host memory stays pageable: only a driver can pin it."""
    make = torch.tensor
    patch(torch, tensor=lambda *arguments, pin_memory=False, **keywords: make(*arguments, **keywords))
    patch(torch.Tensor, pin_memory=lambda tensor, device=None: tensor)


def _run_backward_as_if_devices_were_there() -> None:
    shim, run = ctypes.CDLL(os.environ[SHIM]), torch.autograd.graph._engine_run_backward

    def backward(*arguments: Any, **keywords: Any) -> Any:
        shim.fake_cuda_set_devices(MOST_DEVICES)
        try:
            return run(*arguments, **keywords)
        finally:
            shim.fake_cuda_set_devices(0)

    for module in (torch.autograd.graph, torch.autograd):
        patch(module, _engine_run_backward=backward)


def _apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`torch.nn.Module._apply`, which would swap fake parameters, and cannot where an optimizer knows them.

    DeepSpeed calls it to bring a model to its device and dtype, where all parameters must be already.
    """
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        applied = function(tensor)
        if (applied.device, applied.dtype) != (tensor.device, tensor.dtype):
            raise AssertionError(f"{tensor.device} {tensor.dtype} is moved to {applied.device} {applied.dtype}")
    return module


def join(world_size: int, rank: int = 0) -> None:
    """Join a job of which no other rank exists: collectives return at once and leave tensors as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # DeepSpeed looks for them
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
