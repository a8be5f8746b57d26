"""The muP table against the paper's Table 7, the groups built from it, and the ledger that guards their rates."""

from __future__ import annotations

import math

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import RateLedger, mup_param_groups, mup_table, residual_multiplier, role_of
from minicpm_megatron.recipe import get_preset

SHAPE = get_preset("minicpm-2.4b")
M = 2304 / 256


class Tiny(torch.nn.Module):
    """One parameter of every role, under Megatron-Core's names."""

    def __init__(self) -> None:
        super().__init__()
        names = {
            "embedding.word_embeddings.weight": (8, 4),
            "decoder.layers.0.mlp.linear_fc1.weight": (8, 4),
            "decoder.layers.0.mlp.router.weight": (2, 4),
            "decoder.final_layernorm.weight": (4,),
            "output_layer.weight": (8, 4),
        }
        self.tensors = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in names.items()}

    def named_parameters(self, *args, **kwargs):
        return iter(self.tensors.items())


def groups(**keywords):
    return {group["name"]: group for group in mup_param_groups(Tiny(), SHAPE, lr=0.01, **keywords)}


def test_the_table_is_table_7_with_a_vector_like_embedding():
    table = mup_table(SHAPE)
    assert {role: rule.lr_multiplier for role, rule in table.items()} == {
        "embedding": 1.0,
        "hidden": 1 / M,
        "expert": 1 / M,
        "vector": 1.0,
        "router": 1 / M,
        "head": 1.0,
    }
    assert table["hidden"].init_std == pytest.approx(0.1 / math.sqrt(M))
    assert table["embedding"].init_std == table["head"].init_std == 0.1
    assert table["vector"].init_std is None
    assert residual_multiplier(SHAPE.scale_depth, SHAPE.num_layers) == pytest.approx(1.4 / math.sqrt(40))


def test_the_literal_reading_scales_embedding_and_head_too():
    table = mup_table(SHAPE.model_copy(update={"embedding_role": "matrix"}))
    assert table["embedding"].lr_multiplier == table["head"].lr_multiplier == pytest.approx(1 / M)
    assert table["embedding"].init_std == pytest.approx(0.1 / math.sqrt(M))


def test_standard_parametrisation_has_no_width_in_it():
    table = mup_table(SHAPE.model_copy(update={"parametrization": "standard"}))
    assert {rule.lr_multiplier for rule in table.values()} == {1.0}
    assert {rule.init_std for rule in table.values()} == {0.1, None}


def test_the_spectral_rule_gives_updates_one_spectral_norm_at_every_width():
    rules = {"hidden": "spectral", "expert": "spectral"}
    changes = {}
    for width in (256, 512, 2304):
        shape = SHAPE.model_copy(update={"hidden_size": width})
        rule = mup_table(shape, rules)["hidden"]
        orthogonal = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
        update = rule.lr_multiplier * rule.update_norm * orthogonal
        changes[width] = float(torch.linalg.matrix_norm(update, 2)) if width < 2304 else rule.update_norm
        # by the rule of entries those of one sign have that norm, up to a factor that is the same everywhere
        assert mup_table(shape)["hidden"].lr_multiplier * width == pytest.approx(SHAPE.dim_model_base)
        if width == SHAPE.dim_model_base:
            assert float(update.square().mean().sqrt()) == pytest.approx(1)  # Adam's signs have it, too
    assert list(changes.values()) == pytest.approx([math.sqrt(SHAPE.dim_model_base)] * 3, rel=1e-4)
    others = mup_table(SHAPE, rules)
    assert {role: rule for role, rule in others.items() if role not in rules} == {
        role: rule for role, rule in mup_table(SHAPE).items() if role not in rules
    }
    standard = SHAPE.model_copy(update={"parametrization": "standard"})
    assert mup_table(standard, rules)["expert"].update_norm == pytest.approx(math.sqrt(standard.hidden_size))


