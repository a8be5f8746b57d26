"""Train a sentencepiece BPE tokenizer of MiniCPM's kind and measure how well it compresses each input.

Settings and why: BPE with byte fallback, so that any text has ids and comes back byte for byte; identity
normalisation, because code and Chinese punctuation must survive; a word boundary mark before the text, as in the
published tokenizer (the class it is loaded with is Llama's); single digits; pieces of spaces alone, for indentation.
Documents are given to the trainer with their line breaks, so that indentation is counted as it will be met.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

from minicpm_megatron.data.corpus_files import find_files, segments
from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.data.read_segments import read_segment
from minicpm_megatron.data.records import Document
from minicpm_megatron.data.tokenizer_files import write_tokenizer_files
from minicpm_megatron.data.tokenizers.sentencepiece import (
    BOS_ID,
    CHAT_SYMBOLS,
    EOS_ID,
    MODEL_NAME,
    UNK_ID,
    SentencePieceTokenizer,
)
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import fsync_directory, write_bytes, write_json

REPORT_NAME = "tokenizer_report.json"
BYTE_PIECES = 256
# the running characters that get a piece of their own (sentencepiece's default), in at most this part of the
# vocabulary; the rest is left to byte fallback. sentencepiece refuses to leave out more than 2 %, which a small
# vocabulary for Chinese needs, so they are chosen here
_COVERAGE = 0.9995
_CHARACTER_SHARE = 0.4
# what sentencepiece takes for a boundary that no piece crosses; it has no piece itself
_BOUNDARY = "\t"
_SENTENCE_CHARACTERS = 2000
_MAX_DOCUMENT_BYTES = 64 << 20


@dataclass(frozen=True)
class Compression:
    """How one input came out.

    Attributes:
        input: as given on the command line.
        documents, bytes: what was read of it (UTF-8 bytes of text).
        tokens: its length in tokens, without <s> and </s>.
        rejected: records that held no document.
    """

    input: str
    documents: int
    bytes: int
    tokens: int
    rejected: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token; the paper's tables call it compression ratio (Table 9)."""
        return self.bytes / self.tokens if self.tokens else 0.0


def documents(source: str, *, key: str, rejected: Counter[str] | None = None) -> Iterator[Document]:
    """All documents of one input, a file or a folder; what is rejected is counted by reason."""
    files, unread = find_files([source])
    if rejected is not None:
        rejected.update(outcome.reason for _, outcome in unread)
    for file in files:
        for segment in segments(file):
            for record in read_segment(segment, key=key, max_bytes=_MAX_DOCUMENT_BYTES, progress=lambda _: None):
                if isinstance(record.outcome, Document):
                    yield record.outcome
                elif rejected is not None:
                    rejected[record.outcome.reason] += 1


