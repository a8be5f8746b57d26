"""The Megatron-Core model against an independent forward, and built without the trainer."""

from __future__ import annotations

import os

import pytest
import torch

from tests.convert.conftest import canonical_logits, random_tensors, small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks

TOKENS = 24


def _start(tensor: int = 1) -> None:
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout

    groups.initialize(
        Layout(tensor, tensor, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}"
    )


def _tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(5))


def differences(tensor: int, sequence_parallel: bool) -> dict[str, float]:
    """Largest |logit difference| / |logit| to the reference, for several shapes; and what surrounds it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    import minicpm_megatron as library
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.recipe import ParallelRecipe

    _start(tensor)
    found = {}
    shapes = {
        "tied, grouped heads": {},
        "untied": {"untie_embeddings_and_output_weights": True},
        "every head its own": {"num_query_groups": 8},
        "standard": {"parametrization": "standard"},
        "rope base 1e6": {"rotary_base": 1e6},
    }
    for name, changes in shapes.items():
        shape = small_model(**changes)
        tensors = random_tensors(shape)
        sizes = ParallelRecipe(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
        config = library.MiniCPMConfig.from_recipe(shape, sizes)
        plain = GPTModel(
            config,
            library.get_minicpm_block_spec(config),
            vocab_size=config.padded_vocab_size(),
            max_sequence_length=shape.max_position_embeddings,
            share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
        )
        ours = library.MiniCPMModel(config)
        tokens = _tokens(shape.vocab_size)
        reference = torch.stack([canonical_logits(shape, tensors, row) for row in tokens])
        for kind, model in (("GPTModel", plain), ("MiniCPMModel", ours)):
            with torch.no_grad():
                for parameter_name, parameter, spec in named_shards(model, config):
                    parameter.copy_(spec.take(tensors[parameter_name], tuple(parameter.shape)))
                logits = gather_from_tensor_model_parallel_region(model(put(tokens), None, None)).cpu()
            logits = logits[..., : shape.vocab_size]
            found[f"{kind}, {name}"] = float((logits - reference).abs().max() / reference.abs().max())
        labels = tokens.roll(-1, 1)
        with torch.no_grad():
            losses = ours(put(tokens), labels=put(labels)).cpu()
        expected = torch.nn.functional.cross_entropy(reference.transpose(1, 2).float(), labels, reduction="none")
        found[f"loss, {name}"] = float((losses - expected).abs().max())
    return found


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["alone", "TP2", "TP2 SP"]
)
def test_logits_and_losses_are_the_references(tensor, sequence_parallel):
    found = run_on_ranks(
        "tests.model.test_model:differences", tensor, tensor=tensor, sequence_parallel=sequence_parallel
    )
    for rank in found:
        assert len(rank) == 15
        assert max(rank.values()) < 2e-5, rank


def padding_losses() -> list[list[float]]:
    """Losses of the same model with different amounts of vocabulary padding."""
    import minicpm_megatron as library

    _start()
    shape, results = small_model(vocab_size=400), []
    for unit in (1, 128, 1000):
        config = library.MiniCPMConfig.from_recipe(shape, make_vocab_size_divisible_by=unit)
        model = library.MiniCPMModel(config)
        library.initialize_parameters(model, config, seed=2)
        assert model.embedding.word_embeddings.weight.shape[0] == {1: 400, 128: 512, 1000: 1000}[unit]
        tokens = put(_tokens(400))
        losses = model(tokens[:, :-1], labels=tokens[:, 1:])
        losses.mean().backward()
        gradient = model.embedding.word_embeddings.weight.grad
        assert not gradient[400:].any()
        results.append(losses.detach().flatten().tolist())
    return results


def test_padding_of_the_vocabulary_changes_nothing():
    ((first, *others),) = run_on_ranks("tests.model.test_model:padding_losses", 1)
    for other in others:
        torch.testing.assert_close(torch.tensor(first), torch.tensor(other), rtol=1e-6, atol=1e-6)


def counts() -> dict[str, int]:
    """Non-embedding parameters of the real modules, built without memory."""
    import minicpm_megatron as library

    _start()
    found = {}
    for name in ("minicpm-1.2b", "minicpm-2.4b"):
        config = library.MiniCPMConfig.from_recipe(library.presets[name])
        with torch.device("meta"):
            model = library.MiniCPMModel(config)
        found[name] = sum(p.numel() for n, p in model.named_parameters() if "word_embeddings" not in n)
    return found


@pytest.mark.cpu_only("on CUDA Megatron-Core would allocate the weights of which only the number is wanted")
def test_parameter_counts_are_the_papers_to_the_last_digit():
    (found,) = run_on_ranks("tests.model.test_model:counts", 1)
    assert found == {"minicpm-1.2b": 1_247_442_432, "minicpm-2.4b": 2_442_057_984}


def test_megatrons_own_mup_is_refused():
    from minicpm_megatron import MiniCPMConfig
    from minicpm_megatron.errors import UserError

    with pytest.raises(UserError, match="would scale widths twice"):
        MiniCPMConfig.from_recipe(small_model(), use_mup=True)
