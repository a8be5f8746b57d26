"""Compile the Triton kernels of the fused loss as their call does, for GPUs that are not there; prints what came out.

Triton's own driver asks a GPU what it is. The driver here claims an architecture, and `JITFunction.run` ends where the
kernel would be started, so that types, alignments and divisibilities are those that Triton finds in the arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from minicpm_megatron.model import fused_loss_triton
from minicpm_megatron.model.fused_loss_chunks import ChunkedHead, Part
from tests.fake_cuda.cases import ARCHITECTURES, AS_RUN, PACKED, PRECISIONS, kernel_case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARY, ROWS = 122_753, 122_880
TOKENS = 16  # Triton compiles the same kernel for all multiples
TOOLS = Path(nvidia.__file__).parent / "bin"
ACCESSES = re.compile(r"\b(?:LDG|STG)\.E[\w.]*|\b(?:LDL|STL)\b")


class ClaimedDriver(DriverBase):
    """A driver that answers the compiler's questions alone."""

    architecture = ARCHITECTURES[0]

    def __init__(self) -> None:
        """Nothing is opened."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def logits_as_run(dtype: torch.dtype) -> torch.Tensor:
    """Logits [TOKENS, VOCABULARY] as `ChunkedHead` hands them to the kernels."""
    hidden, weight = torch.zeros(TOKENS, 8, dtype=dtype), torch.zeros(ROWS, 8, dtype=dtype)
    part = Part(first=0, vocab_size=VOCABULARY, logit_scale=1.0, z_loss=0.0, chunk_bytes=2**30, kernels="triton")
    return ChunkedHead(hidden, weight, torch.zeros(TOKENS, dtype=torch.int64), part).logits(slice(0, TOKENS))


def compile_both(logits: torch.Tensor) -> dict[str, Any]:
    """{kernel: what Triton compiled} for such logits."""
    found = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        found[kernel.__name__] = run(kernel, *arguments, **keywords | {"warmup": True})

    JITFunction.run = compile_only
    try:
        labels, of_token = torch.zeros(logits.size(0), dtype=torch.int64), torch.zeros(2, logits.size(0))
        fused_loss_triton.statistics(logits, labels, of_token)
        fused_loss_triton.differentiate_(logits, labels, of_token[0], of_token[0], of_token[1])
    finally:
        JITFunction.run = run
    return found


def describe(compiled: Any, architecture: int) -> dict[str, Any]:
    """Registers and spills by ptxas, and accesses of global and local memory in SASS by width, with their number."""
    with tempfile.TemporaryDirectory() as scratch:
        ptx, cubin = Path(scratch, "kernel.ptx"), Path(scratch, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        suffix = "a" if architecture == 90 else ""
        said = _tool("ptxas", "-v", f"-arch=sm_{architecture}{suffix}", str(ptx), "-o", str(cubin))
        cubin.write_bytes(compiled.asm["cubin"])  # the one Triton would load
        sass = _tool("nvdisasm", "-c", str(cubin))
    accesses = Counter(ACCESSES.findall(sass))
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),  # type: ignore[index]
        "spilled bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "warps": compiled.metadata.num_warps,
        **{f"{access} instructions": number for access, number in sorted(accesses.items())},
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def main() -> None:
    """Print {case: description} as JSON."""
    driver = ClaimedDriver()
    triton.runtime.driver.set_active(driver)
    found = {}
    for driver.architecture in ARCHITECTURES:
        for precision in PRECISIONS:
            dtype = DTYPES[precision]
            layouts = {AS_RUN: logits_as_run(dtype), PACKED: torch.empty(TOKENS, VOCABULARY, dtype=dtype)}
            for layout, logits in layouts.items():
                for kernel, compiled in compile_both(logits).items():
                    case = kernel_case(kernel, driver.architecture, precision, layout)
                    found[case] = describe(compiled, driver.architecture)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