def train_tokenizer(
    inputs: list[str],
    vocab_size: int,
    output: Path,
    *,
    key: str = "text",
    max_sample_bytes: int = 256 << 20,
    show_progress: bool = True,
) -> list[Compression]:
    """Train on `inputs` and write the tokenizer into the new folder `output`.

    Args:
        inputs: files or folders in any supported format.
        vocab_size: number of pieces, the specials and 256 bytes among them.
        key: member or column that holds the text.
        max_sample_bytes: text that each input contributes at most to training and to the report; every n-th
            document is taken of a larger one.

    Returns:
        The compression of each input.

    Raises:
        UserError: the inputs hold too little text, the size is out of reach, or `output` is in the way.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError("the output exists already", where=str(output), fix="choose another --output or remove it")
    specials = BYTE_PIECES + 3 + len(CHAT_SYMBOLS)
    if vocab_size <= specials:
        raise UserError(
            f"{vocab_size} pieces hold no text: {specials} are bytes and special tokens",
            where="--vocab-size",
            fix="give a larger one",
        )
    for source in inputs:
        find_files([source])
    strides, characters = _survey(inputs, key, max_sample_bytes, show_progress)
    model = _train(inputs, strides, vocab_size, _rare(characters, vocab_size), key)

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        write_bytes(scratch / MODEL_NAME, model)
        tokenizer = SentencePieceTokenizer(scratch)
        write_tokenizer_files(tokenizer, scratch)
        report = [_measure(tokenizer, source, strides[source], key, show_progress) for source in inputs]
        write_json(
            scratch / REPORT_NAME,
            {
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.sha256,
                "inputs": [{**asdict(line), "bytes_per_token": round(line.bytes_per_token, 4)} for line in report],
            },
        )
        scratch.chmod(0o755)
        scratch.replace(output)
        fsync_directory(output.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return report


def _survey(
    inputs: list[str], key: str, max_sample_bytes: int, show_progress: bool
) -> tuple[dict[str, int], Counter[str]]:
    """For each input, of how many documents one is taken; and the characters of all."""
    strides: dict[str, int] = {}
    characters: Counter[str] = Counter()
    for source in inputs:
        total, rejected = 0, Counter[str]()
        for document in progress_bar(
            iterable=documents(source, key=key, rejected=rejected),
            desc=f"reading {source}",
            unit=" documents",
            disable=not show_progress,
        ):
            total += document.size
            characters.update(document.text)
        if not total:
            found = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "nothing"
            raise UserError(f"no text to train on (found {found})", where=source, fix="check --input and --json-key")
        strides[source] = -(-total // max_sample_bytes)
    return strides, characters


def _rare(characters: Counter[str], vocab_size: int) -> dict[int, str]:
    """The characters without a piece of their own, as a table for str.translate."""
    room = int((vocab_size - BYTE_PIECES) * _CHARACTER_SHARE)
    ranked = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    wanted, covered = _COVERAGE * characters.total(), 0
    for kept, (_, count) in enumerate(ranked):
        if kept >= room or covered >= wanted:
            return {ord(character): _BOUNDARY for character, _ in ranked[kept:]}
        covered += count
    return {}


def _train(inputs: list[str], strides: dict[str, int], vocab_size: int, rare: dict[int, str], key: str) -> bytes:
    def sentences() -> Iterator[str]:
        for source in inputs:
            for number, document in enumerate(documents(source, key=key)):
                if number % strides[source] == 0:
                    yield from _sentences(document.text.translate(rare))

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(CHAT_SYMBOLS),
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            character_coverage=1.0,
            max_sentence_length=_SENTENCE_CHARACTERS * 8,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split()).rsplit("] ", 1)[-1]
        raise UserError(
            f"no tokenizer of {vocab_size} pieces can be made: {text}",
            where="--vocab-size",
            fix="give a smaller one or more text",
        ) from error
    return model.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """Parts of a document, cut before a line break where there is one."""
    start = 0
    while len(text) - start > _SENTENCE_CHARACTERS:
        cut = text.rfind("\n", start + 1, start + _SENTENCE_CHARACTERS)
        cut = cut if cut > start else start + _SENTENCE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _measure(tokenizer: SentencePieceTokenizer, source: str, stride: int, key: str, show_progress: bool) -> Compression:
    rejected: Counter[str] = Counter()
    count = size = tokens = 0
    found = documents(source, key=key, rejected=rejected)
    for number, document in enumerate(
        progress_bar(iterable=found, desc=f"measuring {source}", unit=" documents", disable=not show_progress)
    ):
        if number % stride == 0:
            count, size, tokens = count + 1, size + document.size, tokens + len(tokenizer.encode(document.text))
    return Compression(source, count, size, tokens, rejected.total())


def compression_table(report: list[Compression]) -> str:
    """The report as text: one line an input."""
    width = max(len("input"), *(len(line.input) for line in report))
    head = f"{'input':<{width}}  {'documents':>10}  {'bytes':>13}  {'tokens':>13}  {'bytes/token':>11}  {'rejected':>8}"
    rows = [
        f"{line.input:<{width}}  {line.documents:>10,}  {line.bytes:>13,}  {line.tokens:>13,}"
        f"  {line.bytes_per_token:>11.3f}  {line.rejected:>8,}"
        for line in report
    ]
    return "\n".join([head, *rows])
