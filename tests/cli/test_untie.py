"""tools/convert_checkpoint.py --untie --to megatron: what is carried over, its memory, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.derive.untie import untie
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import RateLedger
from minicpm_megatron.recipe import build, load_recipe
from minicpm_megatron.storage.manifest import problems, read_manifest
from minicpm_megatron.storage.sharded import CheckpointReader
from tests.cli.commands import command, tree
from tests.cli.saved_run import MOMENTS, killed_in_the_middle, trained, watch_memory
from tests.convert.conftest import (
    EXPERTS,
    MakeCheckpoint,
    assert_bit_equal,
    canonical_logits,
    checkpoint,
    random_tensors,
    read_checkpoint,
    small_model,
    tokens,
)

__all__ = ["checkpoint", "tokens", "trained"]  # fixtures
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def test_everything_but_the_head_is_the_tied_runs(trained: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    run, before = tmp_path / "runs" / "untied", tree(trained)
    done = untie(trained, run)
    assert (done.step, done.has_moments, done.has_recipe) == (30, True, True)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "recipe.yaml"]
    folder = run / "checkpoints" / "step-30"
    assert problems(folder) == []
    tied, model = random_tensors(small_model(num_layers=2)), small_model(num_layers=2)
    assert_bit_equal(read_checkpoint(folder), tied | {HEAD: tied[EMBEDDING]})
    expected = canonical_logits(model, tied, tokens)
    assert torch.equal(canonical_logits(done.model, read_checkpoint(folder), tokens), expected)
    reader, old = CheckpointReader(folder), CheckpointReader(trained)
    for kind in MOMENTS:
        for name in old.names():
            assert torch.equal(reader.read(name, kind), old.read(name, kind))
        assert torch.equal(reader.read(HEAD, kind), old.read(EMBEDDING, kind))
    for rank in range(2):
        assert reader.rank_tensors(rank)["cpu"].tolist() == [rank, 7]
    assert not reader.rank_tensors(2)
    manifest, was = read_manifest(folder), read_manifest(trained)
    for key in ("step", "samples", "tokens", "updates", "faults", "fault"):
        assert manifest["state"][key] == was["state"][key]
    assert manifest["state"]["origin"] == {
        "run": str(tmp_path / "runs" / "dense"),
        "step": 30,
        "untying": {"head_moments": "copy"},
    }
    assert manifest["state"]["rates"] == was["state"]["rates"] | {"head": pytest.approx(0.01)}
    RateLedger(done.model, 0.01).check_saved(manifest["state"]["rates"])
    assert manifest["data"] == was["data"]
    recipe, old_recipe = load_recipe(run / "recipe.yaml"), build(was["recipe"])
    assert build(manifest["recipe"]) == recipe and recipe.run_directory == run
    assert recipe.model == done.model == model.model_copy(update={"untie_embeddings_and_output_weights": True})
    changed = {"name", "preset", "model"}
    assert recipe.model_dump(exclude=changed) == old_recipe.model_dump(exclude=changed)
    assert tree(trained) == before


def test_moments_of_the_head_may_be_zero(trained: Path, tmp_path: Path) -> None:
    untie(trained, tmp_path / "untied", head_moments="zero")
    reader = CheckpointReader(tmp_path / "untied" / "checkpoints" / "step-30")
    for kind in MOMENTS:
        assert reader.read(HEAD, kind).shape == reader.read(EMBEDDING, kind).shape
        assert not reader.read(HEAD, kind).any() and reader.read(EMBEDDING, kind).any()
    assert reader.manifest["state"]["origin"]["untying"] == {"head_moments": "zero"}


@pytest.mark.parametrize("kind", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("published", [False, True])
def test_a_model_without_a_run_begins_at_step_0(
    published: bool, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, model = checkpoint(**kind), small_model(**kind)
    if published:
        convert(folder, tmp_path / "published", "granitemoe" if kind else "granite", dtype="fp32")
        folder = tmp_path / "published"
    done = untie(folder, tmp_path / "untied")
    assert (done.step, done.has_moments, done.has_recipe) == (0, False, False)
    source = open_source(tmp_path / "untied" / "checkpoints" / "step-0")
    assert source.model.untie_embeddings_and_output_weights
    tied = random_tensors(model)
    assert_bit_equal(read_checkpoint(source.folder), tied | {HEAD: tied[EMBEDDING]})
    origin = read_manifest(source.folder)["state"]["origin"]
    assert origin == {"run": str(folder), "step": 0, "untying": {"head_moments": None}}


def test_memory_is_a_few_tensors(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = watch_memory(monkeypatch)
    untie(trained, tmp_path / "untied", head_moments="zero")
    # a weight and two moments, shared by head and embedding where they are equal
    largest = 4 * max(tensor.numel() for tensor in random_tensors(small_model(num_layers=2)).values())
    assert largest < max(peaks) <= 3 * largest + 4096


def test_a_kill_in_the_middle_leaves_no_run(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "untied"
    arguments = ("--untie", "--input", f"{trained.parents[1]}@30", "--to", "megatron", "--output", str(run))
    assert killed_in_the_middle("convert_checkpoint.py", *arguments) == -9 and not run.exists()
    assert command("convert_checkpoint.py", *arguments) == 0
    output = capfd.readouterr()
    model = small_model(num_layers=2, untie_embeddings_and_output_weights=True)
    parameters = sum(tensor.numel() for tensor in random_tensors(model).values())
    assert f"step 30: a head of its own; {parameters:,} parameters" in output.out
    assert f"--recipe {run / 'recipe.yaml'}" in output.out and output.err == ""
    assert sorted(path.name for path in run.parent.iterdir()) == ["dense", "untied"]


MEGATRON = ("--to", "megatron")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--untie", *MEGATRON, "--input", "nowhere"), "nowhere: no such folder"),
        (("--untie", *MEGATRON, "--input", "nowhere@3"), "no run 'nowhere' with checkpoints"),
        (("--untie", *MEGATRON, "--input", "{occupied}"), "so not a model"),
        (("--untie", *MEGATRON, "--input", "{untied}"), "the head has weights of its own already; leave --untie out"),
        (("--untie", "--to", "llama", "--input", "{untied}"), "the head has weights of its own already"),
        (("--untie", *MEGATRON, "--input", "{plain}", "--head-moments", "zero"), "plain has no optimizer state"),
        (("--untie", *MEGATRON, "--output", "{occupied}"), "exists already; give another --output"),
        (("--untie", *MEGATRON, "--output", "{file}/run"), "cannot be written"),
        (("--untie", *MEGATRON, "--overwrite"), "--overwrite: --untie --to megatron makes a run"),
        (("--untie", *MEGATRON, "--dtype", "bf16"), "--dtype: checkpoints always hold fp32; leave it out"),
        (("--untie", *MEGATRON, "--tokenizer", "{file}"), "--tokenizer: the untied run keeps the tokenizer"),
        (("--untie", "--to", "granite", "--head-moments", "copy"), "--head-moments: no optimizer state is written"),
        ((*MEGATRON, "--head-moments", "copy"), "--head-moments: no optimizer state is written; needs --untie --to"),
        (("--untie", "--to", "mixtral"), "--to mixtral: this format holds mixtures of experts only"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(
    options: tuple[str, ...],
    message: str,
    trained: Path,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "file").write_text("x")
    places = {name: tmp_path / name for name in ("occupied", "file")}
    if any("{untied}" in option for option in options):
        places["untied"] = checkpoint("untied", untie_embeddings_and_output_weights=True)
    if any("{plain}" in option for option in options):
        places["plain"] = checkpoint("plain")
    given = ["--input", str(trained), "--output", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    assert command("convert_checkpoint.py", *given, *(option.format(**places) for option in options)) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith("error: ")
    assert message in output.err and output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    file = trained / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        untie(trained, tmp_path / "untied")
    assert not (tmp_path / "untied").exists()
