"""--spec: every way in which Megatron-LM builds a model from a command line gives MiniCPM, or one line that says no."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from minicpm_megatron.methods.mup import mup_table
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import ModelRecipe, load_recipe
from minicpm_megatron.recipe.presets import PRESETS
from minicpm_megatron.recipe.schema import ScheduleRecipe
from tests.distributed.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "megatron_lm.md"
LAYER = "minicpm_megatron.model.layer_spec get_minicpm_block_spec"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 72 --moe-router-dtype fp32"
SETTINGS = {
    "--normalization LayerNorm": "normalization",
    "--qk-layernorm": "qk_layernorm",
    "--add-qkv-bias": "add_qkv_bias",
    "--apply-layernorm-1p": "--apply-layernorm-1p",
    "--attention-dropout 0.1": "attention_dropout",
    "--hidden-dropout 0.1": "hidden_dropout",
    "--rotary-interleaved": "rotary_interleaved",
    "--window-size 4,0": "window_size",
    "--softmax-type off-by-one": "softmax_type",
    "--use-mup": "use_mup",
    "--mtp-num-layers 1": "mtp_num_layers",
    "--position-embedding-type learned_absolute": "position_embedding_type",
    "--rotary-percent 0.5": "rotary_percent",
    "--use-rope-scaling": "use_rope_scaling",
    "--minicpm-rope-scaling-type ntk --minicpm-rope-scaling-factor 2": "rope scaling of type ntk",
    "--reset-attention-mask --no-create-attention-mask-in-dataloader": "--reset-attention-mask",
    f"{EXPERTS} --moe-shared-expert-intermediate-size 8": "moe_shared_expert_intermediate_size",
    f"{EXPERTS} --calculate-per-token-loss": "calculate_per_token_loss",
}
TRAINING = {
    "--optimizer sgd": "--optimizer adam",
    "--decoupled-lr 0.1": "--decoupled-lr",
    "--embedding-init-method-std 0.1": "--embedding-init-method-std",
    "--init-method-xavier-uniform": "--init-method-xavier-uniform",
    "--init-model-with-meta-device": "--init-model-with-meta-device",
    "--lr-warmup-init 0.001": "--lr-warmup-init",
    "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-wsd-decay-style cosine": "--wsd-decay-shape",
    "--use-checkpoint-opt-param-scheduler": "--override-opt_param-scheduler",
    "--lr-decay-style WSD --lr-wsd-decay-iters 2": "--wsd-half-life-iters",
    "--lr-decay-style WSD --lr-wsd-decay-iters 9 --wsd-decay-shape linear": "--lr-wsd-decay-iters",
    "--lr-decay-style WSD --lr-wsd-decay-iters 2 --wsd-decay-shape lineal": "linear",
    "--spec some module": "--spec is given",
    "--minicpm-preset minicpm-2.4": "minicpm-2.4b",
}
# global batch size 12, so that steps are no power of two of samples
COMMON = "--global-batch-size 12 --lr-decay-style WSD"
CURVES = {
    f"{COMMON} --train-iters 30 --lr-warmup-iters 4 --lr-wsd-decay-iters 9 --wsd-half-life-iters 4": {
        "total": 30, "warmup": 4, "decay": 9, "half_life": 4.0, "min_lr_ratio": 0.0,
    },
    f"{COMMON} --train-iters 30 --lr-wsd-decay-iters 6 --wsd-decay-shape 1-sqrt --min-lr 0.001": {
        "total": 30, "decay": 6, "decay_shape": "1-sqrt", "min_lr_ratio": 0.1,
    },
    f"{COMMON} --train-iters 10 --lr-wsd-decay-iters 0": {"total": 10, "decay": 0},
    f"{COMMON} --train-samples 120 --lr-warmup-samples 24 --lr-wsd-decay-samples 48 "
    "--wsd-half-life-samples 18 --min-lr 0.001": {
        "total": 10, "warmup": 2, "decay": 4, "half_life": 1.5, "min_lr_ratio": 0.1,
    },
}  # fmt: skip
FUNCTIONS = {
    "dense": ("equal_models", {"text": "", "experts": False}),
    "experts": ("equal_models", {"text": EXPERTS, "experts": True}),
    "hybrid": ("equal_models", {"text": "--hybrid-layer-pattern *-*-*-", "experts": False}),
    "hybrid experts": ("equal_models", {"text": f"{EXPERTS} --hybrid-layer-pattern *E*E*E", "experts": True}),
    "masked": ("masked", {}),
    "settings": ("refusals", {"texts": [f"{text} --spec {LAYER}" for text in SETTINGS]}),
    "virtual": ("virtual_stages", {}),
    "vanilla": ("without_our_arguments", {}),
    "no GPU": ("without_a_gpu", {}),
    "container": ("in_the_wrong_container", {}),
    "training": ("training_refusals", {"texts": list(TRAINING)}),
    "schedules": ("schedules", {"texts": list(CURVES)}),
    "loaded": (
        "loaded",
        {
            "text": "--lr-decay-style WSD --lr-wsd-decay-iters 2 --wsd-half-life-iters 1",
            "changes": "--wsd-half-life-iters 2",
        },
    ),
    "example": ("example", {"arguments": []}),
    "page": ("page", {"blocks": re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)}),
    "presets": ("preset_configs", {}),
}


def _example(folder):
    """The arguments that examples/megatron_lm/pretrain_minicpm.sh gives its script, behind the launcher's."""
    launcher = folder / "torchrun"
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    script = ROOT / "examples" / "megatron_lm" / "pretrain_minicpm.sh"
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(["bash", script, "--seed", "3"], env=environment, capture_output=True, text=True, check=True)
    words = said.stdout.splitlines()
    at = words.index("examples/megatron_lm/pretrain_minicpm.py")
    assert (ROOT / words[at]).is_file() and words[-2:] == ["--seed", "3"]
    return words[at + 1 :]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    FUNCTIONS["example"][1]["arguments"] = _example(tmp_path_factory.mktemp("example"))
    cases = [{"ranks": 1, "function": name, "arguments": arguments} for name, arguments in FUNCTIONS.values()]
    outcomes = dict(zip(FUNCTIONS, run_forked("tests.megatron_lm.specs:worker", cases), strict=True))
    for name, (outcome,) in outcomes.items():
        assert outcome.status == 0, f"{name}: {outcome.log[-4000:]}"
    return {name: outcome.result for name, (outcome,) in outcomes.items()}


