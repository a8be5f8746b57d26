"""Tokenizer files on their way into an export: checked against each other and against the model, then copied.

Both tokenizer.model and tokenizer.json are shipped: llama.cpp's MiniCPM converter reads only the first, and
transformers 5, given only the first, silently drops the leading word-boundary mark. Whatever comes in, the two must
give the same ids, so a probe is encoded with both before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.convert.format import SpecialTokens
from minicpm_megatron.convert.weight_files import read_json
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes, write_json

SENTENCEPIECE = "tokenizer.model"
FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_COPIED = (SENTENCEPIECE, FAST, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
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
)


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer that was found to be whole.

    Attributes:
        pieces: one more than the largest id it can produce.
        special_tokens: None when only tokenizer.json is there, which does not name their roles.
        has_sentencepiece: whether tokenizer.model is there.
    """

    folder: Path
    pieces: int
    special_tokens: SpecialTokens | None
    has_sentencepiece: bool


def open_tokenizer(folder: Path, *, to_publish: bool) -> TokenizerFolder:
    """Check a tokenizer folder.

    Args:
        to_publish: ask for the completeness that an export needs.
    Raises:
        UserError: neither file is there, tokenizer.json is not and is needed, a file is malformed, or the two give
            different ids.
    """
    fast = _load_fast(folder / FAST) if (folder / FAST).is_file() else None
    slow = _load_sentencepiece(folder / SENTENCEPIECE) if (folder / SENTENCEPIECE).is_file() else None
    fix = "give the folder that tools/train_tokenizer.py wrote"
    if fast is None and slow is None:
        raise UserError(f"neither {SENTENCEPIECE} nor {FAST}", where=str(folder), fix=fix)
    if fast is None and to_publish:
        raise UserError(
            f"no {FAST}, and readers that make one from {SENTENCEPIECE} get other ids", where=str(folder), fix=fix
        )
    pieces = 1 + max(fast.get_vocab(with_added_tokens=True).values(), default=-1) if fast else 0
    if slow is None:
        return TokenizerFolder(folder, pieces, None, has_sentencepiece=False)
    for probe in PROBES:
        if fast and fast.encode(probe, add_special_tokens=False).ids != slow.encode(probe):
            raise UserError(f"{FAST} and {SENTENCEPIECE} give different ids for {probe!r}", where=str(folder))
    tokens = SpecialTokens(slow.bos_id(), slow.eos_id()) if min(slow.bos_id(), slow.eos_id()) >= 0 else None
    return TokenizerFolder(folder, max(pieces, slow.get_piece_size()), tokens, has_sentencepiece=True)


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
    for name in _COPIED:
        if (tokenizer.folder / name).is_file():
            write_bytes(target / name, (tokenizer.folder / name).read_bytes())
    settings = tokenizer.folder / SETTINGS
    content = read_json(settings) if settings.is_file() else _default_settings(tokenizer)
    write_json(target / SETTINGS, {key: value for key, value in content.items() if key != "auto_map"})


def _default_settings(tokenizer: TokenizerFolder) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.special_tokens is not None:
        slow = _load_sentencepiece(tokenizer.folder / SENTENCEPIECE)
        roles = {"bos_token": slow.bos_id(), "eos_token": slow.eos_id(), "unk_token": slow.unk_id()}
        settings |= {role: slow.id_to_piece(token) for role, token in roles.items()}
    return settings


def _load_fast(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"not a tokenizer: {error}", where=str(path)) from None


def _load_sentencepiece(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"not a sentencepiece model: {error}", where=str(path)) from None
