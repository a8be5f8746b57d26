"""tokenizer.json as its own library reads it: ids, long documents, names of special tokens, bytes, and damage."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from minicpm_megatron.data import tokenizer_cuts
from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.haystack import Haystack
from minicpm_megatron.data.retrieval import build_sample
from minicpm_megatron.data.text_bytes import TextBytes
from minicpm_megatron.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_sha256
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.data.tokenizers.tokenizer_json import JsonTokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256
from tests.data.conftest import texts, write_jsonl
from tests.data.json_tokenizers import ROLES, SPECIAL, STYLES, SYMBOLS, build
from tests.data.preprocess_helpers import REPOSITORY, run
from tests.data.test_tokenizer import HARD
from tests.hostile import EDITS, EXAMPLES, Changed, Edit, check_line, damaged
from tests.plugins import install_plugin

EVERY_STYLE = pytest.mark.parametrize("style", STYLES)
PUBLISHED = pytest.mark.parametrize("style", ["llama-3", "qwen-2", "minicpm"])
NAMES = sorted({name for names in (*SPECIAL.values(), *SYMBOLS.values()) for name in names} | {"<0x0A>", "<|x|>"})
# beside the hard texts of sentencepiece: what regular expressions, NFC and added tokens trip over
MORE = [
    "it's I'LL they'Re 'sx x's",
    "a \n\n  b\n \nc\t\n",
    "1234567 12 x1y2",
    "e\u0301 \u1100\u1161 \u212b \u0344",
    "שלום עולם \u202bab\u202c",
    "日本語。\n次の行\n\nかな",
    "a\u00a0b\u3000c\u2028d\u2003 e",
    "word" * 400,
    " " * 300 + "\n" + " " * 300,
    "Price: <s>100</s>",
    *(f"a{name}b {name} {name}{name}" for name in NAMES),
    *NAMES,
]
# spaces, line breaks and letters often, so that there are places to cut
FUZZ = st.lists(
    st.sampled_from(["a", "b", " ", "  ", "\n", "\r\n", "漢", "。", "1", "'s", "é", "e\u0301", "▁", "-", *NAMES])
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
    max_size=30,
).map("".join)
Styles = dict[str, tuple[Path, JsonTokenizer]]


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Styles:
    """Each style's folder, and its tokenizer."""
    folder, sample = tmp_path_factory.mktemp("styles"), texts(60)
    folders = {style: build(style, sample, folder / style) for style in STYLES}
    return {style: (path, JsonTokenizer(path)) for style, path in folders.items()}


def library(folder: Path) -> Callable[[str], list[int]]:
    """Ids by `tokenizers` itself, names of special tokens as text."""
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@EVERY_STYLE
def test_ids_are_the_librarys_own(style: str, styles: Styles) -> None:
    folder, tokenizer = styles[style]
    expected = library(folder)
    for text in [*HARD, *MORE, *texts(20)]:
        assert tokenizer.encode(text) == expected(text), text
    batch = ["short", "", "短"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(batch)] == [expected(text) for text in batch]
    assert all(ids.dtype == np.int32 for ids in tokenizer.encode_batch(batch))


@PUBLISHED
def test_ids_are_those_of_transformers(style: str, styles: Styles) -> None:
    """With the switch that lets names of special tokens be text; without it on texts that have none."""
    from transformers import AutoTokenizer

    folder, tokenizer = styles[style]
    plain = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    split = AutoTokenizer.from_pretrained(folder, local_files_only=True, split_special_tokens=True)
    for text in [*HARD, *MORE, *texts(10)]:
        ids = tokenizer.encode(text)
        if not any(name in text for name in SPECIAL[style]):
            assert plain.encode(text, add_special_tokens=False) == ids, text
        if not any(name in text for name in SYMBOLS.get(style, ())):
            assert split.encode(text, add_special_tokens=False) == ids, text
    bos, eos = (-1 if token is None else token for token in (plain.bos_token_id, plain.eos_token_id))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (bos, eos, len(plain))


