from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import command
from tests.data.conftest import texts, write_jsonl
from tests.windtunnel.warm import WarmTrainer

RECIPE = """\
preset: minicpm-nano
model: {vocab_size: 600, dim_model_base: 32}
data:
  train: [{prefix: tokens}]
  validation: {held-out: held-out}
  tokenizer: tokenizer
  sequence_length: 32
training: {global_batch_size: 4, micro_batch_size: 4, precision: fp32}
schedule: {warmup: 2, total: 12, decay: 4, decay_shape: linear}
evaluation: {batches: 1}
checkpoint: {interval: 4, async_save: false}
logging: {interval: 1, tensorboard: false}
"""


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> WarmTrainer:
    return WarmTrainer(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a small model and the tokens of real texts, made by the public commands."""
    folder = tmp_path_factory.mktemp("sound")
    documents = texts(100)
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "held-out.jsonl", documents[::7])
    tokenizer = folder / "tokenizer"
    train = ("--input", folder / "corpus.jsonl", "--vocab-size", 600, "--output", tokenizer)
    assert command("train_tokenizer.py", *train) == 0
    for name, prefix in (("corpus", "tokens"), ("held-out", "held-out")):
        given = ("--input", folder / f"{name}.jsonl", "--tokenizer", tokenizer, "--output-prefix", folder / prefix)
        assert command("preprocess_data.py", *given, "--workers", 1) == 0
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of links to what is sound, as the current one."""
    for path in sound.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "a-file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path
