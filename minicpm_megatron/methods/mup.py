"""The paper's Tensor Program operations as one table: a parameter's role decides its init, rate and weight decay.

Everything else reads `mup_table`: initial weights (`model.initialize`), optimizer groups (`mup_param_groups`) and
the `RateLedger` that refuses to train with rates the table does not know. With m = hidden_size / dim_model_base
(Table 7 of arXiv 2404.06395):

    role        what it is                           init std              rate
    embedding   word embedding (tied: also the head) init_std              1
    hidden      matrices of attention and MLP        init_std / sqrt(m)    1 / m
    vector      norm weights                         all ones              1
    expert      matrices of experts                  init_std / sqrt(m)    1 / m
    router      expert routers                       init_std / sqrt(m)    1 / m
    head        untied LM head                       init_std              1

The paper says "each two-dimensional tensor" and does not say whether embedding and head count. As vectors (the
default, also the reading of Tensor Programs V) the logits keep their size over width; the literal reading,
`embedding_role="matrix"`, lets them fall with width. Forward multipliers complete the table: embeddings times
scale_emb, block outputs times scale_depth / sqrt(num_layers), the hidden state before the head times 1 / m.

The learning rates above are Adam's. An optimizer may give a role another rule (`LR_RULES`); both keep the change of a
layer's output the same at every width, which asks for a change of the weight whose spectral norm is a constant times
sqrt(fan_out / fan_in) (Yang, Simon and Bernstein, arXiv 2310.17813):

    rule        an update at learning rate 1           its spectral norm                      learning rate
    entries     entries of size 1 (Adam, signs)        grows as m (Tensor Programs)           1 / m
    spectral    c sqrt(fan_out / fan_in) U V^T (Muon)  c sqrt(fan_out / fan_in)               1

c = sqrt(d_base) gives the entries of a square matrix of width d_base the root mean square 1, so that one base learning
rate serves both rules there. In standard parametrization c is sqrt(hidden_size): the root mean square is then the same
at every width, as in Moonlight (arXiv 2502.16982).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

from minicpm_megatron.errors import UserError, require

ROLES = ("embedding", "hidden", "expert", "vector", "router", "head")
LR_RULES = ("entries", "spectral")
NO_RULES: Mapping[str, str] = MappingProxyType({})
RATE_TOLERANCE = 1e-9  # relative; rates are products of three doubles


class Width(Protocol):
    """Fields that decide the width multiplier of a model."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def dim_model_base(self) -> int: ...

    @property
    def parametrization(self) -> Literal["mup", "standard"]: ...


class Shape(Width, Protocol):
    """Fields of a model that the table reads; `ModelRecipe` and `MiniCPMConfig` both have them."""

    @property
    def init_method_std(self) -> float: ...

    @property
    def embedding_role(self) -> Literal["vector", "matrix"]: ...


@dataclass(frozen=True)
class RoleRule:
    """One row of the table.

    Attributes:
        init_std: standard deviation of the initial weights; None: all ones.
        lr_multiplier: the group's rate relative to the base rate.
        decays: whether weight decay applies.
        update_norm: c of the spectral rule, the spectral norm of a square matrix's update at learning rate 1; None: the
            learning rate follows the rule of entries.
    """

    init_std: float | None
    lr_multiplier: float
    decays: bool
    update_norm: float | None = None


def width_multiplier(shape: Width) -> float:
    """m = d_model / d_base, or 1 in standard parametrisation."""
    return shape.hidden_size / shape.dim_model_base if shape.parametrization == "mup" else 1.0


def residual_multiplier(scale_depth: float, num_layers: int) -> float:
    """Factor on the output of every attention and MLP block: scale_depth / sqrt(num_layers) (Table 7)."""
    return scale_depth / math.sqrt(num_layers)


def mup_table(shape: Shape, lr_rules: Mapping[str, str] = NO_RULES) -> dict[str, RoleRule]:
    """Role -> init, rate multiplier and weight decay for a model of this shape (Table 7; see the module).

    Args:
        lr_rules: role -> one of `LR_RULES`, where the optimizer's is not that of entries.

    Raises:
        UserError: an unknown role or rule.
    """
    for role, rule in lr_rules.items():
        known = f"roles are {', '.join(ROLES)}, rules {', '.join(LR_RULES)}"
        require(role in ROLES and rule in LR_RULES, "lr_rules", f"{role}={rule} is none", known)
    m = width_multiplier(shape)
    matrix = RoleRule(shape.init_method_std / math.sqrt(m), 1.0 / m, decays=True)
    ends = matrix if shape.embedding_role == "matrix" else RoleRule(shape.init_method_std, 1.0, decays=True)
    table = {
        "embedding": RoleRule(ends.init_std, ends.lr_multiplier, decays=False),
        "hidden": matrix,
        "expert": matrix,
        "vector": RoleRule(None, 1.0, decays=False),
        "router": matrix,
        "head": ends,
    }
    norm = math.sqrt(shape.hidden_size / m)  # sqrt(d_base) in muP
    for role, rule in lr_rules.items():
        if rule == "spectral":
            table[role] = replace(table[role], lr_multiplier=1.0, update_norm=norm)
    return table