@EVERY_STYLE
def test_names_of_special_tokens_in_a_text_are_text(style: str, styles: Styles) -> None:
    _, tokenizer = styles[style]
    special = set(tokenizer.backend.token_to_id(name) for name in SPECIAL[style])
    for name in SPECIAL[style]:
        for text in (name, f"a{name}b", f"{name} {name}"):
            ids = tokenizer.encode(text)
            assert not special & set(ids) and tokenizer.decode(ids) == text
    for name in SYMBOLS.get(style, ()):
        assert tokenizer.backend.token_to_id(name) in tokenizer.encode(f"a{name}b")


@EVERY_STYLE
def test_long_documents_have_the_ids_of_the_whole(style: str, styles: Styles, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokenizer = styles[style]
    expected = library(folder)

    @EXAMPLES
    @given(text=FUZZ, size=st.sampled_from([1, 2, 3, 17]))
    def check(text: str, size: int) -> None:
        monkeypatch.setattr(tokenizer_cuts, "PART_CHARACTERS", size)
        assert tokenizer.encode(text) == expected(text)

    check()
    long = "\n".join(texts(20))
    assert tokenizer.cuts is not None
    assert len(list(tokenizer.cuts.parts(long, 200))) > 10, "the cuts really happen"
    for size in (1, 200):
        monkeypatch.setattr(tokenizer_cuts, "PART_CHARACTERS", size)
        for text in (long, *HARD, *MORE):
            assert tokenizer.encode(text) == expected(text), text[:80]


@PUBLISHED
def test_a_long_document_without_a_place_to_cut(style: str, styles: Styles) -> None:
    """A word of 200 KB: the library encodes it whole."""
    folder, tokenizer = styles[style]
    text = "a" * 200_000
    assert tokenizer.encode(text) == library(folder)(text)


@pytest.mark.parametrize(
    "change",
    [
        # an expression that nobody has looked at
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+ \p{L}+|.|\s"),
        # one that leaves out digits
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"content": "a b", "id": 703, "special": False}),
    ],
)
def test_unknown_ways_to_split_get_no_cuts(change: Callable[[Any], None], styles: Styles, tmp_path: Path) -> None:
    content = json.loads((styles["llama-3"][0] / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = JsonTokenizer(tmp_path)
    assert tokenizer.cuts is None
    long = "some words and 12 more, " * 4000
    assert tokenizer.encode(long) == library(tmp_path)(long)


def test_a_piece_with_a_space_inside_leaves_no_cuts(styles: Styles, tmp_path: Path) -> None:
    content = json.loads((styles["minicpm"][0] / "tokenizer.json").read_text())
    content["model"]["vocab"]["a▁b"] = len(content["model"]["vocab"]) + 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert JsonTokenizer(tmp_path).cuts is None


@EVERY_STYLE
def test_text_comes_back(style: str, styles: Styles) -> None:
    """All of it, but for what the tokenizer itself changes: NFC, marks, spaces at the beginning and behind symbols."""
    _, tokenizer = styles[style]

    @EXAMPLES
    @given(text=FUZZ)
    def check(text: str) -> None:
        expected = unicodedata.normalize("NFC", text) if style == "qwen-2" else text
        if tokenizer_cuts.mark_before_text(json.loads(tokenizer.content)) is not None:
            expected = re.sub("<用户>|<AI>|▁", "", text).lstrip(" ")
            text = expected
        assert tokenizer.decode(tokenizer.encode(text)) == expected

    check()


@pytest.mark.parametrize("style", ["llama-3", "gpt-2", "minicpm", "metaspace"])
def test_tokens_have_the_bytes_of_their_text(style: str, styles: Styles, tmp_path: Path) -> None:
    """Through .bin and .idx: the samples of an epoch have all bytes of the documents but those of its first token."""
    folder, tokenizer = styles[style]
    documents = [*(text[:200].strip() for text in texts(10)), "x", "naïve café 𓀀 end", "a  b\n\tc"]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    metadata = run([corpus], folder, tmp_path / "tokens")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert (metadata.vocab_size, metadata.bos_id, metadata.eod_id) == (tokenizer.vocab_size, bos, eos)
    assert metadata.tokenizer_sha256 == tokenizer.sha256 == file_sha256(folder / "tokenizer.json")
    dataset = TokenDataset(tmp_path / "tokens", 1, seed=0)
    counter = TextBytes(tokenizer)
    counted = sum(counter.of_labels(dataset, metadata, sample) for sample in range(dataset.samples_per_epoch))
    assert counted == metadata.text_bytes == sum(len(text.encode()) for text in documents)


def test_no_begin_token_is_said_with_the_way_out(styles: Styles, tmp_path: Path) -> None:
    folder, tokenizer = styles["qwen-2"]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["a document"])
    with pytest.raises(UserError, match="the tokenizer has no <s>; give --no-prepend-bos"):
        run([corpus], folder, tmp_path / "tokens")
    metadata = run([corpus], folder, tmp_path / "tokens", prepend_bos=False)
    assert (metadata.bos_id, metadata.eod_id) == (None, tokenizer.eos_id)


def test_the_kind_is_that_of_the_folder(styles: Styles, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder, _ = styles["llama-3"]
    assert isinstance(load_tokenizer(folder), JsonTokenizer)
    # a folder of tools/train_tokenizer.py has both files
    assert isinstance(load_tokenizer(tokenizer_dir), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tokenizer_dir / "tokenizer.json"), JsonTokenizer)
    assert tokenizer_sha256(tokenizer_dir / "tokenizer.json") == file_sha256(tokenizer_dir / "tokenizer.json")
    cached = tmp_path / "snapshot"  # a hub's cache has links to files that are called by their hash
    cached.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / f"blob-{name}".replace(".json", ""))
        (cached / name).symlink_to(tmp_path / f"blob-{name}".replace(".json", ""))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["a document"])
    assert run([corpus], cached, tmp_path / "tokens", workers=2).bos_id == load_tokenizer(folder).bos_id


