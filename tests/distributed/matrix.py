"""Every legal layout on up to four processes against one process, as a table.

    python -m tests.distributed.matrix                  # layouts: losses, gradient norm, digits, seconds
    python -m tests.distributed.matrix TP2 PP4          # those whose name begins so
    python -m tests.distributed.matrix --checkpoints    # from -> to: digits after loading under another layout
    python -m tests.distributed.matrix --experts ...    # the same of a mixture of experts, with expert parallelism
    python -m tests.distributed.matrix --untied         # layouts of a model whose head is a tensor of its own
    python -m tests.distributed.matrix --muon ...       # any of these with Muon

Exit status 1 where a row agrees in fewer than 5 digits (bf16: losses differ by more
than 3e-3 or gradient norms by more than 8e-3).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build
from tests.distributed.forked import run_forked
from tests.distributed.parity import BATCH, DIGITS, SEQUENCE, agreement, digits, furthest, run_layouts

Case = dict[str, Any]
WORLDS = (1, 2, 4)
EXPERTS: dict[str, Any] = {"num_moe_experts": 4}
UNTIED: dict[str, Any] = {"untie_embeddings_and_output_weights": True}
AT_ONCE = 12  # layouts of one start, so that one that hangs does not take all with it


def layouts(world: int, model: dict[str, Any]) -> Iterator[tuple[str, Case]]:
    """(name, case) of every legal layout that uses exactly `world` ranks.

    Of a mixture context parallelism by ring only: experts do not see how attention is made.
    """
    sizes, experts = [size for size in WORLDS if size <= world], "num_moe_experts" in model
    kinds = ("p2p",) if experts else ("p2p", "a2a")
    for tp, pp, cp, ep in itertools.product(sizes, sizes, sizes, sizes if experts else [1]):
        data, left = divmod(world, tp * pp * cp)
        if left or not data:
            continue
        for sp, kind, zero, precision in itertools.product((False, True), kinds, range(4), ("fp32", "bf16")):
            if cp == 1 and kind == "a2a" or (zero > 1 and data * cp == 1):
                continue
            case = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "sp": sp, "kind": kind, "zero": zero}
            case |= {"precision": precision, "model": model}
            if pp > 1:
                case["micro"] = 2
            if _legal(case, world):
                yield _name(case, data), case


def overrides(case: Case) -> list[str]:
    """The recipe's overrides for a layout."""
    parallel = {
        "tensor_model_parallel_size": case.get("tp", 1),
        "pipeline_model_parallel_size": case.get("pp", 1),
        "context_parallel_size": case.get("cp", 1),
        "cp_comm_type": case.get("kind", "p2p"),
        "expert_model_parallel_size": case.get("ep", 1),
        "sequence_parallel": str(case.get("sp", False)).lower(),
    }
    return [f"parallel.{key}={value}" for key, value in parallel.items()] + [
        f"deepspeed.zero_stage={case.get('zero', 0)}"
    ]


def _legal(case: Case, world: int) -> bool:
    fields = {
        "name": "legal",
        "preset": "minicpm-nano",
        "model": {"num_layers": 4} | case["model"],
        "data": {"train": [{"prefix": "unused"}], "sequence_length": SEQUENCE},
        "training": {"global_batch_size": BATCH, "micro_batch_size": 1, "precision": case["precision"]},
        "schedule": {"shape": "constant", "total": 1},
        "parallel": {
            "tensor_model_parallel_size": case["tp"],
            "pipeline_model_parallel_size": case["pp"],
            "context_parallel_size": case["cp"],
            "cp_comm_type": case["kind"],
            "expert_model_parallel_size": case["ep"],
            "sequence_parallel": case["sp"],
        },
        "deepspeed": {"zero_stage": case["zero"]},
    }
    try:
        build(fields).check_world_size(world)
    except UserError:
        return False
    return True


def _name(case: Case, data: int) -> str:
    kind = {"p2p": " ring", "a2a": " Ulysses"}[case["kind"]]
    parts = [
        f"TP{case['tp']}" + (" SP" if case["sp"] else "") if case["tp"] > 1 else "",
        f"PP{case['pp']}" if case["pp"] > 1 else "",
        f"CP{case['cp']}{kind}" if case["cp"] > 1 else "",
        f"DP{data}" if data > 1 else "",
        f"EP{case['ep']}" if case["ep"] > 1 else "",
        f"ZeRO {case['zero']}",
        case["precision"],
    ]
    return " ".join(part for part in parts if part)


