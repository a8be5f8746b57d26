"""The text that something is hidden in: sentences of a corpus with the tokens that each takes."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from random import Random

from minicpm_megatron.data.tokenizer_training import documents
from minicpm_megatron.data.tokenizers import Tokenizer
from minicpm_megatron.errors import UserError

# after the stop: Latin needs a space, Chinese has none
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_SENTENCE_CHARACTERS = (12, 400)
_FILL_WORDS = 64
HELD_OUT = 4
"""One sentence in this many, chosen by its hash, is asked about in sets and never shown in training text."""


def sentences(text: str) -> list[str]:
    """Sentences with single spaces, in order; what is too short or too long to be one is left out.

    >>> sentences("It began in the morning.  It ended\\nlater that very day. No.")
    ['It began in the morning.', 'later that very day.']
    """
    shortest, longest = _SENTENCE_CHARACTERS
    parts = (" ".join(part.split()) for part in _SENTENCE_ENDS.split(text))
    return [part for part in parts if shortest <= len(part) <= longest]


def held_out(sentence: str) -> bool:
    """Whether the sentence is kept for sets."""
    return hashlib.sha256(sentence.encode()).digest()[0] % HELD_OUT == 0


class Haystack:
    """Sentences of a corpus, document by document.

    Args:
        texts: documents.
        tokenizer: counts the tokens.

    Raises:
        UserError: there are not even two sentences that are not held out.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.documents = [found for found in map(sentences, texts) if found]
        # fewer would let `stream` look for one for ever
        if len({each for document in self.documents for each in document if not held_out(each)}) < 2:
            raise UserError("hardly a sentence in the corpus", where="--corpus", fix="give running text")
        self._counts: dict[str, int] = {}
        # where the tokenizer begins a text as it begins a word (sentencepiece), a word alone has the same tokens
        alone, after_another = tokenizer.encode("a"), tokenizer.encode("a a")
        self._space = "" if after_another == alone * 2 else " "

    @classmethod
    def read(cls, inputs: Sequence[str], tokenizer: Tokenizer, *, key: str, max_bytes: int) -> Haystack:
        """The first `max_bytes` of text of files or folders in any format that minicpm preprocess reads.

        Raises:
            UserError: no such input, or no text in it.
        """
        texts, size = [], 0
        for source in inputs:
            for document in documents(source, key=key):
                texts.append(document.text)
                size += document.size
                if size >= max_bytes:
                    return cls(texts, tokenizer)
        return cls(texts, tokenizer)

    @cached_property
    def sha256(self) -> str:
        """Of all sentences."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update("\n".join((*document, "")).encode())
        return digest.hexdigest()

    def tokens(self, text: str) -> int:
        """Tokens that `text` adds to a text that it follows after a space."""
        if text not in self._counts:
            self._counts[text] = len(self.tokenizer.encode(self._space + text)) if text else 0
        return self._counts[text]

    def stream(self, random: Random, *, without: Collection[str] = (), training: bool = False) -> Iterator[str]:
        """Sentences without end: a random document from a random place on, then another one.

        Args:
            without: sentences to leave out.
            training: leave out what is `held_out`, too.
        """
        while True:
            document = self.documents[random.randrange(len(self.documents))]
            start = random.randrange(len(document))
            for sentence in (*document[start:], *document[:start]):
                if sentence not in without and not (training and held_out(sentence)):
                    yield sentence

    @cached_property
    def fill_words(self) -> list[str]:
        """Frequent words of one token each, to fill the last places with."""
        words = Counter(word for document in self.documents for sentence in document for word in sentence.split())
        found = (word for word, _ in words.most_common() if word.isalpha() and self.tokens(word) == 1)
        chosen = [word for word, _ in zip(found, range(_FILL_WORDS), strict=False)]
        if not chosen:  # a language without spaces
            pieces = (self.tokenizer.decode([index]) for index in range(self.tokenizer.vocab_size))
            chosen = [piece for piece in pieces if piece.isalpha() and self.tokens(piece) == 1][:_FILL_WORDS]
        if not chosen:
            raise UserError(
                "no word of one token, so lengths cannot be exact",
                where=str(self.tokenizer.path),
                fix="give the tokenizer of a trained model",
            )
        return chosen

    def beginning(self, sentence: str, room: int) -> str:
        """The longest beginning of `sentence` that takes at most `room` tokens, cut at a space where it has any."""
        cuts = [match.start() for match in re.finditer(" ", sentence)] or list(range(1, len(sentence)))
        low, high = 0, len(cuts)
        while low < high:  # the number of cuts that fit
            middle = (low + high + 1) // 2
            if self.tokens(sentence[: cuts[middle - 1]]) <= room:
                low = middle
            else:
                high = middle - 1
        return sentence[: cuts[low - 1]] if low else ""
