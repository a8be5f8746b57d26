"""Make a mixture of experts of a dense model, as a run to go on with:

    python tools/upcycle.py --input quickstart@300 --output runs/moe --experts 8 --top-k 2
    deepspeed --num_gpus 2 examples/train.py --recipe runs/moe/recipe.yaml schedule.total=600

Every MLP becomes EXPERTS exact copies behind a router drawn from N(0, 0.1^2) (section 7.3 of the paper), so that the
new model computes what the dense one did. Step, data position, schedule and optimizer state are carried over.
"""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

import sys
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.entry import run
from minicpm_megatron.derive.moments import EXPERT_MOMENTS
from minicpm_megatron.derive.upcycle import upcycle
from minicpm_megatron.methods.upcycling import Upcycling
from minicpm_megatron.recipe import count_parameters


def main() -> int:
    """Parse the arguments and upcycle."""
    default = Upcycling()
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input",
        required=True,
        help="dense model: run (its newest checkpoint), RUN@STEP, checkpoint, or Hugging Face model folder",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the new run; appears whole or not at all")
    parser.add_argument("--experts", type=int, default=default.copies, help=f"copies of each MLP ({default.copies})")
    parser.add_argument("--top-k", type=int, default=default.top_k, help=f"copies a token ({default.top_k})")
    parser.add_argument(
        "--router-std",
        type=float,
        default=default.router_std,
        help=f"standard deviation of the routers' weights ({default.router_std}; variance 0.01 in the paper)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help=f"of routers and noise ({default.seed})")
    parser.add_argument(
        "--noise",
        type=float,
        default=default.noise,
        help="standard deviation of noise on the copies, relative to that of the matrix (0: exact copies)",
    )
    parser.add_argument(
        "--granularity",
        type=int,
        default=default.granularity,
        help="cut each copy into this many experts of a part of the width each, and give a token as many more (1)",
    )
    parser.add_argument(
        "--moments",
        choices=EXPERT_MOMENTS,
        default=EXPERT_MOMENTS[0],
        help="what experts get of Adam's moments: the dense MLP's, scaled as theirs will be, or zeros (%(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change one value of the new run's recipe"
    )
    options = parser.parse_intermixed_args()
    plan = Upcycling(
        copies=options.experts,
        top_k=options.top_k,
        router_std=options.router_std,
        seed=options.seed,
        noise=options.noise,
        granularity=options.granularity,
    )
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


if __name__ == "__main__":
    run(main)
