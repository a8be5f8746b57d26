"""Sparse upcycling (section 7.3 of arXiv 2404.06395): a dense model as a mixture of experts that computes the same.

Every MLP becomes E experts, each a bit-exact copy of it, behind a router drawn from N(0, 0.1^2), the paper's variance
of 0.01. The weights of a token's experts sum to 1 (`moe_router_pre_softmax` false), so that the sum over equal experts
is the dense MLP's output whatever the router says; where they are not renormalised it is that output times their sum.

With granularity G every copy is cut into G experts of 1/G of its width, numbered copy by copy, and a token gets k x G.
A slice's second matrix is G times the dense one's columns, and the G slices of a copy share one row of the router (the
virtual groups of arXiv 2410.07524). Equal logits are chosen together and weigh the same, w/G each, so the sum over a
copy is w times the dense output again. Training tells the slices apart.

Names are those of our checkpoints (Megatron-Core's, layers and experts numbered globally).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods import draws
from minicpm_megatron.recipe import ModelRecipe

if TYPE_CHECKING:
    from torch import Tensor

_MLP = re.compile(r"(decoder\.layers\.\d+\.mlp\.)(linear_fc[12]\.weight)")
ADAM = ("exp_avg", "exp_avg_sq")
ROUTER_STD = 0.1  # variance 0.01 (section 7.3)
NEW_ROLES = ("expert", "router")  # muP groups of a mixture that a dense model lacks


@dataclass(frozen=True)
class Upcycling:
    """What is made of each MLP.

    Attributes:
        copies: E, copies of the MLP.
        top_k: k, copies a token.
        router_std: standard deviation of the routers' weights.
        seed: of the routers and the noise; each tensor depends on it and on its name alone.
        noise: standard deviation of the noise on each copy, relative to that of the copied matrix; 0: exact copies.
        granularity: G, experts that a copy is cut into.

    Raises:
        UserError: a value out of its range.
    """

    copies: int = 8
    top_k: int = 2
    router_std: float = ROUTER_STD
    seed: int = 0
    noise: float = 0.0
    granularity: int = 1

    def __post_init__(self) -> None:
        for holds, where, what in (
            (self.copies >= 2, "--experts", f"a mixture has 2 experts or more, not {self.copies}"),
            # equal logits would send every token to the same experts
            (0 < self.router_std < float("inf"), "--router-std", f"must be above 0, not {self.router_std}"),
            (0 <= self.noise < float("inf"), "--noise", f"must be 0 or more, not {self.noise}"),
            (self.granularity >= 1, "--granularity", f"must be 1 or more, not {self.granularity}"),
            (0 <= self.seed < 1 << 63, "--seed", f"must be 0 or more and fit 63 bits, not {self.seed}"),
            (1 <= self.top_k <= self.copies, "--top-k", f"{self.top_k} of {self.copies} copies a token"),
            (
                self.top_k * self.granularity > 1,
                "--top-k",
                "the router of one expert a token would learn nothing, as its weight is always 1",
            ),
        ):
            if not holds:
                raise UserError(what, where=where)

    def facts(self) -> dict[str, Any]:
        """JSON values by which the result can be made again."""
        return asdict(self)


def upcycled_model(dense: ModelRecipe, plan: Upcycling) -> ModelRecipe:
    """The shape of the mixture; everything but its experts is the dense model's.

    Raises:
        UserError: `dense` has experts already, or the granularity does not divide its width.
    """
    if dense.num_moe_experts is not None:
        raise UserError(
            f"is a mixture of {dense.num_moe_experts} experts already", where="the model", fix="give a dense model"
        )
    if dense.ffn_hidden_size % plan.granularity:
        raise _uneven(dense.ffn_hidden_size, plan.granularity)
    return ModelRecipe(
        **dense.model_dump()
        | {
            "num_moe_experts": plan.copies * plan.granularity,
            "moe_router_topk": plan.top_k * plan.granularity,
            "moe_ffn_hidden_size": dense.ffn_hidden_size // plan.granularity,
            "moe_router_pre_softmax": False,
        }
    )


def upcycle_tensor(name: str, tensor: Tensor, plan: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the dense model -> those of the mixture that come of it, each when it is asked for.

    Args:
        tensor: whole, of any floating type.

    Yields:
        (name, whole tensor): the router [experts, hidden_size] in fp32 before the experts' linear_fc1
        [2 width, hidden_size]; linear_fc2 [hidden_size, width]; any other tensor as it is. Exact copies share storage.

    Raises:
        UserError: the granularity does not divide the MLP's width.
    """
    match = _MLP.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    module, matrix = match.groups()
    if matrix == "linear_fc1.weight":
        router = module + "router.weight"
        rows = draws.normal(router, (plan.copies, tensor.size(1)), plan.router_std, plan.seed)
        yield router, rows.repeat_interleave(plan.granularity, dim=0)
    for number in range(plan.copies * plan.granularity):
        expert = f"{module}experts.local_experts.{number}.{matrix}"
        values = _slice(tensor, matrix, number % plan.granularity, plan.granularity)
        if matrix == "linear_fc2.weight" and plan.granularity > 1:
            values = values * plan.granularity
        if plan.noise:
            std = plan.noise * float(tensor.float().std())
            values = values + draws.normal(expert, tuple(values.shape), std, plan.seed).to(values)
        yield expert, values


