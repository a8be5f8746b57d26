"""Samples against a second, plain implementation that holds everything, and refusal of what does not fit."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.data.dataset import Blend, TokenDataset, open_training_data
from minicpm_megatron.data.indexed_format import open_index, token_dtype, write_index
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.data.metadata import TokenMetadata, data_fingerprint, json_path, verify
from minicpm_megatron.data.sampling import Permutation, batch, key
from minicpm_megatron.data.statistics import blend_entropy, bytes_per_token, token_counts, unigram_entropy
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256

VOCAB_SIZE = 500


def write_tokens(prefix: Path, documents: list[list[int]], *, metadata: bool = True, dtype: str = "<u2") -> Path:
    """Documents as .bin/.idx, with a PREFIX.json as preprocessing leaves it."""
    flat = np.array([token for document in documents for token in document], dtype=dtype)
    Path(f"{prefix}.bin").write_bytes(flat.tobytes())
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    with open(f"{prefix}.idx", "wb") as handle:
        write_index(handle, np.dtype(dtype), len(documents), [lengths[:2], lengths[2:]])
    if metadata:
        bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        TokenMetadata(
            vocab_size=VOCAB_SIZE,
            max_id=max(flat.tolist(), default=-1),
            tokenizer_sha256="a" * 64,
            bos_id=1,
            eod_id=2,
            dtype=flat.dtype.name,
            documents=len(documents),
            tokens=len(flat),
            text_bytes=3 * len(flat),
            records=len(documents),
            rejected={},
            bin_bytes=bin_file.stat().st_size,
            idx_bytes=idx_file.stat().st_size,
            bin_sha256=file_sha256(bin_file),
            idx_sha256=file_sha256(idx_file),
            plan="p",
        ).write(json_path(prefix))
    return prefix


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [source.integers(3, VOCAB_SIZE, size=source.integers(1, 40)).tolist() for _ in range(count)]


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(150)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> Path:
    return write_tokens(tmp_path / "tokens", documents)


def epoch_samples(documents: list[list[int]], length: int, seed: int, epoch: int) -> list[list[int]]:
    """What `TokenDataset` promises, word for word."""
    order = Permutation(len(documents), key(seed, "documents", epoch))
    stream = [token for place in range(len(documents)) for token in documents[order(place)]]
    count = (len(stream) - 1) // length
    places = Permutation(count, key(seed, "samples", epoch))
    return [stream[places(k) * length : places(k) * length + length + 1] for k in range(count)]


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_samples_are_the_promised_ones(prefix: Path, documents: list[list[int]], length: int) -> None:
    dataset = TokenDataset(prefix, length, seed=11)
    expected = [sample for epoch in range(3) for sample in epoch_samples(documents, length, 11, epoch)]
    assert dataset.samples_per_epoch == len(expected) // 3
    step = max(1, len(expected) // 400)
    for sample in range(0, len(expected), step):
        found = dataset[sample]
        assert found.dtype == np.int64
        assert found.tolist() == expected[sample]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_starts_are_where_documents_begin(prefix: Path, documents: list[list[int]], length: int) -> None:
    """Documents are found again by writing each token's document and place in it in the place of the token."""
    numbered = [[number] * len(document) for number, document in enumerate(documents)]
    dataset = TokenDataset(prefix, length, seed=5)
    owners = [sample for epoch in range(2) for sample in epoch_samples(numbered, length, 5, epoch)]
    for number, owner in enumerate(owners):
        starts = dataset.starts(number)
        assert starts.dtype == np.int64 and len(starts) == length
        for place in range(length):
            assert owner[starts[place]] == owner[place]
            assert starts[place] == 0 or owner[starts[place] - 1] != owner[place]
    blend = open_training_data([(str(prefix), 1.0)], length, 5)
    assert blend.starts(3).tolist() == blend.datasets[0].starts(3).tolist()


def test_each_epoch_covers_the_corpus_once_in_another_order(prefix: Path, documents: list[list[int]]) -> None:
    dataset = TokenDataset(prefix, 10, seed=1)
    n = dataset.samples_per_epoch
    first, second = ([dataset[k] for k in range(e * n, (e + 1) * n)] for e in range(2))
    total = sum(map(len, documents))
    for epoch in (first, second):
        seen = np.bincount(np.concatenate([sample[:-1] for sample in epoch]), minlength=VOCAB_SIZE)
        whole = np.bincount(np.concatenate(documents), minlength=VOCAB_SIZE)
        assert (seen <= whole).all()
        assert seen.sum() == n * 10 > total - 11  # all but the tail that fills no sample
    assert [s.tolist() for s in first] != [s.tolist() for s in second]


