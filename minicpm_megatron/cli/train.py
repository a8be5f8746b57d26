"""The command line of examples/train.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_megatron.cli import interrupts
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.derive.moved_run import load_recipe_of_run
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.training.launcher import Launcher
from minicpm_megatron.training.notes import schedule_note
from minicpm_megatron.versions import check_versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from minicpm_megatron.training.start import Origin
    from minicpm_megatron.training.trainer import Trainer

DESCRIPTION = """Train a MiniCPM model as a recipe says.

  deepspeed --num_gpus 2 examples/train.py --recipe examples/recipes/quickstart.yaml
  deepspeed --num_gpus 2 examples/train.py --recipe R.yaml name=try optimizer.lr=0.02      (overrides)
  deepspeed --num_gpus 2 examples/train.py --recipe R.yaml --from RUN@STEP name=decay-a schedule.decay=100 \\
      schedule.half_life=20                                            (exponential: five half-lives, to 1/32)
  deepspeed --num_gpus 2 examples/train.py --recipe LONGER.yaml --init-from RUN@STEP       (or a Hugging Face folder)
  python examples/train.py --recipe R.yaml --dry-run                                       (nothing is started)

Started again with the same recipe, a run goes on from its newest checkpoint. Ctrl-C or SIGTERM saves and stops after
the current step. Works under torchrun, too."""


def parser() -> argparse.ArgumentParser:
    """The parser; `--help` is its documentation."""
    result = Parser(description=DESCRIPTION)
    result.add_argument("--recipe", required=True, metavar="FILE", help="YAML recipe; docs/recipes.md lists its keys")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the recipe")
    result.add_argument(
        "--from",
        dest="reference",
        metavar="RUN@STEP",
        help="start a decay of schedule.decay from a stable checkpoint of another run (STEP may be 'latest')",
    )
    result.add_argument(
        "--init-from",
        dest="weights",
        metavar="RUN@STEP|FOLDER",
        help="begin at step 0 with the weights and moments of another run's checkpoint, or the weights in a Hugging"
        " Face folder: a new stage, whose data, lengths, RoPE, batches and schedule are the recipe's own",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be run, read the data, the run's checkpoints and the DeepSpeed JSON, and exit",
    )
    result.add_argument(
        "--finished",
        action="store_true",
        help="start nothing, and exit with 0 if the run has reached its last step, with 1 if not",
    )
    result.add_argument(
        "--world-size", type=int, help="ranks to assume for --dry-run (default: as started, or the fewest that fit)"
    )
    # the deepspeed launcher adds it; the environment says the same
    result.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None, make_trainer: Callable[..., Trainer] | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        make_trainer: takes what `Trainer` takes, for a run with parts of its own; None: `Trainer` itself.

    Raises:
        UserError: the recipe, its data or its checkpoints are wrong.
    """
    launcher = Launcher()
    options = parser().parse_intermixed_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"{options.world_size} is no number of ranks", where="--world-size", fix="give 1 or more")
    if options.world_size is not None and not options.dry_run:
        raise UserError("is assumed by --dry-run alone", where="--world-size", fix="tell the launcher how many ranks")
    if options.finished and options.dry_run:
        raise UserError("ask two things", where="--dry-run and --finished", fix="give one of them")
    check_versions()
    recipe = load_recipe_of_run(Path(options.recipe), options.overrides)
    origin = None
    if options.reference is not None and options.weights is not None:
        raise UserError("a run starts in one way", where="--from and --init-from", fix="give one of them")
    if options.reference is not None:
        from minicpm_megatron.training.start import Origin, branch_recipe

        recipe, folder, step = branch_recipe(recipe, options.reference)
        origin = Origin(folder, step, options.reference, goes_on=True)
    elif options.weights is not None:
        from minicpm_megatron.derive.published_weights import open_published_weights
        from minicpm_megatron.training.start import initial_weights

        origin = initial_weights(recipe, options.weights, open_published_weights)
    if options.dry_run:
        from minicpm_megatron.cli.dry_run import check_inputs, format_dry_run

        parallel = recipe.parallel
        fewest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        fewest *= parallel.context_parallel_size
        world_size = options.world_size or int(os.environ.get("WORLD_SIZE") or fewest)
        report = format_dry_run(recipe, world_size)
        if _is_first_rank():
            print(report, flush=True)  # whole, also where the data are still to be made
        inputs = check_inputs(recipe, recipe.check_world_size(world_size))
        if _is_first_rank():
            print(f"  {inputs}")
        return 0
    if options.finished:
        return _say_whether_finished(recipe)
    note = schedule_note(recipe.schedule)
    if note is not None and _is_first_rank():
        print(note, flush=True)
    return _train(recipe, origin, launcher, make_trainer)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say_whether_finished(recipe: Recipe) -> int:
    """Print how far a run's newest checkpoint is; 0 if that is its last step."""
    from minicpm_megatron.checkpoint.find import CHECKPOINTS
    from minicpm_megatron.checkpoint.names import published_steps

    last = BatchPlan(recipe).last_step()
    done = max(published_steps(recipe.run_directory / CHECKPOINTS), default=0)
    print(f"{recipe.run_directory}: {done:,} of {last:,} steps are done")
    return 0 if done >= last else 1


def _train(
    recipe: Recipe, origin: Origin | None, launcher: Launcher, make_trainer: Callable[..., Trainer] | None
) -> int:
    # seconds of imports, after everything that can be refused without them
    with interrupts.leaving_at_once():
        from minicpm_megatron.parallel import groups
        from minicpm_megatron.training.faults import FaultyStep
        from minicpm_megatron.training.report import finish
        from minicpm_megatron.training.trainer import Trainer
        from minicpm_megatron.training.watchdog import Watchdog

    rank, size, folder = groups.rank(), groups.world_size(), recipe.run_directory
    try:
        with Watchdog(folder, rank=rank, size=size, timeout=recipe.training.hang_timeout) as watchdog:
            trainer = (make_trainer or Trainer)(recipe, origin, watchdog, launcher)
            finished = trainer.run() == trainer.total
        if finished and rank == 0:
            finish(folder, recipe)
    except FaultyStep as error:
        if rank == 0:
            print(f"stopped: {error}", flush=True)
        return 1
    finally:
        groups.destroy()
    return 0
