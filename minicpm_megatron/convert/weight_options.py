"""What a conversion can be asked for about its weights; loads no torch."""

from __future__ import annotations

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Of the command line -> of torch, and of config.json."""
DEFAULT_DTYPE = "bf16"  # what every MiniCPM is published in
DEFAULT_SHARD = "5GB"
