"""Everything that lets Megatron-Core run without CUDA, and nothing else that knows about devices.

Written for megatron-core 0.19. Megatron-Core asks `torch.cuda.current_device()` where it allocates buffers
and keeps CUDA generators for dropout. Without CUDA the first must answer the CPU, and the second must do nothing:
MiniCPM has no dropout, so no generator is ever drawn from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from minicpm_megatron.parallel.zigzag import zigzag


class _NoRngTracker:
    """Stands where Megatron-Core keeps CUDA generators; every fork leaves the random state alone."""

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield

    def reset(self) -> None:
        return None

    def add(self, name: str, seed: int) -> None:
        return None

    def get_states(self) -> dict[str, Any]:
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        return None

    def is_initialized(self) -> bool:
        return True

    def is_inference_rng_tracker(self) -> bool:
        return False


def on_cpu() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """torch.distributed's backend for this device."""
    return "gloo" if on_cpu() else "nccl"


def prepare() -> torch.device:
    """Choose this rank's device and make Megatron-Core run on it; safe to call more than once.

    On CUDA the rank takes the device of LOCAL_RANK. On CPU the cores are shared out between the ranks of the machine
    (unless OMP_NUM_THREADS is set) and `patch_megatron` is called.
    """
    if not on_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return device()
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun's name, deepspeed's name, and neither: this machine is the whole job
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    patch_megatron()
    return device()


def patch_megatron() -> None:
    """Let Megatron-Core run on a machine without CUDA; elsewhere do nothing. Safe to call more than once.

    `MiniCPMConfig` and the layer specs call it, so that a script of one's own needs no call.
    """
    if not on_cpu():
        return
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    # an object, not an index: torch.empty(device=0) would mean CUDA device 0
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    megatron_random._CUDA_RNG_STATE_TRACKER = _NoRngTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # activation recompute saves and restores the generators around the second forward pass
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    # Megatron-Core's own builds an index in pinned memory, which only CUDA has
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = lambda emb, dim, group: zigzag(
        emb, group.size(), group.rank(), dim
    )
    # it makes a CUDA stream unless it has one, and fetches the sizes of its messages over it
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _sizes_as_lists


def _sizes_as_lists(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """On CPU sizes need no fetching, but gloo takes them as numbers."""
    for name in ("input_splits", "output_splits"):
        sizes = getattr(dispatcher, name)
        if isinstance(sizes, torch.Tensor):
            setattr(dispatcher, name, sizes.tolist())
    return tokens_per_expert


_TRACKED = "megatron."  # begins the names of Megatron-Core's generators among the states


def rng_state() -> dict[str, torch.Tensor]:
    """Return the states of torch's and Megatron-Core's generators on this rank: uint8 tensors on the CPU."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    if not on_cpu():
        states["cuda"] = torch.cuda.get_rng_state()
        tracked = get_cuda_rng_tracker().get_states()
        states |= {f"{_TRACKED}{name}": state.cpu() for name, state in tracked.items()}
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned; a generator that this machine lacks is left out.

    A generator that the states lack, since they were saved on a CPU, keeps its own state.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    if not on_cpu() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
        tracker = get_cuda_rng_tracker()
        saved = {name.removeprefix(_TRACKED): state for name, state in states.items() if name.startswith(_TRACKED)}
        tracker.set_states({**tracker.get_states(), **saved})


def from_host(values: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor's values on this rank's device, without waiting for what the device still has to do."""
    if on_cpu():
        return values
    # only from page-locked memory is a copy asynchronous; torch keeps that memory until the copy is done
    return values.pin_memory().to(device(), non_blocking=True)


def peak_memory_bytes() -> int:
    """Largest memory this rank has held: of the CUDA allocator, or of the process on CPU."""
    if not on_cpu():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def synchronize() -> None:
    """Wait until the device has done what was asked, so that a clock reading means something."""
    if not on_cpu():
        torch.cuda.synchronize()
