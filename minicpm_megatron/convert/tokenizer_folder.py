"""Tokenizer files on their way into an export: checked against each other and against the model, then copied.

Both tokenizer.model and tokenizer.json are shipped: llama.cpp's MiniCPM converter reads only the first, and
transformers 5, given only the first, silently drops the leading word-boundary mark. Whatever comes in, the two must
give the same ids, so a probe is encoded with both before anything is written.

A tokenizer of a kind that another package has added leaves with its own files, and with the tokenizer.json that it
can be written as.

The name of a control token in a text is text to sentencepiece, with which documents are tokenised for training. To
transformers it is the token itself, unless tokenizer_config.json says split_special_tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.text_settings import SpecialTokens
from minicpm_megatron.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes, write_json
from minicpm_megatron.storage.sentencepiece_model import parse_model

SENTENCEPIECE = "tokenizer.model"
FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_COPIED = (SENTENCEPIECE, FAST, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SPLIT = "split_special_tokens"
# names of control tokens in a text, at its beginning and end, after a chat symbol, and beside a space
CONTROL_PROBES = ("Price: <s>100</s> 80", "<s>", "</s> <unk>", "<用户><s><AI></s>", "<unk>0x0A <0x0A>")
# leading and doubled spaces, scripts, digits, bytes outside any vocabulary, line ends: where tokenizers part ways
PROBES = (
    "The quick brown fox.",
    " leading space",
    "two  spaces   three",
    "微笑着对他说：你好，世界！",
    "mixed 中文 and English 混排",
    "def f(x):\n\treturn x ** 2  # 1234567890\n",
    "naïve café — “quotes” …",
    "🙂🧮 \U00020bb7 ٣٤٥",
    "a\n\n\nb \n",
    "x",
    *CONTROL_PROBES,
)


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer that was found to be whole.

    Attributes:
        pieces: one more than the largest id it can produce.
        special_tokens: None where no file names their roles.
        has_sentencepiece: whether tokenizer.model is there.
        read_as_tokens: names that a text may contain and that transformers would read as tokens, in the settings that
            are exported; not so sentencepiece.
        differ_on: texts with names of control tokens that the two read differently whatever the settings.
        other: of a kind that another package has added, None for the two above.
    """

    folder: Path
    pieces: int
    special_tokens: SpecialTokens | None
    has_sentencepiece: bool
    read_as_tokens: tuple[str, ...] = ()
    differ_on: tuple[str, ...] = ()
    other: Tokenizer | None = None

    def notes(self) -> list[str]:
        """Things worth knowing that are no errors, one line each."""
        found = []
        if self.read_as_tokens:
            found.append(
                f"{FAST} reads {', '.join(self.read_as_tokens[:4])} in a text as tokens, {SENTENCEPIECE}, with which"
                f" texts are tokenised for training, as characters: give transformers' tokenizer {SPLIT}=True, or"
                f" write it into {SETTINGS}"
            )
        if self.differ_on:
            found.append(
                f"{FAST} and {SENTENCEPIECE} give different ids for {self.differ_on[0]!r}, and no setting changes it"
            )
        if self.other is not None and self.other.as_tokenizer_json() is None:
            found.append(f"no {FAST}: no other program reads {self.other.file}")
        elif not self.has_sentencepiece:
            found.append("no tokenizer.model: llama.cpp's MiniCPM converter needs it")
        return found


def open_tokenizer(folder: Path, *, to_publish: bool) -> TokenizerFolder:
    """Check a tokenizer folder.

    Args:
        to_publish: ask for the completeness that an export needs.
    Raises:
        UserError: no tokenizer is there, tokenizer.json is not and is needed, a file is malformed, or two that are
            there give different ids.
    """
    fast = _load_fast((folder / FAST).read_bytes(), folder / FAST) if (folder / FAST).is_file() else None
    slow = _load_sentencepiece(folder / SENTENCEPIECE) if (folder / SENTENCEPIECE).is_file() else None
    fix = "give the folder that minicpm train-tokenizer wrote"
    if fast is None and slow is None:
        if not has_tokenizer(folder):
            raise UserError(f"neither {SENTENCEPIECE} nor {FAST}", where=str(folder), fix=fix)
        return _open_other(load_tokenizer(folder), folder)
    if fast is None and to_publish:
        raise UserError(
            f"no {FAST}, and readers that make one from {SENTENCEPIECE} get other ids", where=str(folder), fix=fix
        )
    pieces = 1 + max(fast.get_vocab(with_added_tokens=True).values(), default=-1) if fast else 0
    settings = _settings(folder)
    if slow is None:
        return TokenizerFolder(folder, pieces, _named_tokens(fast, settings), has_sentencepiece=False)
    tokens = SpecialTokens(slow.bos_id(), slow.eos_id()) if min(slow.bos_id(), slow.eos_id()) >= 0 else None
    compared = _compare(folder, fast, slow, settings) if fast else ()
    return TokenizerFolder(folder, max(pieces, slow.get_piece_size()), tokens, True, *compared)


