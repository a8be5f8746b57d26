"""UTF-8 bytes of the text that tokens stand for, to express a loss per byte."""

from __future__ import annotations

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.metadata import TokenMetadata
from minicpm_megatron.data.tokenizers import Tokenizer


class TextBytes:
    """Counts the bytes of text behind the tokens of a sample, as the tokenizer's kind knows them.

    Args:
        tokenizer: the one that made the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._added = tokenizer.token_bytes - tokenizer.first_token_bytes

    def of_labels(self, dataset: TokenDataset, metadata: TokenMetadata, sample: int) -> int:
        """Bytes of the tokens that the model predicts in a sample: all but its first.

        Args:
            metadata: of the dataset; says whether a document begins with the begin token.
            sample: k >= 0.
        """
        ids = dataset[sample]
        first = 0 if metadata.bos_id is None else 1
        begins = dataset.document_places(sample, first)
        begins = begins[begins > 0]
        return int(self._bytes[ids[1:]].sum() - self._added[ids[begins]].sum())
