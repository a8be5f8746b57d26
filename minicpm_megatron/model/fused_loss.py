"""VocabParallelLinearCrossEntropy: LM head and cross-entropy in one, whose logits are never whole.

Tokens go through the head in chunks. A chunk's logits are made, turned into their own gradient in place and multiplied
on into the gradients of hidden states and head before the next chunk takes the buffer, so that a training step costs
three matrix products (6 T V H operations for T tokens) and no logits remain. Needs torch alone, and no process group
without tensor parallelism. Chunks whose gradient is made in forward are Liger-Kernel's idea (Hsu et al. 2024, arXiv
2410.10989), making logits twice is cut cross-entropy's (Wijmans et al. 2024, arXiv 2411.09009), and the loss over a
divided vocabulary is Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.fused_loss_chunks import ChunkedHead, Gradients, Part, wide
from minicpm_megatron.recipe.loss_chunks import loss_chunk_bytes

Reduction = Literal["none", "mean", "sum"]
# torch 2.13 has new names for them and warns of the old ones
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class VocabParallelLinearCrossEntropy(torch.nn.Module):
    """Cross-entropy of `logit_scale * hidden @ weight.T` against labels, for a head divided over `group`.

    With L = log-sum-exp of a token's logits over the whole vocabulary, its loss is L - logit of the label, plus
    z_loss x L^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5), times its mask.

    Memory beyond the gradients themselves (which have the shapes of hidden and weight), in bytes, with V rows of the
    head on this rank and e bytes an element:

        c V e + s V + 40 T,  c = min(T, max(1, chunk_bytes / (V e))) tokens in a chunk

    for T tokens, where s V, the softmax in fp32, is at most 4 MiB on CPU (or one token's, if that is more), 8 c V
    elsewhere, and nothing with Triton, for which the V of c V e is rounded up to a multiple of 64: no term grows with
    T x V. With more than 4 chunks the gradient of a head in half precision is summed in fp32 and narrowed in place,
    which adds 2 V H and 6 MiB (96 elsewhere). Sequence parallelism adds the gathered hidden states and their gradient,
    2 T H e, as ColumnParallelLinear does.

    Gradients. `gradient_in="forward"` makes them with the loss, 6 T V H operations in all. They are then those for an
    upstream gradient that is the same for every token, which backward multiplies by it: always so for "mean" and "sum".
    For "none" backward looks at the upstream gradient; where tokens that count have different ones, it makes the
    gradients anew from the saved log-sum-exps (10 T V H in all). `gradient_in="backward"` only ever does that (8 T V H)
    and holds nothing between forward and backward but hidden states. Without gradients to make, 2 T V H.

    Precision: products in the dtype of the inputs, softmax and loss in fp32. A bf16 gradient of the head is rounded
    once a chunk, 4 times at most; benchmarks/README.md says what that costs.

    Args:
        reduction: "none", a loss a token; "sum"; "mean" over the weight of the mask, 0 where that is 0.
        ignore_index: label that has no loss and no gradient.
        z_loss: weight of L^2, 0 for none.
        logit_scale: factor on the hidden state, chunk by chunk; logits are never scaled.
        vocab_size: rows of the head over all ranks without padding, which gets no probability and no gradient; None:
            there is no padding.
        group: process group over which the head's rows are divided, equally and in order; None: they are not.
        sequence_parallel: hidden states are parts of the sequence in the order of the group's ranks; they are gathered,
            and their gradient is reduced and scattered.
        gradient_in: see above.
        chunk_bytes: memory of a chunk's logits; None: a quarter of the head's on CPU (16 MiB at least), 512
            MiB elsewhere.
        kernels: "auto" is Triton's on CUDA where it is installed, else torch's; fp64 always has torch's.

    Raises:
        UserError: shapes or dtypes that do not fit each other, or kernels that this machine lacks.
        IndexError: a label outside the vocabulary (on CPU; elsewhere a device-side assertion).
    """

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
        gradient_in: Literal["forward", "backward"] = "forward",
        chunk_bytes: int | None = None,
        kernels: Literal["auto", "torch", "triton"] = "auto",
    ) -> None:
        super().__init__()
        self.reduction, self.ignore_index, self.z_loss = reduction, ignore_index, z_loss
        self.logit_scale, self.vocab_size, self.gradient_in = logit_scale, vocab_size, gradient_in
        self.chunk_bytes, self.kernels = chunk_bytes, kernels
        self.group = group if group is not None and group.size() > 1 else None
        self.sequence_parallel = sequence_parallel and self.group is not None

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            hidden: [..., H]; with sequence parallelism this rank's part of the first dimension. Any float dtype.
            weight: [rows of the head on this rank, H], of the same dtype.
            labels: int64 [...], tokens of the whole vocabulary, the same on all ranks of the group.
            loss_mask: [...], a factor on each token's loss, 0 to leave it out; gets no gradient.

        Returns:
            In nats, fp32 (fp64 for fp64 inputs): labels' shape for "none", otherwise a scalar; the same on all ranks.
        """
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        self._check(hidden, weight, labels, loss_mask)
        rank, ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        vocab_size = self.vocab_size or ranks * weight.size(0)
        counts = labels != self.ignore_index
        _check_labels(torch.where(counts, labels, 0), vocab_size)
        factor = counts.to(wide(hidden.dtype))
        if loss_mask is not None:
            factor = factor * loss_mask.to(factor.dtype)
        part = Part(
            first=rank * weight.size(0),
            vocab_size=vocab_size,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            chunk_bytes=self.chunk_bytes or loss_chunk_bytes(hidden.device.type, weight.nbytes),
            kernels=self.kernels,
        )
        group = (self.group, self.sequence_parallel)
        in_forward = self.gradient_in == "forward" and torch.is_grad_enabled()
        losses = _LinearCrossEntropy.apply(
            hidden, weight, labels.reshape(-1), factor.reshape(-1), part, group, in_forward, self.reduction != "none"
        )
        if self.reduction == "none":
            return losses.view(labels.shape)
        return losses / factor.sum().clamp(min=torch.finfo(factor.dtype).tiny) if self.reduction == "mean" else losses

    def _check(self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None) -> None:
        where = type(self).__name__
        shape = list(hidden.shape[:-1])
        if self.sequence_parallel and self.group is not None:
            shape[0] *= self.group.size()
        if weight.dim() != 2 or hidden.size(-1) != weight.size(1):
            raise UserError(
                f"hidden states {tuple(hidden.shape)} and head {tuple(weight.shape)} do not multiply",
                where=where,
                fix="give [..., H] and [vocabulary rows of this rank, H]",
            )
        for name, tensor in (("labels", labels), ("loss_mask", loss_mask)):
            if tensor is not None and list(tensor.shape) != shape:
                raise UserError(
                    f"{name} are {tuple(tensor.shape)} where hidden states want {tuple(shape)}",
                    where=where,
                    fix="give every token one, in the order of the hidden states",
                )
        if hidden.dtype != weight.dtype:
            raise UserError(
                f"hidden states are {hidden.dtype} and the head is {weight.dtype}", where=where, fix="cast one of them"
            )


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted losses [T], or their sum, of hidden states [..., H]; see `VocabParallelLinearCrossEntropy`.

    What is already reduced has one upstream gradient for all tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        factor: Tensor,
        part: Part,
        group: tuple[Any, bool],
        in_forward: bool,
        reduced: bool,
    ) -> Tensor:
        head = ChunkedHead(_whole(hidden, *group), weight, labels, part)
        needs = ctx.needs_input_grad[:2]
        sums = Gradients(head, weight, needs) if in_forward and any(needs) else None
        log_sums, targets = torch.empty_like(factor), torch.empty_like(factor)
        for tokens in head:
            logits = head.logits(tokens)
            own = head.statistics(tokens, logits, keep_softmax=sums is not None)
            log_sums[tokens], targets[tokens] = _join(own, group[0])
            if sums is not None:
                sums.add(tokens, head.correct_(tokens, logits, own, log_sums[tokens], factor[tokens]))
        losses = log_sums - targets
        if part.z_loss:
            losses += part.z_loss * log_sums.square()
        losses = torch.where(factor == 0, 0.0, losses * factor)
        del head.buffer, head.scratch
        ctx.gradients = None if sums is None else _finish(sums, hidden, group)
        ctx.save_for_backward(hidden, weight, labels, log_sums)
        ctx.factor, ctx.part, ctx.group, ctx.reduced = factor, part, group, reduced
        return losses.sum() if reduced else losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        # they are scaled where they lie, so a second backward has to make them anew
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            scale = float(upstream) if ctx.reduced else _common(upstream, ctx.factor)
            if scale is not None:
                if scale != 1.0:
                    for gradient in filter(torch.is_tensor, gradients):
                        gradient.mul_(scale)
                return *gradients, *(None,) * 6
            del gradients
        hidden, weight, labels, log_sums = ctx.saved_tensors
        head = ChunkedHead(_whole(hidden, *ctx.group), weight, labels, ctx.part)
        sums = Gradients(head, weight, ctx.needs_input_grad[:2])
        factor = ctx.factor * upstream
        for tokens in head:
            sums.add(tokens, head.differentiate_(tokens, head.logits(tokens), log_sums[tokens], factor[tokens]))
        del head.buffer, head.scratch
        return *_finish(sums, hidden, ctx.group), *(None,) * 6


