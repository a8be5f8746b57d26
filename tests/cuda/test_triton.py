"""Triton's kernels, compiled, against fp64: real vocabularies, every width of float, more than 2^31 logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minicpm_megatron import VocabParallelLinearCrossEntropy

pytestmark = pytest.mark.gpu_only
pytest.importorskip("triton")

# A gradient is computed in fp32 and rounded once: half a unit in the last place, and one where fp32 fell the other way
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
BLOCK = 4096  # columns that a program holds at once
GIB = 2**30


def case(rows: int, columns: int, dtype: torch.dtype, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits [rows, columns] and labels [rows], of which -1 stands for another rank's."""
    generator = torch.Generator("cuda").manual_seed(rows + columns)
    logits = torch.randn(rows, stride or columns, generator=generator, device="cuda", dtype=torch.float32)
    labels = torch.randint(columns, (rows,), generator=generator, device="cuda")
    labels[::3] = -1
    return (5 * logits).to(dtype)[:, :columns], labels


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [n] and logit of the label [n] (0 for -1), fp64."""
    wide = logits.double()
    target = wide.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return wide.logsumexp(1), torch.where(labels < 0, 0.0, target)


def kernels(logits: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [2, n], and the gradient in place of a copy of the logits."""
    from minicpm_megatron.model.fused_loss_triton import differentiate_, statistics

    found = statistics(logits, labels, logits.new_empty(2, labels.size(0), dtype=torch.float32))
    copy = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
    return found, differentiate_(copy, labels, found[0], 1.5 * factor, factor)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("rows", "columns", "stride"),
    [
        (1, 1, None),
        (7, BLOCK - 1, None),
        (7, BLOCK, None),
        (7, BLOCK + 1, None),
        (5, 5003, 5120),  # a chunk's buffer may be wider than its columns
        (64, 122_753, None),
        (64, 122_753, 122_880),
        (64, 122_753 // 2 + 1, None),
    ],
)
def test_statistics_and_gradients_are_those_of_fp64(rows: int, columns: int, stride: int | None, dtype) -> None:
    logits, labels = case(rows, columns, dtype, stride)
    factor = torch.linspace(-1, 2, rows, device="cuda")
    found, gradient = kernels(logits, labels, factor)
    log_sum, target = exact(logits, labels)
    torch.testing.assert_close(found[0].double(), log_sum, rtol=2e-6, atol=2e-6)
    assert torch.equal(found[1].double(), target), "a logit is read, not computed"
    softmax = (logits.double() - log_sum[:, None]).exp()
    at_label = torch.nn.functional.one_hot(labels.clamp(min=0), columns) * (labels >= 0)[:, None]
    expected = factor.double()[:, None] * (1.5 * softmax - at_label)
    # of an exponent of -60 fp32 keeps 4e-6, and as much again of the log-sum-exp in it
    torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype] + 2e-5, atol=1e-7)


def test_two_calls_give_the_same_bits() -> None:
    logits, labels = case(256, 122_753, torch.bfloat16)
    factor = torch.ones(256, device="cuda")
    first, second = kernels(logits, labels, factor), kernels(logits, labels, factor)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 * GIB, reason="needs 16 GiB of free memory"
)
def test_a_chunk_of_more_than_2_31_logits() -> None:
    """The last row lies beyond what an int32 counts."""
    from minicpm_megatron.model.fused_loss_triton import differentiate_, statistics

    rows, columns = 17_600, 122_753
    assert rows * columns > 2**31
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    last, labels = case(1, columns, torch.bfloat16)
    logits[-1], labels = last[0], torch.full((rows,), 5, device="cuda")
    found = statistics(logits, labels, torch.empty(2, rows, device="cuda"))
    log_sum, target = exact(logits[-1:], labels[-1:])
    torch.testing.assert_close(found[:, -1].double(), torch.cat([log_sum, target]), rtol=2e-6, atol=2e-6)
    ones = torch.ones(rows, device="cuda")
    differentiate_(logits, labels, found[0], ones, ones)
    assert abs(float(logits[-1].double().sum())) < 1e-2, "a softmax less its label sums to nothing"
    assert float(logits[0, 5]) == pytest.approx(-1.0, rel=1e-2)


@pytest.mark.parametrize("gradient_in", ["forward", "backward"])
def test_the_loss_at_its_real_size_is_that_of_whole_logits(gradient_in: str) -> None:
    """2,048 tokens of MiniCPM-2.4B in bf16, against torch's cross_entropy of fp32 logits of the same weights."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2048, 2304, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(122_880, 2304, generator=generator, device="cuda") / 48).bfloat16().requires_grad_()
    labels = torch.randint(122_753, (2048,), generator=generator, device="cuda")
    loss = VocabParallelLinearCrossEntropy(vocab_size=122_753, gradient_in=gradient_in, kernels="triton")
    ours = loss(hidden, weight, labels)
    mine = torch.autograd.grad(ours, (hidden, weight))
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    reference = torch.nn.functional.cross_entropy(wide[0] @ wide[1][:122_753].T, labels)
    theirs = torch.autograd.grad(reference, wide)
    assert float(ours) == pytest.approx(float(reference), rel=1e-4)
    for found, expected in zip(mine, theirs, strict=True):
        # logits rounded to bf16 once, their gradient once: 2 x 2^-9 of each product, and sums of them less
        assert float((found.float() - expected).norm() / expected.norm()) < 1e-2
    assert not mine[1][122_753:].any(), "padding"
