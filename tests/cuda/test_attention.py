"""The attention core and ring attention's blocks on a GPU against softmax(q k^T) v written out in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from minicpm_megatron.model import attention, block_attention, document_attention
from minicpm_megatron.model.attention_kernels import auto
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.recipe import get_preset

pytestmark = pytest.mark.gpu_only
# of the largest element. bf16 rounds probabilities, products and results: 2^-9 each; measured on the CPU 9e-3 at most
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
FLASH = pytest.param("flash-attn", marks=pytest.mark.skipif(auto.flash_attn_func is None, reason="no flash-attn"))
BATCH = 2
SHAPES = [  # heads, groups, channels, length
    (36, 36, 64, 256),  # MiniCPM-2.4B
    (24, 8, 64, 200),  # MiniCPM-1.2B: grouped, and no multiple of a block
    (4, 1, 128, 129),
    (4, 2, 64, 1),
]


def tensors(heads: int, groups: int, channels: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output: [length, BATCH, ., channels]."""
    generator = torch.Generator("cuda").manual_seed(heads * length)
    sizes = (heads, groups, groups, heads)
    return [torch.randn(length, BATCH, n, channels, generator=generator, device="cuda").to(dtype) for n in sizes]


def plain(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Attention in fp64; `hidden` [b, s, s] is True where a key is not seen."""
    repeats = q.size(2) // k.size(2)
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 2), v.double().repeat_interleave(repeats, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / math.sqrt(q.size(3))
    return torch.einsum("bhqk,kbhd->qbhd", scores.masked_fill(hidden[:, None], -math.inf).softmax(-1), v)


def future(length: int) -> Tensor:
    """[BATCH, s, s]: True above the diagonal."""
    return torch.ones(BATCH, length, length, dtype=torch.bool, device="cuda").triu(1)


def with_gradients(attend: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3].to(out.dtype).view(out.shape))]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        other = other.reshape(one.shape)
        size = max(float(other.abs().max()), 0.1)  # nothing flows to the query of a single token
        assert float((one.double() - other).abs().max()) < TOLERANCES[dtype] * size


def core(heads: int, groups: int, channels: int) -> attention.MiniCPMCoreAttention:
    shape = get_preset("minicpm-nano").model_copy(
        update={"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": channels}
    )
    return attention.MiniCPMCoreAttention(MiniCPMConfig.from_recipe(shape), 1, AttnMaskType.causal, "self")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """flash-attn as it is installed, or as if it were not."""
    if request.param != "flash-attn":
        monkeypatch.setattr(auto, "flash_attn_func", None)
        monkeypatch.setattr(document_attention, "flash_attn_varlen_func", None)
        monkeypatch.setattr(block_attention, "_flash_attn_forward", None)
    return str(request.param)


@pytest.mark.parametrize("kernel", ["torch", FLASH], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_is_causal_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: str) -> None:
    given, module = tensors(*shape, dtype), core(*shape[:3])
    found = with_gradients(lambda q, k, v: module(q, k, v, None), given)
    assert_close(found, with_gradients(lambda q, k, v: plain(q, k, v, future(shape[3])), given), dtype)


@pytest.mark.parametrize("kernel", ["torch", FLASH], indirect=True)
def test_one_new_token_sees_a_whole_cache(kernel: str) -> None:
    q, k, v, _ = tensors(8, 2, 64, 100, torch.bfloat16)
    seen = torch.zeros(BATCH, 1, 100, dtype=torch.bool, device="cuda")
    found = core(8, 2, 64)(q[-1:], k, v, None, attn_mask_type=AttnMaskType.no_mask)
    assert_close([found], [plain(q[-1:], k, v, seen)], torch.bfloat16)


@pytest.mark.parametrize("kernel", ["torch", FLASH], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_do_not_see_each_other(dtype: torch.dtype, kernel: str) -> None:
    length = 200
    given, module = tensors(8, 2, 64, length, dtype), core(8, 2, 64)
    starts = torch.zeros(BATCH, length, dtype=torch.int64, device="cuda")
    starts[0, 50:], starts[0, 51:], starts[1, 199:] = 50, 51, 199  # of one token, too, at the end, too
    hidden = future(length) | (torch.arange(length, device="cuda") < starts[:, :, None])
    found = with_gradients(lambda q, k, v: module(q, k, v, starts), given)
    assert_close(found, with_gradients(lambda q, k, v: plain(q, k, v, hidden), given), dtype)


@pytest.mark.parametrize("kernel", ["torch", FLASH], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_parts_of_the_whole(causal: bool, kernel: str) -> None:
    """Forward, log-sum-exp and backward of one block, as ring attention joins them."""
    q, k, v, grad = given = tensors(8, 2, 64, 128, torch.bfloat16)
    hidden = future(128) if causal else torch.zeros(BATCH, 128, 128, dtype=torch.bool, device="cuda")
    out, lse = block_attention.block_attention(q, k, v, 1 / 8, causal)
    grads = block_attention.block_attention_backward(grad, q, k, v, out.bfloat16(), lse, 1 / 8, causal)
    expected = with_gradients(lambda q, k, v: plain(q, k, v, hidden), given)
    assert_close([out, *grads], expected, torch.bfloat16)
    scores = torch.einsum("qbhd,kbhd->bhqk", q.double(), k.double().repeat_interleave(4, 2)) / 8
    sums = scores.masked_fill(hidden[:, None], -math.inf).logsumexp(-1).permute(2, 0, 1)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("kernel", ["torch", FLASH], indirect=True)
def test_scores_are_never_stored(groups: int, kernel: str) -> None:
    """16,384 tokens whose scores would take 4 GiB in bf16: memory grows by a small part of that."""
    length = 16_384
    leaves = [
        torch.randn(length, 1, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (8, groups, groups)
    ]
    module = core(8, groups, 64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(*leaves, None).float().sum().backward()
    scores = 8 * length**2 * 2
    assert torch.cuda.max_memory_allocated() - before < scores / 8
