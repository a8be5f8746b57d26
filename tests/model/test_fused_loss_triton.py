"""Triton's kernels against torch's and against fp64, in Triton's interpreter, and on the device where there is one.

The interpreter is chosen when a kernel is defined, so that it has a process of its own.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from minicpm_megatron import VocabParallelLinearCrossEntropy
from minicpm_megatron.errors import UserError
from tests.device import on_cuda, put
from tests.distributed.launch import run_on_ranks

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
TOKENS, HIDDEN, ROWS = 37, 24, 5003  # more columns than a program holds at once
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss and scale": {"z_loss": 0.01, "logit_scale": 0.5},
    "gradient in backward": {"gradient_in": "backward"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ["cpu", *(["cuda"] if on_cuda() else [])]


def losses_and_gradients(device: str) -> dict[str, list[float]]:
    """{"DTYPE SETTINGS": relative distances between both kinds of kernels: losses, gradient of hidden, of weight}."""
    found = {}
    for dtype_name, dtype in DTYPES.items():
        for settings_name, settings in SETTINGS.items():
            torch.manual_seed(0)
            hidden = torch.randn(TOKENS, HIDDEN).to(device, dtype).requires_grad_()
            weight = torch.randn(ROWS, HIDDEN).to(device, dtype).requires_grad_()
            labels = torch.randint(4990, (TOKENS,)).to(device)
            labels[3] = -100
            shape: dict[str, Any] = {"vocab_size": 4990, "chunk_bytes": 11 * ROWS * dtype.itemsize}
            both = []
            for kernels in ("torch", "triton"):
                fused = VocabParallelLinearCrossEntropy(reduction="none", kernels=kernels, **shape, **settings)
                losses = fused(hidden, weight, labels)
                both.append((losses.detach(), *torch.autograd.grad(0.37 * losses.sum(), (hidden, weight))))
            found[f"{dtype_name} {settings_name}"] = [
                _distance(ours, reference) for reference, ours in zip(*both, strict=True)
            ]
    return found


def rows_far_apart(device: str) -> dict[str, float]:
    """Relative distances from fp64 where rows are further apart than they are long, and some labels are elsewhere."""
    from minicpm_megatron.model.fused_loss_triton import differentiate_, statistics

    torch.manual_seed(0)
    whole = torch.randn(5, 5120, device=device)
    logits, beyond = whole[:, :ROWS], whole[:, ROWS:].clone()
    exact, labels = logits.double(), torch.tensor([0, -1, ROWS - 1, 4096, -1], device=device)
    here = labels >= 0
    log_sum, factor = exact.logsumexp(1), torch.rand(5, device=device)
    at_label = torch.where(here, exact.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    gradient = (exact - log_sum[:, None]).exp() * (0.3 * factor.double())[:, None]
    gradient[here, labels[here]] -= factor.double()[here]
    found = statistics(logits, labels, torch.empty(2, 5, device=device))
    differentiate_(logits, labels, log_sum.float(), 0.3 * factor, factor)
    return {
        "log-sum-exp": _distance(found[0], log_sum),
        "logit of the label": _distance(found[1], at_label),
        "gradient": _distance(logits, gradient),
        "beyond the columns": _distance(whole[:, ROWS:], beyond),
    }


def _distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def run_both(device: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    return losses_and_gradients(device), rows_far_apart(device)


@pytest.fixture(scope="module", params=DEVICES)
def distances(request: pytest.FixtureRequest) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Results of `run_both` on the device: on the CPU in Triton's interpreter."""
    env = {"TRITON_INTERPRET": "1" if request.param == "cpu" else "0"}
    return run_on_ranks(f"{__name__}:run_both", 1, env=env, new_imports=True, device=request.param)[0]


@needs_triton
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kernels_give_the_same(distances: Any, dtype: str, settings: str) -> None:
    # the interpreter cuts bf16 where a GPU rounds; measured 6e-3 there
    assert max(distances[0][f"{dtype} {settings}"]) < (1e-2 if dtype == "bf16" else 1e-5)


@needs_triton
@pytest.mark.parametrize("what", ["log-sum-exp", "logit of the label", "gradient"])
def test_kernels_keep_to_their_columns(distances: Any, what: str) -> None:
    assert distances[1][what] < 1e-6  # fp32; measured 1e-7
    assert distances[1]["beyond the columns"] == 0


@needs_triton
def test_fp64_keeps_its_digits() -> None:
    """The kernels compute in fp32: asked for they are refused, and "auto" is torch's."""
    hidden, weight = (put(torch.randn(rows, HIDDEN, dtype=torch.float64)) for rows in (TOKENS, 50))
    labels = put(torch.arange(TOKENS))
    with pytest.raises(UserError, match="compute in fp32, and the inputs are torch.float64"):
        VocabParallelLinearCrossEntropy(kernels="triton")(hidden, weight, labels)
    auto, own = (VocabParallelLinearCrossEntropy(kernels=kind)(hidden, weight, labels) for kind in ("auto", "torch"))
    assert torch.equal(auto, own)


@pytest.mark.skipif(INSTALLED, reason="says what happens without Triton")
def test_without_triton_it_is_asked_for() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(UserError, match="Triton is not installed"):
        VocabParallelLinearCrossEntropy(kernels="triton")(hidden, weight, torch.tensor([0, 1, 2]))
