"""FLOPs a token against torch's own counter, which watches the operators that really run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minicpm_megatron.recipe.gpu_peaks import PEAK_FLOPS
from minicpm_megatron.training.flops import Peak, device_peak, flops_per_token
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
    peak = device_peak("fp32")
    assert 1e8 < peak.flops < 1e15
    assert "measured" in peak.describe() and "fp32" in peak.describe()
    assert torch.equal(state, torch.random.get_rng_state()), "measuring moved the run's random state"


# TFLOP/s dense in bf16, read from NVIDIA's data sheets a second time; half of what they print with sparsity
DENSE = {
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA H20": 148,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA B200": 4500 / 2,
    "NVIDIA GB200": 5000 / 2,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
}


@pytest.mark.parametrize("name", DENSE)
def test_a_card_has_its_own_peak(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("minicpm_megatron.parallel.device.on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak("bf16").flops == pytest.approx(DENSE[name] * 1e12, rel=1e-3)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B300 SXM6 AC", "AMD Instinct MI300X"])
def test_a_card_that_is_not_listed_takes_no_other_cards_peak(name: str) -> None:
    assert name not in PEAK_FLOPS
    assert Peak(4e14, measured=f"{name} in bf16").describe().startswith(f"no stated peak is known of {name} in bf16: ")