def upcycle_moment(
    name: str, kind: str, moment: Tensor, plan: Upcycling, *, clone: bool
) -> Iterator[tuple[str, Tensor]]:
    """One of Adam's moments of a dense tensor -> those of the tensors that `upcycle_tensor` makes of it, in its order.

    Args:
        kind: exp_avg, exp_avg_sq, or one of another optimizer.
        clone: give experts the dense moments, in the size their own will have. An expert sees k of E tokens with a
            weight of 1/k: its gradient is on average 1/E of the dense one, and its square, which is mostly the noise
            of a batch, 1/(k E). For the enlarged second matrix of a slice it is 1/G and 1/G^2 of that. False: zeros.
            Routers always start from zeros.

    Raises:
        UserError: `clone`, and the moment is another optimizer's: how large an expert's will be is not known.
    """
    if clone and kind not in ADAM:
        raise UserError(f"{kind} is none of Adam's moments", where="--moments clone", fix="use --moments drop")
    match = _MLP.fullmatch(name)
    if match is None:
        yield name, moment
        return
    module, matrix = match.groups()
    first = kind == "exp_avg"
    share = 1.0 / plan.copies if first else 1.0 / (plan.top_k * plan.copies)
    if matrix == "linear_fc1.weight":
        yield module + "router.weight", moment.new_zeros(plan.copies * plan.granularity, moment.size(1))
    else:
        share /= plan.granularity if first else plan.granularity**2
    scaled = moment * (share if clone else 0.0)
    for number in range(plan.copies * plan.granularity):
        expert = f"{module}experts.local_experts.{number}.{matrix}"
        yield expert, _slice(scaled, matrix, number % plan.granularity, plan.granularity)


def upcycle_state_dict(
    state_dict: Mapping[str, Tensor],
    experts: int = 8,
    *,
    router_std: float = ROUTER_STD,
    seed: int = 0,
    noise: float = 0.0,
    granularity: int = 1,
) -> dict[str, Tensor]:
    """The weights of a dense model as those of a mixture that computes the same (section 7.3 of the paper).

    Args:
        state_dict: whole tensors of any floating type, by Megatron-Core's names.
        experts: E, copies of each MLP.
        router_std: standard deviation of the routers' weights.
        seed: of the routers and the noise; each tensor depends on it and on its name alone.
        noise: standard deviation of the noise on each copy, relative to that of the copied matrix; 0: exact copies.
        granularity: G, experts that a copy is cut into.

    Returns:
        Tensors of the mixture, which share no storage with each other.

    Raises:
        UserError: there is no dense MLP in `state_dict`, or experts already; a value out of its range.
    """
    plan = Upcycling(copies=experts, router_std=router_std, seed=seed, noise=noise, granularity=granularity)
    if any(".experts." in name for name in state_dict):
        raise UserError("has experts already", where="state_dict", fix="give a dense model")
    if not any(map(_MLP.fullmatch, state_dict)):
        raise UserError(
            "no decoder.layers.N.mlp.linear_fc1.weight in it", where="state_dict", fix="use Megatron-Core's names"
        )
    return {
        new: value.clone() for name, tensor in state_dict.items() for new, value in upcycle_tensor(name, tensor, plan)
    }


def _slice(whole: Tensor, matrix: str, number: int, slices: int) -> Tensor:
    """Part `number` of an MLP: rows of gate and up, or columns of the output."""
    if slices == 1:
        return whole
    width = whole.size(1) if matrix == "linear_fc2.weight" else whole.size(0) // 2
    if width % slices:
        raise _uneven(width, slices)
    width //= slices
    if matrix == "linear_fc2.weight":
        return whole.narrow(1, number * width, width)
    import torch  # here, so that the defaults of `Upcycling` are read without it

    return torch.cat([half.narrow(0, number * width, width) for half in whole.chunk(2)])


def _uneven(width: int, granularity: int) -> UserError:
    return UserError(
        f"{granularity} does not divide the MLP's width {width}",
        where="--granularity",
        fix=f"give a divisor of {width}",
    )
