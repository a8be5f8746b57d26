"""Places where a long text may be cut without changing one id of a tokenizer.json's tokenizer.

`tokenizers` needs memory in proportion to the text it is given at once. Two kinds of tokenizer let a text be cut:

- Those that split a text into words by one of the usual expressions (GPT-2, Llama 3, Qwen 2, GPT-4o) before they merge
  anything. No alternative of these matches a visible character and a space after it, and none looks back, so the
  splitting of a text agrees with that of its parts before a space that follows a visible character, and between a line
  break that follows one and a letter.
- BPE over a text whose spaces are marks, without other splitting (Llama 2, published MiniCPM). Where no piece has the
  mark after another character, no merge crosses from a word to the space behind it.

Every other tokenizer gets no cuts: its documents are encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MARK = "▁"
PART_CHARACTERS = 1 << 16

# alternatives of the usual expressions -> which characters one covers alone: letters, digits, spaces, others
_SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ALTERNATIVES = {
    f"(?i:{_SHORT})": "",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": "",
    **dict.fromkeys(_SHORT.split("|"), ""),
    r" ?\p{L}+": "L",
    r"[^\r\n\p{L}\p{N}]?\p{L}+": "L",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:{_SHORT})?": "",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:{_SHORT})?": "L",
    r" ?\p{N}+": "N",
    r"\p{N}": "N",
    r"\p{N}{1,3}": "N",
    r" ?[^\s\p{L}\p{N}]+": "O",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": "O",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*": "O",
    r"\s*[\r\n]+": "",
    r"\s*[\r\n]": "",
    r"\s+(?!\S)": "",
    r"\s+": "S",
}
# letters and other visible characters that Python and every regular expression engine class alike
_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яא-תؠ-يぁ-ゖァ-ヺ一-龥가-힣"
_VISIBLE = _LETTERS + r"!-~、-〃〈-】！-～‘-”"
_CUT = re.compile(rf"(?<=[{_VISIBLE}])(?= )|(?<=[{_VISIBLE}]\n)(?=[{_LETTERS}])")


@dataclass(frozen=True)
class WordCuts:
    """Cuts of a tokenizer that splits a text into words."""

    def parts(self, text: str, size: int) -> Iterator[str]:
        """Parts of about `size` characters, one after another the whole text; more where there is no place to cut."""
        start = 0
        while len(text) - start > size and (cut := _CUT.search(text, start + size)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


@dataclass(frozen=True)
class MarkCuts:
    """Cuts of a tokenizer whose words begin with a mark.

    Attributes:
        skips: leave the space at a cut out, since the mark that the tokenizer puts before a text stands for it.
        symbols: added tokens, which begin a text of their own behind them.
    """

    skips: bool
    symbols: tuple[str, ...]

    def parts(self, text: str, size: int) -> Iterator[str]:
        """Parts of about `size` characters; more where there is no place to cut."""
        start = 0
        while len(text) - start > size:
            cut = text.find(" ", start + size)
            while cut >= 0 and not self._fits(text, cut):
                cut = text.find(" ", cut + 1)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut + self.skips
        yield text[start:]

    def _fits(self, text: str, cut: int) -> bool:
        around = text[cut - 1 : cut], text[cut + 1 : cut + 2]
        return (
            not {"", " ", MARK} & {*around}
            and not text.endswith(self.symbols, 0, cut)
            and not text.startswith(self.symbols, cut + 1)
        )


Cuts = WordCuts | MarkCuts


def cuts(description: dict[str, Any], vocabulary: Iterable[str]) -> Cuts | None:
    """Where texts of a tokenizer may be cut; None where nothing is known that would be exact.

    Args:
        description: content of its tokenizer.json.
        vocabulary: the model's pieces.
    """
    symbols = [token for token in description["added_tokens"] if not token["special"]]
    # one that takes spaces around it, or has one inside, would be cut, too
    if any(token[key] for token in symbols for key in ("lstrip", "rstrip", "single_word")):
        return None
    names = tuple(token["content"] for token in symbols)
    if any(re.search(rf"\s|{MARK}", name) for name in names):
        return None
    normalizers, splitters = steps(description["normalizer"]), steps(description["pre_tokenizer"])
    if all(step["type"] == "NFC" for step in normalizers) and splitters and _splits_into_words(splitters):
        return WordCuts()
    prefix = mark_before_text(description)
    marks = {"Prepend", "Replace"} >= {step["type"] for step in normalizers} and (
        [step["type"] for step in splitters] == ["Metaspace"] or not splitters
    )
    model = description["model"]
    if not marks or prefix is None or model["type"] != "BPE" or model.get("ignore_merges"):
        return None
    pieces = set(vocabulary)
    if MARK not in pieces or any(MARK in piece.lstrip(MARK) for piece in pieces):
        return None
    return MarkCuts(skips=bool(prefix), symbols=names)


def steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a component of tokenizer.json, sequences taken apart."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    members = next(value for value in component.values() if isinstance(value, list))
    return [step for member in members for step in steps(member)]


def mark_before_text(description: dict[str, Any]) -> str | None:
    """What a tokenizer of marks puts before a text: the mark or nothing; None where its spaces are no marks."""
    spaces, before = False, ""
    for step in steps(description["normalizer"]):
        if step["type"] == "Prepend":
            before = step["prepend"]
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == MARK:
            spaces = True
        elif step["type"] == "Replace":
            return None
    for step in steps(description["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            if step["replacement"] != MARK or before:
                return None
            spaces, before = True, "" if step["prepend_scheme"] == "never" else MARK
    return before if spaces and before in ("", MARK) else None


def _splits_into_words(splitters: list[dict[str, Any]]) -> bool:
    """Whether the first step cuts wherever `WordCuts` does, and the others see what is between its cuts alone."""
    first, *others = splitters
    if any(step["type"] == "Metaspace" or step.get("add_prefix_space") for step in splitters):
        return False
    if any(step["type"] not in ("Split", "ByteLevel", "Digits", "Punctuation") for step in others):
        return False
    if first["type"] == "ByteLevel":
        return bool(first["use_regex"])
    return (
        first["type"] == "Split"
        and first["behavior"] == "Isolated"
        and not first["invert"]
        and _is_usual(first["pattern"].get("Regex", ""))
    )


def _is_usual(expression: str) -> bool:
    """Whether an expression is made of the known alternatives and leaves no character out."""
    covered = ""
    while expression:
        known = next((a for a in _ALTERNATIVES if expression == a or expression.startswith(f"{a}|")), None)
        if known is None:
            return False
        covered += _ALTERNATIVES[known]
        expression = expression[len(known) + 1 :]
    return set(covered) >= set("LNOS")
