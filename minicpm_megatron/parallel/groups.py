"""Process groups: Megatron-Core's `parallel_state`, and the same groups as DeepSpeed wants to see them."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import device, meeting, open_files
from minicpm_megatron.recipe import Layout

DEFAULT_TIMEOUT = datetime.timedelta(minutes=10)


class MegatronMPU:
    """Megatron-Core's `parallel_state` as DeepSpeed's `mpu`.

    DeepSpeed asks for three names that `parallel_state` no longer has (get_model_parallel_group, _world_size, _rank);
    here they are tensor parallelism, over which DeepSpeed reduces norms. What is not named here is Megatron-Core's own.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    # DeepSpeed's sequence parallelism is Megatron-Core's context parallelism: gradients are summed over its ranks and
    # averaged over data-parallel ones, and ZeRO divides over both
    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_context_parallel_group()

    def get_sequence_parallel_world_size(self) -> int:
        return parallel_state.get_context_parallel_world_size()

    def get_sequence_parallel_rank(self) -> int:
        return parallel_state.get_context_parallel_rank()

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_sequence_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_sequence_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)


def world_size() -> int:
    """Number of ranks the launcher started, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def initialize(
    layout: Layout,
    *,
    init_method: str | None = None,
    timeout: datetime.timedelta = DEFAULT_TIMEOUT,
    seed: int = 0,
    job: str = "",
) -> None:
    """Join the job and build Megatron-Core's groups for `layout`.

    Args:
        layout: sizes of every kind of parallelism.
        init_method: torch.distributed's rendezvous; None: the launcher's environment variables, or, when this is the
            only process and no launcher set them, a port of the machine's choosing.
        timeout: how long a collective may wait before the job is given up.
        seed: of the random generators, as `seed_generators` takes it.
        job: name that the ranks of this job share and those of others do not. Without it ranks whose launcher's port is
            another job's would meet that job's ranks.

    Raises:
        UserError: the launcher's port is in use, or the process may not open as many files as it needs sockets.
    """
    device.prepare()
    open_files.allow_many()
    with _refusals():
        _join(layout, init_method, timeout, job)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            create_gloo_process_groups=False,
        )
    seed_generators(seed)


def _join(layout: Layout, init_method: str | None, timeout: datetime.timedelta, job: str) -> None:
    """Make the process group of all ranks, unless there is one."""
    if not dist.is_initialized():
        if init_method is None and "MASTER_ADDR" not in os.environ and layout.world_size == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, launcher or not
            store = dist.HashStore()
            dist.init_process_group(device.backend(), store=store, rank=0, world_size=1, timeout=timeout)
        elif init_method is None:
            common, _, _ = next(dist.rendezvous("env://", rank(), layout.world_size, timeout=timeout))
            ours = dist.PrefixStore(job, common)
            if meeting.outlives_ranks():  # and is full of the addresses of those that died
                ours = dist.PrefixStore(meeting.name_of_start(ours, rank(), layout.world_size, timeout), ours)
            dist.init_process_group(
                device.backend(), store=ours, rank=rank(), world_size=layout.world_size, timeout=timeout
            )
        else:
            dist.init_process_group(
                device.backend(), init_method=init_method, rank=rank(), world_size=layout.world_size, timeout=timeout
            )


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn those errors of torch and gloo into UserErrors that a user can do something about.

    Torch 2.13 raises them as RuntimeErrors that are told apart by their text alone.
    """
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {os.environ.get('MASTER_PORT')} is in use, by another run perhaps",
                where="the launcher's port",
                fix="give another one: deepspeed --master_port PORT, or torchrun --master_port PORT",
            ) from None
        if os.strerror(errno.EMFILE) in str(error):
            raise open_files.too_few() from None
        raise


def seed_generators(seed: int) -> None:
    """Seed torch's generators and Megatron-Core's CUDA generators on this rank.

    On CUDA Megatron-Core forks generators of its own wherever it draws or computes activations again, and raises where
    they were never seeded. On CPU `device.prepare` stands in for them.

    Args:
        seed: of the run; torch's generator takes seed + rank, Megatron-Core's derive theirs from the layout.
    """
    torch.manual_seed(seed + rank())
    if not device.on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def is_initialized() -> bool:
    """Whether `initialize` has been called."""
    return bool(parallel_state.is_initialized())


def destroy() -> None:
    """Leave the groups and the job."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