def _open_other(tokenizer: Tokenizer, folder: Path) -> TokenizerFolder:
    """A tokenizer of another package.

    Raises:
        UserError: the tokenizer.json that it says it is has other ids.
    """
    content = tokenizer.as_tokenizer_json()
    if content is not None:
        fast = _load_fast(json.dumps(content), tokenizer.path)
        fast.encode_special_tokens = True
        for probe in PROBES:
            if fast.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
                raise UserError(f"its {FAST} gives different ids for {probe!r}", where=str(tokenizer.path))
    bos, eos = (None if index < 0 else index for index in (tokenizer.bos_id, tokenizer.eos_id))
    tokens = None if eos is None else SpecialTokens(bos, eos)
    return TokenizerFolder(folder, tokenizer.vocab_size, tokens, has_sentencepiece=False, other=tokenizer)


def _compare(
    folder: Path, fast: Any, slow: Any, settings: dict[str, Any] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`read_as_tokens` and `differ_on` of a `TokenizerFolder`.

    Raises:
        UserError: they differ on a text without names of control tokens.
    """

    def equal(text: str, split: bool) -> bool:
        fast.encode_special_tokens = split
        return bool(fast.encode(text, add_special_tokens=False).ids == slow.encode(text))

    # settings that are missing are written, with the switch
    switched = settings is None or settings.get(SPLIT) is True
    for probe in PROBES:
        if probe not in CONTROL_PROBES and not equal(probe, switched):
            raise UserError(f"{FAST} and {SENTENCEPIECE} give different ids for {probe!r}", where=str(folder))
    names = [token.content for token in fast.get_added_tokens_decoder().values() if token.special]
    texts = {f"Price: {name}100 {name}": name for name in names}
    differ_on = tuple(text for text in (*texts, *CONTROL_PROBES) if not equal(text, True))
    as_tokens = (name for text, name in texts.items() if text not in differ_on and not equal(text, switched))
    return tuple(as_tokens), differ_on


def _named_tokens(fast: Any, settings: dict[str, Any] | None) -> SpecialTokens | None:
    """The tokens that tokenizer_config.json names."""
    named = [(settings or {}).get(f"{role}_token") for role in ("bos", "eos", "pad")]
    contents = [name.get("content") if isinstance(name, dict) else name for name in named]
    ids = [fast.token_to_id(name) if isinstance(name, str) else None for name in contents]
    return SpecialTokens(*ids) if ids[1] is not None else None


def check_vocabulary(tokenizer: TokenizerFolder, vocab_size: int) -> str | None:
    """Compare with the model's embedding rows; a note when rows are left over.

    Raises:
        UserError: the tokenizer produces ids that the model has no row for.
    """
    if tokenizer.pieces > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.pieces} pieces, the model's vocabulary {vocab_size}",
            where=str(tokenizer.folder),
            fix="give the tokenizer that the model was trained with",
        )
    if tokenizer.pieces < vocab_size:
        return f"{vocab_size - tokenizer.pieces} rows of the vocabulary have no piece in the tokenizer"
    return None


def copy_tokenizer(tokenizer: TokenizerFolder, target: Path) -> None:
    """Write the tokenizer's files into `target`.

    A reference to code (auto_map) in the settings is left behind with the code; settings that are missing are
    written so that every reader takes tokenizer.json as it stands instead of rebuilding it.
    """
    other = tokenizer.other
    for name in (*_COPIED, *((other.file, *other.companions) if other else ())):
        if (tokenizer.folder / name).is_file():
            write_bytes(target / name, (tokenizer.folder / name).read_bytes())
    if other is not None:
        fast = other.as_tokenizer_json()
        if fast is None:
            return
        write_json(target / FAST, fast)
    content = _settings(tokenizer.folder)
    content = _default_settings(tokenizer) if content is None else content
    write_json(target / SETTINGS, {key: value for key, value in content.items() if key != "auto_map"})


def _settings(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json, None where there is none."""
    return read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None


def _default_settings(tokenizer: TokenizerFolder) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.other is not None:
        named = _load_fast(json.dumps(tokenizer.other.as_tokenizer_json()), tokenizer.other.path)
        ids = {"bos_token": tokenizer.other.bos_id, "eos_token": tokenizer.other.eos_id}
        settings |= {role: named.id_to_token(index) for role, index in ids.items() if index >= 0} | {SPLIT: True}
    elif tokenizer.special_tokens is not None:
        slow = _load_sentencepiece(tokenizer.folder / SENTENCEPIECE)
        roles = {"bos_token": slow.bos_id(), "eos_token": slow.eos_id(), "unk_token": slow.unk_id()}
        settings |= {role: slow.id_to_piece(token) for role, token in roles.items()} | {SPLIT: True}
    return settings


def _load_fast(content: str | bytes, path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(content if isinstance(content, str) else content.decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not a tokenizer: {error}", where=str(path)) from None


def _load_sentencepiece(path: Path) -> Any:
    import sentencepiece

    try:
        content = path.read_bytes()
        parse_model(content)  # first: sentencepiece takes an empty file for a model and dies on the first text
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"not a sentencepiece model: {error}", where=str(path)) from None
