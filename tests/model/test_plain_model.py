"""Megatron-Core's own models with MiniCPM's specs in a plain script on a CPU: the same model, or refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tests.distributed.launch import run_on_ranks

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "vocab_size": 512}
RIGHT = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": True}
# arguments of GPTModel -> what is said
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no arguments": ({"position_embedding_type": "learned_absolute"}, 'give position_embedding_type="rope"'),
    "another base": ({"rotary_base": 5000}, "the rotary base is not the config's 10000"),
    "llama3 scaling": ({"rope_scaling": True}, "the rotary base is not the config's 10000"),
    "half the channels": ({"rotary_percent": 0.5}, "8 of 16 channels are rotated"),
    "interpolated": ({"seq_len_interpolation_factor": 2.0}, "positions are interpolated"),
}
REFUSED_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "an untied head": ({"share_embeddings_and_output_weights": False}, "share_embeddings_and_output_weights is False"),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is"),
    "a small vocabulary": ({"vocab_size": 256}, "vocab_size is 256, the config's is 512"),
}


def script() -> dict[str, Any]:
    """A script that knows Megatron-Core and this library's surface, and no call that prepares anything."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    import minicpm_megatron as library
    from minicpm_megatron.errors import UserError
    from minicpm_megatron.recipe import RopeScaling

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = library.MiniCPMConfig(**SIZES)
    tokens = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(0))

    def build(spec: Any, config: Any = config, **arguments: Any) -> torch.nn.Module:
        given = {"vocab_size": config.padded_vocab_size(), "max_sequence_length": 256, **RIGHT, **arguments}
        return GPTModel(config, spec, **given)

    def loss(model: torch.nn.Module) -> float:
        positions = torch.arange(32).expand(2, 32)
        return float(model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean())

    def refusal(call: Any) -> str:
        try:
            call()
        except UserError as error:
            return str(error)
        return "nothing"

    found: dict[str, Any] = {"losses": {}, "refused": {}}
    models = {
        "layer spec": build(library.get_minicpm_layer_spec(config)),
        "block spec": build(library.get_minicpm_block_spec(config)),
        "MiniCPMModel": library.MiniCPMModel(config),
        "MiniCPMHybridModel": library.MiniCPMHybridModel(config),
    }
    for name, model in models.items():
        library.initialize_parameters(model, config, seed=1)
        found["losses"][name] = loss(model)
    spec = library.get_minicpm_layer_spec(config)
    for name, (arguments, _) in REFUSED.items():
        model = build(spec, **arguments)
        found["refused"][name] = refusal(lambda model=model: loss(model))
    for name, (arguments, _) in REFUSED_WEIGHTS.items():
        model = build(spec, **arguments)
        found["refused"][name] = refusal(lambda model=model: library.initialize_parameters(model, config, seed=1))
    deeper = dataclasses.replace(config, num_layers=3)
    found["another config"] = refusal(lambda: build(spec, deeper))
    scaled = library.MiniCPMConfig(
        **SIZES, max_position_embeddings=16, rope_scaling=RopeScaling(type="dynamic", factor=2.0)
    )
    long = build(library.get_minicpm_layer_spec(scaled), scaled)
    found["beyond the context"] = refusal(lambda: loss(long))
    found["keywords"] = [
        refusal(lambda form=form: form(config, rotary_percent=0.5))
        for form in (library.MiniCPMModel, library.MiniCPMHybridModel)
    ]
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    [outcome] = run_on_ranks("tests.model.test_plain_model:script", 1)
    return outcome


pytestmark = pytest.mark.cpu_only("what a script on a CPU has to call")


def test_a_plain_script_gets_the_same_model_in_every_form(found: dict[str, Any]) -> None:
    losses = found["losses"]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses.values())
    assert list(losses.values()) == pytest.approx([losses["MiniCPMModel"]] * 4, rel=1e-6)


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, (_, line) in (REFUSED | REFUSED_WEIGHTS).items()])
def test_arguments_that_make_another_model_are_refused(name: str, line: str, found: dict[str, Any]) -> None:
    assert line in found["refused"][name]


def test_what_does_not_fit_together_is_refused(found: dict[str, Any]) -> None:
    assert "made from another config" in found["another config"]
    assert "32 tokens are beyond max_position_embeddings" in found["beyond the context"]
    for line in found["keywords"]:
        assert "rotary_percent is decided by the config" in line and "parallel_output" in line
