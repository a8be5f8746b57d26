"""Our writer against the library's reader."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minicpm_megatron.storage.safetensors_file import DTYPE_NAMES, write_safetensors


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    flat = torch.arange(24, dtype=torch.float32)
    tensors = {f"of {dtype}": (torch.arange(7) % 2).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"shared a": flat[:12], "shared b": flat[6:18], "strided": flat.view(4, 6).t()[1:3]}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.5)}
    record = write_safetensors(tmp_path / "x.safetensors", tensors.items(), {"note": "中文"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [("a", torch.ones(3))], {})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, [("a", torch.zeros(3))], {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
