"""How much models gain from their context, as their loss by position in long documents:

    python tools/evaluate_positions.py --checkpoint RUN... --data PREFIX --length 4096 --output DIR

Takes runs (their newest checkpoints), RUN@STEP, checkpoints, or exported or downloaded Hugging Face folders, and
tokens of tools/preprocess_data.py. Prints a table, and writes NAME.json for each model and positions.png. Killed and
run again, it goes on with the first model that is missing.
"""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.entry import run
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.data.indexed_format import bin_path
from minicpm_megatron.errors import UserError
from minicpm_megatron.evaluation.positions import (
    PICTURE,
    draw,
    load_curve,
    read_curve,
    read_windows,
    save_curve,
    table,
)
from minicpm_megatron.storage.checksum import fingerprint


def main() -> None:
    """Parse the command line and evaluate."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, help="runs, RUN@STEP, checkpoints or Hugging Face folders"
    )
    parser.add_argument("--data", type=Path, required=True, help="prefix of held-out tokens (.bin and .idx)")
    parser.add_argument("--length", type=int, required=True, help="positions; longer documents alone are read")
    parser.add_argument("--samples", type=int, default=32, help="windows of documents to read (default 32)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that belongs to the model)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    for name in ("length", "samples"):
        if getattr(options, name) < 1:
            raise UserError("must be at least 1", where=f"--{name}")
    names = [Path(text).resolve().name for text in options.checkpoint]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two models are called {twice}", where="--checkpoint", fix="give folders of different names")
    windows = read_windows(options.data, options.length, options.samples)
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
        curve = load_curve(options.output / f"{name}.json", identity)
        if curve is None:
            curve = read_curve(Generator(folder, options.tokenizer), name, windows)
            _make(options.output)
            save_curve(options.output / f"{name}.json", curve, identity)
        curves.append(curve)
    print(f"loss in nats per token, {curves[0].windows} windows of {options.data}")
    print(table(curves))
    print(f"picture: {draw(curves, options.output / PICTURE)}")


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(output)) from None


if __name__ == "__main__":
    run(main)
