"""Upcycling as pure functions of tensors: against the mixture's definition, written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minicpm_megatron import upcycle_state_dict
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import RateLedger, rates_with_roles
from minicpm_megatron.methods.upcycling import NEW_ROLES, Upcycling, upcycle_moment, upcycled_model
from minicpm_megatron.model.initialize import initial_tensor
from tests.convert.conftest import EXPERTS, random_tensors, small_model

HIDDEN, WIDTH = 24, 48
MLP = "decoder.layers.3.mlp."
EXPERT = MLP + "experts.local_experts."


def dense() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder.layers.3.input_layernorm.weight": torch.ones(HIDDEN),
        MLP + "linear_fc1.weight": torch.randn(2 * WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5,
        MLP + "linear_fc2.weight": torch.randn(HIDDEN, WIDTH, generator=generator) / WIDTH**0.5,
    }


def mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ first.T).chunk(2, -1)
    return (F.silu(gate) * up) @ second.T


def mixture(
    x: torch.Tensor, weights: dict[str, torch.Tensor], top_k: int, *, renormalised: bool = True
) -> tuple[torch.Tensor, list[list[int]]]:
    """Output and the experts of every token, one token and one expert after the other."""
    outputs, chosen = [], []
    for token in x:
        probabilities = (weights[MLP + "router.weight"] @ token).softmax(0)
        values, experts = probabilities.topk(top_k)
        if renormalised:
            values = values / values.sum()
        each = [
            value * mlp(token, weights[f"{EXPERT}{e}.linear_fc1.weight"], weights[f"{EXPERT}{e}.linear_fc2.weight"])
            for value, e in zip(values, experts.tolist(), strict=True)
        ]
        outputs.append(torch.stack(each).sum(0))
        chosen.append(sorted(experts.tolist()))
    return torch.stack(outputs), chosen


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_experts_are_copies_in_every_bit_and_the_rest_is_untouched() -> None:
    before = dense()
    after = upcycle_state_dict(before)
    assert len(after) == 1 + 1 + 2 * 8
    for e in range(8):
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            assert torch.equal(after[f"{EXPERT}{e}.{matrix}"], before[MLP + matrix])
    assert torch.equal(after["decoder.layers.3.input_layernorm.weight"], torch.ones(HIDDEN))
    assert len({tensor.untyped_storage().data_ptr() for tensor in after.values()}) == len(after)


def test_the_router_is_drawn_as_initial_weights_are() -> None:
    name = MLP + "router.weight"
    router = upcycle_state_dict(dense(), seed=7)[name]
    assert torch.equal(router, initial_tensor(name, (8, HIDDEN), 0.1, 7))
    wide = {MLP + "linear_fc1.weight": torch.zeros(4, 4000), MLP + "linear_fc2.weight": torch.zeros(4000, 2)}
    drawn = upcycle_state_dict(wide)[name]
    # of 32,000 draws the deviation is known to 0.4 %, the mean to 0.0006
    assert float(drawn.var()) == pytest.approx(0.01, rel=0.03) and abs(float(drawn.mean())) < 0.003
    assert float(upcycle_state_dict(wide, router_std=0.5)[name].std()) == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(drawn, upcycle_state_dict(wide, seed=1)[name])


@pytest.mark.parametrize("granularity", [1, 2, 3, 4])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_mixture_computes_what_the_mlp_did(granularity: int, top_k: int, tokens: torch.Tensor) -> None:
    before = dense()
    after = upcycle_state_dict(before, 5, granularity=granularity, router_std=1.0)
    output, chosen = mixture(tokens, after, top_k * granularity)
    expected = mlp(tokens, before[MLP + "linear_fc1.weight"], before[MLP + "linear_fc2.weight"])
    assert float((output - expected).abs().max()) < 2e-6 * float(expected.abs().max())
    # the slices of a copy are chosen together, and tokens choose different copies
    for experts in chosen:
        assert [e % granularity for e in experts] == list(range(granularity)) * top_k
    assert top_k == 5 or len(set(map(tuple, chosen))) > 3


def test_without_renormalisation_the_output_is_smaller(tokens: torch.Tensor) -> None:
    before = dense()
    after = upcycle_state_dict(before)
    output, _ = mixture(tokens, after, 2, renormalised=False)
    expected = mlp(tokens, before[MLP + "linear_fc1.weight"], before[MLP + "linear_fc2.weight"])
    ratio = output.norm(dim=1) / expected.norm(dim=1)
    # two of eight nearly equal probabilities
    assert float(ratio.min()) > 0.25 and float(ratio.max()) < 0.6


def test_noise_is_relative_and_of_its_own_for_every_copy() -> None:
    before = {name: 100 * tensor for name, tensor in dense().items()}
    after = upcycle_state_dict(before, noise=0.05)
    name = "linear_fc1.weight"
    noises = [after[f"{EXPERT}{e}.{name}"] - before[MLP + name] for e in range(8)]
    for noise in noises:
        assert float(noise.std() / before[MLP + name].std()) == pytest.approx(0.05, rel=0.1)
    assert all(not torch.equal(noises[0], other) for other in noises[1:])
    again = upcycle_state_dict(before, noise=0.05)
    assert all(torch.equal(after[key], again[key]) for key in after)


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("clone", [False, True])
def test_moments_have_the_shapes_of_the_weights(clone: bool, granularity: int) -> None:
    plan = Upcycling(copies=4, granularity=granularity)
    weights = upcycle_state_dict(dense(), 4, granularity=granularity)
    for kind, share in (("exp_avg", 1 / 4 / granularity), ("exp_avg_sq", 1 / 8 / granularity**2)):
        found = {}
        for name, tensor in dense().items():
            found |= dict(upcycle_moment(name, kind, tensor.abs(), plan, clone=clone))
        assert list(found) == list(weights)
        assert all(found[name].shape == weights[name].shape for name in weights)
        assert not found[MLP + "router.weight"].any()
        expert = found[f"{EXPERT}{granularity - 1}.linear_fc2.weight"]
        columns = dense()[MLP + "linear_fc2.weight"].abs()[:, -expert.size(1) :]
        torch.testing.assert_close(expert, columns * (share if clone else 0.0))


@pytest.mark.parametrize("granularity", [1, 2])
def test_the_gradients_of_experts_sum_to_the_dense_one_scaled(granularity: int, tokens: torch.Tensor) -> None:
    """What the scale of cloned moments rests on: over the copies, shares of the gradient add up to all of it."""
    before = {name: tensor.requires_grad_() for name, tensor in dense().items()}
    mlp(tokens, before[MLP + "linear_fc1.weight"], before[MLP + "linear_fc2.weight"]).square().sum().backward()
    copies = 4
    after = {
        name: tensor.detach().requires_grad_()
        for name, tensor in upcycle_state_dict(before, copies, granularity=granularity, router_std=1.0).items()
    }
    mixture(tokens, after, 2 * granularity)[0].square().sum().backward()
    for matrix, scale in (("linear_fc1.weight", 1.0), ("linear_fc2.weight", 1.0 / granularity)):
        gradients = [after[f"{EXPERT}{e}.{matrix}"].grad for e in range(copies * granularity)]
        slices = [sum(gradients[number::granularity]) for number in range(granularity)]
        whole = torch.cat(slices, 1)
        if matrix == "linear_fc1.weight":
            halves = [part.chunk(2) for part in slices]
            whole = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        torch.testing.assert_close(whole, before[MLP + matrix].grad * scale, rtol=1e-4, atol=1e-5)


def test_the_model_that_comes_of_it() -> None:
    model = small_model(untie_embeddings_and_output_weights=True)
    sparse = upcycled_model(model, Upcycling(copies=8, granularity=4))
    assert (sparse.num_moe_experts, sparse.moe_router_topk, sparse.moe_ffn_hidden_size) == (32, 8, 60)
    assert sparse.model_copy(update={key: getattr(model, key) for key in EXPERTS}) == model
    shapes = {name: tuple(t.shape) for name, t in upcycle_state_dict(random_tensors(model), granularity=4).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in random_tensors(sparse).items()}


def test_rates_of_the_new_groups_are_the_tables() -> None:
    model = small_model()
    ledger = RateLedger(model, 0.02)
    before = {role: ledger.rate(role, 0.3) for role in ("embedding", "hidden", "vector")}
    rates = rates_with_roles(before, NEW_ROLES, model)
    assert set(rates) == {"embedding", "hidden", "vector", "expert", "router"}
    assert rates["router"] == pytest.approx(ledger.rate("router", 0.3), rel=1e-12)
    ledger.check_saved(rates)
    assert rates_with_roles({}, NEW_ROLES, model) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "--experts: a mixture has 2 experts or more"),
        ({"router_std": 0.0}, "--router-std: must be above 0"),
        ({"router_std": float("nan")}, "--router-std"),
        ({"noise": -0.1}, "--noise: must be 0 or more"),
        ({"granularity": 0}, "--granularity: must be 1 or more"),
        ({"granularity": 5}, "--granularity: 5 does not divide the MLP's width 48; give a divisor of 48"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_what_cannot_be_made(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        upcycle_state_dict(dense(), **options)


def test_other_state_dicts() -> None:
    with pytest.raises(UserError, match="has experts already"):
        upcycle_state_dict(upcycle_state_dict(dense()))
    with pytest.raises(UserError, match="no decoder.layers.N.mlp.linear_fc1.weight"):
        upcycle_state_dict({"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="mixture of 5 experts already"):
        upcycled_model(small_model(**EXPERTS), Upcycling())
    for top_k, message in ((0, "0 of 8 copies"), (9, "9 of 8 copies"), (1, "would learn nothing")):
        with pytest.raises(UserError, match=f"--top-k: .*{message}"):
            Upcycling(top_k=top_k)


def test_moments_of_another_optimizer_are_dropped_or_refused() -> None:
    plan, dense = Upcycling(copies=4, top_k=2), torch.ones(2, 2)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert not any(tensor.any() for _, tensor in upcycle_moment(name, "momentum_buffer", dense, plan, clone=False))
    with pytest.raises(UserError, match="momentum_buffer is none of Adam's moments; use --moments drop"):
        list(upcycle_moment(name, "momentum_buffer", dense, plan, clone=True))