@pytest.mark.parametrize("kind", ["dense", "experts", "hybrid", "hybrid experts"])
def test_every_way_gives_the_model_in_every_bit(found, kind):
    assert len(found[kind]) == (1 if "hybrid" in kind else 6)
    for way, equal in found[kind].items():
        assert equal == [True, True, True], f"{way}: logits, losses, gradients"


def test_the_data_loaders_mask_is_followed(found):
    assert found["masked"]["causal"] < 1e-6 and found["masked"]["documents"] < 1e-6
    assert found["masked"]["apart"] > 0.01


@pytest.mark.parametrize(("number", "setting"), list(enumerate(SETTINGS)), ids=list(SETTINGS))
def test_a_setting_that_the_spec_would_ignore_is_refused(found, number, setting):
    said = found["settings"][number]
    assert said.startswith("UserError: MiniCPM's layer spec") and SETTINGS[setting] in said and "\n" not in said, said


def test_virtual_stages_need_a_name(found):
    layer, as_it_is, called, block, block_as_it_is, block_called = found["virtual"]
    assert layer == block == [1, 1]
    for said in (as_it_is, called, block_as_it_is, block_called):
        assert "virtual pipeline stage" in said and "(config, vp_stage)" in said
    assert "GPTModelBuilder" in as_it_is


