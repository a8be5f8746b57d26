"""Ids are sentencepiece's own: for cut documents, in tokenizer.json and in transformers."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import sentencepiece

from minicpm_megatron.data.tokenizer_files import write_tokenizer_files
from minicpm_megatron.data.tokenizers import tokenizer_sha256
from minicpm_megatron.data.tokenizers.sentencepiece import (
    BOS_ID,
    CHAT_SYMBOLS,
    EOS_ID,
    UNK_ID,
    SentencePieceTokenizer,
)
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sentencepiece_model import PieceType, parse_model
from tests.data.conftest import VOCAB_SIZE, texts

HARD = [
    "",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tx",
    "<用户>hi<AI>yo",
    "<用户>",
    "a<用户>",
    " <用户> b",
    "<用户><AI>",
    "<用户",
    "▁",
    "▁▁a",
    "你好，世界！",
    "한국어🙂👨‍👩‍👧",
    "\u200b\ufeff",
    "\0a\0",
    "12345 6.7e8",
    "def f(x):\n    return x\n        y",
    "é e\u0301",
    "a" * 17,
    "-" * 10 + "=" * 5,
    "ﬁ Ⅳ ｆｕｌｌ",
    "a\r\nb",
    "\x7f\x1b[0m",
    " " * 37 + "x",
    "x" + " " * 64,
    "\u2028\u2029\x85",
    "\U0010ffff",
    "ا ב",
    "<0x0A>",
    "<unk",
]
ALPHABET = [*"ab de\n\t  ▁▁<>用户AI1239=-.,()你好的之者也", "    ", "<用户>", "<AI>", "self", "return", " the", "🙂"]


def fuzz(count: int) -> list[str]:
    source = random.Random(0)
    return HARD + ["".join(source.choices(ALPHABET, k=source.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def reference(tokenizer_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


def test_special_ids_are_the_published_ones(reference: sentencepiece.SentencePieceProcessor) -> None:
    assert [reference.piece_to_id(name) for name in ("<unk>", "<s>", "</s>")] == [UNK_ID, BOS_ID, EOS_ID] == [0, 1, 2]
    for symbol in CHAT_SYMBOLS:
        assert len(reference.encode(f"x{symbol}")) == len(reference.encode("x")) + 1


def test_text_comes_back_byte_for_byte(tokenizer: SentencePieceTokenizer) -> None:
    for text in [*HARD, *texts(40)]:
        if "▁" not in text:  # sentencepiece itself writes its mark as a space
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_documents_have_the_ids_of_the_whole(
    tokenizer: SentencePieceTokenizer, reference: sentencepiece.SentencePieceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenizer.can_cut
    long = [" ".join(texts(40)), "a " * 300, " " * 400, "word  " * 90, "▁ x " * 90, "<用户> <AI> " * 50, "汉" * 500]
    for size in (1, 2, 3, 17, 100):
        monkeypatch.setattr("minicpm_megatron.data.tokenizers.sentencepiece._PART_CHARACTERS", size)
        for text in [*long, *fuzz(300)]:
            assert tokenizer.encode(text) == reference.encode(text), (size, text[:80])
    assert sum(1 for _ in tokenizer._cut(long[0])) > 10  # the cuts really happen


def test_batch_keeps_the_order_of_short_and_long(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ["short", "a long one " * 5, "", "短", "b " * 40]
    expected = [tokenizer.processor.encode(text) for text in batch]
    monkeypatch.setattr("minicpm_megatron.data.tokenizers.sentencepiece._PART_CHARACTERS", 10)
    assert [ids.tolist() for ids in tokenizer.encode_batch(batch)] == expected


def test_tokenizers_library_gives_the_same_ids(
    tokenizer_dir: Path, reference: sentencepiece.SentencePieceProcessor
) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizer_dir / "tokenizer.json"))
    for text in [*fuzz(3000), *texts(100)]:
        assert backend.encode(text, add_special_tokens=False).ids == reference.encode(text), text


@pytest.mark.parametrize("model_type", [None, "llama", "granite"])
def test_stock_transformers_gives_the_same_ids(
    tokenizer: SentencePieceTokenizer,
    reference: sentencepiece.SentencePieceProcessor,
    tmp_path: Path,
    model_type: str | None,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

    write_tokenizer_files(tokenizer, tmp_path, model_max_length=512)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": VOCAB_SIZE}))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in [*fuzz(200), *texts(20)]:
        ids = reference.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids, text
        assert loaded(text)["input_ids"] == [BOS_ID, *ids]
        if "▁" not in text:
            assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded), loaded.model_max_length) == (1, 2, VOCAB_SIZE, 512)
    chat = loaded.apply_chat_template([{"role": "user", "content": " hi "}], tokenize=False)
    assert chat == "<用户>hi<AI>"


def test_published_files_are_those_of_the_training_run(
    tokenizer: SentencePieceTokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    names = write_tokenizer_files(tokenizer, tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256


def test_description_agrees_with_sentencepiece(tokenizer: SentencePieceTokenizer) -> None:
    processor, model = tokenizer.processor, tokenizer.description
    assert [piece.text for piece in model.pieces] == [processor.id_to_piece(i) for i in range(len(processor))]
    assert [piece.score for piece in model.pieces] == [processor.get_score(i) for i in range(len(processor))]
    for index, piece in enumerate(model.pieces):
        assert processor.is_byte(index) == (piece.type is PieceType.BYTE)
        assert processor.is_control(index) == (piece.type is PieceType.CONTROL)
    assert {piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED} == set(CHAT_SYMBOLS)
    assert model.is_bpe and model.identity and model.add_dummy_prefix and not model.remove_extra_whitespaces


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff\xff\xff\xff\xff", b"\x80\x05K\x01."])
def test_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a sentencepiece model"):
        SentencePieceTokenizer(tmp_path)
    with pytest.raises(ValueError):
        parse_model(content)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model: no such tokenizer"):
        SentencePieceTokenizer(tmp_path)


def test_unigram_models_are_encoded_whole_and_not_converted(tmp_path: Path, corpus: Path) -> None:
    prefix = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(400)[250:]),
        model_prefix=str(prefix),
        model_type="unigram",
        vocab_size=500,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = SentencePieceTokenizer(f"{prefix}.model")
    assert not model.can_cut
    with pytest.raises(UserError, match="is not a BPE model"):
        write_tokenizer_files(model, tmp_path)


CONTROL = [
    "Price: <s>100</s> 80",
    *("<s>", "</s>", "<unk>", " <s>", "<s> ", "<s><s>", "</s>\n<s>", "a<unk>b"),
    # between user-defined symbols a name is a word of its own
    *(
        "<用户><s>",
        "<用户><s><AI></s>",
        "<AI><unk>",
        "<用户></s>x",
        "<用户><unk> <s>",
        "<用户><0x0A><AI>",
        "<AI><0xFF>",
    ),
    *("<用户><s", "<用户>s>", "<AI></s><用户>", "<用户>\n<s>\n<AI>"),
]


def test_names_of_control_tokens_in_a_text_are_text(
    tokenizer: SentencePieceTokenizer, tokenizer_dir: Path, reference: sentencepiece.SentencePieceProcessor
) -> None:
    """With what tokenizer_config.json says, and with the switch that `tokenizers` has; without it, not."""
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    backend = Backend.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert backend.encode(CONTROL[0], add_special_tokens=False).ids != reference.encode(CONTROL[0])
    backend.encode_special_tokens = True
    loaded = AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    source = random.Random(1)
    names = ["<s>", "</s>", "<unk>", "<0x0A>", "<0x3C>", "<用户>", "<AI>", " ", "a", "<", "s>", "\n", "1"]
    mixed = ["".join(source.choices(names, k=source.randint(1, 8))) for _ in range(400)]
    for text in [*CONTROL, *mixed]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert backend.encode(text, add_special_tokens=False).ids == ids, text
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids, text
        assert loaded(text)["input_ids"] == [BOS_ID, *ids]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    # the tokens themselves are still there for whoever puts them
    assert loaded.convert_tokens_to_ids(["<s>", "</s>"]) == [BOS_ID, EOS_ID]
    assert loaded.decode([BOS_ID, *reference.encode("a"), EOS_ID], skip_special_tokens=True) == "a"
