"""Causal attention over a sequence that is divided between ranks (context parallelism), in two ways.

Ring attention (Liu et al. 2023, arXiv 2310.01889) sends keys and values from rank to rank; Ulysses (Jacobs et al. 2023,
arXiv 2309.14509) exchanges a part of the sequence for a part of the heads. The first needs no divisible heads, the
second sends less where ranks are many.

The sequence is laid out as Megatron-Core's `get_batch_on_this_cp_rank` does it: with c ranks it is cut in 2c chunks,
and rank r holds chunk r followed by chunk 2c - 1 - r ("zigzag"). The causal mask then leaves every rank the same work,
which one run of tokens per rank would not (Brandon et al. 2023, arXiv 2311.09431, reach it by stripes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minicpm_megatron.model.block_attention import Documents, block_attention, block_attention_backward
from minicpm_megatron.model.document_attention import document_attention
from minicpm_megatron.parallel.zigzag import unzigzag, zigzag

KEYS_VALUES, GRADIENTS = 0, 1  # tags: two kinds of messages are under way between the same two ranks


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Causal attention in which blocks of keys and values go round the ranks while each attends to the block it has.

    Results over blocks are merged in fp32 by their log-sum-exp. The backward pass goes round once more; gradients of
    keys and values, in fp32, travel with their block and end at its owner.

    Args:
        query: [s_local, b, heads, d], fp32 or bf16: this rank's part of the sequence, in zigzag order.
        key, value: [s_local, b, groups, d]; heads is a multiple of groups.
        group: the ranks that share the sequence; each calls with the same shapes.
        scale: factor on q k^T.
        starts: int [b, s_local], of each token the position in the whole sequence at which its document begins (see
            `document_attention`); None: the whole sequence is one.

    Returns:
        [s_local, b, heads, d] in the dtype of query.

    Raises:
        ValueError: s_local is odd, or groups does not divide heads.
    """
    _check(query, key)
    return _RingAttention.apply(query, key, value, group, scale, starts)


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Causal attention in which each rank attends over the whole sequence with its part of the heads.

    One all-to-all before and one after; a key/value head goes to every rank that has a query head of its group.

    Args:
        query, key, value, group, scale, starts: as in `ring_attention`.

    Returns:
        [s_local, b, heads, d] in the dtype of query.

    Raises:
        ValueError: as in `ring_attention`, or the ranks do not divide heads.
    """
    _check(query, key)
    ranks, heads, per_group = dist.get_world_size(group), query.size(2), query.size(2) // key.size(2)
    if heads % ranks:
        raise ValueError(f"Ulysses divides {heads} heads over {ranks} ranks, which does not come out even")
    # so many query heads of a rank share a key/value head whatever the rank
    sharing = math.gcd(heads // ranks, per_group)
    key, value = (_repeated(tensor, per_group // sharing) for tensor in (key, value))
    # [ranks, s_local, b, heads of one rank and then twice its key/value heads, d]
    outgoing = [tensor.unflatten(2, (ranks, -1)).movedim(2, 0) for tensor in (query, key, value)]
    counts = [tensor.size(3) for tensor in outgoing]
    whole = unzigzag(list(_AllToAll.apply(torch.cat(outgoing, 3), group).unbind(0)), 0)
    if starts is None:
        # [s, b, n, d] -> [b, n, s, d]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in whole.split(counts, 2))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
        ).permute(2, 0, 1, 3)
    else:
        parts = [torch.empty_like(starts) for _ in range(ranks)]
        dist.all_gather(parts, starts.contiguous(), group=group)
        q, k, v = whole.split(counts, 2)
        context = document_attention(q, k, v, unzigzag(parts, 1), scale)
    returning = torch.stack([zigzag(context, ranks, rank, 0) for rank in range(ranks)])
    return _AllToAll.apply(returning, group).movedim(0, 2).flatten(2, 3)


def _check(query: Tensor, key: Tensor) -> None:
    if query.size(0) % 2:
        raise ValueError(f"a rank's part of {query.size(0)} tokens does not divide into two chunks")
    if query.size(2) % key.size(2):
        raise ValueError(f"{query.size(2)} heads do not divide over {key.size(2)} groups")


def _repeated(tensor: Tensor, times: int) -> Tensor:
    """[s, b, groups, d] -> [s, b, groups x times, d], each group `times` in a row."""
    return tensor.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3) if times > 1 else tensor


class _AllToAll(torch.autograd.Function):
    """Row j of [ranks, ...] goes to rank j and is replaced by what rank j sends; its own inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(received, rows.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: dist.ProcessGroup,
        scale: float,
        starts: Tensor | None,
    ) -> Tensor:
        for source, (k, v) in _round(torch.stack((key, value)), group):
            rows, columns, causal = _visible(source, dist.get_rank(group), query.size(0))
            within = _within(starts, source, group, rows, columns)
            block = block_attention(query[rows], k[columns], v[columns], scale, causal, within)
            if causal:
                out, lse = block
            else:
                _merge(out[rows], lse[rows], *block)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.group, ctx.scale, ctx.starts = group, scale, starts
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        transfer = None
        for source, (k, v) in _round(torch.stack((key, value)), ctx.group):
            rows, columns, causal = _visible(source, dist.get_rank(ctx.group), query.size(0))
            within = _within(ctx.starts, source, ctx.group, rows, columns)
            block_dq, *block_dkv = block_attention_backward(
                grad[rows], query[rows], k[columns], v[columns], out[rows], lse[rows], ctx.scale, causal, within
            )
            if transfer is None:
                dq, dkv = block_dq, torch.stack(block_dkv)
            else:
                dq[rows] += block_dq
                dkv = transfer.wait()
                dkv[0, columns] += block_dkv[0]
                dkv[1, columns] += block_dkv[1]
            transfer = _Transfer(dkv, ctx.group, GRADIENTS)
        assert transfer is not None
        dk, dv = transfer.wait()
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, None


