"""What experiments were run on, in words."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def describe_machine() -> str:
    """GPUs where there are any, else the processor: "8 x NVIDIA H100 80GB HBM3", "2 cores of Intel(R) Xeon(R)"."""
    import torch  # seconds, which a command that only reads its arguments saves

    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return ", ".join(f"{count} x {name}" for name, count in names.items())
    return f"{len(os.sched_getaffinity(0))} cores of {_processor()}"


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] not in ("", "unknown") else os.uname().machine
