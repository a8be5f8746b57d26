"""Questions whose answer stands at a known place of a long text, in the manner of InfiniteBench (arXiv 2402.13718).

passkey, number_string and kv are its Retrieve.PassKey, Retrieve.Number and Retrieve.KV with the text of any corpus for
padding; qa is a synthetic long QA (section 7.2 of arXiv 2404.06395 names such data and no more): which word is missing
from one sentence of the text. Everything is a function of a seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from minicpm_megatron.data.haystack import Haystack, held_out
from minicpm_megatron.errors import UserError

_ADJUSTMENTS = 8
_QA_TRIES = 20_000


@dataclass(frozen=True)
class Needle:
    """What one sample hides and asks.

    Attributes:
        instruction, closing: stand before and after the text.
        text: what is hidden.
        question: ends where the answer begins.
        distractors: what it is hidden among, without end.
        may_pad: whether words may stand beside the distractors; otherwise they follow `closing`.
    """

    instruction: str
    text: str
    closing: str
    question: str
    answer: str
    distractors: Iterator[str]
    may_pad: bool = True


@dataclass(frozen=True)
class Sample:
    """One question. The prompt is context, a space, question; a space and the answer follow.

    Attributes:
        id: task, length, depth and number.
        length: tokens of <s>, prompt and answer together.
        depth: percent of the distractors before what is hidden.
    """

    id: str
    task: str
    length: int
    depth: float
    context: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"{self.context} {self.question}"

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return f"{self.prompt} {self.answer}"


_HIDDEN = "There is important information hidden in the text below. Find it and memorize it."


def _passkey(random: Random, haystack: Haystack, length: int, training: bool) -> Needle:
    key = f"{random.randrange(100_000):05d}"
    return Needle(
        _HIDDEN,
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        "",
        "What is the pass key? The pass key is",
        key,
        haystack.stream(random, training=training),
    )


def _number_string(random: Random, haystack: Haystack, length: int, training: bool) -> Needle:
    # runs of digits, which are harder to count than to copy
    digits = "".join(str(random.randrange(10)) * random.randint(1, 3) for _ in range(10))[:10]
    return Needle(
        _HIDDEN,
        f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits.",
        "",
        "What is the sequence of digits? The sequence of digits is",
        digits,
        haystack.stream(random, training=training),
    )


def _kv(random: Random, haystack: Haystack, length: int, training: bool) -> Needle:
    def pairs() -> Iterator[str]:
        while True:
            other, value = (f"{random.getrandbits(32):08x}" for _ in range(2))
            if other != key:
                yield f'"{other}": "{value}",'

    key, answer = (f"{random.getrandbits(32):08x}" for _ in range(2))
    return Needle(
        "Extract the value that belongs to a key in the JSON object below. {",
        f'"{key}": "{answer}",',
        '"end": "end" }',
        f'Key: "{key}". The value that belongs to the key is',
        answer,
        pairs(),
        may_pad=False,
    )


def _qa(random: Random, haystack: Haystack, length: int, training: bool) -> Needle:
    for _ in range(_QA_TRIES):
        document = haystack.documents[random.randrange(len(haystack.documents))]
        sentence = document[random.randrange(len(document))]
        # it stands in the question, too, and the rest is to be mostly text
        short = haystack.tokens(sentence) <= length // 6
        if short and held_out(sentence) != training and (hole := _hole(random, sentence)):
            start, end = hole
            return Needle(
                "Read the text below and answer the question after it.",
                sentence,
                "",
                f'Which word is missing from this sentence of the text: "{sentence[:start]}____{sentence[end:]}"'
                " The missing word is",
                sentence[start:end],
                haystack.stream(random, without=(sentence,), training=training),
            )
    raise UserError(
        f"too few sentences that one can ask about in {length} tokens",
        where="--corpus",
        fix="give more running text or greater --lengths",
    )


def _hole(random: Random, sentence: str) -> tuple[int, int] | None:
    """Where a word stands that the rest of the sentence does not hold; in Chinese or Japanese two characters."""
    if " " in sentence:
        places = [match.span() for match in re.finditer(r"[^\W\d_]{4,}", sentence)]
        if len(sentence.split()) < 8:
            return None
    else:
        places = [match.span(1) for match in re.finditer(r"(?=([\u3040-\u30ff\u3400-\u9fff]{2}))", sentence)]
    alone = [place for place in places if sentence.count(sentence[slice(*place)]) == 1]
    return random.choice(alone) if alone else None


TASKS: dict[str, Callable[[Random, Haystack, int, bool], Needle]] = {
    "passkey": _passkey,
    "number_string": _number_string,
    "kv": _kv,
    "qa": _qa,
}


def build_sample(
    task: str, haystack: Haystack, *, length: int, depth: float, number: int, seed: int, training: bool = False
) -> Sample:
    """The sample of this number, whatever others there are.

    Args:
        task: one of `TASKS`.
        length: tokens of <s>, prompt and answer, met exactly.
        depth: percent, 0 to 100.
        training: for training text: other draws than those of a set, and never about a sentence of one.

    Raises:
        UserError: the question alone is longer, or the tokenizer does not let the length be met.
    """
    random = Random(f"{seed}/{task}/{length}/{depth:g}/{number}/{'training' if training else 'set'}")
    needle = TASKS[task](random, haystack, length, training)
    fixed = (needle.instruction, needle.text, needle.closing, needle.question, needle.answer)
    first = haystack.tokenizer.bos_id >= 0
    room = length - first - sum(map(haystack.tokens, fixed))
    if room < 0:
        raise UserError(
            f"{length} tokens are too few: {task} takes {length - room} without any text around it",
            where="--lengths",
            fix="give longer ones",
        )
    units: list[str] = []
    for unit in needle.distractors:
        if haystack.tokens(unit) > room:
            break
        units.append(unit)
        room -= haystack.tokens(unit)
    cut = _place(haystack, units, depth)
    begun = unit if needle.may_pad else next(haystack.stream(random, training=training))
    for _ in range(_ADJUSTMENTS):
        padding = _padding(haystack, random, begun, room)
        context = _context(needle, units, cut, padding)
        sample = Sample(
            f"{task}-{length}-{depth:g}-{number}", task, length, depth, context, needle.question, needle.answer
        )
        off = length - first - len(haystack.tokenizer.encode(sample.text))
        if off == 0:
            return sample
        room += off
        if room < 0:
            room += haystack.tokens(units.pop())
            cut = _place(haystack, units, depth)
    raise UserError(
        f"{length} tokens cannot be met exactly with this tokenizer",
        where=str(haystack.tokenizer.path),
        fix="give one of minicpm train-tokenizer",
    )


def _place(haystack: Haystack, units: list[str], depth: float) -> int:
    """Units before what is hidden, so that they hold `depth` percent of the tokens as nearly as can be."""
    wanted = sum(map(haystack.tokens, units)) * depth / 100
    before, best, nearest = 0, 0, wanted
    for index, unit in enumerate(units, start=1):
        before += haystack.tokens(unit)
        if abs(before - wanted) <= nearest:
            best, nearest = index, abs(before - wanted)
    return best


def _padding(haystack: Haystack, random: Random, begun: str, room: int) -> str:
    """Words of exactly `room` tokens: the beginning of a sentence, then words of one token."""
    beginning = haystack.beginning(begun, room)
    missing = room - haystack.tokens(beginning)
    return (
        " ".join(filter(None, (beginning, *random.choices(haystack.fill_words, k=missing)))) if missing else beginning
    )


def _context(needle: Needle, units: list[str], cut: int, padding: str) -> str:
    before, after = units[:cut], units[cut:]
    if not needle.may_pad:
        parts = (needle.instruction, *before, needle.text, *after, needle.closing, padding)
    elif after or not before:
        parts = (needle.instruction, *before, needle.text, *after, padding, needle.closing)
    else:
        parts = (needle.instruction, *before, padding, needle.text, needle.closing)
    return " ".join(filter(None, parts))