# Names of the modules that own a matrix. Megatron-Core's come first, then those of transformers' decoders (Llama,
# GPT-2, GPT-NeoX, OPT, Mixtral), of Meta's Llama, of nanoGPT (GPT-2's) and of torch.nn's layers. A name that
# also means other things ("proj", "linear") is left out on purpose: a guess would put a matrix into the wrong group.
_OWNERS = {
    "embedding": """word_embeddings position_embeddings embed_tokens embed_positions tok_embeddings token_embedding
        tok_emb embed_in wte wpe embedding embeddings embed""",
    "head": "output_layer lm_head embed_out output head unembed",
    "router": "router gate",
    "hidden": """linear_qkv linear_proj linear_fc1 linear_fc2
        q_proj k_proj v_proj o_proj qkv_proj out_proj gate_proj up_proj down_proj gate_up_proj
        c_attn c_proj c_fc query_key_value dense dense_h_to_4h dense_4h_to_h fc1 fc2
        wq wk wv wo wqkv w1 w2 w3 in_proj in_proj_weight linear1 linear2""",
}
_ROLE_OF_OWNER = {owner: role for role, owners in _OWNERS.items() for owner in owners.split()}


def role_of(name: str, dimensions: int) -> str:
    """Role of the parameter `name` with that many dimensions, by the common names of language models.

    Raises:
        UserError: a matrix of a name that no rule knows.

    >>> role_of("model.embed_tokens.weight", 2), role_of("transformer.h.0.mlp.c_fc.weight", 2)
    ('embedding', 'hidden')
    """
    if dimensions < 2:
        return "vector"
    parts = name.split(".")
    if "experts" in parts:
        return "expert"
    # Megatron-Core's grouped experts number their weights; a bare parameter of a module has no ".weight"
    owner = parts[-2] if len(parts) > 1 and re.fullmatch(r"weight\d*", parts[-1]) else parts[-1]
    role = _ROLE_OF_OWNER.get(owner)
    if role is None:
        raise UserError(
            f"the matrix {name!r} has a name that no rule knows",
            where="roles of the muP table",
            fix=f"give mup_param_groups role=, a function of (name, dimensions) that returns one of {', '.join(ROLES)}",
        )
    return role


