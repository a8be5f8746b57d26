"""Compare runs by tokens, FLOPs and held-out loss: a table, and a picture.

    minicpm compare --runs runs/dense runs/moe --output runs/moe/comparison.png

The table counts each run's own steps; what was before a branch or an upcycling is common to them. The picture counts
from where the first of the runs began, so that a branch follows on its trunk. Both take the mean over the validation
sets that all runs have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.errors import UserError
from minicpm_megatron.training.compare import draw, equal_flops, format_table, read_curve


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs")
    result.add_argument("--output", type=Path, help="picture to write (.png)")
    result.add_argument(
        "--equal-flops",
        type=int,
        metavar="STEPS",
        help="only print how many steps of the first run cost the FLOPs of STEPS of the second",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, print the table and draw."""
    options = parser().parse_args(arguments)
    if options.equal_flops is not None:
        if len(options.runs) != 2 or options.equal_flops < 1:
            raise UserError("takes two runs and a number of steps", where="--equal-flops")
        run_folder, other = options.runs
        print(equal_flops(run_folder, other, options.equal_flops))
        return
    if options.output is not None:
        if not options.output.resolve().parent.is_dir():
            raise UserError("no such folder", where=str(options.output.parent), fix="give another --output")
        if options.output.is_dir():
            raise UserError("is a folder, not a picture", where=str(options.output), fix="add a file name to --output")
    curves = [read_curve(folder) for folder in options.runs]
    print(format_table(curves))
    if options.output is not None:
        try:
            draw(curves, options.output)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(options.output)) from None
        print(f"picture: {options.output}")
