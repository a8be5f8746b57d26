"""Retrieval sets: exact lengths, the right depth, answers that stand where they should and nowhere else."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minicpm_megatron.data import haystack as haystack_module
from minicpm_megatron.data.haystack import Haystack, held_out
from minicpm_megatron.data.preprocess import preprocess
from minicpm_megatron.data.retrieval import TASKS, Sample, build_sample
from minicpm_megatron.data.retrieval_set import PLAN, SET, Plan, build_set, open_set, read_samples, write_training_text
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from tests.cli.commands import tree
from tests.data.conftest import texts

EVERY_TASK = pytest.mark.parametrize("task", TASKS)
# what surrounds the text takes 200 tokens of this small vocabulary
LENGTHS, DEPTHS = (400, 1023), (0.0, 12.5, 50.0, 100.0)


@pytest.fixture(scope="module", params=["mixed", "Chinese"])
def haystack(request: pytest.FixtureRequest, tokenizer: SentencePieceTokenizer) -> Haystack:
    documents = texts()
    return Haystack(documents if request.param == "mixed" else documents[: len(documents) // 2], tokenizer)


def sample(haystack: Haystack, task: str, **changes: object) -> Sample:
    options = {"length": 400, "depth": 50.0, "number": 0, "seed": 0} | changes
    return build_sample(task, haystack, **options)  # type: ignore[arg-type]


def test_the_examples_in_the_docstrings() -> None:
    done = doctest.testmod(haystack_module)
    assert done.attempted and not done.failed


@EVERY_TASK
def test_lengths_are_exact_for_both_tokenizers(task: str, haystack: Haystack, tokenizer_dir: Path) -> None:
    fast = AutoTokenizer.from_pretrained(tokenizer_dir)
    for length in LENGTHS:
        for depth in DEPTHS:
            for number in range(4):
                found = sample(haystack, task, length=length, depth=depth, number=number)
                whole, prompt = fast(found.text)["input_ids"], fast(found.prompt)["input_ids"]
                assert len(whole) == length == 1 + len(haystack.tokenizer.encode(found.text))
                assert whole[: len(prompt)] == prompt and whole[0] == 1


@EVERY_TASK
def test_the_same_numbers_give_the_same_sample_and_others_another(task: str, haystack: Haystack) -> None:
    first = sample(haystack, task)
    assert sample(haystack, task) == first
    others = [sample(haystack, task, **change) for change in ({"number": 1}, {"seed": 1}, {"training": True})]
    assert len({first.text, *(other.text for other in others)}) == 4


@EVERY_TASK
@pytest.mark.parametrize("depth", DEPTHS)
def test_what_is_hidden_stands_at_its_depth(task: str, depth: float, haystack: Haystack) -> None:
    found = sample(haystack, task, length=1023, depth=depth)
    if task == "qa":
        start, end = found.question.split('"')[1].split("____")
        hidden = f"{start}{found.answer}{end}"
    else:
        hidden = {
            "passkey": f"The pass key is {found.answer}. Remember it. {found.answer} is the pass key.",
            "number_string": f"The sequence of digits is {found.answer}. Remember it.",
            "kv": f'{found.question.split()[1].rstrip(".")}: "{found.answer}",',
        }[task]
    assert found.context.count(hidden) == 1
    before, after = (haystack.tokens(part.strip()) for part in found.context.split(hidden))
    # sentences are whole, and the instruction and the last words count on one side
    assert abs(before / (before + after) - depth / 100) < 0.12
    # a word may stand in other sentences, too
    assert task == "qa" or found.context.count(found.answer) == (1 if task == "kv" else 2)


def test_a_set_asks_about_held_out_sentences_and_training_text_never_shows_one(haystack: Haystack) -> None:
    def asked(training: bool) -> set[str]:
        found = (sample(haystack, "qa", number=number, training=training) for number in range(40))
        quoted = ((each.question[each.question.index('"') + 1 : each.question.rindex('"')], each) for each in found)
        return {text.replace("____", each.answer) for text, each in quoted}

    assert all(held_out(sentence) for sentence in asked(False))
    assert not any(held_out(sentence) for sentence in asked(True))
    sentences = {sentence for document in haystack.documents for sentence in document}
    kept = {sentence for sentence in sentences if held_out(sentence)}
    assert 0.15 < len(kept) / len(sentences) < 0.35
    rest = "\n".join(sentences - kept)
    kept = {sentence for sentence in kept if len(sentence) > 30 and sentence not in rest}  # documents here overlap
    for number in range(10):
        text = sample(haystack, "passkey", length=1023, number=number, training=True).context
        assert not [sentence for sentence in kept if sentence in text]


@EVERY_TASK
def test_too_few_tokens_are_refused(task: str, haystack: Haystack) -> None:
    message = "too few sentences .* in 20 tokens" if task == "qa" else f"--lengths: 20 tokens are too few: {task} takes"
    with pytest.raises(UserError, match=message):
        sample(haystack, task, length=20)


@pytest.mark.parametrize("texts", [[], [""], ["no"], ["One sentence and no other one."] * 5])
def test_a_corpus_without_sentences_is_refused(texts: list[str], tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match="hardly a sentence"):
        Haystack(texts, tokenizer)


PLAN_OF_TESTS = Plan("passkey", (200, 300), (0.0, 100.0), 3, seed=7)


@pytest.fixture(scope="module")
def mixed(tokenizer: SentencePieceTokenizer) -> Haystack:
    return Haystack(texts(), tokenizer)


def test_an_interrupted_build_goes_on_to_the_same_bytes(
    mixed: Haystack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_set(PLAN_OF_TESTS, mixed, tmp_path / "whole", show_progress=False)
    calls = 0

    def stop(*arguments: object, **options: object) -> Sample:
        nonlocal calls
        calls += 1
        if calls == 9:  # one to try, and then within the third of four files
            raise KeyboardInterrupt
        return build_sample(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("minicpm_megatron.data.retrieval_set.build_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            build_set(PLAN_OF_TESTS, mixed, tmp_path / "cut", show_progress=False)
    assert len(list((tmp_path / "cut").glob("length-*.jsonl"))) == 2
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.json")) == [PLAN]
    with pytest.raises(UserError, match=r"no finished set; run minicpm build-retrieval-set again"):
        open_set(tmp_path / "cut")
    assert build_set(PLAN_OF_TESTS, mixed, tmp_path / "cut", show_progress=False) == 2
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    cells = open_set(tmp_path / "cut").cells
    assert list(cells) == [(200, 0.0), (200, 100.0), (300, 0.0), (300, 100.0)]
    assert [len(read_samples(path)) for path in cells.values()] == [3] * 4


def test_another_set_in_the_same_folder_is_refused(mixed: Haystack, tmp_path: Path) -> None:
    build_set(PLAN_OF_TESTS, mixed, tmp_path / "set", show_progress=False)
    before = tree(tmp_path / "set")
    with pytest.raises(UserError, match="holds another set"):
        build_set(Plan("passkey", (200, 300), (0.0, 100.0), 4, seed=7), mixed, tmp_path / "set", show_progress=False)
    assert tree(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"jsonl:2: not a JSON value"),
        ("[]", r"jsonl:2: not an object of id, task"),
        ('{"id": "x"}', r"jsonl:2: not an object of id, task"),
        (None, r"jsonl:2: length is True"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(line: str | None, message: str, mixed: Haystack, tmp_path: Path) -> None:
    build_set(PLAN_OF_TESTS, mixed, tmp_path / "set", show_progress=False)
    path = next(iter(open_set(tmp_path / "set").cells.values()))
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"length": True}) if line is None else line
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_samples(path)


def test_a_description_that_is_none_is_refused(mixed: Haystack, tmp_path: Path) -> None:
    build_set(PLAN_OF_TESTS, mixed, tmp_path / "set", show_progress=False)
    (tmp_path / "set" / SET).write_text('{"task": "passkey"}')
    with pytest.raises(UserError, match=r"set\.json: not the description of a set"):
        open_set(tmp_path / "set")


def test_training_text_is_read_by_the_tokeniser_at_its_length(
    mixed: Haystack, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = write_training_text(PLAN_OF_TESTS, mixed, tmp_path / "train", samples=5, show_progress=False)
    assert path.name == "train.jsonl"
    made = preprocess([str(path)], str(tokenizer_dir), str(tmp_path / "tokens"), workers=1)
    # <s> is counted in a length, </s> is not
    assert (made.documents, made.tokens) == (20, 5 * 2 * (201 + 301))
    before = path.read_bytes()
    write_training_text(PLAN_OF_TESTS, mixed, tmp_path / "train", samples=5, show_progress=False)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"train\.jsonl: exists already"):
        write_training_text(PLAN_OF_TESTS, mixed, tmp_path / "train", samples=6, show_progress=False)