def layout_matrix(model: dict[str, Any], names: tuple[str, ...], optimizer: dict[str, Any]) -> bool:
    """Print the table of the layouts whose name begins with one of `names`; whether every row agrees."""
    keywords = {"num_layers": 4, "model": model, "optimizer": optimizer}
    whole = run_layouts(1, {"one": {}}, **keywords)["one"].lines
    print(f"| layout | first loss | last loss | gradient norm | agreement | seconds |\n| {'--- | ' * 6}".rstrip())
    sound = True
    for world in WORLDS:
        wanted = [row for row in layouts(world, model) if row[0].startswith(names)]
        for start in range(0, len(wanted), AT_ONCE):
            some = dict(wanted[start : start + AT_ONCE])
            for name, run in run_layouts(world, some, **keywords).items():
                if some[name]["precision"] == "bf16":
                    apart = furthest(whole, run.lines)
                    agrees, told = apart.as_bf16_may_be, f"losses within {apart.loss:.0e}, norms {apart.norm:.0e}"
                else:
                    places = agreement(whole, run.lines)
                    agrees, told = places >= DIGITS, "all digits" if places == 16 else f"{places:.1f} digits"
                sound = sound and agrees
                (first, _), (last, norm) = run.lines[0], run.lines[-1]
                fault = "" if agrees else " DIFFERS"
                print(
                    f"| {name} | {first:.6f} | {last:.6f} | {norm:.6f} | {told}{fault} | {run.seconds:.1f} |",
                    flush=True,
                )
    return sound


PAIRED: dict[str, Case] = {
    "1": {"world": 1, "zero": 1},
    "DP2 ZeRO 0": {"zero": 0},
    "DP2 ZeRO 1": {"zero": 1},
    "DP2 ZeRO 2": {"zero": 2},
    "DP2 ZeRO 3": {"zero": 3},
    "TP2": {"tp": 2, "zero": 0},
    "TP2 SP ZeRO 1": {"tp": 2, "sp": True, "zero": 1},
    "PP2 ZeRO 1": {"pp": 2, "zero": 1},
    "CP2 ring ZeRO 1": {"cp": 2, "zero": 1},
    "CP2 Ulysses ZeRO 3": {"cp": 2, "kind": "a2a", "zero": 3},
    "TP2 PP2 ZeRO 1": {"world": 4, "tp": 2, "pp": 2, "zero": 1},
    "TP2 DP2 ZeRO 3": {"world": 4, "tp": 2, "zero": 3},
}
PAIRED_EXPERTS: dict[str, Case] = {
    "1": {"world": 1, "zero": 1},
    "DP2 ZeRO 3": {"zero": 3},
    "EP2 ZeRO 0": {"ep": 2, "zero": 0},
    "EP2 ZeRO 1": {"ep": 2, "zero": 1},
    "DP4 EP2 ZeRO 2": {"world": 4, "ep": 2, "zero": 2},
    "CP2 ring EP2 ZeRO 1": {"cp": 2, "ep": 2, "zero": 1},
    "TP2 SP DP2 EP2 ZeRO 1": {"world": 4, "tp": 2, "sp": True, "ep": 2, "zero": 1},
    "PP2 DP2 EP2 ZeRO 1": {"world": 4, "pp": 2, "ep": 2, "zero": 1},
}


def checkpoint_matrix(experts: bool, optimizer: dict[str, Any]) -> bool:
    """Print the table of checkpoint pairs; whether every one agrees."""
    from tests.training import nano

    paired, model = (PAIRED_EXPERTS, EXPERTS) if experts else (PAIRED, {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = nano.write_recipe(
            folder, evaluation={"interval": None}, model=nano.MODEL | model, optimizer={"lr": 0.005} | optimizer
        )
        wholes = [
            nano.case(recipe, f"from-{number}", *overrides(case), ranks=case.get("world", 2))
            for number, case in enumerate(paired.values())
        ]
        for name, outcome in zip(paired, run_forked("tests.training.nano:train", wholes), strict=True):
            nano.check(outcome)
            print(f"trained under {name}", file=sys.stderr, flush=True)
        reference = [record[2] for record in nano.losses(folder / "runs" / "from-0")][nano.HALF :]
        print(f"| from, to | {' | '.join(paired)} |\n|{' --- |' * (len(paired) + 1)}")
        sound = True
        for number, origin in enumerate(paired):
            begun = str(folder / "runs" / f"from-{number}" / "checkpoints" / f"step-{nano.HALF}")
            cases = [
                nano.case(recipe, f"{number}-{place}", *overrides(case), ranks=case.get("world", 2), begin_with=begun)
                for place, case in enumerate(paired.values())
            ]
            row = []
            for place, outcome in enumerate(run_forked("tests.training.nano:train", cases)):
                nano.check(outcome)
                lines = [record[2] for record in nano.losses(folder / "runs" / f"{number}-{place}")]
                row.append(min(digits(a, b) for a, b in zip(reference, lines, strict=True)))
            sound = sound and min(row) >= DIGITS
            print(f"| {origin} | {' | '.join('all' if value == 16 else f'{value:.1f}' for value in row)} |", flush=True)
    return sound


def main() -> int:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of layouts' names (default: all layouts)")
    parser.add_argument("--checkpoints", action="store_true", help="load each layout's checkpoint under each other")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--experts", action="store_true", help="of a mixture of experts")
    model.add_argument("--untied", action="store_true", help="of an untied model; layouts only")
    parser.add_argument("--muon", action="store_true", help="with Muon instead of AdamW")
    options = parser.parse_args()
    optimizer = {"name": "muon"} if options.muon else {}
    if options.checkpoints:
        return 0 if checkpoint_matrix(options.experts, optimizer) else 1
    shape = EXPERTS if options.experts else UNTIED if options.untied else {}
    return 0 if layout_matrix(shape, tuple(options.names) or ("",), optimizer) else 1


if __name__ == "__main__":
    sys.exit(main())
