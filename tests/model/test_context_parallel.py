"""Ring and Ulysses attention on real processes against torch's attention over the whole sequence."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicpm_megatron.model import block_attention as blocks
from minicpm_megatron.parallel.zigzag import unzigzag, zigzag
from tests.device import put
from tests.distributed.forked import run_forked

BATCH, WIDTH = 2, 16
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest element; measured 1.7e-6 and 9.2e-3
NAMES = ("out", "dq", "dk", "dv")


def variant(heads: int, groups: int, length: int, **changes: Any) -> dict[str, Any]:
    return {"heads": heads, "groups": groups, "length": length, "dtype": "float32", "scale": WIDTH**-0.5, **changes}


SHAPES = [variant(heads, groups, length) for heads, groups, length in product((4, 8), (1, 2, 4), (64, 8))]
SHAPES += [
    variant(8, 8, 64),
    variant(12, 6, 16),  # neither do ranks divide groups nor groups ranks, where there are 4
    variant(8, 2, 64, dtype="bfloat16"),
    variant(4, 1, 64, dtype="bfloat16"),
    variant(8, 2, 64, scale=0.7),
    variant(8, 2, 64, score_bytes=4096),
    variant(8, 2, 64, score_bytes=1),
    variant(8, 2, 64, expanded=True),  # strides of 0, as the gradient of a sum has
    variant(8, 2, 64, documents=0.1),
    variant(4, 1, 64, documents=0.03, score_bytes=4096),
    variant(8, 4, 64, documents=0.7, dtype="bfloat16"),
    variant(4, 4, 64, documents=0.5),
]
CASES = {
    "1 rank": {"ranks": 1, "variants": [variant(4, 2, 16), variant(4, 2, 16, documents=0.2)]},
    "2 ranks": {"ranks": 2, "variants": SHAPES},
    "4 ranks": {"ranks": 4, "variants": SHAPES},
    "2 groups of 2": {"ranks": 4, "group": [[0, 2], [1, 3]], "variants": [variant(8, 2, 64), variant(4, 1, 8)]},
}


def inputs(heads: int, groups: int, length: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, fp32 [length, BATCH, ., WIDTH]."""
    generator = torch.Generator().manual_seed(100 * heads + groups)
    counts = (heads, groups, groups, heads)
    return [put(torch.randn(length, BATCH, count, WIDTH, generator=generator)) for count in counts]


def document_numbers(length: int, chance: float) -> Tensor:
    """int64 [BATCH, length]: which document each token is of; a new one begins with that chance."""
    return (torch.rand(BATCH, length, generator=torch.Generator().manual_seed(7)) < chance).cumsum(1)