def test_the_ledger_knows_the_rule_of_each_role():
    rules = {"hidden": "spectral"}
    found, ledger = groups(lr_rules=rules), RateLedger(SHAPE, 0.01, rules)
    assert found["hidden"]["lr"] == 0.01 and found["hidden"]["update_norm"] == pytest.approx(16)
    assert found["router"]["lr"] == pytest.approx(0.01 / M) and "update_norm" not in found["router"]
    ledger.check(found.values(), 1.0)
    for wrong in (groups(), {"hidden": found["hidden"] | {"update_norm": 15.0}}):
        with pytest.raises(UserError, match="updates of group 'hidden' are scaled by"):
            ledger.check(wrong.values(), 1.0)
    with pytest.raises(UserError, match="updates of group 'hidden' are scaled by 16"):
        RateLedger(SHAPE, 0.01).check(found.values(), 1.0)


@pytest.mark.parametrize(
    ("name", "dimensions", "role"),
    [
        ("embedding.word_embeddings.weight", 2, "embedding"),
        ("decoder.layers.3.self_attention.linear_qkv.weight", 2, "hidden"),
        ("decoder.layers.3.self_attention.linear_qkv.bias", 1, "vector"),
        ("decoder.layers.3.mlp.router.weight", 2, "router"),
        ("decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight", 2, "expert"),
        ("output_layer.weight", 2, "head"),
        ("decoder.final_layernorm.weight", 1, "vector"),
    ],
)
def test_roles(name, dimensions, role):
    assert role_of(name, dimensions) == role


def small_models():
    """The smallest models of several programs' decoders, as transformers and torch build them."""
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}
    wide, gpt2 = sizes | {"intermediate_size": 16}, {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16}
    configs = {
        "Llama": transformers.LlamaConfig(**wide),
        "Llama, tied": transformers.LlamaConfig(**wide, tie_word_embeddings=True),
        "GPT-2": transformers.GPT2Config(**gpt2),
        "GPT-NeoX": transformers.GPTNeoXConfig(**wide),
        "OPT": transformers.OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=8),
        "Mixtral": transformers.MixtralConfig(**wide, num_local_experts=2, num_key_value_heads=2),
        "Granite": transformers.GraniteConfig(**wide),
    }
    return {name: transformers.AutoModelForCausalLM.from_config(config) for name, config in configs.items()}


def test_ends_of_other_programs_models_are_no_hidden_matrices():
    for program, model in small_models().items():
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        head = {id(model.get_output_embeddings().weight)} - embeddings
        found = {group["name"]: group for group in mup_param_groups(model, SHAPE, lr=0.01, weight_decay=0.1)}
        assert {id(each) for each in found["embedding"]["params"]} == embeddings, program
        assert {id(each) for each in found.get("head", {"params": []})["params"]} == head, program
        assert found["embedding"]["weight_decay"] == 0.0 and found["hidden"]["weight_decay"] == 0.1
        routers = {id(each) for name, each in model.named_parameters() if ".gate.weight" in name}
        assert {id(each) for each in found.get("router", {"params": []})["params"]} == routers, program


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embed_tokens.weight", "embedding"),
        ("wte.weight", "embedding"),
        ("embedding.weight", "embedding"),
        ("_orig_mod.transformer.wpe.weight", "embedding"),
        ("tok_embeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("output.weight", "head"),
        ("layers.0.attention.wq.weight", "hidden"),
        ("layers.0.self_attn.in_proj_weight", "hidden"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight0", "expert"),
        ("model.layers.0.mlp.gate_proj.weight", "hidden"),
        ("model.layers.0.mlp.gate.weight", "router"),
    ],
)
def test_common_names(name, role):
    assert role_of(name, 2) == role


@pytest.mark.parametrize("name", ["0.weight", "my_table.weight", "blocks.0.lora_A.default.weight", "W"])
def test_a_matrix_that_no_rule_knows_is_refused(name):
    model = torch.nn.Module()
    model.named_parameters = lambda: iter([(name, torch.nn.Parameter(torch.ones(2, 2)))])
    with pytest.raises(UserError, match=rf"'{name}' has a name that no rule knows; give mup_param_groups role="):
        mup_param_groups(model, SHAPE, lr=0.01)
    assert [group["name"] for group in mup_param_groups(model, SHAPE, lr=0.01, role=lambda *_: "head")] == ["head"]
    with pytest.raises(UserError, match=f"role=: '{name}' is given the role 'matrix'; return one of embedding"):
        mup_param_groups(model, SHAPE, lr=0.01, role=lambda *_: "matrix")