def test_settings_of_one_application_change_nothing(styles: Styles, tmp_path: Path) -> None:
    folder, tokenizer = styles["llama-3"]
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    text = texts(4)[0]
    assert JsonTokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_a_text_that_names_a_special_token_cannot_be_one(tmp_path: Path) -> None:
    """Where a word is looked up whole, whatever the switch."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "<unk>": 2}, "unk_token": "<unk>"}
    token = {"id": 1, "content": "</s>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content = {"added_tokens": [token], "model": model, "decoder": {"type": "Fuse"}, "version": "1.0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="'</s>' in a text is read as the special token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer"),
        (b"[]", "not a tokenizer"),
        (b"\xff\xfe", "not a tokenizer"),
        (b"[" * 200_000, "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no pieces|not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "for 1 pieces"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "not a tokenizer"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "gives no text back"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}', "not a tok|no text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_tokenizer(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    check_line(caught, tmp_path / "tokenizer.json")


def test_a_file_beyond_all_reason_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)  # holes: no disk is taken
    with pytest.raises(UserError, match="larger than 256 MiB") as caught:
        load_tokenizer(tmp_path)
    check_line(caught, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("style", ["qwen-2", "minicpm"])
def test_any_damage(style: str, file: str, styles: Styles, tmp_path: Path) -> None:
    folder = shutil.copytree(styles[style][0], tmp_path / style)

    @EXAMPLES
    @given(edit=EDITS)
    def check(edit: Edit) -> None:
        with Changed(folder / file) as path:
            path.write_bytes(damaged(path.read_bytes(), edit))
            try:
                tokenizer: Tokenizer = load_tokenizer(folder)
                assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
                assert tokenizer.bos_id < tokenizer.vocab_size and tokenizer.eos_id < tokenizer.vocab_size
                tokenizer.decode(tokenizer.encode("a text"))
            except UserError as error:
                check_line(error, folder)

    check()


VALUES = st.none() | st.booleans() | st.sampled_from([0, -1, 2**40, "", "▁", "x", [], {}, [[]], {"type": "NFC"}])


@pytest.mark.parametrize("style", ["llama-3", "minicpm"])
def test_any_value_of_any_key(style: str, styles: Styles, tmp_path: Path) -> None:
    folder = shutil.copytree(styles[style][0], tmp_path / style)
    sound = json.loads((folder / "tokenizer.json").read_text())
    keys = [(key,) for key in sound] + [
        (key, inner)
        for key, value in sound.items()
        if isinstance(value, dict)
        for inner in value
        if inner not in ("vocab", "merges")
    ]

    @EXAMPLES
    @given(place=st.sampled_from(keys), value=VALUES)
    def check(place: tuple[str, ...], value: Any) -> None:
        content = json.loads(json.dumps(sound))
        inner = content if len(place) == 1 else content[place[0]]
        inner[place[-1]] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))
        try:
            tokenizer = load_tokenizer(folder)
            assert tokenizer.encode("a text")
            assert tokenizer.bos_id and tokenizer.token_bytes.sum()
        except UserError as error:
            check_line(error, folder)

    check()


def test_roles_of_another_file_or_none(styles: Styles, tmp_path: Path) -> None:
    folder = shutil.copytree(styles["llama-3"][0], tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    assert (load_tokenizer(folder).bos_id, load_tokenizer(folder).eos_id) == (-1, -1)
    bos, eos = ROLES["llama-3"]
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": bos}, "eos_token": eos}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|not there|>"}))
    with pytest.raises(UserError, match="eos_token '<|not there|>' is no token of tokenizer.json"):
        assert load_tokenizer(folder).eos_id


@pytest.mark.parametrize("style", ["llama-3", "qwen-2"])
def test_retrieval_samples_have_exact_lengths(style: str, styles: Styles) -> None:
    _, tokenizer = styles[style]
    haystack = Haystack([(REPOSITORY / "README.md").read_text(encoding="utf-8")], tokenizer)
    for number in range(3):
        found = build_sample("passkey", haystack, length=256, depth=50.0, number=number, seed=0)
        assert (tokenizer.bos_id >= 0) + len(tokenizer.encode(found.text)) == 256


def test_a_package_cannot_take_over_a_folder_of_ours(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (REPOSITORY / "examples/my_plugin/minicpm_my_plugin/byte_tokenizer.py").read_text(encoding="utf-8")
    for package, file in (("takes_a_file", "tokenizer.model"), ("has_its_own", "its-own.json")):
        module = source.replace('"bytes.json"', repr(file))
        entry = f"{package.replace('_', '-')} = {package}:ByteTokenizer"
        install_plugin(tmp_path, monkeypatch, package, module, {"minicpm_megatron.tokenizers": entry})
    broken = {"minicpm_megatron.tokenizers": "broken = broken_kind:KIND"}
    install_plugin(tmp_path, monkeypatch, "broken_kind", "KIND = 3", broken)
    assert isinstance(load_tokenizer(tokenizer_dir), SentencePieceTokenizer)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        UserError, match=r"tokenizer\.model: no such tokenizer.*a tokenizer must be a subclass"
    ) as caught:
        load_tokenizer(empty)
    assert "plugin broken_kind cannot provide" in str(caught.value) and "\n" not in str(caught.value)
    (empty / "its-own.json").write_text('{"begin": "<s>", "end": "</s>"}')
    assert load_tokenizer(empty).encode("é") == [*"é".encode()]
    assert load_tokenizer(empty / "its-own.json").vocab_size == 258
