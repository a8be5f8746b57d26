"""A small real corpus, English, Chinese and code, from what every machine with Python and our requirements has.

Code is the standard library; English is the prose in the documentation of installed packages and of Python itself
(examples, signatures and parameter tables are left out); Chinese ships with the project (sample_texts/README.md).
Sources are read as text, nothing is imported or run. Documents are taken in the order of their hashes, so the same
packages give the same files, and a smaller corpus is a subset of a larger one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import cast

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import atomic_file, fsync_directory, write_bytes, write_json

LANGUAGES = ("en", "zh", "code")
VALIDATION_MODULUS = 40
"""One document in this many, chosen by its hash, is held out."""

DOCSTRING_PACKAGES = (
    "sympy",
    "numpy",
    "networkx",
    "torch",
    "transformers",
    "pydantic",
    "huggingface_hub",
    "tokenizers",
    "mpmath",
    "pyarrow",
    "rich",
    "setuptools",
    "pygments",
    "deepspeed",
)
_CHINESE = Path(__file__).parent / "sample_texts" / "zh_classics.jsonl"
_CHINESE_LICENCE = "public domain (transcription: MIT, chinese-poetry 2.0.1)"
_PYTHON_LICENCE = "PSF-2.0"
# what is left for English and code when the Chinese, which is small, is all in
_ENGLISH_SHARE = 0.5
_NOT_CODE = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "turtledemo",
    "msilib",
}
_CODE_BYTES = (600, 120_000)
_PROSE_CHARACTERS = 200


@dataclass(frozen=True)
class Text:
    """One document and where it is from.

    Attributes:
        text: the document.
        source: package or collection.
        licence: of that source.
    """

    text: str
    source: str
    licence: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, which decides its place and whether it is held out."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of a documentation text that are running English, re-joined to one line each."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        paragraph = " ".join(lines)
        words = paragraph.split()
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if (
            len(words) >= 10
            and letters >= 0.88 * len(paragraph)
            and paragraph[0].isupper()
            and paragraph[-1] in ".:!?"
            and not re.search(
                r">>>|\\[a-z]+|[|{}<>=]|^\s*[-*+#] |--|\w : |^(Args|Parameters|Returns|Raises):|:param|https?:|\.\. ",
                paragraph,
            )
            and "".join(words).isascii()
        ):
            found.append(paragraph.replace("``", "`"))
    return found


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's strings
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _PROSE_CHARACTERS:
                yield text


def _sources(folder: Path, excluded: set[str]) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        if excluded.isdisjoint(path.relative_to(folder).parts):
            try:
                yield path, path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _licence(distribution: metadata.Distribution) -> str:
    fields = cast(Message, distribution.metadata)
    stated = fields.get("License-Expression") or next(
        (line.rsplit(" :: ", 1)[-1] for line in fields.get_all("Classifier") or () if line.startswith("License ::")), ""
    )
    short = (fields.get("License") or "").strip().splitlines()
    return stated or (short[0][:60] if short else "see the package")


def english() -> Iterator[Text]:
    """Prose of Python's documentation topics, of package descriptions and of docstrings; no paragraph twice."""
    seen: set[str] = set()

    def new(paragraphs: Iterable[str]) -> str:
        fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
        seen.update(fresh)
        return "\n\n".join(fresh)

    standard_library = Path(sysconfig.get_path("stdlib"))
    topics_file = standard_library / "pydoc_data" / "topics.py"
    if topics_file.is_file():
        tree = ast.parse(topics_file.read_text(encoding="utf-8"))
        topics = next(
            (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)),
            None,
        )
        for topic in ast.literal_eval(topics).values() if topics else ():
            yield Text(new(prose_paragraphs(topic)), "python documentation", _PYTHON_LICENCE)
    for distribution in sorted(metadata.distributions(), key=lambda found: found.name or ""):
        description = cast(Message, distribution.metadata).get_payload()
        if isinstance(description, str):
            name = f"{distribution.name} {distribution.version}"
            yield Text(new(prose_paragraphs(description)), name, _licence(distribution))
    for package in DOCSTRING_PACKAGES:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        folder = Path(str(distribution.locate_file(package)))
        name, licence = f"{distribution.name} {distribution.version}", _licence(distribution)
        for _, source in _sources(folder, {"tests", "test", "_vendor", "models", "__pycache__"}):
            for docstring in _docstrings(source):
                yield Text(new(prose_paragraphs(docstring)), name, licence)