def _visible(source: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """(queries of `rank`, keys of `source`, whether the causal mask applies within) that causality leaves to compute.

    A part is an early chunk and a late one. Its own is causal as it stands; of a part from a lower rank the early chunk
    precedes all queries and the late one follows them; that of a higher rank precedes the late queries only.
    """
    everything, early, late = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    if source == rank:
        return everything, everything, True
    return (everything, early, False) if source < rank else (late, everything, False)


def _within(
    starts: Tensor | None, source: int, group: dist.ProcessGroup, rows: slice, columns: slice
) -> Documents | None:
    """What hides keys of other documents: where those of the queries begin, and where the keys of `source` lie."""
    if starts is None:
        return None
    ranks, length = dist.get_world_size(group), starts.size(1)
    places = zigzag(torch.arange(ranks * length, device=starts.device), ranks, source, 0)
    return starts[:, rows], places[columns]


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block's keys to the attention of these queries, in place; fp32 [s, b, heads, d] and [s, b, heads]."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(block_out, (block_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


class _Transfer:
    """A block under way to the next rank of the ring, and another one from the rank before."""

    def __init__(self, block: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent, self.received, self.works = block, block, []
        if ranks > 1:
            self.received = torch.empty_like(block)
            ends = ((dist.isend, block, (rank + 1) % ranks), (dist.irecv, self.received, (rank - 1) % ranks))
            self.works = dist.batch_isend_irecv(
                [dist.P2POp(way, tensor, group=group, tag=tag, group_peer=peer) for way, tensor, peer in ends]
            )

    def wait(self) -> Tensor:
        """The block that arrived."""
        for work in self.works:
            work.wait()
        return self.received


def _round(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(rank it is from, block) for every rank's block, the own one first; the next comes while one is worked on."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for step in range(ranks):
        transfer = _Transfer(block, group, KEYS_VALUES) if step < ranks - 1 else None
        yield (rank - step) % ranks, block
        if transfer is not None:
            block = transfer.wait()
