"""Our streamed files against the library's own reader, and what is left when the disk fails."""

from __future__ import annotations

import contextlib
import hashlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from minicpm_megatron.storage.safetensors_file import DTYPE_NAMES, write_safetensors


def _bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    buffer = torch.arange(64, dtype=torch.float32)
    tensors = {f"of {dtype}": torch.arange(1, 8).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"view a": buffer[3:9], "view b": buffer[3:9], "turned": buffer.view(8, 8).t(), "scalar": buffer[5]}
    tensors |= {"empty": torch.empty(0, 3), "nan": torch.tensor([float("nan"), float("-inf"), -0.0])}
    path = tmp_path / "x.safetensors"
    record = write_safetensors(path, tensors.items(), {"table": "[]"})
    found = safetensors.torch.load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert _bytes(found[name]) == _bytes(tensor)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"table": "[]"}
    content = path.read_bytes()
    assert (record.name, record.size, record.sha256) == (path.name, len(content), hashlib.sha256(content).hexdigest())


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 4 KiB: not even the log of the tests, so for as short as can be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", torch.ones(4))], {})
    before = path.read_bytes()
    with pytest.raises(OSError), small_files():
        write_safetensors(path, [("a", torch.ones(4096))], {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
