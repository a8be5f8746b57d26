"""Small tokenizers in the style of published ones, as folders with tokenizer.json and no tokenizer.model.

Vocabularies are trained here on a few documents; every component around them is as the published files have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
STYLES = ("llama-3", "qwen-2", "minicpm", "gpt-2", "metaspace")
SPECIAL = {
    "llama-3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    "qwen-2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "minicpm": ["<unk>", "<s>", "</s>"],
    "gpt-2": ["<|endoftext|>"],
    "metaspace": ["<unk>", "<s>", "</s>"],
}
# added and not special, so that a text may have them
SYMBOLS = {"qwen-2": ["<tool_call>", "</tool_call>"], "minicpm": ["<用户>", "<AI>"]}
ROLES = {
    "llama-3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "qwen-2": (None, "<|endoftext|>"),
    "minicpm": ("<s>", "</s>"),
    "gpt-2": ("<|endoftext|>", "<|endoftext|>"),
    "metaspace": ("<s>", "</s>"),
}


def _byte_level(style: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if style == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA_3 if style == "llama-3" else QWEN_2), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if style == "qwen-2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.ignore_merges = style == "llama-3"
    return tokenizer


def _marks(style: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    first = [*SPECIAL[style], *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *("▁" * 2**n for n in (1, 2, 3))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    # spaces of an indentation are joined, as in the published vocabularies
    content["model"]["merges"][:0] = [["▁" * n, "▁" * n] for n in (1, 2, 4)]
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(ends)
    if style == "minicpm":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def build(style: str, texts: Iterable[str], folder: Path, vocab_size: int = 700) -> Path:
    """Make the folder with tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    maker = _marks if style in ("minicpm", "metaspace") else _byte_level
    tokenizer = maker(style, texts, vocab_size)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL[style]])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in SYMBOLS.get(style, ())])
    bos, eos = ROLES[style]
    if bos and style != "gpt-2":
        put = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokenizer.token_to_id(bos))])
        level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence([level, put]) if style == "llama-3" else put
    tokenizer.save(str(folder / "tokenizer.json"))
    # published MiniCPM says LlamaTokenizer, of which transformers 5.23 makes another tokenizer than the file says
    kind = "Qwen2Tokenizer" if style == "qwen-2" else "PreTrainedTokenizerFast"
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
