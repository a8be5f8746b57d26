"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from minicpm_megatron.planning.search import Plan
from minicpm_megatron.planning.step import Prediction
from minicpm_megatron.recipe.memory import estimate_memory

GIB = 2**30
COLUMNS = "TP PP CP EP DP micro accum ZeRO recompute GiB s/step tokens/s util bubble exposed".split()


def format_plan(plan: Plan, title: str, top: int) -> str:
    """The `top` fastest layouts as a table, the first in parts, and what to set for it in a recipe."""
    shown = plan.layouts[:top]
    lines = [title, "", *_table([COLUMNS, *(_row(each) for each in shown)]), ""]
    lines += [f"{len(plan.layouts)} layouts fit, {len(shown)} shown; {plan.do_not_fit} do not fit"]
    lines += ["", "the first in parts, and as overrides of a recipe"]
    for part in (*_parts(shown[0]), " ".join(overrides(shown[0]))):
        lines += textwrap.wrap(part, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def plan_values(plan: Plan, top: int) -> dict[str, Any]:
    """The same for JSON: bytes, seconds and fractions."""
    return {
        "fit": len(plan.layouts),
        "do_not_fit": plan.do_not_fit,
        "layouts": [_values(each) for each in plan.layouts[:top]],
    }


def overrides(prediction: Prediction) -> list[str]:
    """section.key=value for everything that the search chose."""
    recipe = prediction.recipe
    chosen = {f"parallel.{key}": value for key, value in recipe.parallel.model_dump(mode="json").items()}
    chosen["training.micro_batch_size"] = prediction.layout.micro_batch_size
    chosen["training.recompute"] = recipe.training.recompute
    chosen["deepspeed.zero_stage"] = recipe.deepspeed.zero_stage
    values = {key: "null" if value is None else str(value).lower().replace(" ", "") for key, value in chosen.items()}
    return [f"{key}={value}" for key, value in values.items()]


def _row(prediction: Prediction) -> list[str]:
    layout, recipe = prediction.layout, prediction.recipe
    context = str(layout.context_parallel_size)
    if layout.context_parallel_size > 1:
        context += f" {recipe.parallel.cp_comm_type}"
    return [
        str(layout.tensor_model_parallel_size),
        str(layout.pipeline_model_parallel_size),
        context,
        str(layout.expert_model_parallel_size),
        str(layout.data_parallel_size),
        str(layout.micro_batch_size),
        str(prediction.micro_batches),
        str(recipe.deepspeed.zero_stage),
        recipe.training.recompute,
        f"{prediction.memory.total / GIB:.1f}",
        f"{prediction.step_seconds:.3g}",
        f"{prediction.tokens_per_second:,.0f}",
        f"{prediction.utilisation:.1%}",
        f"{prediction.bubble:.1%}",
        f"{prediction.exposed_seconds / prediction.step_seconds:.1%}",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _parts(prediction: Prediction) -> Iterator[str]:
    memory = {name: size / GIB for name, size in asdict(prediction.memory).items()}
    sending = [each for each in prediction.traffic if each.sent(prediction.micro_batches)]
    yield "GiB a GPU: " + _pairs(memory, ".2f")
    yield "activations by recompute: " + _pairs({k: v / GIB for k, v in _activations(prediction).items()}, ".2f")
    yield "GB sent by a GPU in a step: " + _pairs(
        {each.kind: each.sent(prediction.micro_batches) / 1e9 for each in sending}, ".3g"
    )
    yield "ms a step: " + _pairs({name: seconds * 1e3 for name, seconds in _seconds(prediction).items()}, ".4g")


def _pairs(numbers: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {number:{form}}" for name, number in numbers.items()) or "nothing"


def _activations(prediction: Prediction) -> dict[str, int]:
    """Bytes of activations for each kind of recompute, all else the same."""
    recipe, kept = prediction.recipe, {}
    for recompute in ("none", "selective", "full"):
        training = recipe.training.model_copy(update={"recompute": recompute})
        changed = recipe.model_copy(update={"training": training})
        kept[recompute] = estimate_memory(changed, prediction.layout).activations
    return kept


def _seconds(prediction: Prediction) -> dict[str, float]:
    """The parts that add up to a step; of communication what is exposed."""
    exposed = {
        each.kind: each.exposed(prediction.micro_batches)
        for each in prediction.traffic
        if each.sent(prediction.micro_batches)
    }
    return {
        "matrix products": prediction.products,
        "memory-bound": prediction.memory_bound,
        **exposed,
        "bubble": prediction.bubble_seconds,
        "optimizer": prediction.optimizer,
    }


def _values(prediction: Prediction) -> dict[str, Any]:
    return {
        "overrides": overrides(prediction),
        "data_parallel_size": prediction.layout.data_parallel_size,
        "micro_batches": prediction.micro_batches,
        "memory_bytes": asdict(prediction.memory) | {"total": prediction.memory.total},
        "activation_bytes_by_recompute": _activations(prediction),
        "sent_bytes_a_step": {each.kind: each.sent(prediction.micro_batches) for each in prediction.traffic},
        "seconds": _seconds(prediction) | {"step": prediction.step_seconds},
        "tokens_per_second": prediction.tokens_per_second,
        "utilisation": prediction.utilisation,
        "bubble_fraction": prediction.bubble,
    }
