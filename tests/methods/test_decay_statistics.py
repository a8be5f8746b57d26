"""Statistics of gradients on losses whose derivatives are known, and sums over any cut of the model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods import decay_statistics
from minicpm_megatron.methods.decay_statistics import DecaySums, decay_sums, largest_update
from tests.device import put


@pytest.fixture
def triple() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    g, h, v = (put(torch.randn(1000, generator=generator)) for _ in range(3))
    return g, h, 0.01 * v


def test_quadratic_loss() -> None:
    """0.5 x H x: g = H x, so D2 = v H v / |v|^2 exactly, and D1 the slope at the end of the step."""
    generator = torch.Generator().manual_seed(0)
    root = put(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    hessian, x = root @ root.T, put(torch.randn(20, generator=generator, dtype=torch.float64))
    v = -0.01 * hessian @ x
    sums = decay_sums([(hessian @ x, hessian @ (x + v), v)])
    assert sums.second_derivative == pytest.approx(float(v @ hessian @ v / (v @ v)), rel=1e-9)
    assert sums.gradient_norm == pytest.approx(float((hessian @ x).norm()))
    unit = v / v.norm()

    def loss(along: float) -> float:
        end = x + v + along * unit
        return float(0.5 * end @ hessian @ end)

    assert sums.first_derivative == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-6)
    assert sums.update_norm == pytest.approx(float(v.norm()))


@pytest.mark.parametrize("x", [-2.0, 0.0, 0.5])
def test_curvature_of_a_parabola(x: float) -> None:
    """y = a x^2 / 2 has curvature |a| / (1 + (a x)^2)^(3/2)."""
    a, step = 3.0, 0.25
    g, h, v = (put(torch.tensor([value], dtype=torch.float64)) for value in (a * (x - step), a * x, step))
    sums = decay_sums([(g, h, v)])
    assert sums.curvature == pytest.approx(a / (1 + (a * x) ** 2) ** 1.5, rel=1e-12)
    assert sums.first_derivative == pytest.approx(a * x)
    down = decay_sums([(-g, -h, v)])
    assert (down.curvature, down.second_derivative) == (pytest.approx(sums.curvature), pytest.approx(-a))


def test_cosine() -> None:
    g, h, v = put(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])).unbind()
    assert decay_sums([(g, h, v)]).gradient_cosine == pytest.approx(math.cos(math.pi / 4))
    assert decay_sums([(g, -g, v)]).gradient_cosine == -1.0
    assert decay_sums([(g, v, v)]).gradient_cosine == 0.0


def test_all_at_once_by_torch(triple: tuple[Tensor, Tensor, Tensor]) -> None:
    g, h, v = (tensor.double() for tensor in triple)
    sums = decay_sums([triple])
    assert sums.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert sums.gradient_cosine == pytest.approx(float(torch.cosine_similarity(g, h, dim=0)), rel=1e-9)
    assert sums.first_derivative == pytest.approx(float(h @ v / v.norm()), rel=1e-9)
    assert sums.second_derivative == pytest.approx(float((h - g) @ v / (v @ v)), rel=1e-9)


@pytest.mark.parametrize("cuts", [[1000], [1, 999], [500, 500], [0, 300, 7, 693], [10] * 100])
def test_shards_add_up_exactly(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, whose sums have no rounding: every cut, and every chunk within a shard, gives the same six."""
    generator = torch.Generator().manual_seed(0)
    tensors = [put(torch.randint(-99, 99, (1000,), generator=generator).float()) for _ in range(3)]
    whole = decay_sums([(tensors[0], tensors[1], tensors[2])])
    shards = list(zip(*(tensor.split(cuts) for tensor in tensors), strict=True))
    assert sum((decay_sums([shard]) for shard in shards), DecaySums()) == whole
    assert decay_sums(shards) == whole
    monkeypatch.setattr(decay_statistics, "CHUNK", 17)
    assert decay_sums(shards) == whole
    assert whole.gh != whole.gv != whole.hv  # so that a mix-up would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_fp64(dtype: torch.dtype) -> None:
    """2^24 + 1 ones, which fp32 would count as 2^24."""
    ones = put(torch.ones(1, dtype=dtype)).expand(2**24 + 1)
    assert decay_sums([(ones, ones, ones)]).gg == 2**24 + 1


def test_over_ranks_as_six_numbers(triple: tuple[Tensor, Tensor, Tensor]) -> None:
    sums = decay_sums([triple])
    assert DecaySums.from_tensor(sums.to_tensor()) == sums
    both = decay_sums([triple, triple])
    assert DecaySums.from_tensor(sums.to_tensor() + sums.to_tensor()) == both
    assert sums.to_tensor().dtype == torch.float64 and sums.to_tensor().shape == (6,)


def test_nothing_is_undefined_not_zero() -> None:
    sums = decay_sums([])
    assert sums == DecaySums() and sums.gradient_norm == 0.0
    for name in ("gradient_cosine", "first_derivative", "second_derivative", "curvature"):
        assert math.isnan(getattr(sums, name)), name


def test_largest_update() -> None:
    before = put(torch.zeros(3, 5))
    after = before.clone()
    after[1, 2], after[2, 4] = -0.5, 0.25
    assert largest_update(before, after) == 0.5
    assert max(largest_update(a, b) for a, b in zip(before, after, strict=True)) == 0.5
    assert largest_update(torch.zeros(0), torch.zeros(0)) == 0.0
    # the difference of two bf16 weights is not rounded to bf16
    one, next_to = put(torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16))
    assert largest_update(one[None] * 1, next_to[None]) == 0.0078125


def test_refused() -> None:
    with pytest.raises(UserError, match=r"shapes \(2,\), \(3,\), \(2,\)"):
        decay_sums([(torch.ones(2), torch.ones(3), torch.ones(2))])
    with pytest.raises(UserError, match="largest_update: shapes"):
        largest_update(torch.ones(2), torch.ones(3))