def test_groups_hold_every_parameter_once_with_its_rate():
    found = groups(weight_decay=0.1)
    assert set(found) == {"embedding", "hidden", "vector", "router", "head"}
    assert all(len(group["params"]) == 1 for group in found.values())
    assert found["hidden"]["lr"] == pytest.approx(0.01 / M)
    assert {name for name, group in found.items() if group["weight_decay"]} == {"hidden", "router", "head"}


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_weight_decay_tied_or_independent_of_the_rate(factor):
    """One AdamW step without gradient shrinks a weight by rate x decay, or by decay x factor alone."""
    shrunk = {}
    for mode in ("tied", "independent"):
        model = Tiny()
        optimizer = torch.optim.AdamW(mup_param_groups(model, SHAPE, lr=0.01, weight_decay=0.1, weight_decay_mode=mode))
        RateLedger(SHAPE, 0.01).apply(optimizer.param_groups, factor)
        for parameter in model.tensors.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        shrunk[mode] = 1 - float(model.tensors["decoder.layers.0.mlp.linear_fc1.weight"][0, 0].detach())
        assert float(model.tensors["embedding.word_embeddings.weight"][0, 0].detach()) == 1.0
        assert float(model.tensors["decoder.final_layernorm.weight"][0].detach()) == 1.0
    assert shrunk["tied"] == pytest.approx(0.01 / M * factor * 0.1, rel=1e-2)  # fp32 weights of size 1
    assert shrunk["independent"] == pytest.approx(0.1 * factor, rel=1e-5)


def test_the_ledger_accepts_its_own_rates_at_any_factor():
    ledger, found = RateLedger(SHAPE, 0.01), list(groups().values())
    for factor in (1.0, 0.5**0.1, 0.0):
        ledger.apply(found, factor)
        ledger.check(found, factor)


@pytest.mark.parametrize("role", ["embedding", "hidden", "vector", "router", "head"])
def test_the_ledger_names_the_group_that_is_wrong(role):
    ledger, found = RateLedger(SHAPE, 0.01), groups()
    found[role]["lr"] *= 1.001
    with pytest.raises(UserError, match=f"group '{role}' has rate"):
        ledger.check(found.values(), 1.0)


def test_the_ledger_refuses_one_rate_for_all_and_unknown_groups():
    ledger = RateLedger(SHAPE, 0.01)
    with pytest.raises(UserError, match="'hidden'"):
        ledger.check([{**group, "lr": 0.01} for group in groups().values()], 1.0)
    with pytest.raises(UserError, match="optimizer group 0 is called None"):
        ledger.check([{"lr": 0.01}], 1.0)
    with pytest.raises(UserError, match="multiplier"):
        ledger.check([{**groups()["hidden"], "lr_multiplier": 1.0}], 1.0)


def test_the_rates_of_a_checkpoint_must_stand_in_the_ratios_of_the_table():
    ledger = RateLedger(SHAPE, 0.01)
    for factor in (1.0, 0.37, 0.0):
        ledger.check_saved({name: ledger.rate(name, factor) for name in groups()})
    ledger.check_saved({})
    for name in groups():
        rates = {other: ledger.rate(other, 0.5) for other in groups()}
        with pytest.raises(UserError, match=f"group '{name}' was trained at rate"):
            ledger.check_saved(rates | {name: rates[name] * 1.01})
    with pytest.raises(UserError, match="no such group"):
        ledger.check_saved({name: ledger.rate(name, 0.5) for name in groups()} | {"bias": 0.5})


@pytest.mark.parametrize("rules", [{"hidden": "spectrl"}, {"matrix": "spectral"}, {"matrix": "entries"}])
def test_a_misspelt_rule_is_no_other_learning_rate(rules: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is none"):
        mup_table(SHAPE, rules)
