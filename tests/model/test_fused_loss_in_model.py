"""MiniCPMModel's loss with and without logits: the same losses and gradients, and no logits in between."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.device import put
from tests.distributed.launch import run_on_ranks

VOCABULARY, PADDED, LENGTH, CHUNK = 2000, 2048, 96, 32


def compared(tensor: int, sequence_parallel: bool, untied: bool) -> dict[str, float]:
    """Largest differences of losses and of each gradient, relative; and elements of the largest tensor of each path."""
    import minicpm_megatron as library
    from benchmarks.plan_check import Recorder
    from minicpm_megatron.model import fused_loss
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ParallelRecipe
    from tests.convert.conftest import small_model

    class Largest(Recorder):
        most = 0

        def _note(self, storage: torch.UntypedStorage) -> None:
            self.most = max(self.most, storage.nbytes())
            super()._note(storage)

    groups.initialize(
        Layout(tensor, tensor, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}"
    )
    sizes = ParallelRecipe(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
    shape = small_model(vocab_size=VOCABULARY, untie_embeddings_and_output_weights=untied)
    fused_loss.loss_chunk_bytes = lambda device, head: CHUNK * 4 * PADDED // tensor  # type: ignore[assignment]
    tokens = put(torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(5)))
    runs: list[dict[str, Any]] = []
    found = {}
    for fused in (True, False):
        config = library.MiniCPMConfig.from_recipe(shape, sizes, fused_loss=fused)
        model = library.MiniCPMModel(config)
        library.initialize_parameters(model, config, seed=2)
        with Largest() as recorder:
            losses = model(tokens[:, :-1], labels=tokens[:, 1:])
            (0.7 * losses.mean()).backward()
        found[f"largest, fused {fused}"] = recorder.most
        runs.append({"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, value in runs[0].items():
        found[name] = float((value - runs[1][name]).abs().max() / runs[1][name].abs().max())
    return found


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_a_model_never_makes_whole_logits(tensor: int, sequence_parallel: bool, untied: bool) -> None:
    logits = 4 * LENGTH * PADDED // tensor * 4  # bytes of 4 samples, padding included
    target = "tests.model.test_fused_loss_in_model:compared"
    for rank in run_on_ranks(target, tensor, tensor=tensor, sequence_parallel=sequence_parallel, untied=untied):
        assert rank.pop("largest, fused False") >= logits
        assert rank.pop("largest, fused True") < 0.75 * logits
        assert max(rank.values()) < 1e-5, rank
        assert len(rank) > 10
