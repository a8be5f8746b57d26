"""Silence lines that libraries print when they start and that tell a user of a command nothing."""

from __future__ import annotations

import logging
import os
import warnings


def only_our_lines() -> None:
    """Silence what the libraries say at start-up about optional accelerators that are missing."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\..*")
    for name in (
        # "No CUDA runtime is found", on a machine with a CUDA compiler and no GPU
        "torch.utils.cpp_extension",
        # "GPTModel IS DEPRECATED", from Megatron-Core 0.19 on; docs/megatron_lm.md says which model is trained and why
        "megatron.core.models.gpt.gpt_model",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
