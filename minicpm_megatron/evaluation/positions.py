"""Loss by position: how much a model gains from what stands further back in a text.

Positions are those of a document, so that position 4,095 has 4,095 tokens of one text before it. A model that uses its
context loses less there than at position 255; one that was never trained beyond 256 tokens, more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from minicpm_megatron.data.indexed_format import open_index
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.picture import legend_beside, offscreen_pyplot, save_picture

PICTURE = "positions.png"
_FIRST_RANGE = 16


class Reader(Protocol):
    """A model as this file needs it; `convert.generation.Generator` is one.

    Attributes:
        longest: tokens of the longest sequence that it takes.
        vocab_size: ids that it knows.
    """

    longest: int
    vocab_size: int

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """fp32 [n - 1]: nats of each token after the first, those before it given."""


@dataclass(frozen=True)
class Curve:
    """A model's loss by position.

    Attributes:
        name: of the model.
        windows: how many texts the means are of.
        ranges: [first, after the last) position of each range; doubling, as context helps by its logarithm.
        losses: mean of each range, nats a token.
        errors: standard error of that mean over the windows.
    """

    name: str
    windows: int
    ranges: tuple[tuple[int, int], ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]


def position_ranges(length: int) -> tuple[tuple[int, int], ...]:
    """Ranges of positions that double, the last one cut at `length`.

    >>> position_ranges(100)
    ((0, 16), (16, 32), (32, 64), (64, 100))
    """
    bounds = [0, _FIRST_RANGE]
    while bounds[-1] < length:
        bounds.append(2 * bounds[-1])
    return tuple((first, min(last, length)) for first, last in zip(bounds, bounds[1:], strict=False))


def read_windows(prefix: Path, length: int, count: int) -> list[list[int]]:
    """The first `count` windows of length + 1 tokens that lie within one document and do not overlap.

    Args:
        prefix: of a .bin/.idx pair.
        length: positions of a window.

    Raises:
        UserError: no document is long enough.
    """
    index = open_index(prefix)
    tokens, found = open_indexed_dataset(prefix), []
    for number in np.flatnonzero(np.asarray(index.lengths) > length):
        document = np.array(tokens[int(number)])
        for first in range(0, len(document) - length, length + 1):
            found.append([int(token) for token in document[first : first + length + 1]])
            if len(found) == count:
                return found
    if not found:
        longest = int(index.lengths.max()) if len(index.lengths) else 0
        raise UserError(
            f"no document of more than {length} tokens; the longest has {longest}",
            where=str(prefix),
            fix="give a smaller --length, or longer texts",
        )
    return found


def read_curve(reader: Reader, name: str, windows: Sequence[Sequence[int]], *, show_progress: bool = True) -> Curve:
    """The loss of one model by position.

    Args:
        windows: tokens of texts, equally long.

    Raises:
        UserError: the model does not take so long a sequence, or does not know a token.
    """
    length = len(windows[0]) - 1
    if length > reader.longest:
        raise UserError(
            f"{length} tokens do not fit the model's context of {reader.longest}",
            where=name,
            fix=f"give --length {reader.longest} or less",
        )
    if min(map(min, windows)) < 0 or max(map(max, windows)) >= reader.vocab_size:
        raise UserError("the tokens are of another vocabulary", where=name, fix="give data made with its tokenizer")
    rows = np.stack([reader.losses(window).double().numpy() for window in _with_bar(windows, name, show_progress)])
    ranges = position_ranges(length)
    means = np.stack([rows[:, first:last].mean(1) for first, last in ranges], 1)  # [windows, ranges]
    errors = means.std(0, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.full(len(ranges), np.nan)
    return Curve(
        name, len(rows), ranges, tuple(map(float, means.mean(0))), tuple(float(e) for e in np.nan_to_num(errors))
    )


def _with_bar(windows: Sequence[Sequence[int]], name: str, show: bool) -> Iterator[Sequence[int]]:
    with progress_bar(total=len(windows), unit=" texts", desc=name, disable=not show) as bar:
        for window in windows:
            yield window
            bar.update()


def save_curve(path: Path, curve: Curve, identity: Mapping[str, Any]) -> None:
    """Write the curve as JSON, with what it is of."""
    write_json(path, {"identity": dict(identity), "curve": asdict(curve)})


def load_curve(path: Path, identity: Mapping[str, Any]) -> Curve | None:
    """A curve of an earlier start; None where there is none, or one of something else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content["identity"] != identity:
            return None
        fields = content["curve"]
        return Curve(
            fields["name"],
            fields["windows"],
            tuple((first, last) for first, last in fields["ranges"]),
            tuple(fields["losses"]),
            tuple(fields["errors"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def table(curves: Sequence[Curve]) -> str:
    """Nats a token with their standard error: a line a range of positions, a column a model."""
    width = max(18, *(len(curve.name) + 2 for curve in curves))
    lines = [f"{'positions':>13}" + "".join(f"{curve.name:>{width}}" for curve in curves)]
    for place, (first, last) in enumerate(curves[0].ranges):
        cells = (f"{curve.losses[place]:.3f} ± {curve.errors[place]:.3f}" for curve in curves)
        lines.append(f"{f'{first:,}-{last - 1:,}':>13}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> Path:
    """Loss over position, both as ranges that double, as a picture."""
    pyplot = offscreen_pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.2))
    for curve in curves:
        middles = [(first + last) / 2 for first, last in curve.ranges]
        axis.errorbar(middles, curve.losses, curve.errors, marker="o", markersize=4, capsize=2, label=curve.name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("position in the document (tokens)")
    axis.set_ylabel("loss (nats per token)")
    legend_beside(axis, title="run, ± standard error")
    axis.set_title(f"loss by position: means over {curves[0].windows} texts")
    return save_picture(figure, path)
