"""Megatron-LM's own `pretrain()` trains MiniCPM as torch alone does, on every layout of two processes.

`on_cpu` lists the patches with which it runs without CUDA. Nothing here shows that it runs on a GPU.
"""

from __future__ import annotations

import pytest

from tests.distributed.forked import run_forked
from tests.distributed.parity import DIGITS, agreement

RUNS = "tests.megatron_lm.runs"
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.1}
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1.0 --moe-z-loss-coeff 0.1 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-router-dtype fp32 --moe-token-dispatcher-type allgather"
)
HYBRID, HYBRID_MOE = "--hybrid-layer-pattern *-*-*-*-", f"{MOE} --hybrid-layer-pattern *E*E*E*E"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
END = 499  # the NullTokenizer's end of document is its last id; one of 500 tokens of the samples is
LAYOUTS = {
    "alone": {"ranks": 1},  # and saved
    "hybrid, recompute, whole logits": {"ranks": 1, "arguments": f"{HYBRID} {RECOMPUTE} --no-minicpm-fused-loss"},
    "TP2 SP": {"layout": {"tp": 2, "sp": True}},
    "PP2 VP2": {"layout": {"pp": 2, "vp": 2}},
    "hybrid PP2": {"layout": {"pp": 2}, "arguments": "--hybrid-layer-pattern *-*|-*-*-"},
    "DP2, distributed optimizer": {"arguments": SHARDED},
}
SPARSE = {
    "experts TP2 SP": {"layout": {"tp": 2, "sp": True}, "arguments": MOE},
    "hybrid experts EP2": {"layout": {"ep": 2}, "arguments": f"{HYBRID_MOE} --use-distributed-optimizer"},
}
DOCUMENTS = {"documents CP2": {"layout": {"cp": 2}, "arguments": "--reset-attention-mask"}}
REFERENCES = {
    "torch": {"ranks": 1, "torch": {}},
    "torch experts": {"ranks": 1, "torch": {"changes": EXPERTS}},
    "torch documents": {"ranks": 1, "torch": {"end_of_document": END}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    load = f"--load {folder} --ckpt-step 4 --no-load-rng"
    cases = REFERENCES | LAYOUTS | SPARSE | DOCUMENTS
    cases["alone"] = {"ranks": 1, "arguments": f"--save {folder} --save-interval 4"}
    cases["resumed"] = {"ranks": 1, "arguments": load}
    cases["resumed TP2"] = {"layout": {"tp": 2}, "arguments": load}
    outcomes = dict(zip(cases, run_forked(f"{RUNS}:worker", list(cases.values())), strict=True))
    for name, ranks in outcomes.items():
        assert all(outcome.status == 0 and outcome.result for outcome in ranks), f"{name}: {ranks[-1].log[-6000:]}"
    # the last pipeline stage has the losses
    return {name: [outcome.result for outcome in ranks] for name, ranks in outcomes.items()}


@pytest.mark.parametrize(
    ("reference", "names"),
    [("torch", LAYOUTS), ("torch experts", SPARSE), ("torch documents", DOCUMENTS)],
    ids=["dense", "experts", "documents"],
)
def test_every_layout_gives_the_losses_of_torch_alone(runs, reference, names):
    wanted = runs[reference][0]
    table = {name: agreement(wanted["lines"], runs[name][-1]["lines"]) for name in names}
    for name, value in table.items():
        print(f"{name:32} {value:.1f} digits")
    assert wanted["lines"][-1][0] < wanted["lines"][0][0] - 0.05
    assert all(value >= DIGITS for value in table.values()), table
    for name in names:
        for step, rates in enumerate(wanted["rates"]):
            found = runs[name][-1]["rates"][step]
            assert {role: found[role] for role in rates} == pytest.approx(rates, rel=1e-14, abs=0), (name, step)


def test_experts_and_documents_change_these_numbers(runs):
    for name in ("torch experts", "torch documents"):
        assert agreement(runs["torch"][0]["lines"], runs[name][0]["lines"]) < 4


def test_the_models_are_those_that_were_asked_for(runs):
    assert runs["alone"][0]["model"] == ["MiniCPMModel", True]
    assert runs["hybrid, recompute, whole logits"][0]["model"] == ["MiniCPMHybridModel", False]
    assert runs["hybrid PP2"][0]["model"] == runs["hybrid experts EP2"][0]["model"] == ["MiniCPMHybridModel", True]


@pytest.mark.parametrize(
    ("reference", "name"),
    [("torch", "alone"), ("torch", "PP2 VP2"), ("torch", "hybrid PP2"), ("torch experts", "experts TP2 SP")],
)
def test_every_parameter_has_the_rate_and_decay_of_mup_param_groups(runs, reference, name):
    """The tied embedding is there twice with PP2, as output_layer.weight on the last stage, and has one decay."""
    together = {}
    for rank in runs[name]:
        for parameter, group in rank["groups"].items():
            assert together.setdefault(parameter, group) == group, parameter
    wanted = runs[reference][0]["groups"]
    assert set(together) == set(wanted)
    for parameter, group in wanted.items():
        assert together[parameter] == pytest.approx(group, rel=1e-14, abs=0), parameter


def test_a_resumed_run_goes_on_in_every_bit_and_under_another_layout(runs):
    saved, resumed = runs["alone"][0], runs["resumed"][0]
    assert resumed["lines"] == saved["lines"][4:] and resumed["rates"] == saved["rates"][4:]
    assert agreement(saved["lines"][4:], runs["resumed TP2"][0]["lines"]) >= DIGITS
    assert runs["resumed TP2"][0]["rates"] == saved["rates"][4:]
