"""FLOPs a token against torch's own counter, which watches the operators that really run."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from minicpm_megatron.training.flops import flops_per_token, peak_flops
from tests.convert import reference
from tests.convert.conftest import random_tensors, reference_config, small_model


def test_what_is_counted_is_what_runs() -> None:
    # the reference computes keys and values once a query head, so as many groups as heads
    model, length = small_model(num_query_groups=8), 24
    config, tensors = reference_config(model), random_tensors(model)
    weights = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    tokens = torch.arange(length)
    with FlopCounterMode(display=False) as counter:
        logits = reference.logits(reference.canonical(weights, config), config, tokens)
        torch.nn.functional.cross_entropy(logits, tokens).backward()
    norms = (2 * model.num_layers + 1) * model.hidden_size  # elementwise products, which torch does not count
    assert counter.get_total_flops() == (flops_per_token(model, length) - 6 * norms) * length


def test_a_machine_that_is_not_listed_is_measured() -> None:
    state = torch.random.get_rng_state()
    assert 1e8 < peak_flops("fp32") < 1e15
    assert torch.equal(state, torch.random.get_rng_state()), "measuring moved the run's random state"
