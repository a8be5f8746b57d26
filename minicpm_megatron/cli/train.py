"""The command line of examples/train.py."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from typing import TYPE_CHECKING

from minicpm_megatron.cli.dry_run import check_inputs, format_dry_run
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.training.notes import schedule_note
from minicpm_megatron.versions import check_versions

if TYPE_CHECKING:
    from minicpm_megatron.training.start import Origin

DESCRIPTION = """Train a MiniCPM model as a recipe says.

  deepspeed --num_gpus 2 examples/train.py --recipe examples/recipes/quickstart.yaml
  deepspeed --num_gpus 2 examples/train.py --recipe R.yaml name=try optimizer.lr=0.02      (overrides)
  deepspeed --num_gpus 2 examples/train.py --recipe R.yaml --from RUN@STEP name=decay-a schedule.decay=100 \\
      schedule.half_life=20                                            (exponential: five half-lives, to 1/32)
  deepspeed --num_gpus 2 examples/train.py --recipe LONGER.yaml --init-from RUN@STEP
  python examples/train.py --recipe R.yaml --dry-run                                       (nothing is started)

Started again with the same recipe, a run goes on from its newest checkpoint. Ctrl-C or SIGTERM saves and stops after
the current step. Works under torchrun, too."""


def parser() -> argparse.ArgumentParser:
    """The parser; `--help` is its documentation."""
    result = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        metavar="RUN@STEP",
        help="begin at step 0 with the weights and moments of another run's checkpoint: a new stage, whose data,"
        " lengths, RoPE, batches and schedule are the recipe's own",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print what would be run, read the data and the DeepSpeed JSON, and exit"
    )
    result.add_argument(
        "--world-size", type=int, help="ranks to assume for --dry-run (default: as started, or the fewest that fit)"
    )
    # the deepspeed launcher adds it; the environment says the same
    result.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: the recipe, its data or its checkpoints are wrong.
    """
    options = parser().parse_intermixed_args(arguments)
    check_versions()
    recipe = load_recipe(options.recipe, options.overrides)
    origin = None
    if options.reference is not None and options.weights is not None:
        raise UserError("a run starts in one way", where="--from and --init-from", fix="give one of them")
    if options.reference is not None:
        from minicpm_megatron.training.start import Origin, branch_recipe

        recipe, folder, step = branch_recipe(recipe, options.reference)
        origin = Origin(folder, step, options.reference, goes_on=True)
    elif options.weights is not None:
        from minicpm_megatron.training.start import initial_weights

        origin = initial_weights(recipe, options.weights)
    if options.dry_run:
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
    note = schedule_note(recipe.schedule)
    if note is not None and _is_first_rank():
        print(note, flush=True)
    return _train(recipe, origin)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(recipe: Recipe, origin: Origin | None) -> int:
    only_our_lines()
    # seconds of imports, after everything that can be refused without them
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.training.faults import FaultyStep
    from minicpm_megatron.training.report import finish
    from minicpm_megatron.training.trainer import Trainer

    try:
        trainer = Trainer(recipe, origin)
        finished = trainer.run() == trainer.total
        if finished and groups.rank() == 0:
            finish(trainer.folder, recipe)
    except FaultyStep as error:
        if groups.rank() == 0:
            print(f"stopped: {error}", flush=True)
        return 1
    finally:
        groups.destroy()
    return 0


def only_our_lines() -> None:
    """Silence start-up chatter of the libraries that tells a user nothing (missing optional accelerators)."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)\..*")
    for name in (
        # "No CUDA runtime is found", on a machine with a CUDA compiler and no GPU
        "torch.utils.cpp_extension",
        # "GPTModel IS DEPRECATED", from Megatron-Core 0.19 on; docs/megatron_lm.md says which model is trained and why
        "megatron.core.models.gpt.gpt_model",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
