"""Loss by position with readers whose losses are known, and with a real model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.errors import UserError
from minicpm_megatron.evaluation.positions import position_ranges, read_curve, read_windows
from tests.evaluation.small import write_model_and_tokens

LENGTH = 60


class Further:
    """Loses 8 - log2(position) nats, and a window's first token besides."""

    longest, vocab_size = 128, 1000

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        positions = torch.arange(1, len(tokens), dtype=torch.float32)
        return 8 - positions.log2() + tokens[0]


def test_means_and_errors_are_those_of_the_closed_form() -> None:
    windows = [[first] + [5] * 100 for first in (1, 2, 3)]
    curve = read_curve(Further(), "further", windows, show_progress=False)
    assert curve.ranges == ((0, 16), (16, 32), (32, 64), (64, 100)) and curve.windows == 3
    for (first, last), loss, error in zip(curve.ranges, curve.losses, curve.errors, strict=True):
        expected = 8 + 2 - sum(math.log2(position + 1) for position in range(first, last)) / (last - first)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert error == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 4096])
def test_ranges_cover_each_position_once(length: int) -> None:
    ranges = position_ranges(length)
    assert [place for first, last in ranges for place in range(first, last)] == list(range(length))


def test_a_sequence_beyond_the_context_or_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="200 tokens do not fit the model's context of 128"):
        read_curve(Further(), "further", [[1] * 201])
    with pytest.raises(UserError, match="another vocabulary"):
        read_curve(Further(), "further", [[1, 1000, 3]])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and a model."""
    return write_model_and_tokens(tmp_path_factory.mktemp("sound"))


def test_windows_lie_within_documents_and_do_not_overlap(sound: Path) -> None:
    windows = read_windows(sound / "tokens", LENGTH, 10**6)
    assert {len(window) for window in windows} == {LENGTH + 1}
    assert read_windows(sound / "tokens", LENGTH, 3) == windows[:3]
    data = open_indexed_dataset(sound / "tokens")
    documents = [data[number].tolist() for number in range(len(data))]
    expected = [len(document) // (LENGTH + 1) for document in documents]
    assert len(windows) == sum(expected)
    for document, count in zip(documents, expected, strict=True):
        mine, windows = windows[:count], windows[count:]
        assert [token for window in mine for token in window] == document[: count * (LENGTH + 1)]


def test_losses_are_those_of_whole_logits(sound: Path) -> None:
    reader = Generator(sound / "model", sound / "tokenizer", dtype=torch.float32)
    window = read_windows(sound / "tokens", LENGTH, 1)[0]
    logits = reader.logits(window[:-1], LENGTH)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
    torch.testing.assert_close(reader.losses(window), expected, rtol=1e-5, atol=1e-5)