def chinese() -> Iterator[Text]:
    """The classics that ship with the project."""
    for line in _CHINESE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield Text(record["text"], record["source"], _CHINESE_LICENCE)


def code() -> Iterator[Text]:
    """Modules of the standard library, whole files, without tests and tables."""
    name = f"python {sysconfig.get_python_version()} standard library"
    for _, source in _sources(Path(sysconfig.get_path("stdlib")), _NOT_CODE):
        digits = sum(map(str.isdigit, source))
        if _CODE_BYTES[0] <= len(source) <= _CODE_BYTES[1] and digits < 0.08 * len(source):
            yield Text(source.expandtabs(4), name, _PYTHON_LICENCE)


def _select(texts: Iterable[Text], budget: int) -> list[Text]:
    unique = {text.digest: text for text in texts if len(text.text) >= _PROSE_CHARACTERS or not text.text.isascii()}
    chosen, used = [], 0
    for digest in sorted(unique):
        size = len(unique[digest].text.encode())
        if used + size <= budget:
            chosen.append(unique[digest])
            used += size
    return chosen


def build_sample_corpus(output: Path, size_mb: float) -> dict[str, dict[str, int]]:
    """Write {en,zh,code}.jsonl, {en,zh,code}.valid.jsonl, README.md and manifest.json into the new folder `output`.

    Args:
        output: appears whole or not at all.
        size_mb: megabytes (1e6 bytes) of text at most; less where the machine holds less.

    Returns:
        For each file name without ".jsonl": its documents and bytes of text.

    Raises:
        UserError: `output` is in the way or the size makes no sense.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError("the output exists already", where=str(output), fix="choose another --output or remove it")
    if not 1 <= size_mb <= 1000:
        raise UserError(f"{size_mb:g} MB is out of range", where="--size-mb", fix="give 1 to 1000")
    total = int(size_mb * 1e6)
    selected = {"zh": _select(chinese(), total // 3)}
    rest = total - sum(len(text.text.encode()) for text in selected["zh"])
    selected["en"] = _select(english(), int(rest * _ENGLISH_SHARE))
    rest -= sum(len(text.text.encode()) for text in selected["en"])
    selected["code"] = _select(code(), rest)

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        counts: dict[str, dict[str, int]] = {}
        for language in LANGUAGES:
            held_out = [text for text in selected[language] if int(text.digest[:8], 16) % VALIDATION_MODULUS == 0]
            held_out = held_out or selected[language][:1]
            training = [text for text in selected[language] if text not in held_out]
            for name, texts in ((language, training), (f"{language}.valid", held_out)):
                counts[name] = _write(scratch / f"{name}.jsonl", texts)
        sources = _sources_table(selected)
        write_json(scratch / "manifest.json", {"files": counts, "sources": sources})
        write_bytes(scratch / "README.md", _readme(counts, sources).encode())
        scratch.chmod(0o755)
        scratch.replace(output)
        fsync_directory(output.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return counts


def _write(path: Path, texts: list[Text]) -> dict[str, int]:
    with atomic_file(path) as handle:
        for text in texts:
            record = {"text": text.text, "source": text.source}
            handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return {"documents": len(texts), "bytes": sum(len(text.text.encode()) for text in texts)}


def _sources_table(selected: dict[str, list[Text]]) -> list[dict[str, str | int]]:
    rows: dict[tuple[str, str, str], list[int]] = {}
    for language, texts in selected.items():
        for text in texts:
            row = rows.setdefault((language, text.source, text.licence), [0, 0])
            row[0] += 1
            row[1] += len(text.text.encode())
    return [
        {"language": language, "source": source, "licence": licence, "documents": documents, "bytes": size}
        for (language, source, licence), (documents, size) in sorted(rows.items())
    ]


def _readme(counts: dict[str, dict[str, int]], sources: list[dict[str, str | int]]) -> str:
    lines = [
        "# Sample corpus",
        "",
        "Built by minicpm build-sample-corpus from what this machine has installed.",
        'One `{"text", "source"}` a line; `.valid` is held out by the hash of the document.',
        "",
        "| file | documents | bytes of text |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name}.jsonl | {row['documents']:,} | {row['bytes']:,} |" for name, row in counts.items()]
    lines += ["", "| language | source | licence | documents | bytes of text |", "| --- | --- | --- | ---: | ---: |"]
    lines += [
        f"| {row['language']} | {row['source']} | {row['licence']} | {row['documents']:,} | {row['bytes']:,} |"
        for row in sources
    ]
    return "\n".join(lines) + "\n"
