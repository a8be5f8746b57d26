"""What `fused_loss` does to one chunk of tokens: logits, their statistics, and their gradient in place of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe.loss_chunks import CPU_SCRATCH_BYTES, ROUNDINGS, SUM_BYTES, chunk_tokens

Kernels = Literal["auto", "torch", "triton"]
ROW_MULTIPLE = 64  # logits; 128 bytes in half precision
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Part(NamedTuple):
    """This rank's part of a head, and what is done with it.

    Attributes:
        first: number in the vocabulary of the weight's first row.
        vocab_size: rows of the whole head that stand for tokens.
        logit_scale, z_loss, kernels: as `VocabParallelLinearCrossEntropy` has them.
        chunk_bytes: most bytes that a chunk's logits take.
    """

    first: int
    vocab_size: int
    logit_scale: float
    z_loss: float
    chunk_bytes: int
    kernels: Kernels


def wide(dtype: torch.dtype) -> torch.dtype:
    """What softmax and loss are computed in: fp32, or fp64 for fp64."""
    return WIDE.get(dtype, dtype)


class ChunkedHead:
    """Hidden states on their way through a head, chunk by chunk, all in one buffer.

    Args:
        hidden: [T, H].
        weight: [V, H], this rank's rows, padding included.
        labels: int64 [T], of the whole vocabulary.
        part: what those rows are.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, part: Part) -> None:
        self.hidden, self.part = hidden, part
        self.weight = weight[: max(0, min(weight.size(0), part.vocab_size - part.first))]
        self.triton = _use_triton(part.kernels, hidden.device, hidden.dtype)
        local = labels - part.first
        # a label that another rank holds is -1 here
        self.labels = torch.where((local >= 0) & (local < self.weight.size(0)), local, -1)
        # padding counts, so that all ranks have the same chunks
        self.size = chunk_tokens(hidden.size(0), weight.size(0), hidden.element_size(), part.chunk_bytes)
        columns = self.weight.size(0)
        # rows of 122,753 logits would begin at odd addresses, which Triton's kernels read by two bytes
        stride = -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE if self.triton else columns
        self.buffer = hidden.new_empty(self.size, stride)[:, :columns]
        width = wide(hidden.dtype)
        rows = self.size
        if hidden.device.type == "cpu":
            rows = min(rows, max(1, CPU_SCRATCH_BYTES // max(1, 2 * self.weight.size(0) * width.itemsize)))
        # two of them: logits and softmax
        self.scratch = hidden.new_empty(2, 0 if self.triton else rows, self.weight.size(0), dtype=width)

    def __iter__(self) -> Iterator[slice]:
        """The tokens of each chunk."""
        for start in range(0, self.hidden.size(0), self.size):
            yield slice(start, min(start + self.size, self.hidden.size(0)))

    def __len__(self) -> int:
        return -(-self.hidden.size(0) // self.size)

    def entry(self, tokens: slice) -> Tensor:
        """[n, H] as they are multiplied with the head."""
        hidden = self.hidden[tokens]
        return hidden if self.part.logit_scale == 1.0 else hidden * self.part.logit_scale

    def logits(self, tokens: slice) -> Tensor:
        """[n, valid rows], in the buffer."""
        entry = self.entry(tokens)
        return torch.mm(entry, self.weight.t(), out=self.buffer[: entry.size(0)])

    def statistics(self, tokens: slice, logits: Tensor, *, keep_softmax: bool) -> Tensor:
        """[2, n]: log-sum-exp over this rank's rows, and the label's logit, 0 where another rank has it.

        With `keep_softmax` the softmax over this rank's rows takes the place of the logits, for `correct_`; Triton's
        kernels rather read logits again.
        """
        labels = self.labels[tokens]
        found = logits.new_empty(2, labels.size(0), dtype=wide(logits.dtype))
        if not logits.size(1):  # nothing but padding
            found.zero_()[0] = -torch.inf
            return found
        if self.triton:
            from minicpm_megatron.model.fused_loss_triton import statistics

            return statistics(logits, labels, found)
        for rows in self._blocks(labels.size(0)):
            values, softmax = (scratch[: rows.stop - rows.start] for scratch in self.scratch)
            values.copy_(logits[rows])
            found[1, rows] = torch.where(labels[rows] < 0, 0.0, _at(values, labels[rows]))
            # torch.exp takes longer than all of softmax, whose largest value is exp(largest logit - log-sum-exp)
            torch.softmax(values, 1, out=softmax)
            found[0, rows] = values.amax(1) - softmax.amax(1).log()
            if keep_softmax:
                logits[rows] = softmax
        return found

    def correct_(self, tokens: slice, softmax: Tensor, own: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
        """Make the gradient of `statistics`' softmax, in place.

        Args:
            own: [2, n], what `statistics` returned.
            log_sum, factor: as for `differentiate_`, which this is equal to but for roundings.
        """
        if self.triton:
            return self.differentiate_(tokens, softmax, log_sum, factor)
        if not softmax.size(1):
            return softmax
        labels, at_softmax = self.labels[tokens], self._softmax_factor(log_sum, factor)
        share = at_softmax * (own[0] - log_sum).exp()
        if not bool((share == 1).all()):
            for rows in self._blocks(labels.size(0)):
                values = self.scratch[0][: rows.stop - rows.start].copy_(softmax[rows])
                softmax[rows] = values.mul_(share[rows, None])
        # from the logit and not from the rounded softmax, which near 1 would leave nothing
        label = at_softmax * (own[1] - log_sum).exp() - factor
        flat, places = softmax.view(-1), _places(softmax, labels)  # scatter_ copies all of what it changes
        flat[places] = torch.where(labels < 0, flat[places], label.to(softmax.dtype))
        return softmax

    def differentiate_(self, tokens: slice, logits: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
        """Put the gradient in place of the logits.

        Args:
            log_sum: [n], log-sum-exp of each token over the whole vocabulary.
            factor: [n], what each token's loss is multiplied by.

        Returns:
            `logits`, which then are factor x (softmax x (1 + 2 z_loss log_sum) - 1 at the label).
        """
        labels = self.labels[tokens]
        softmax_factor = self._softmax_factor(log_sum, factor)
        if not logits.size(1):
            return logits
        if self.triton:
            from minicpm_megatron.model.fused_loss_triton import differentiate_

            return differentiate_(logits, labels, log_sum, softmax_factor, factor)
        narrow = logits.dtype in WIDE
        for rows in self._blocks(labels.size(0)):
            values = self.scratch[0][: rows.stop - rows.start].copy_(logits[rows]) if narrow else logits[rows]
            values.sub_(log_sum[rows, None]).exp_().mul_(softmax_factor[rows, None])
            places = _places(values, labels[rows])
            values.view(-1)[places] -= torch.where(labels[rows] < 0, 0.0, factor[rows])
            if narrow:
                logits[rows] = values
        return logits

    def _softmax_factor(self, log_sum: Tensor, factor: Tensor) -> Tensor:
        return factor * (1 + 2 * self.part.z_loss * log_sum)

    def _blocks(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.scratch.size(1)):
            yield slice(start, min(start + self.scratch.size(1), count))


def _at(values: Tensor, labels: Tensor) -> Tensor:
    """[n]: the value of [n, V] at each label; at 0 for a label of -1."""
    return values.view(-1)[_places(values, labels)]


def _places(values: Tensor, labels: Tensor) -> Tensor:
    tokens = torch.arange(labels.size(0), device=labels.device)
    return tokens * values.size(1) + labels.clamp(min=0)


class Gradients:
    """Gradients of hidden states and head that grow chunk by chunk.

    Args:
        head: the chunks.
        weight: [V, H], padding included, whose gradient is zero.
        needs: whether the hidden states want a gradient, and whether the head does.
    """

    def __init__(self, head: ChunkedHead, weight: Tensor, needs: tuple[bool, bool]) -> None:
        self.head, self.dtype = head, weight.dtype
        self.hidden = torch.empty_like(head.hidden) if needs[0] else None
        self.weight: Tensor | None = None
        if needs[1]:
            self.weight = torch.empty_like(
                weight,
                dtype=wide(weight.dtype) if len(head) > ROUNDINGS else weight.dtype,
                memory_format=torch.contiguous_format,
            )
            if self.weight.dtype != weight.dtype:
                block = SUM_BYTES["cpu" if weight.device.type == "cpu" else "cuda"]
                rows = max(1, min(weight.size(0), block // (weight.size(1) * self.weight.itemsize)))
                self.product = weight.new_empty(rows, weight.size(1))
                self.widened = self.product.to(self.weight.dtype)
            self.weight[head.weight.size(0) if head.hidden.size(0) else 0 :].zero_()

    def add(self, tokens: slice, logits: Tensor) -> None:
        """Take in the gradient of a chunk's logits."""
        if self.hidden is not None:
            torch.mm(logits, self.head.weight, out=self.hidden[tokens])
            if self.head.part.logit_scale != 1.0:
                self.hidden[tokens].mul_(self.head.part.logit_scale)
        if self.weight is None:
            return
        total, entry = self.weight[: self.head.weight.size(0)], self.head.entry(tokens)
        if total.dtype == self.dtype:
            if tokens.start == 0:
                torch.mm(logits.t(), entry, out=total)
            else:
                total.addmm_(logits.t(), entry)
            return
        if tokens.start == 0:
            total.zero_()
        for start in range(0, total.size(0), self.product.size(0)):
            rows = slice(start, min(start + self.product.size(0), total.size(0)))
            product = torch.mm(logits[:, rows].t(), entry, out=self.product[: rows.stop - start])
            # torch adds what differs in dtype several times slower than it widens and adds
            total[rows].add_(self.widened[: rows.stop - start].copy_(product))

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of hidden states and head in their own dtype; the sums are gone afterwards."""
        hidden, weight = self.hidden, self.weight
        self.hidden = self.weight = None
        if weight is not None and weight.dtype != self.dtype:
            weight = _narrow_in_place(weight, self.dtype)
        return hidden, weight


def _narrow_in_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in a dtype of half their width, in the first half of their own memory."""
    flat = values.view(-1)
    narrow = flat.view(dtype)[: flat.numel()]
    step = 2**22
    for start in range(0, flat.numel(), step):
        narrow[start : start + step] = flat[start : start + step].clone()  # what is overwritten has been read
    return narrow.view(values.shape)


def _use_triton(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    installed = importlib.util.find_spec("triton") is not None
    fits = wide(dtype) == torch.float32  # the kernels compute in fp32, which would halve the digits of fp64
    if kernels == "triton" and not installed:
        raise UserError("Triton is not installed", where="kernels='triton'", fix="install triton or use 'auto'")
    if kernels == "triton" and not fits:
        raise UserError(
            f"Triton's kernels compute in fp32, and the inputs are {dtype}", where="kernels='triton'", fix="use 'auto'"
        )
    return kernels == "triton" or kernels == "auto" and installed and fits and device.type == "cuda"
