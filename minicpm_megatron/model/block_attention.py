"""Attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged into the whole.

flash-attn (Dao 2023, arXiv 2307.08691) where it is installed and fits; otherwise matrix products in fp32 over some rows
of queries at a time, as softmax needs all keys of a query but not all queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

try:
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
except ImportError:
    _flash_attn_forward = _flash_attn_backward = None

SCORES_BYTES = 64 * 2**20
"""Most memory that scores may take at once; one row of queries is the least that is worked on."""
FLASH_OPTIONS = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


Documents = tuple[Tensor, Tensor]
"""(int [b, s_q], int [s_k]): where each query's document begins, and where each key lies; earlier keys are hidden."""


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys of this block alone.

    Args:
        query: [s_q, b, heads, d], fp32, bf16 or fp16.
        key, value: [s_k, b, groups, d]; heads is a multiple of groups.
        scale: factor on q k^T.
        causal: query i sees keys 0 to i; needs s_q = s_k.
        documents: hides keys of other documents; a query that then sees none gets 0 and a sum of log 0.

    Returns:
        (out, lse): fp32 [s_q, b, heads, d] and fp32 [s_q, b, heads], the natural logarithm of the softmax's sum.
    """
    if documents is None and _flash_fits(query):
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        out, lse, *_ = _flash_attn_forward(
            q, k, v, softmax_scale=scale, causal=causal, return_softmax=False, **FLASH_OPTIONS
        )
        return out.transpose(0, 1).float(), lse.permute(2, 0, 1)
    groups = key.size(2)
    queries, keys, values = _grouped(query, groups), _of_group(key), _of_group(value)
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    outs, sums = _grouped(out, groups), _grouped(lse[..., None], groups)
    for rows, seen in _rows(query, key, causal, tensors=1):
        weights = _scores(queries[:, :, rows], keys[:, :, :seen], scale, rows.start if causal else None)
        _hide_others(weights, documents, rows, seen)
        # finite where nothing is seen, too
        largest = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
        total = weights.sub_(largest).exp_().sum(-1, keepdim=True)
        outs[:, :, rows] = _product(weights, values[:, :, :seen]) / total.clamp_min(torch.finfo(torch.float32).tiny)
        sums[:, :, rows] = largest + total.log()
        del weights  # or they would live on beside those of the next rows
    return out, lse


def block_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this block adds to the gradients of attention over all blocks.

    Args:
        grad: [s_q, b, heads, d], of the loss by `out`.
        query, key, value, scale, causal, documents: as in `block_attention`.
        out: [s_q, b, heads, d], the result over all blocks.
        lse: fp32 [s_q, b, heads], over all blocks.

    Returns:
        (dq, dk, dv): fp32, shaped as query, key and value; dk and dv summed over the heads of a group.
    """
    if documents is None and _flash_fits(query):
        views = [tensor.transpose(0, 1) for tensor in (grad, query, key, value, out)]
        grads = [torch.empty(view.shape, dtype=view.dtype, device=view.device) for view in views[1:4]]
        # the kernel reads lse by its address and not by its strides
        _flash_attn_backward(
            *views,
            lse.permute(1, 2, 0).contiguous(),
            *grads,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **FLASH_OPTIONS,
        )
        dq, dk, dv = (each.transpose(0, 1).float() for each in grads)
        return dq, dk, dv
    groups = key.size(2)
    queries, keys, values = _grouped(query, groups), _of_group(key), _of_group(value)
    grads_out, sums = _grouped(grad, groups), _grouped(lse[..., None], groups)
    deltas = _grouped((grad.float() * out.float()).sum(-1, keepdim=True), groups)
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    dk, dv = (torch.zeros(key.shape, dtype=torch.float32, device=key.device) for _ in range(2))
    dqs, dks, dvs = _grouped(dq, groups), _of_group(dk), _of_group(dv)
    for rows, seen in _rows(query, key, causal, tensors=2):
        some = queries[:, :, rows]
        weights = _scores(some, keys[:, :, :seen], scale, rows.start if causal else None)
        _hide_others(weights, documents, rows, seen)
        weights.sub_(sums[:, :, rows]).exp_()
        dvs[:, :, :seen] += _transposed_product(weights, grads_out[:, :, rows])
        dscores = _product(grads_out[:, :, rows], values[:, :, :seen].mT).sub_(deltas[:, :, rows]).mul_(weights)
        del weights  # or they would live on beside those of the next rows, and so would dscores
        dscores.mul_(scale)
        dqs[:, :, rows] = _product(dscores, keys[:, :, :seen])
        dks[:, :, :seen] += _transposed_product(dscores, some)
        del dscores
    return dq, dk, dv


def _flash_fits(query: Tensor) -> bool:
    if _flash_attn_forward is None or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return query.size(-1) % 8 == 0 and query.size(-1) <= 256


def _rows(query: Tensor, key: Tensor, causal: bool, tensors: int) -> Iterator[tuple[slice, int]]:
    """(rows of queries, number of keys that they see), so that `tensors` times their scores keep to SCORES_BYTES."""
    length, batch, heads, _ = query.shape
    if causal and length != key.size(0):
        raise ValueError(f"a causal block of {length} queries and {key.size(0)} keys")
    step = max(1, SCORES_BYTES // (4 * tensors * batch * heads * key.size(0)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), stop if causal else key.size(0)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """[s, b, heads, n] as fp32 [b, groups, s, heads / groups, n]; a view where it is fp32 already."""
    return tensor.float().unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4)


def _of_group(tensor: Tensor) -> Tensor:
    """[s, b, groups, d] as fp32 [b, groups, s, d]; a view where it is fp32 already."""
    return tensor.float().permute(1, 2, 0, 3)


def _scores(queries: Tensor, keys: Tensor, scale: float, first: int | None) -> Tensor:
    """[b, groups, s_q, heads / groups, s_k]; -inf above the diagonal, where the queries are those from `first` on."""
    scores = _product(queries, keys.mT).mul_(scale)
    if first is not None:
        places = torch.arange(first, first + queries.size(2), device=keys.device)
        hidden = torch.arange(keys.size(2), device=keys.device) > places[:, None]
        scores.masked_fill_(hidden[:, None], float("-inf"))
    return scores


def _hide_others(scores: Tensor, documents: Documents | None, rows: slice, seen: int) -> None:
    """-inf where a key is of an earlier document than the query; scores as `_scores` returns them."""
    if documents is not None:
        starts, places = documents
        hidden = places[:seen] < starts[:, rows, None]
        scores.masked_fill_(hidden[:, None, :, None], float("-inf"))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[b, groups, s, r, m] @ [b, groups, m, n]: heads of a group become rows, which keys serve without copies."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """[b, groups, s, r, m]^T @ [b, groups, s, r, n], summed over s and r: [b, groups, m, n]."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)
