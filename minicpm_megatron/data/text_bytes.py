"""UTF-8 bytes of the text that tokens stand for, to express a loss per byte."""

from __future__ import annotations

import numpy as np

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.metadata import TokenMetadata
from minicpm_megatron.data.tokenizer import Tokenizer
from minicpm_megatron.storage.sentencepiece_model import Piece, PieceType

_MARK = "▁"


class TextBytes:
    """Counts the bytes of text behind the tokens of a sample.

    A piece stands for its own UTF-8 bytes, with a space for each word boundary mark; a byte piece for one byte; <s>,
    </s> and <unk> for none. The mark that sentencepiece puts before a document stands for nothing, too. Over a whole
    document that is exactly the document's bytes, unless the tokenizer changes text before it splits it, or the text
    has the mark itself as a character.

    Args:
        tokenizer: the one that made the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.description.pieces
        self._bytes = np.array([_bytes_of(piece) for piece in pieces], dtype=np.int64)
        added = tokenizer.description.add_dummy_prefix
        self._marked = np.array([added and piece.text.startswith(_MARK) for piece in pieces])

    def of_labels(self, dataset: TokenDataset, metadata: TokenMetadata, sample: int) -> int:
        """Bytes of the tokens that the model predicts in a sample: all but its first.

        Args:
            metadata: of the dataset; says whether a document begins with <s>.
            sample: k >= 0.
        """
        ids = dataset[sample]
        first = 0 if metadata.bos_id is None else 1
        begins = dataset.document_places(sample, first)
        begins = begins[begins > 0]
        return int(self._bytes[ids[1:]].sum() - np.count_nonzero(self._marked[ids[begins]]))


def _bytes_of(piece: Piece) -> int:
    if piece.type is PieceType.BYTE:
        return 1
    if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN):
        return 0
    return len(piece.text.replace(_MARK, " ").encode())
