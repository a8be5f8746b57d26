"""PREFIX.json: what tokens were made from and with, written beside .bin and .idx as the last of the three.

It ties a corpus to its tokenizer and vocabulary, holds the checksums that a resumed run is checked against, and the
bytes of text that a loss per byte needs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from minicpm_megatron.data.indexed_format import bin_path, idx_path
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.checksum import content_sha256, file_sha256

FORMAT = "minicpm_megatron tokens 1"
CHECKSUM = "checksum"
_REMAKE = "run preprocess_data.py again with --overwrite"

_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class TokenMetadata:
    """Content of PREFIX.json.

    Attributes:
        vocab_size: pieces of the tokenizer.
        max_id: largest id in .bin, -1 for none.
        tokenizer_sha256: of the file that its kind has, tokenizer.model or tokenizer.json.
        bos_id, eod_id: ids put before and after each document, None for none.
        dtype: numpy name of the ids' type.
        documents, tokens: what .bin holds; tokens count <s> and </s>.
        text_bytes: UTF-8 bytes of the documents' text.
        records: records read; documents + all rejected.
        rejected: class -> count.
        bin_bytes, idx_bytes, bin_sha256, idx_sha256: the two files.
        plan: hash of everything that decides the bytes: inputs, options, tokenizer.
    """

    vocab_size: Annotated[int, Field(gt=0)]
    max_id: Annotated[int, Field(ge=-1)]
    tokenizer_sha256: str
    bos_id: int | None
    eod_id: int | None
    dtype: str
    documents: _Count
    tokens: _Count
    text_bytes: _Count
    records: _Count
    rejected: dict[str, _Count]
    bin_bytes: _Count
    idx_bytes: _Count
    bin_sha256: str
    idx_sha256: str
    plan: str

    def write(self, path: Path) -> None:
        """Write it atomically, with a checksum of its own."""
        content = {"format": FORMAT, **asdict(self)}
        write_json(path, content | {CHECKSUM: content_sha256(content)})


_SCHEMA = TypeAdapter(TokenMetadata)


def json_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def read_metadata(prefix: str | Path) -> TokenMetadata | None:
    """PREFIX.json, or None for tokens that another program made.

    Raises:
        UserError: the file is there and is not what we write.
    """
    path = json_path(prefix)
    try:
        value: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("cannot be read as JSON", where=str(path), fix=_REMAKE) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"not of the form {FORMAT!r}", where=str(path), fix=_REMAKE)
    checksum = value.pop(CHECKSUM, None)
    fields = {key: entry for key, entry in value.items() if key != "format"}
    try:
        # as JSON, since strict validation of Python values wants an instance of the class
        metadata = _SCHEMA.validate_json(json.dumps(fields), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {first['msg']}", where=str(path), fix=_REMAKE) from None
    # files of earlier releases have none
    if checksum is not None and checksum != content_sha256(value):
        raise UserError("the checksum is not that of what was written", where=str(path), fix=_REMAKE)
    return metadata


def data_fingerprint(prefix: str | Path) -> str:
    """A short identity of a tokenised corpus, cheap enough for every start; equal means equal bytes.

    With PREFIX.json it is made of the recorded checksums, after a comparison of the files' sizes with the recorded
    ones; without it, of a checksum of .idx and the size of .bin.

    Raises:
        UserError: a file is missing or has another size than recorded.
    """
    metadata = read_metadata(prefix)
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            raise UserError("no such token file", where=str(path), fix="check the prefix or run preprocess_data.py")
    if metadata is None:
        parts = [file_sha256(idx_path(prefix)), str(bin_path(prefix).stat().st_size)]
    else:
        for path, due in ((bin_path(prefix), metadata.bin_bytes), (idx_path(prefix), metadata.idx_bytes)):
            if path.stat().st_size != due:
                raise UserError(
                    f"{path.stat().st_size} bytes where {due} are recorded",
                    where=str(path),
                    fix=_REMAKE,
                )
        parts = [metadata.bin_sha256, metadata.idx_sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def verify(prefix: str | Path) -> TokenMetadata:
    """Read .bin and .idx in full and compare them with the recorded checksums.

    Raises:
        UserError: there is no record, or a file differs from it.
    """
    metadata = read_metadata(prefix)
    if metadata is None:
        raise UserError(
            "there are no checksums to compare with",
            where=str(json_path(prefix)),
            fix="make the tokens with preprocess_data.py",
        )
    data_fingerprint(prefix)
    for path, due in ((bin_path(prefix), metadata.bin_sha256), (idx_path(prefix), metadata.idx_sha256)):
        if file_sha256(path) != due:
            raise UserError(
                "the checksum differs from the recorded one",
                where=str(path),
                fix=_REMAKE,
            )
    return metadata
