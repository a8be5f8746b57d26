"""Measure how much models gain from their context: their loss by position in long documents.

    minicpm evaluate-positions --checkpoint RUN... --data PREFIX --length 4096 --output DIR

Takes runs (their newest checkpoints), RUN@STEP, checkpoints, or exported or downloaded Hugging Face folders, and
tokens of `minicpm preprocess`. Prints a table, and writes NAME.json for each model and positions.png. Killed and
run again, it goes on with the first model that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.data.indexed_format import bin_path
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import fingerprint


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument(
        "--checkpoint", nargs="+", required=True, help="runs, RUN@STEP, checkpoints or Hugging Face folders"
    )
    result.add_argument("--data", type=Path, required=True, help="prefix of held-out tokens (.bin and .idx)")
    result.add_argument("--length", type=int, required=True, help="positions; longer documents alone are read")
    result.add_argument("--samples", type=int, default=32, help="windows of documents to read (default 32)")
    result.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that belongs to the model)")
    result.add_argument("--output", type=Path, required=True, help="folder of the results")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    options = parser().parse_args(arguments)
    for name in ("length", "samples"):
        if getattr(options, name) < 1:
            raise UserError("must be at least 1", where=f"--{name}")
    names = [Path(text).resolve().name for text in options.checkpoint]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two models are called {twice}", where="--checkpoint", fix="give folders of different names")
    with leaving_at_once():  # torch and transformers: seconds
        from minicpm_megatron.convert.generation import Generator
        from minicpm_megatron.evaluation import positions
    windows = positions.read_windows(options.data, options.length, options.samples)
    curves = []
    for name, text in zip(names, options.checkpoint, strict=True):
        folder = find_source(text)
        if not folder.is_dir():
            raise UserError("no such folder", where=text)
        identity = {
            "model": str(folder.resolve()),
            "model_files": fingerprint(folder),
            "data": str(options.data.resolve()),
            "data_bytes": bin_path(options.data).stat().st_size,
            "length": options.length,
            "samples": options.samples,
        }
        curve = positions.load_curve(options.output / f"{name}.json", identity)
        if curve is None:
            curve = positions.read_curve(Generator(folder, options.tokenizer), name, windows)
            _make(options.output)
            positions.save_curve(options.output / f"{name}.json", curve, identity)
        curves.append(curve)
    print(f"loss in nats per token, {curves[0].windows} windows of {options.data}")
    print(positions.table(curves))
    print(f"picture: {positions.draw(curves, options.output / positions.PICTURE)}")


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(output)) from None
