"""The report of `--dry-run`: everything a recipe decides, and whether a start would find its data and its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

from minicpm_megatron.methods.schedules import Schedule, build_schedule
from minicpm_megatron.recipe import BatchPlan, Layout, Recipe, count_parameters, dump_recipe, recipe_hash
from minicpm_megatron.recipe.memory import MemoryEstimate, estimate_memory, offloaded_bytes
from minicpm_megatron.training.notes import schedule_note
from minicpm_megatron.training.run_data import RunData, check_unchanged, open_data

WIDTH = 100
GIB = 2**30
MIB = 2**20
# what a process on a CPU was seen to hold before its first tensor: interpreter, torch 2.13, Megatron-Core, DeepSpeed.
# On a GPU none of it is in the GPU's memory.
LIBRARY_BYTES = 768 * MIB


def format_dry_run(recipe: Recipe, world_size: int) -> str:
    """The resolved recipe, layout, parameters, schedule and memory of `recipe` on `world_size` ranks, as text.

    Raises:
        UserError: the recipe does not fit `world_size` ranks, or names a decay shape that does not work.
    """
    layout = recipe.check_world_size(world_size)
    schedule = build_schedule(recipe.schedule)
    sections = (
        ("recipe", dump_recipe(recipe).rstrip("\n").splitlines()),
        ("layout", _layout(recipe, layout)),
        ("parameters", _parameters(recipe)),
        ("batches", _batches(recipe, layout)),
        ("schedule", _schedule(recipe, schedule)),
        ("memory per rank (estimate)", _memory(estimate_memory(recipe, layout), offloaded_bytes(recipe, layout))),
        ("memory per rank on a CPU (estimate)", _memory_on_cpu(recipe, layout)),
        ("verdict", _verdict(recipe)),
    )
    return "\n".join(line for title, body in sections for line in (_heading(title), *body, ""))


def check_inputs(recipe: Recipe, layout: Layout) -> str:
    """Read the data, the run's newest checkpoint's manifest and the DeepSpeed JSON as the start does.

    Returns:
        What was found, as one line.

    Raises:
        UserError: the start would refuse them.
    """
    data = open_data(recipe)
    _check_resume(recipe, data)
    found = f"the data are there: {len(data.train.datasets)} for training, {len(data.validation)} for validation"
    if recipe.deepspeed.config is None:
        return found
    from minicpm_megatron.engine.config import deepspeed_config  # loads torch, to see whether there is a GPU

    deepspeed_config(recipe, layout)
    return f"{found}; {recipe.deepspeed.config} agrees with the recipe"


def _check_resume(recipe: Recipe, data: RunData) -> None:
    """Refuse what a start would refuse because of the steps that the run has done already."""
    folder = recipe.run_directory / "checkpoints"
    if not folder.is_dir():
        return
    # these load torch
    from minicpm_megatron.checkpoint.names import published_steps, step_folder
    from minicpm_megatron.storage.manifest import read_manifest
    from minicpm_megatron.training.start import check_resume

    steps = published_steps(folder)
    if steps:
        manifest = read_manifest(step_folder(folder, steps[-1]))
        check_resume(manifest, recipe, data.fingerprint)
        check_unchanged(manifest.get("data") or {}, data.fingerprint)


def _heading(title: str) -> str:
    return f"-- {title} ".ljust(WIDTH, "-")


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, numbers to the right and words of the first column to the left."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  " + "  ".join(_align(cell, widths[column], column) for column, cell in enumerate(row)) for row in cells]


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 and not cell[:1].isdigit() else cell.rjust(width)


def _layout(recipe: Recipe, layout: Layout) -> list[str]:
    sequence = "on" if recipe.parallel.sequence_parallel else "off"
    return _table(
        [
            ("ranks", str(layout.world_size)),
            ("data parallel", str(layout.data_parallel_size)),
            ("tensor parallel", str(layout.tensor_model_parallel_size)),
            ("sequence parallel", sequence),
            ("pipeline parallel", str(layout.pipeline_model_parallel_size)),
            ("context parallel", str(layout.context_parallel_size)),
            ("expert parallel", str(layout.expert_model_parallel_size)),
            ("ZeRO stage", str(recipe.deepspeed.zero_stage)),
            ("micro-batch size", str(layout.micro_batch_size)),
        ]
    )


def _parameters(recipe: Recipe) -> list[str]:
    counts = count_parameters(recipe.model)
    rows = [("embedding", counts.embedding), ("head", counts.head), ("non-embedding", counts.non_embedding)]
    if recipe.model.num_moe_experts is not None:
        rows.append(("non-embedding, active", counts.active_non_embedding))
    lines = _table([(name, f"{count:,}") for name, count in (*rows, ("total", counts.total))])
    return lines if counts.head else [*lines, "  (the head is the embedding)"]


def _batches(recipe: Recipe, layout: Layout) -> list[str]:
    plan = BatchPlan(recipe)
    rows = [("from step", "samples", "tokens", "micro-batches a rank")]
    accumulation = {
        size: steps
        for size, steps in zip(
            (recipe.training.global_batch_size, *(g.global_batch_size for g in recipe.training.batch_growth)),
            layout.gradient_accumulation_steps,
            strict=True,
        )
    }
    for phase in plan.phases:
        size = phase.global_batch_size
        rows.append((f"{phase.first_step:,}", f"{size:,}", f"{size * plan.sequence_length:,}", str(accumulation[size])))
    steps = plan.total_steps()
    lines = [*_table(rows), f"  {steps:,} steps, {plan.samples(steps):,} samples, {plan.tokens(steps):,} tokens"]
    if recipe.training.stop_after is not None:
        lines.append(f"  stops after step {min(recipe.training.stop_after, steps):,} (training.stop_after)")
    return lines


def _schedule(recipe: Recipe, schedule: Schedule) -> list[str]:
    lr = recipe.optimizer.lr
    rows: list[tuple[str, str, str, str]] = [(recipe.schedule.unit, "factor", "base rate", "")]
    for event, position in (("first update", BatchPlan(recipe).position(0)), *schedule.landmarks()):
        factor = schedule.factor(position)
        rows.append((f"{round(position):,}", f"{factor:.4g}", f"{lr * factor:.4g}", event))
    numbers = _table([row[:3] for row in rows])
    events = [f"  {row[3]}".rstrip() for row in rows]
    lines = ["  " + schedule.describe(lr), *(line + event for line, event in zip(numbers, events, strict=True))]
    note = schedule_note(recipe.schedule)
    return lines if note is None else [*lines, f"  {note}"]


def _memory(estimate: MemoryEstimate, offloaded: int) -> list[str]:
    rows = [*((part.name, getattr(estimate, part.name)) for part in fields(estimate)), ("total", estimate.total)]
    if offloaded:
        rows.append(("host", offloaded))
    return _table([(name, _bytes(size)) for name, size in rows])


def _memory_on_cpu(recipe: Recipe, layout: Layout) -> list[str]:
    tensors = estimate_memory(recipe, layout, fused_norm=False).total + offloaded_bytes(recipe, layout)
    rows = (("tensors", tensors), ("libraries", LIBRARY_BYTES), ("total", tensors + LIBRARY_BYTES))
    # Each of the quickstart's two ranks held 1,167 MiB after one step, for 1,088 here, and 1,385 from step 200 on.
    # It rose neither at evaluations nor at checkpoints, and the mapped tokens are 7 MiB; malloc's slack is not measured
    return [
        *_table([(name, _bytes(size)) for name, size in rows]),
        "  not counted: what a process grows by as it runs; the quickstart's were 0.3 GiB above it after 200 steps",
    ]


def _bytes(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def _verdict(recipe: Recipe) -> list[str]:
    lines = [f"  run folder   {recipe.run_directory}", f"  recipe hash  {recipe_hash(recipe)}"]
    return [*lines, "  the recipe is valid"]
