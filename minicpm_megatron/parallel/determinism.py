"""Settings under which a step on CUDA gives the same bits whenever it is run again on the same layout and cards.

Without them atomic additions in backward kernels (flash-attn, index operations), cuBLAS' choice of workspace and NCCL's
choice of algorithm change the last bits from one run to the next. On CPU the same run gives the same bits anyway.
"""

from __future__ import annotations

import os

import torch

from minicpm_megatron.errors import UserError

ENVIRONMENT = {
    # cuBLAS: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Megatron-Core 0.19 accepts more; a ring adds in an order that rank and size alone decide
    "NCCL_ALGO": ("Ring",),
}
"""Environment variable -> values that make its library deterministic, ours first. Each library reads its own when it is
first used."""


def make_deterministic() -> None:
    """Choose deterministic kernels for this process; call it before the first matrix product and collective.

    torch then raises where an operation has no deterministic kernel, and the attention of this package asks flash-attn
    for its deterministic backward.

    Raises:
        UserError: the environment says otherwise.
    """
    for name, values in ENVIRONMENT.items():
        found = os.environ.setdefault(name, values[0])
        if found not in values:
            raise UserError(
                f"{name} is {found!r}, with which results differ from run to run",
                where="training.deterministic",
                fix=f"unset it, or set it to {' or '.join(values)}",
            )
    torch.use_deterministic_algorithms(True)
    # torch would also fill what `empty` returns, so that reads of unwritten memory repeat; nothing here reads it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
