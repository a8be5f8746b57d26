"""Document boundaries are read once for all layers, and anew when they change."""

from __future__ import annotations

import pytest
import torch

from minicpm_megatron.model import document_attention as module
from tests.device import on_cuda, put

LENGTH = 12
ATOL = 1e-5 if on_cuda() else 1e-6  # of sums of 12 products around 1: a GPU's kernel may add fp32 in another order


def attend(starts: torch.Tensor) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    q, k, v = put(torch.randn(3, LENGTH, 2, 4, 8, generator=random)).unbind()
    return module.document_attention(q, k, v, starts, 0.3)


def reference(starts: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs in fp64, those of other documents hidden."""
    random = torch.Generator().manual_seed(0)
    q, k, v = put(torch.randn(3, LENGTH, 2, 4, 8, generator=random).double()).unbind()
    scores = 0.3 * torch.einsum("ibhd,jbhd->bhij", q, k)
    keys = put(torch.arange(LENGTH))
    seen = (keys <= keys[:, None]) & (keys >= starts[:, :, None])
    return torch.einsum("bhij,jbhd->ibhd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def documents(*rows: list[int]) -> torch.Tensor:
    """[rows, LENGTH] from where documents begin."""
    places = torch.arange(LENGTH)
    begins = [torch.tensor(row) for row in rows]
    return put(torch.stack([begin[torch.searchsorted(begin, places, right=True) - 1] for begin in begins]))


def test_layers_share_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = module._bounds

    def counted(starts: torch.Tensor) -> list[list[int]]:
        read.append(starts)
        return plain(starts)

    monkeypatch.setattr(module, "_bounds", counted)
    starts = documents([0, 5], [0, 1, 9])
    for _ in range(3):
        torch.testing.assert_close(attend(starts).double(), reference(starts), rtol=1e-5, atol=ATOL)
    assert len(read) == 1
    attend(starts.clone())
    assert len(read) == 2  # equal, but another micro-batch's


def test_changed_starts_are_read_anew() -> None:
    starts = documents([0, 5], [0, 1, 9])
    attend(starts)
    starts.copy_(documents([0, 7], [0]))
    torch.testing.assert_close(attend(starts).double(), reference(starts), rtol=1e-5, atol=ATOL)


def test_inference_tensors_are_read_every_time() -> None:
    with torch.inference_mode():
        starts = documents([0, 5], [0, 1, 9])
        attend(starts)
        starts.copy_(documents([0, 7], [0]))
        torch.testing.assert_close(attend(starts).double(), reference(starts), rtol=1e-5, atol=ATOL)
