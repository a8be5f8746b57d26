"""A sentencepiece BPE model as the files that Hugging Face programs read, with identical ids.

Four things differ between the two by nature and are reconciled here:

- sentencepiece merges by the score of the result, `tokenizers` by a list of pairs: every pair of pieces whose
  concatenation is a piece becomes a pair, ordered by that piece's score.
- sentencepiece puts a word boundary mark before the text as a whole. transformers puts it itself when it is given
  tokenizer.model alone, at other places or not at all, so the normaliser in tokenizer.json does it.
- A user-defined symbol (<用户>) is matched inside the text by sentencepiece, without a new mark behind it. As an
  "added token" it would begin a new text; here a pre-tokeniser isolates it and it is looked up whole.
- The name of a control token (<s>) in a text is text to sentencepiece, and the token itself to `tokenizers`.
  tokenizer_config.json tells transformers otherwise (split_special_tokens). tokenizer.json has no place for it: a
  program that uses `tokenizers` alone sets `encode_special_tokens` of its Tokenizer. Between two user-defined symbols
  such a name would be looked up whole all the same, so a second pre-tokeniser cuts it where sentencepiece does.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from minicpm_megatron.data.tokenizers.sentencepiece import MODEL_NAME, SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.sentencepiece_model import ModelDescription, PieceType

_MARK = "▁"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}{% endfor %}"
)
"""The published chat form: <用户>question<AI>answer."""


def write_tokenizer_files(
    tokenizer: SentencePieceTokenizer, directory: Path, *, model_max_length: int | None = None
) -> list[str]:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json into `directory`.

    Args:
        tokenizer: a BPE model with byte fallback.
        directory: an existing folder; each file appears whole or not at all.
        model_max_length: longest sequence in tokens that the model takes, for programs that cut by it.

    Returns:
        Names of the files.

    Raises:
        UserError: the model is not of the kind that `tokenizer.json` can stand for.
    """
    specials = _special_names(tokenizer)
    files = {
        MODEL_NAME: tokenizer.path.read_bytes(),
        "tokenizer.json": _json(tokenizer_json(tokenizer)),
        "tokenizer_config.json": _json(_config(specials, model_max_length)),
        "special_tokens_map.json": _json({f"{role}_token": name for role, name in specials.items()}),
    }
    for name, content in files.items():
        write_bytes(directory / name, content)
    return list(files)


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json for a sentencepiece BPE model.

    Raises:
        UserError: the model has no byte fallback, no leading mark, or pieces that merges do not lead to.
    """
    model, where = tokenizer.description, str(tokenizer.path)
    _check_convertible(model, where)
    pieces = [piece.text for piece in model.pieces]
    normal = {p.text: (index, p.score) for index, p in enumerate(model.pieces) if p.type is PieceType.NORMAL}
    symbols = {p.text for p in model.pieces if p.type is PieceType.USER_DEFINED}
    control = [i for i, p in enumerate(model.pieces) if p.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": pieces[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in control
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": _MARK},
            ],
        },
        "pre_tokenizer": _pre_tokenizer(tokenizer, symbols),
        "post_processor": _post_processor(pieces[tokenizer.bos_id], tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in _merges(normal)],
        },
    }
    _check_reachable(document, normal, where)
    return document


def _check_convertible(model: ModelDescription, where: str) -> None:
    faults = {
        "is not a BPE model": not model.is_bpe,
        "has no byte fallback": all(piece.type is not PieceType.BYTE for piece in model.pieces),
        "changes text before it splits it": not model.identity or model.remove_extra_whitespaces,
        "puts no mark before a text": not model.add_dummy_prefix,
        "has one piece twice": len({piece.text for piece in model.pieces}) != len(model.pieces),
        # a mark inside would be written as a space by the decoder, and matched there by neither library
        "has a user-defined symbol with a space": any(
            piece.type is PieceType.USER_DEFINED and (_MARK in piece.text or " " in piece.text)
            for piece in model.pieces
        ),
    }
    for fault, found in faults.items():
        if found:
            raise UserError(f"the tokenizer {fault}", where=where, fix="train one with minicpm train-tokenizer")


def _merges(normal: dict[str, tuple[int, float]]) -> list[tuple[str, str]]:
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, (index, score) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                # sentencepiece takes the leftmost of equal results; in a run of one character the longer left part
                # is the one that stands there
                ranked.append((-score, index, -cut, (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _check_reachable(document: dict[str, Any], normal: dict[str, tuple[int, float]], where: str) -> None:
    """`ignore_merges` looks a whole word up first: exact only if merges lead to every piece anyway."""
    from tokenizers import Tokenizer as Backend

    bare = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    model = {**document["model"], "ignore_merges": False}
    backend = Backend.from_str(json.dumps({**document, **bare, "model": model, "added_tokens": []}))
    encoded = backend.encode_batch(list(normal), add_special_tokens=False)
    for (piece, (index, _)), encoding in zip(normal.items(), encoded, strict=True):
        if encoding.ids != [index]:
            raise UserError(f"no sequence of merges leads to the piece {piece!r}", where=where, fix="train a BPE model")


def _pre_tokenizer(tokenizer: SentencePieceTokenizer, symbols: set[str]) -> dict[str, Any] | None:
    if not symbols:
        return None
    longest_first = sorted(symbols, key=lambda name: (-len(name), name))
    # what is left between two symbols is looked up whole, names of control tokens and of bytes, too
    heads: dict[str, list[str]] = {}
    symbol = longest_first[0]
    before, processor = len(tokenizer.processor.encode(symbol)), tokenizer.processor
    for piece in tokenizer.description.pieces:
        if piece.type not in (PieceType.NORMAL, PieceType.USER_DEFINED):
            first = processor.encode(symbol + piece.text)[before]
            # a character that is no piece stands as its bytes
            head = piece.text[0] if processor.is_byte(first) else processor.id_to_piece(first)
            heads.setdefault(head, []).append(piece.text.removeprefix(head))
    cuts = (rf"\A{re.escape(head)}(?=(?:{'|'.join(map(re.escape, rests))})\z)" for head, rests in sorted(heads.items()))
    patterns = ("|".join(map(re.escape, longest_first)), "|".join(cuts))
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in patterns
        ],
    }


def _post_processor(bos: str, bos_id: int) -> dict[str, Any]:
    first, second = {"id": "A", "type_id": 0}, {"id": "B", "type_id": 1}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": first}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": first},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": second},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _special_names(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.processor.unk_id()}
    missing = [role for role, index in ids.items() if index < 0]
    if missing:
        raise UserError(f"the tokenizer has no {missing[0]} token", where=str(tokenizer.path), fix="train another one")
    return {role: tokenizer.processor.id_to_piece(index) for role, index in ids.items()}


def _config(specials: dict[str, str], model_max_length: int | None) -> dict[str, Any]:
    return {
        # the class that takes tokenizer.json as it is; LlamaTokenizer would put its own mark
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": name for role, name in specials.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        # the names of control tokens in a text are text, as they were in training
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **({"model_max_length": model_max_length} if model_max_length else {}),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
