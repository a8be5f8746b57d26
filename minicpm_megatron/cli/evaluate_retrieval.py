"""Ask a trained model what long texts hide:

    minicpm evaluate-retrieval --checkpoint RUN --set DIR --output DIR

Takes a run (its newest checkpoint), RUN@STEP, one checkpoint, or an exported or downloaded Hugging Face folder, and a
set of `minicpm build-retrieval-set`. Prints accuracy by length and depth, and writes every answer, results.json and
heat_map.png. Killed and run again, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.data.retrieval_set import SET, open_set
from minicpm_megatron.data.tokenizers import has_tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256, fingerprint


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument("--checkpoint", required=True, help="run, RUN@STEP, checkpoint or Hugging Face folder")
    result.add_argument("--set", type=Path, required=True, help="folder of `minicpm build-retrieval-set`")
    result.add_argument("--output", type=Path, required=True, help="folder of the results")
    result.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that belongs to the model)")
    result.add_argument("--max-length", type=int, help="leave out questions of more tokens")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    options = parser().parse_args(arguments)
    if options.max_length is not None and options.max_length < 1:
        raise UserError("must be at least 1", where="--max-length")
    with leaving_at_once():  # torch and transformers: seconds
        from minicpm_megatron.convert.generation import Generator
        from minicpm_megatron.evaluation.heat_map import draw_heat_map
        from minicpm_megatron.evaluation.retrieval import RESULTS, evaluate, table
    questions = open_set(options.set)
    folder = find_source(options.checkpoint)
    generator = Generator(folder, options.tokenizer)
    identity = {
        "task": questions.task,
        "model": str(folder.resolve()),
        "model_files": fingerprint(folder),
        "set_sha256": file_sha256(options.set / SET),
        "tokenizer": str(generator.tokenizer_folder.resolve()),
    }
    cells = evaluate(generator, questions, options.output, identity=identity, max_length=options.max_length)
    if not has_tokenizer(generator.tokenizer_folder, questions.tokenizer_sha256):
        print("note: the set's lengths were counted with another tokenizer than the model's")
    print(f"{questions.task}, {folder}")
    print(table(cells))
    picture = draw_heat_map(cells, f"{questions.task}: {Path(options.checkpoint).name}", options.output)
    print(f"results: {options.output / RESULTS}, picture: {picture}")
