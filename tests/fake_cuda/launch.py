"""Start a script of this folder in a process with the shim preloaded, and read the JSON it prints."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
SHIM = "FAKE_CUDA_SHIM"  # the environment's name for the path of the compiled shim


@functools.cache
def missing() -> str | None:
    """Name what the pretended machine needs and this one lacks; None: nothing."""
    if shutil.which("cc") is None:
        return "no C compiler (cc) for tests/fake_cuda/shim.c"
    if sys.platform != "linux":
        return "LD_PRELOAD is Linux's"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / "lib" / "libc10_cuda.so").exists():
        return "torch's CPU build: a pretended CUDA device needs its CUDA build"
    return None


@functools.cache
def missing_triton() -> str | None:
    """Why kernels cannot be compiled here; None: they can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed"
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    absent = [name for name in ("ptxas", "nvdisasm") if not (tools / name).exists()]
    return f"Triton's wheel has no {' and no '.join(absent)}" if absent else None


def run(script: str, *arguments: str, shim: bool = True, **environment: str) -> Any:
    """Run `python -m tests.fake_cuda.SCRIPT ARGUMENTS` and return its last line, which is JSON.

    Raises:
        AssertionError: it failed; its output is the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(Path(scratch, "triton")),  # nothing compiled before is taken
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            **environment,
        }
        if shim:
            library = _compile(Path(scratch))
            # DeepSpeed chooses its accelerator when it is imported
            variables |= {SHIM: str(library), "LD_PRELOAD": str(library), "DS_ACCELERATOR": "cuda"}
        done = subprocess.run(
            [sys.executable, "-m", f"tests.fake_cuda.{script}", *arguments],
            cwd=REPOSITORY,
            env=variables,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise AssertionError(f"{script} exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile(folder: Path) -> Path:
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(FOLDER / "shim.c")]
    subprocess.run(command, check=True, capture_output=True)
    return library
