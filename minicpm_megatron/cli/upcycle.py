"""Make a mixture of experts of a dense model, as a run to go on with:

    minicpm upcycle --input quickstart@300 --output runs/moe --experts 8 --top-k 2
    deepspeed --num_gpus 2 examples/train.py --recipe runs/moe/recipe.yaml schedule.total=600

Every MLP becomes EXPERTS exact copies behind a router drawn from N(0, 0.1^2) (section 7.3 of the paper), so that the
new model computes what the dense one did. Step, data position, schedule and optimizer state are carried over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.derive.moments import EXPERT_MOMENTS
from minicpm_megatron.methods.upcycling import Upcycling
from minicpm_megatron.recipe import count_parameters


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    default = Upcycling()
    result = Parser(description=__doc__)
    result.add_argument(
        "--input",
        required=True,
        help="dense model: run (its newest checkpoint), RUN@STEP, checkpoint, or Hugging Face model folder",
    )
    result.add_argument("--output", type=Path, required=True, help="folder of the new run; appears whole or not at all")
    result.add_argument("--experts", type=int, default=default.copies, help=f"copies of each MLP ({default.copies})")
    result.add_argument("--top-k", type=int, default=default.top_k, help=f"copies a token ({default.top_k})")
    result.add_argument(
        "--router-std",
        type=float,
        default=default.router_std,
        help=f"standard deviation of the routers' weights ({default.router_std}; variance 0.01 in the paper)",
    )
    result.add_argument("--seed", type=int, default=default.seed, help=f"of routers and noise ({default.seed})")
    result.add_argument(
        "--noise",
        type=float,
        default=default.noise,
        help="standard deviation of noise on the copies, relative to that of the matrix (0: exact copies)",
    )
    result.add_argument(
        "--granularity",
        type=int,
        default=default.granularity,
        help="cut each copy into this many experts of a part of the width each, and give a token as many more (1)",
    )
    result.add_argument(
        "--moments",
        choices=EXPERT_MOMENTS,
        default=EXPERT_MOMENTS[0],
        help="what experts get of Adam's moments: the dense MLP's, scaled as theirs will be, or zeros (%(default)s)",
    )
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change one value of the new run's recipe"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and upcycle."""
    options = parser().parse_intermixed_args(arguments)
    plan = Upcycling(
        copies=options.experts,
        top_k=options.top_k,
        router_std=options.router_std,
        seed=options.seed,
        noise=options.noise,
        granularity=options.granularity,
    )
    with leaving_at_once():  # torch: seconds
        from minicpm_megatron.derive.upcycle import upcycle
    done = upcycle(
        find_source(options.input),
        options.output,
        plan,
        moments=options.moments,
        overrides=options.overrides,
        progress=sys.stderr.isatty(),
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    count = count_parameters(done.model)
    active = count.total - count.non_embedding + count.active_non_embedding
    print(
        f"{options.input} -> {done.run}, step {done.step}: {done.model.num_moe_experts} experts, "
        f"{done.model.moe_router_topk} a token; {count.total:,} parameters, {active:,} of them for one token"
    )
    print(done.how_to_go_on())
    return 0