def _common(upstream: Tensor, factor: Tensor) -> float | None:
    """The upstream gradient of every token that counts, or None where they differ."""
    least = torch.where(factor == 0, torch.inf, upstream).amin()
    most = torch.where(factor == 0, -torch.inf, upstream).amax()
    low, high = torch.stack([least, most]).tolist()
    if low > high:  # none counts
        return 0.0
    return low if low == high else None


def _whole(hidden: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """[T, H]: the hidden states of all tokens."""
    if sequence_parallel:
        parts = hidden.contiguous()
        hidden = parts.new_empty(group.size() * parts.size(0), *parts.shape[1:])
        _all_gather(hidden, parts, group=group)
    return hidden.reshape(-1, hidden.size(-1))


def _finish(sums: Gradients, hidden: Tensor, group: tuple[Any, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients; that of the hidden states summed over the ranks, each of which had a part of the vocabulary."""
    gradient, weight = sums.take()
    if gradient is None or group[0] is None:
        return None if gradient is None else gradient.view(hidden.shape), weight
    if group[1]:
        part = hidden.new_empty(hidden.shape)
        _reduce_scatter(part, gradient.view(-1, *hidden.shape[1:]), group=group[0])
        return part, weight
    dist.all_reduce(gradient, group=group[0])
    return gradient.view(hidden.shape), weight


def _join(own: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, logit of the label) [n] over the whole vocabulary from each rank's [2, n]; one message."""
    if group is None:
        return own[0], own[1]
    every = own.new_empty(group.size(), *own.shape)
    _all_gather(every.flatten(0, 1), own, group=group)  # gloo knows concatenation only
    return every[:, 0].logsumexp(0), every[:, 1].sum(0)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    inside = ((labels >= 0) & (labels < vocab_size)).all()
    if labels.device.type != "cpu":
        torch._assert_async(inside, "a label is outside the vocabulary")
    elif not inside:
        raise IndexError(f"a label is outside the vocabulary of {vocab_size:,}")
