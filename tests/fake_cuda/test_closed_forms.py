"""Recorded counts against arithmetic on the shapes: nothing that is recorded is a mistake of the counting."""

from __future__ import annotations

import pytest

from minicpm_megatron.recipe.flops import head_flops_per_token
from minicpm_megatron.recipe.parameters import count_parameters
from minicpm_megatron.recipe.presets import get_preset
from tests.fake_cuda import records

COUNTS = records.read(records.COUNTS)
MODEL = get_preset("minicpm-2.4b")
TOKENS = 4096
LAYER = (count_parameters(MODEL).non_embedding - MODEL.hidden_size) // MODEL.num_layers
LINEAR = LAYER - 2 * MODEL.hidden_size  # without the norms
SCORES = TOKENS**2 * MODEL.hidden_size  # multiplications of q k^T, as if it were not causal
PADDED_ROWS = 122_880


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, ""), (2, ""), (2, " SP"), (4, ""), (4, " SP")])
def test_flops_of_a_layer(ranks: int, sequence_parallel: str) -> None:
    found = COUNTS[f"TP {ranks}{sequence_parallel} recompute none"]
    assert found["forward, a layer: flops"] * ranks == 2 * TOKENS * LINEAR + 4 * SCORES
    # flash attention makes the scores once more
    assert found["backward, a layer: flops"] * ranks == 4 * TOKENS * LINEAR + 10 * SCORES


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_recompute_adds_what_it_says(ranks: int) -> None:
    none, selective, full = (COUNTS[f"TP {ranks} recompute {how}"] for how in ("none", "selective", "full"))
    backward = "backward, a layer: flops"
    assert (selective[backward] - none[backward]) * ranks == 4 * SCORES
    assert full[backward] - none[backward] == none["forward, a layer: flops"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_that_tensor_parallel_ranks_exchange(ranks: int) -> None:
    hidden = 2 * TOKENS * MODEL.hidden_size
    plain, parallel = (COUNTS[f"TP {ranks}{name} recompute none"] for name in ("", " SP"))
    for way in ("forward", "backward"):
        assert plain[f"{way}, a layer: allreduce_ bytes"] == 2 * hidden
    # whole and part of it, before and behind each of the two blocks
    gathered = 2 * (hidden + hidden // ranks)
    assert parallel["forward, a layer: _allgather_base_ bytes"] == gathered
    assert parallel["forward, a layer: _reduce_scatter_base_ bytes"] == gathered


def test_flops_of_the_head() -> None:
    found = COUNTS["TP 1 recompute none"]["forward, all else: flops"]  # forward makes its gradients, too
    assert found == TOKENS * head_flops_per_token(MODEL)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_sent_in_fp32(stage: int, precision: str) -> None:
    found = COUNTS[f"ZeRO {stage} world 8 {precision}"]
    parameters = 2 * LAYER + MODEL.hidden_size * (1 + PADDED_ROWS)
    if stage == 3:  # all of it, and one part of eight
        sent, wanted = found["2 micro-batches: _reduce_scatter_base_ bytes"], 2 * 4 * parameters * 9 / 8
    else:
        sent = found["2 micro-batches: allreduce_ bytes"]
        wanted = (2 if stage == 2 else 1) * 4 * parameters
    assert sent == pytest.approx(wanted, rel=1e-4)  # partitions are padded


def test_flops_of_newton_schulz() -> None:
    """Five iterations of seven matrices in each of two layers; the busiest of eight ranks has gate and up of one."""
    width, ffn = MODEL.hidden_size, MODEL.ffn_hidden_size
    square, long = (5 * 2 * width**2 * (2 * columns + width) for columns in (width, ffn))
    for stage in (1, 2, 3):
        assert COUNTS[f"ZeRO {stage} world 1 bf16 Muon"]["update: flops"] == 2 * (4 * square + 3 * long)
    assert COUNTS["ZeRO 0 world 8 bf16 Muon"]["update: flops"] == 2 * long


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_host_waits_no_more_for_muon_than_for_adamw(stage: int) -> None:
    muon, adamw = (
        {key: count for key, count in COUNTS[f"ZeRO {stage} world 1 bf16{name}"].items() if "host waits" in key}
        for name in (" Muon", "")
    )
    assert muon == adamw
