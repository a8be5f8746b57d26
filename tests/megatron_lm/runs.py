"""Short runs of Megatron-LM's `pretrain()` on CPU processes, and the same run by torch alone.

The workers run inside `tests.distributed.forked`; this module imports what is slow to import, so that forks need not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from megatron.training import training
from megatron.training.arguments import parse_and_validate_args

import minicpm_megatron as library
from minicpm_megatron.megatron_lm import add_minicpm_args, pretrain
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.recipe import ModelRecipe
from tests.distributed.parity import BATCH, SEQUENCE, VOCABULARY, samples
from tests.megatron_lm import on_cpu

STEPS = 8
SEED = 3
RATE, WEIGHT_DECAY = 0.002, 0.1
MODEL = {"num_layers": 4, "vocab_size": VOCABULARY, "dim_model_base": 32}  # m = 2, so that no multiplier is 1
# warmup 2, decay 3 with a half-life of 1.5
SCHEDULE = f"--lr-decay-style WSD --lr-warmup-iters 2 --lr-wsd-decay-iters 3 --wsd-half-life-iters 1.5 --lr {RATE}"
COMMON = f"""
    --minicpm-preset minicpm-nano --num-layers {MODEL["num_layers"]} --vocab-size {VOCABULARY}
    --dim-model-base {MODEL["dim_model_base"]} --seed {SEED}
    --seq-length {SEQUENCE} --global-batch-size {BATCH} --weight-decay {WEIGHT_DECAY} --adam-beta2 0.95
    --mock-data {SCHEDULE}
"""


class Samples(torch.utils.data.Dataset):
    """The samples of `parity`, step after step, as Megatron-Core's GPTDataset gives them."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(samples(index // BATCH)[index % BATCH])
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(SEQUENCE),
            "position_ids": torch.arange(SEQUENCE),
        }


def _datasets(sizes: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return Samples(), None, None


_datasets.is_distributed = True  # type: ignore[attr-defined]


def worker(rank: int, case: dict[str, Any]) -> Any:
    """Run one rank of a case: by torch alone where it says so, else by `pretrain()`.

    Returns:
        `lines`: [loss, gradient norm] of every step (loss None where this stage has none); `rates`: of every update,
        role -> learning rate; `groups`: name of each parameter that the optimizer steps as it is -> its learning rate
        and weight decay at the last update.
    """
    on_cpu.start(case.get("layout", {}), dist.get_world_size())
    return by_torch(**case["torch"]) if "torch" in case else by_pretrain(case)


def by_pretrain(case: dict[str, Any]) -> dict[str, Any]:
    """Train as the example script does, with recorded steps."""
    lines, rates, groups = [], [], {}
    train_step = training.train_step

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        model, optimizer = arguments[2], arguments[3]
        chunks = unwrap_model(model)
        names = {parameter: name for chunk in chunks for name, parameter, _ in named_shards(chunk, chunk.config)}
        rates.append({})
        for group in optimizer.param_groups:
            rates[-1].update(dict.fromkeys(group["name"].split(", "), group["lr"]))
            mine = [names[parameter] for parameter in group["params"] if parameter in names]
            groups.update(dict.fromkeys(mine, [group["lr"], group["weight_decay"]]))
        result = train_step(*arguments, **keywords)
        losses, norm = result[0], result[5]
        lines.append([float(losses["lm loss"]) if losses else None, float(norm)])
        recorded.model = [type(chunks[0]).__name__, chunks[0].config.fused_loss]  # type: ignore[attr-defined]
        return result

    training.train_step = recorded
    sizes = case.get("layout", {})
    names = {
        "tp": "--tensor-model-parallel-size",
        "pp": "--pipeline-model-parallel-size",
        "cp": "--context-parallel-size",
        "ep": "--expert-model-parallel-size",
        "vp": "--num-virtual-stages-per-pipeline-rank",
    }
    layout = " ".join("--sequence-parallel" if name == "sp" else f"{names[name]} {n}" for name, n in sizes.items())
    on_cpu.command_line(f"{COMMON} --train-iters {STEPS} {layout} --micro-batch-size 4 {case.get('arguments', '')}")
    with on_cpu.without_cuda():
        pretrain.train(parse_and_validate_args(extra_args_provider=add_minicpm_args), _datasets)
    return {"lines": lines, "rates": rates, "groups": groups, "model": recorded.model}  # type: ignore[attr-defined]


def _starts(rows: list[list[int]], end_of_document: int) -> torch.Tensor:
    """Begin of every token's document, token by token."""
    found = []
    for row in rows:
        start, starts = 0, []
        for place, token in enumerate(row):
            starts.append(start)
            if token == end_of_document:
                start = place + 1
        found.append(starts)
    return torch.tensor(found)


def by_torch(changes: dict[str, Any] | None = None, end_of_document: int | None = None) -> dict[str, Any]:
    """The same run without Megatron-LM: MiniCPMModel, torch's AdamW, mup_param_groups, WSDScheduler."""
    from minicpm_megatron.model.experts import set_auxiliary_loss_scale

    shape = ModelRecipe(**{**library.presets["minicpm-nano"].model_dump(), **MODEL, **(changes or {})})
    config = library.MiniCPMConfig.from_recipe(shape, moe_token_dispatcher_type="allgather")
    model = library.MiniCPMModel(config)
    library.initialize_parameters(model, config, SEED)
    groups = library.mup_param_groups(model, config, lr=RATE, weight_decay=WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = library.WSDScheduler(optimizer, total=STEPS, warmup=2, decay=3, half_life=1.5)
    set_auxiliary_loss_scale(1.0, torch.device("cpu"))
    lines, rates = [], []
    for step in range(STEPS):
        rows = torch.from_numpy(samples(step))
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        starts = None if end_of_document is None else _starts(rows[:, :-1].tolist(), end_of_document)
        loss = model(rows[:, :-1], attention_mask=starts, labels=rows[:, 1:]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        lines.append([float(loss), float(norm)])
    names = {parameter: name for name, parameter, _ in named_shards(model, config)}
    groups = {
        names[parameter]: [rates[-1][group["name"]], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {"lines": lines, "rates": rates, "groups": groups}