def test_a_script_without_the_arguments_is_told_to_add_them(found):
    assert "extra_args_provider=add_minicpm_args" in found["vanilla"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would train")
def test_the_script_needs_a_gpu(found):
    assert "has no CUDA device; train on CPUs with examples/train.py" in found["no GPU"]


def test_a_config_that_megatron_would_overwrite_is_refused(found):
    assert "GPTModelConfig cannot hold a MiniCPMConfig" in found["container"]


@pytest.mark.parametrize(("number", "text"), list(enumerate(TRAINING)), ids=list(TRAINING))
def test_an_argument_that_training_would_ignore_is_refused(found, number, text):
    said = found["training"][number]
    assert TRAINING[text] in said and "\n" not in said, said


@pytest.mark.parametrize(("number", "text"), list(enumerate(CURVES)), ids=["steps", "floor", "trunk", "samples"])
def test_every_update_has_the_rate_of_the_schedule(found, number, text):
    schedule = build_schedule(ScheduleRecipe(**CURVES[text]))
    rates = found["schedules"][number]
    # hidden size 96 and a base of 40: m = 2.4
    multipliers = sorted({rule.lr_multiplier for rule in mup_table(_Shape()).values()})
    assert multipliers == [1 / 2.4, 1.0]
    for step, groups in enumerate(rates, 1):
        expected = [0.01 * multiplier * schedule.factor(step) for multiplier in multipliers]
        assert sorted(set(groups)) == pytest.approx(sorted(set(expected)), rel=1e-14, abs=0), step


def test_another_curve_than_the_checkpoints_must_be_meant(found):
    said, rates = found["loaded"]["said"], found["loaded"]["rates"]
    assert "the checkpoint was trained by WSD" in said and "--override-opt_param-scheduler" in said
    # step 4 of 4, 2 of decay: a whole half-life of 2, whatever the groups were loaded with
    assert rates == pytest.approx(
        {"embedding, vector": 0.01 * 0.5, "hidden, expert, router": 0.01 * 0.5 / 2.4, "head": 0.01 * 0.5}
    )
    assert "use_minicpm_training(model_config)" in found["loaded"]["plain"]


def test_the_example_script_is_the_recipe(found):
    recipe = load_recipe(ROOT / "examples" / "recipes" / "minicpm-2.4b.yaml")
    optimizer = recipe.optimizer
    assert found["example"] == {
        "model": {name: getattr(recipe.model, name) for name in found["example"]["model"]},
        "bf16": True,
        "micro_batch_size": recipe.training.max_micro_batch_size,  # what auto takes on eight GPUs
        "global_batch_size": recipe.training.global_batch_size,
        "sequence_length": recipe.data.sequence_length,
        "optimizer": [
            optimizer.lr, *optimizer.betas, optimizer.eps, optimizer.weight_decay, recipe.training.gradient_clipping
        ],
        "schedule": build_schedule(recipe.schedule).describe(),
        "recompute": ["selective", ["core_attn"]],
    }  # fmt: skip


def test_the_code_of_the_page_runs(found):
    assert len(FUNCTIONS["page"][1]["blocks"]) == 4
    assert found["page"] == {
        "weights": [True] * 14,
        "kind": "GPTModel",
        "hybrid": "MiniCPMHybridModel",
        "scheduler": "MiniCPMParamScheduler",
    }


def test_the_arguments_of_the_page_exist():
    text = PAGE.read_text(encoding="utf-8")
    source = "".join(path.read_text() for path in sorted((ROOT / "minicpm_megatron" / "megatron_lm").glob("*.py")))
    named = re.findall(r"--(?:minicpm|no-minicpm|wsd|scale|dim|parametrization|embedding-role)[\w-]*", text)
    assert len(set(named)) >= 10
    for option in named:
        assert f'"{option}"' in source, option


class _Shape:
    hidden_size, dim_model_base, parametrization, embedding_role, init_method_std = 96, 40, "mup", "vector", 0.1


def test_presets_are_the_same_models_on_megatrons_command_line(found):
    assert set(PRESETS) <= set(found["presets"])
    for name, differences in found["presets"].items():
        (compared,) = differences.pop("sizes compared")
        assert not differences, name
        assert compared > 25 and isinstance(PRESETS[name], ModelRecipe)