def starts_of(numbers: Tensor) -> Tensor:
    """Where the document of each token begins, one token after the other."""
    starts = torch.zeros_like(numbers)
    for row in range(numbers.size(0)):
        for place in range(1, numbers.size(1)):
            same = numbers[row, place] == numbers[row, place - 1]
            starts[row, place] = starts[row, place - 1] if same else place
    return starts


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, numbers: Tensor | None = None
) -> Tensor:
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    if numbers is not None:
        seen = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def with_gradients(attend: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Largest errors of this rank's part, for every variant; and what was refused."""
    import torch.distributed as dist

    from minicpm_megatron.model.context_parallel import ring_attention, ulysses_attention

    group = dist.group.WORLD
    for members in case.get("group", []):
        subgroup = dist.new_group(members)
        group = subgroup if rank in members else group
    ranks, rank, default = dist.get_world_size(group), dist.get_rank(group), blocks.SCORES_BYTES
    found = []
    for variant in case["variants"]:
        blocks.SCORES_BYTES = variant.get("score_bytes", default)
        found.append(_errors(variant, ranks, rank, group, {"ring": ring_attention, "ulysses": ulysses_attention}))
    return {"variants": found, "refused": _refused(group, ring_attention, ulysses_attention)}


def _errors(variant: dict[str, Any], ranks: int, rank: int, group: Any, ways: dict[str, Any]) -> dict[str, Any]:
    dtype, scale = getattr(torch, variant["dtype"]), variant["scale"]
    whole = [tensor.to(dtype) for tensor in inputs(variant["heads"], variant["groups"], variant["length"])]
    if variant.get("expanded"):
        whole[3] = whole[3][:1, :1].expand(whole[3].shape)
    numbers = document_numbers(variant["length"], variant["documents"]) if "documents" in variant else None
    *operands, grad = (tensor.float() for tensor in whole)
    expected = with_gradients(partial(full_attention, scale=scale, numbers=numbers), operands, grad)
    keywords: dict[str, Any] = {"group": group, "scale": scale}
    if numbers is not None:
        keywords["starts"] = zigzag(starts_of(numbers), ranks, rank, 1)
    *operands, grad = (zigzag(tensor, ranks, rank, 0) for tensor in whole)
    if variant.get("expanded"):
        grad = grad[:1, :1].expand(grad.shape)
    results = {name: with_gradients(partial(way, **keywords), operands, grad) for name, way in ways.items()}
    pairs = {
        name: (result, [zigzag(tensor, ranks, rank, 0) for tensor in expected]) for name, result in results.items()
    }
    pairs["each other"] = tuple(results.values())
    errors = {name: [error(*both) for both in zip(*pair, strict=True)] for name, pair in pairs.items()}
    return {"errors": errors, "dtypes": sorted({str(t.dtype)[6:] for result in results.values() for t in result})}


def _refused(group: Any, ring: Any, ulysses: Any) -> dict[str, str | None]:
    sizes = {
        "ring": (ring, 3, 4, 4),
        "ulysses": (ulysses, 3, 4, 4),
        "groups": (ring, 4, 4, 3),
        "heads": (ulysses, 4, 3, 3),
    }
    found = {}
    for name, (attention, length, heads, groups) in sizes.items():
        q, k = (torch.zeros(length, BATCH, count, WIDTH) for count in (heads, groups))
        try:
            attention(q, k, k, group=group, scale=1.0)
            found[name] = None
        except ValueError as refusal:
            found[name] = str(refusal)
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[dict[str, Any]]]:
    found = run_forked("tests.model.test_context_parallel:worker", list(CASES.values()))
    for ranks in found:
        for rank in ranks:
            assert rank.status == 0, rank.log
    return {name: [rank.result for rank in ranks] for name, ranks in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("pair", ["ring", "ulysses", "each other"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_whole_sequence(outcomes, name, pair):
    for rank, result in enumerate(outcomes[name]):
        for variant, found in zip(CASES[name]["variants"], result["variants"], strict=True):
            errors = dict(zip(NAMES, found["errors"][pair], strict=True))
            assert max(errors.values()) <= TOLERANCES[variant["dtype"]], (rank, variant, errors)
            assert found["dtypes"] == [variant["dtype"]]


def test_sizes_that_do_not_divide_are_refused(outcomes):
    for name in ("2 ranks", "4 ranks"):
        for result in outcomes[name]:
            refused = result["refused"]
            assert "3 tokens" in refused["ring"] and "3 tokens" in refused["ulysses"]
            assert "4 heads do not divide over 3 groups" in refused["groups"]
            assert f"3 heads over {name}" in refused["heads"]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_unzigzag_is_the_inverse(ranks, dim):
    whole = put(torch.randn(24, 48, 24))
    assert torch.equal(unzigzag([zigzag(whole, ranks, rank, dim) for rank in range(ranks)], dim), whole)


@pytest.mark.parametrize("size", [4, 9, 10])
def test_zigzag_refuses_what_does_not_divide(size):
    with pytest.raises(ValueError, match=f"sequence of {size} "):
        zigzag(torch.zeros(2, size), 4, 0, 1)


@pytest.mark.cpu_only("Megatron-Core's own wants CUDA, and is made to take tensors of the CPU")
@pytest.mark.parametrize("ranks", [2, 4])
def test_zigzag_is_megatrons_order(ranks, monkeypatch):
    from megatron.core import utils
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: tensor(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    monkeypatch.setattr(utils, "get_pg_size", lambda group: group.size())
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: group.rank())
    places, tokens = torch.arange(48.0).reshape(48, 1, 1, 1), torch.arange(96).reshape(2, 48)
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        assert torch.equal(zigzag(places, ranks, rank, 0), get_pos_emb_on_this_cp_rank(places, 0, group))
        # the group's own size and rank: without a job torch.distributed has none to ask for
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda of: of.size())
        monkeypatch.setattr(torch.distributed, "get_rank", lambda of: of.rank())
        batch = utils.get_batch_on_this_cp_rank({"tokens": tokens.clone()}, False, group)
        assert torch.equal(zigzag(tokens, ranks, rank, 1), batch["tokens"])


class LiveBytes(TorchDispatchMode):
    """The most memory that results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = [tensor.untyped_storage() for made in self.made if (tensor := made()) is not None]
        self.peak = max(self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_scores_keep_to_their_limit(monkeypatch, causal):
    """Of 16 MiB of scores a quarter exists at once, beside what operands and results take; the numbers stay."""
    q, k, v, grad = inputs(8, 2, 512)
    scale, limit = 0.2, 2**22

    def measured(function: Any, *args: Any) -> tuple[list[Tensor], int]:
        with LiveBytes() as live:
            result = function(*args, scale, causal)
        return list(result), live.peak

    def both() -> tuple[list[Tensor], list[int]]:
        (out, lse), forward = measured(blocks.block_attention, q, k, v)
        grads, backward = measured(blocks.block_attention_backward, grad, q, k, v, out, lse)
        return [out, lse, *grads], [forward, backward]

    whole, unlimited = both()
    monkeypatch.setattr(blocks, "SCORES_BYTES", limit)
    parts, limited = both()
    operands = sum(tensor.numel() * 4 for tensor in (q, k, v, grad))
    assert min(unlimited) >= 4 * BATCH * 8 * 512 * 512
    assert max(limited) <= limit + 2 * operands
    for found, expected in zip(parts, whole, strict=True):
        assert error(found, expected) < 1e-5
    reference = with_gradients(partial(full_attention, scale=scale, causal=causal), [q, k, v], grad)
    for found, expected in zip([whole[0], *whole[2:]], reference, strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.cpu_only("a stand-in of flash-attn; tests/cuda/test_attention.py has the real one")
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_called_as_its_interface_asks(monkeypatch, causal):
    """A stand-in of flash-attn 2.7's two functions, [b, s, heads, d] and lse [b, heads, s], through autograd."""
    calls = []

    def scores(q: Tensor, k: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        k = k.repeat_interleave(q.size(2) // k.size(2), 2)
        found = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        return found.masked_fill(torch.ones(found.shape[2:]).triu(1).bool(), -torch.inf) if causal else found

    def forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        calls.append("forward")
        found = scores(q.float(), k.float(), softmax_scale, causal)
        values = v.float().repeat_interleave(q.size(2) // v.size(2), 2)
        out = torch.einsum("bhqk,bkhd->bqhd", found.softmax(-1), values)
        return out.to(q.dtype), found.logsumexp(-1), torch.empty(0), torch.empty(2)

    def backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert softmax_lse.is_contiguous() and dout.shape == out.shape == q.shape == dq.shape and k.shape == dk.shape
        calls.append("backward")
        with torch.enable_grad():
            leaves = [tensor.float().requires_grad_() for tensor in (q, k, v)]
            weights = (scores(leaves[0], leaves[1], softmax_scale, causal) - softmax_lse[..., None]).exp()
            values = leaves[2].repeat_interleave(q.size(2) // v.size(2), 2)
            # with out and lse given, the softmax's own term is subtracted by hand
            delta = torch.einsum("bqhd,bqhd->bhq", dout.float(), out.float())
            product = torch.einsum("bqhd,bkhd->bhqk", dout.float(), values)
            loss = (weights * (product - delta[..., None])).sum()
            for target, source in zip((dq, dk, dv), torch.autograd.grad(loss, leaves), strict=True):
                target.copy_(source)
        return torch.empty(0)

    *tensors, grad = (tensor.bfloat16() for tensor in inputs(8, 2, 32))
    q, k, v = tensors
    expected_out, expected_lse = blocks.block_attention(q, k, v, 0.3, causal)
    # as if other blocks had been merged into it
    out, lse = (0.9 * expected_out).bfloat16(), expected_lse + 0.2
    expected = blocks.block_attention_backward(grad, q, k, v, out, lse, 0.3, causal)
    monkeypatch.setattr(blocks, "_flash_attn_forward", forward)
    monkeypatch.setattr(blocks, "_flash_attn_backward", backward)
    assert not blocks._flash_fits(q)
    monkeypatch.setattr(blocks, "_flash_fits", lambda query: True)
    found_out, found_lse = blocks.block_attention(q, k, v, 0.3, causal)
    found = blocks.block_attention_backward(grad, q, k, v, out, lse, 0.3, causal)
    assert calls == ["forward", "backward"]
    for one, other in zip((found_out, found_lse, *found), (expected_out, expected_lse, *expected), strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape and error(one, other) < 1e-2