def mup_param_groups(
    model: Any,
    shape: Shape,
    *,
    lr: float,
    weight_decay: float = 0.0,
    weight_decay_mode: Literal["tied", "independent"] = "tied",
    role: Callable[[str, int], str] = role_of,
    lr_rules: Mapping[str, str] = NO_RULES,
) -> list[dict[str, Any]]:
    """Optimizer groups of `model`, one a role, for torch.optim, DeepSpeed's optimizers and apex's alike.

    Args:
        model: anything with `named_parameters()`; frozen parameters are left out, tied ones appear once.
        shape: width and reading of the table.
        lr: base rate; each group's `lr` is lr x multiplier.
        weight_decay: of the roles that the table lets decay.
        weight_decay_mode: "tied": an AdamW step shrinks a weight by (the group's learning rate) x weight_decay.
            "independent": by weight_decay x f(t), whatever the learning rate, which AdamW does when the group's own
            weight_decay is divided by its learning rate at f = 1.
        role: parameter name and number of dimensions -> role, for models with other names than `role_of` knows
            (Megatron-Core's, and those of transformers, GPT-2, Llama and nanoGPT).
        lr_rules: as in `mup_table`.

    Returns:
        Groups with `name` (the role), `params`, `lr`, `lr_multiplier` and `weight_decay`, by the spectral rule also
        `update_norm`; empty roles are left out.

    Raises:
        UserError: a matrix whose name `role_of` does not know, or a role that is none.
    """
    table = mup_table(shape, lr_rules)
    members: dict[str, list[Any]] = {name: [] for name in ROLES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty placeholder behind; the full shape is then in ds_shape
            found = role(name, len(getattr(parameter, "ds_shape", parameter.shape)))
            require(
                found in members, "role=", f"{name!r} is given the role {found!r}", f"return one of {', '.join(ROLES)}"
            )
            members[found].append(parameter)
    groups: list[dict[str, Any]] = []
    for name, parameters in members.items():
        if parameters:
            rule = table[name]
            rate = lr * rule.lr_multiplier
            decay = weight_decay if rule.decays else 0.0
            groups.append(
                {
                    "name": name,
                    "params": parameters,
                    "lr": rate,
                    "lr_multiplier": rule.lr_multiplier,
                    "weight_decay": decay / rate if weight_decay_mode == "independent" else decay,
                }
            )
            if rule.update_norm is not None:
                groups[-1]["update_norm"] = rule.update_norm
    return groups


def rates_with_roles(
    rates: Mapping[str, float], roles: Iterable[str], shape: Shape, lr_rules: Mapping[str, str] = NO_RULES
) -> dict[str, float]:
    """A run's rates at its last update, group name -> rate, with those of `roles` where the table puts them.

    Nothing is added where the rate of the hidden matrices, from which theirs follow, is not known.
    """
    if "hidden" not in rates:
        return dict(rates)
    table = mup_table(shape, lr_rules)
    base = rates["hidden"] / table["hidden"].lr_multiplier
    return {**rates, **{role: base * table[role].lr_multiplier for role in roles}}


class RateLedger:
    """The rates a run may use: base x multiplier of the table x f(t), for every group, at any time.

    Rates are never trusted from an optimizer or a checkpoint, they are recomputed; and before the first step after
    any start, load, branch or conversion what the optimizer holds is compared with the table.
    """

    def __init__(self, shape: Shape, base_lr: float, lr_rules: Mapping[str, str] = NO_RULES) -> None:
        self.base_lr = base_lr
        table = mup_table(shape, lr_rules)
        self.multipliers = {name: rule.lr_multiplier for name, rule in table.items()}
        self.update_norms = {name: rule.update_norm for name, rule in table.items()}

    def rate(self, group: str, factor: float) -> float:
        """Rate of the group `group` where the schedule stands at `factor`."""
        return self.base_lr * self.multipliers[group] * factor

    def apply(self, param_groups: Iterable[dict[str, Any]], factor: float) -> None:
        """Set every group's `lr` to its rate at `factor`."""
        for group in param_groups:
            group["lr"] = self.rate(group["name"], factor)

    def check_saved(self, rates: Mapping[str, float]) -> None:
        """Compare the rates of a checkpoint's last update, group name -> rate, with each other as the table has them.

        f(t) is whatever the saving run had; the multipliers must be the table's.

        Raises:
            UserError: naming the first group whose rate stands in another ratio to the others.
        """
        factors = {name: rate / self.rate(name, 1.0) for name, rate in rates.items() if name in self.multipliers}
        usual = sorted(factors.values())[len(factors) // 2] if factors else 0.0
        for name, rate in rates.items():
            if name not in factors or not math.isclose(factors[name], usual, rel_tol=RATE_TOLERANCE, abs_tol=1e-30):
                wanted = f"{self.rate(name, usual):.6g}" if name in factors else "no such group"
                raise UserError(
                    f"group {name!r} was trained at rate {rate:.6g}, the muP table gives {wanted}",
                    where="learning rates of the checkpoint",
                    fix="go on with the release that saved it",
                )

    def check(self, param_groups: Iterable[dict[str, Any]], factor: float) -> None:
        """Compare every group's `lr` and multiplier with the table.

        Raises:
            UserError: naming the first group whose name, multiplier or rate is not the table's.
        """
        for index, group in enumerate(param_groups):
            name = group.get("name")
            if name not in self.multipliers:
                raise UserError(
                    f"optimizer group {index} is called {name!r}, which no role of muP is",
                    where="learning rates",
                    fix=f"build the groups with mup_param_groups (roles: {', '.join(ROLES)})",
                )
            if group.get("update_norm") != self.update_norms[name]:
                raise UserError(
                    f"updates of group {name!r} are scaled by {group.get('update_norm')}, the muP table gives "
                    f"{self.update_norms[name]}",
                    where="learning rates",
                    fix="build the groups with mup_param_groups and the optimizer's lr_rules",
                )
            expected = self.rate(name, factor)
            wrong_multiplier = group.get("lr_multiplier") != self.multipliers[name]
            if wrong_multiplier or not math.isclose(group["lr"], expected, rel_tol=RATE_TOLERANCE, abs_tol=1e-30):
                raise UserError(
                    f"group {name!r} has rate {group['lr']:.6g} (multiplier {group.get('lr_multiplier')}), the muP "
                    f"table gives {expected:.6g} (multiplier {self.multipliers[name]:.6g})",
                    where="learning rates",
                    fix="leave the rates to the recipe: remove optimizer and scheduler settings made elsewhere",
                )
