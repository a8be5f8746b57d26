"""Prompts and answers as the tokenizer in a model's folder has them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.text_settings import SpecialTokens
from minicpm_megatron.convert.tokenizer_folder import FAST, SENTENCEPIECE, SETTINGS, SPLIT
from minicpm_megatron.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from minicpm_megatron.data.tokenizers.tokenizer_json import JsonTokenizer
from minicpm_megatron.errors import UserError


class Prompts(Protocol):
    """Turns prompts into ids, and ids into text.

    Attributes:
        pieces: one more than the largest id.
        named: the begin and end tokens that the tokenizer's files name.
    """

    pieces: int
    named: SpecialTokens

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the begin token first."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special ones left out."""


def open_prompts(folder: Path) -> Prompts:
    """By transformers where sentencepiece and transformers share a folder, else with the ids of training.

    A lone tokenizer.json is read by its own library: transformers 5.23 builds another tokenizer than the file says
    where tokenizer_config.json names the class LlamaTokenizer, as published MiniCPM's does.

    Raises:
        UserError: the folder has no tokenizer, or tokenizer.model alone, of which transformers makes other ids.
    """
    fast, slow = ((folder / name).is_file() for name in (FAST, SENTENCEPIECE))
    if fast and slow:
        return _Transformers(folder)
    if slow or not has_tokenizer(folder):
        raise UserError(f"no {FAST}", where=str(folder), fix="give --tokenizer DIR")
    tokenizer = load_tokenizer(folder)
    return _Library(tokenizer) if isinstance(tokenizer, JsonTokenizer) else _Own(tokenizer)


class _Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        with _no_remarks_on_the_config():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        self.pieces = len(self._tokenizer)
        self.named = SpecialTokens(self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class _Own:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.pieces = tokenizer.vocab_size
        bos, eos = (None if index < 0 else index for index in (tokenizer.bos_id, tokenizer.eos_id))
        self.named = SpecialTokens(bos, eos)

    def encode(self, text: str) -> list[int]:
        begin = [] if self.named.bos is None else [self.named.bos]
        return begin + self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


class _Library(_Own):
    """As transformers reads a prompt: with what the file puts around it, and special tokens by their names."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        super().__init__(tokenizer)
        self._backend = tokenizer.backend
        settings = tokenizer.path.parent / SETTINGS
        split = settings.is_file() and read_json(settings).get(SPLIT) is True
        self._backend.encode_special_tokens = split

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text).ids)


@contextlib.contextmanager
def _no_remarks_on_the_config() -> Iterator[None]:
    """Silence what transformers says about the config.json that it reads beside a tokenizer, to choose its class.

    transformers 5.23 has no class for the model type `minicpm`, and remarks on that and on the key rope_scaling. Here
    no model is made of that config.json by transformers.
    """
    log = logging.getLogger("transformers.configuration_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("You are using a model of type")

    log.addFilter(is_wanted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
            yield
    finally:
        log.removeFilter(is_wanted)