def test_sample_is_independent_of_what_was_read_before(prefix: Path) -> None:
    straight = TokenDataset(prefix, 16, seed=2)
    wanted = [straight[k].tolist() for k in range(3 * straight.samples_per_epoch)]
    jumping = TokenDataset(prefix, 16, seed=2)
    for k in (len(wanted) - 1, 0, straight.samples_per_epoch, 3, straight.samples_per_epoch - 1, len(wanted) - 1):
        assert jumping[k].tolist() == wanted[k]
    assert TokenDataset(prefix, 16, seed=3)[0].tolist() != wanted[0]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_steps_are_the_same_for_every_layout(prefix: Path, ranks: int, micro: int) -> None:
    """Also where the number of ranks changes in mid-epoch, and across the end of one."""
    dataset = TokenDataset(prefix, 16, seed=2)
    for step in range(dataset.samples_per_epoch // 12 + 2):
        alone = {tuple(dataset[k]) for k in range(step * 12, step * 12 + 12)}
        parts = [batch(step * 12, 12, rank, ranks, micro).ravel() for rank in range(ranks)]
        together = [tuple(dataset[k]) for part in parts for k in part]
        assert set(together) == alone
        assert len(together) == 12


def test_blend_reads_each_source_in_its_own_order(tmp_path: Path) -> None:
    prefixes = [write_tokens(tmp_path / name, random_documents(60, seed)) for seed, name in enumerate("ab")]
    blend = open_training_data([(str(prefixes[0]), 3.0), (str(prefixes[1]), 1.0)], 8, seed=5, vocab_size=VOCAB_SIZE)
    counts = [0, 0]
    for sample in range(400):
        source, index = blend.source(sample)
        assert index == counts[source]
        counts[source] += 1
        expected = TokenDataset(prefixes[source], 8, key(5, "corpus", source))[index] if sample % 50 == 0 else None
        assert expected is None or (blend[sample] == expected).all()
    assert abs(counts[0] - 300) < 3
    with pytest.raises(UserError, match="different lengths"):
        Blend([TokenDataset(prefixes[0], 8, 0), TokenDataset(prefixes[1], 9, 0)], [1, 1], 0)


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's own tools write a sequence a sentence; documents stay whole all the same."""
    documents = random_documents(20)
    prefix = write_tokens(tmp_path / "t", documents, metadata=False)
    cut = [(document[: len(document) // 2], document[len(document) // 2 :]) for document in documents]
    lengths = np.array([len(part) for pair in cut for part in pair], dtype="<i4")
    offsets = np.concatenate(([0], np.cumsum(lengths)[:-1])) * 2
    bounds = np.arange(0, len(lengths) + 1, 2)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(bounds))
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + offsets.astype("<i8").tobytes() + bounds.astype("<i8").tobytes()
    )
    dataset = TokenDataset(prefix, 9, seed=0)
    assert [dataset[k].tolist() for k in range(dataset.samples_per_epoch)] == epoch_samples(documents, 9, 0, 0)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_megatron_reads_what_we_write(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    prefix = write_tokens(tmp_path / "t", documents, dtype=dtype)
    reader = open_indexed_dataset(prefix)
    assert [reader[k].tolist() for k in range(len(reader))] == documents
    assert reader.document_indices.tolist() == list(range(len(documents) + 1))


def test_megatron_reads_in_silence(
    tmp_path: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("RANK", raising=False)  # as in a tool, which no launcher started
    open_indexed_dataset(write_tokens(tmp_path / "t", documents))
    assert [str(each.message) for each in recwarn] == []


def test_we_write_what_megatron_writes(tmp_path: Path, documents: list[list[int]]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for vocab_size in (100, 65_499, 65_500, 122_753):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "m.idx"))
    ours = write_tokens(tmp_path / "o", documents)
    for suffix in ("bin", "idx"):
        assert Path(f"{ours}.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()


def damage(prefix: Path, how: str) -> None:
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    content = bytearray(idx_file.read_bytes())
    if how == "no bin":
        bin_file.unlink()
    elif how == "no idx":
        idx_file.unlink()
    elif how == "short bin":
        bin_file.write_bytes(bin_file.read_bytes()[:-2])
    elif how == "long bin":
        bin_file.write_bytes(bin_file.read_bytes() + b"\0\0")
    elif how == "short idx":
        idx_file.write_bytes(content[:-1])
    elif how == "empty idx":
        idx_file.write_bytes(b"")
    elif how == "garbage idx":
        idx_file.write_bytes(b"\x80\x05garbage" * 100)
    elif how == "type":
        content[17] = 99
        idx_file.write_bytes(content)
    elif how == "huge count":
        content[18:26] = struct.pack("<Q", 2**62)
        idx_file.write_bytes(content)
    elif how == "length":
        content[34:38] = struct.pack("<i", 10**6)
        idx_file.write_bytes(content)
    elif how == "bound":
        content[-8:] = struct.pack("<q", 10**6)
        idx_file.write_bytes(content)


DAMAGES = [
    "no bin",
    "no idx",
    "short bin",
    "long bin",
    "short idx",
    "empty idx",
    "garbage idx",
    "type",
    "huge count",
    "length",
    "bound",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_refused_in_one_line(prefix: Path, how: str) -> None:
    damage(prefix, how)
    with pytest.raises(UserError, match=r"tokens\.(bin|idx)") as caught:
        TokenDataset(prefix, 16, seed=0)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused(prefix: Path, tmp_path: Path, documents: list[list[int]]) -> None:
    total = sum(map(len, documents))
    assert TokenDataset(prefix, total - 1, seed=0).samples_per_epoch == 1
    with pytest.raises(UserError, match="fewer than one sample"):
        TokenDataset(prefix, total, seed=0)
    with pytest.raises(UserError, match=r"set model\.vocab_size=500"):
        TokenDataset(prefix, 16, seed=0, vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(UserError, match="another tokenizer"):
        TokenDataset(prefix, 16, seed=0, tokenizer_sha256="b" * 64)
    TokenDataset(prefix, 16, seed=0, vocab_size=VOCAB_SIZE, tokenizer_sha256="a" * 64)
    with pytest.raises(UserError, match="weight"):
        open_training_data([(str(prefix), 0.0)], 16, seed=0)
    foreign = write_tokens(tmp_path / "foreign", [[5, 9, 499]] * 20, metadata=False)
    TokenDataset(foreign, 16, seed=0, vocab_size=500)
    with pytest.raises(UserError, match="holds id 499"):
        TokenDataset(foreign, 16, seed=0, vocab_size=499)


def test_fingerprint_and_verify(prefix: Path) -> None:
    before = data_fingerprint(prefix)
    assert before == TokenDataset(prefix, 16, seed=0).fingerprint
    verify(prefix)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[7] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.bin: the checksum differs"):
        verify(prefix)
    json_path(prefix).unlink()
    assert data_fingerprint(prefix) != before
    with pytest.raises(UserError, match="no checksums"):
        verify(prefix)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "minicpm_megatron tokens 1"}', b"[" * 100_000])
def test_damaged_metadata(prefix: Path, content: bytes) -> None:
    json_path(prefix).write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.json"):
        TokenDataset(prefix, 16, seed=0)


def test_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minicpm_megatron.data.statistics._BLOCK", 5)
    prefix = write_tokens(tmp_path / "t", [[0, 0, 0, 0], [1, 1], [7], [9]])
    assert token_counts(prefix).tolist() == [4, 2, 0, 0, 0, 0, 0, 1, 0, 1]
    # shares 1/2, 1/4, 1/8, 1/8: 1.75 bits
    assert unigram_entropy(prefix) == pytest.approx(1.75 * np.log(2), rel=1e-12)
    assert bytes_per_token(prefix) == 3.0
    # no id in common: which corpus a token is of costs as much again as the weights are uncertain
    other = write_tokens(tmp_path / "o", [[2, 3, 4, 5] * 3])
    weights = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    mixed = 0.75 * 1.75 * np.log(2) + 0.25 * np.log(4) + weights
    assert blend_entropy([(prefix, 3.0), (other, 1.0)]) == pytest.approx(mixed, rel=1e-12)
    with pytest.raises(UserError, match="holds no tokens"):
        unigram_entropy(write_tokens(tmp_path / "empty", []))
    write_tokens(tmp_path / "negative", [[1, -2]], dtype="<i4")
    with pytest.raises(UserError, match="negative id"):
        unigram_entropy(tmp_path / "negative")


def test_index_of_nothing(tmp_path: Path) -> None:
    index = open_index(write_tokens(tmp_path / "t", []))
    assert (index.tokens, len(index.lengths), index.documents.tolist()) == (0, 0, [0])


def test_data_imports_no_torch() -> None:
    modules = sorted(path.stem for path in Path(sys.modules["minicpm_megatron.data"].__path__[0]).glob("[a-z]*.py"))
    lines = [f"import minicpm_megatron.data.{name}" for name in modules]
    check = (
        "import sys; bad = {'torch', 'megatron', 'transformers', 'deepspeed'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(modules) > 10
