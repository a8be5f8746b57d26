"""A tied run goes on with a head of its own: the same loss at first, the same batches, the same run in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minicpm_megatron import MiniCPMConfig, MiniCPMModel
from minicpm_megatron.convert import open_source
from minicpm_megatron.convert.text_settings import SpecialTokens
from minicpm_megatron.derive.untie import untie
from minicpm_megatron.model.sharding import named_shards
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Layout, ModelRecipe, ParallelRecipe
from minicpm_megatron.storage.manifest import read_manifest, records, write_manifest
from minicpm_megatron.storage.sharded import CheckpointReader
from tests.device import put
from tests.distributed.forked import Outcome, run_forked
from tests.distributed.parity import digits
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

VOCABULARY = nano.VOCABULARY + 4  # padded to 640 rows by one process and to 768 by two tensor-parallel ones
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TP, PP = "parallel.tensor_model_parallel_size=", "parallel.pipeline_model_parallel_size="
TP2, PP2 = TP + "2", PP + "2"
TEXT = {"bos_token_id": 5, "eos_token_id": [6, 7], "generation_config": {"top_k": 3}}
BETAS, EPSILON, DECAY = (0.9, 0.95), 1e-8, 0.1


def worker(rank: int, case: dict[str, Any]) -> Any:
    if "logits" in case:
        return _same_logits(*map(Path, case["logits"]), tensor=case["ranks"])
    if "untie" in case and rank == 0:
        _as_if_imported(Path(case["untie"]))
        untie(Path(case["untie"]), Path(case["untied"]))
    dist.barrier()
    return nano.train(rank, case)


def _as_if_imported(folder: Path) -> None:
    """Give a checkpoint the end tokens that one of an imported model has."""
    manifest = read_manifest(folder)
    facts = {key: manifest[key] for key in ("model", "recipe", "recipe_hash", "layout", "data")}
    write_manifest(folder, records(manifest, folder), state=manifest["state"] | {"text": TEXT}, facts=facts)


def _same_logits(tied: Path, untied: Path, tensor: int) -> list[bool]:
    """Whether the real model gives two checkpoints the same logits, bit for bit; and losses, made without logits."""
    groups.initialize(Layout(tensor, tensor, 1, 1, 1, 1, (1,)))
    tokens = put(torch.randint(nano.VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1)))
    found = []
    for folder in (tied, untied):
        reader = CheckpointReader(folder)
        shape = ModelRecipe(**reader.manifest["model"])
        config = MiniCPMConfig.from_recipe(shape, ParallelRecipe(tensor_model_parallel_size=tensor))
        model = MiniCPMModel(config).eval()
        with torch.no_grad():
            for _, parameter, spec in named_shards(model, config):
                parameter.copy_(reader.read_shard(spec, padded_shape=tuple(parameter.shape)))
            found.append([model(tokens[:, :-1]), model(tokens[:, :-1], labels=tokens[:, 1:].contiguous())])
    return [torch.equal(first, second) for first, second in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("untie")
    recipe = nano.write_recipe(
        folder,
        model={"vocab_size": VOCABULARY},
        deepspeed={"zero_stage": 1},
        # clipping would scale the gradients of the two models differently
        training={"gradient_clipping": 0.0},
    )
    runs, often = folder / "runs", ("checkpoint.interval=1", "checkpoint.keep_last=30")

    def untied(name: str, of: str, *overrides: str, ranks: int = 2) -> dict[str, Any]:
        case = nano.case(runs / name / "recipe.yaml", name, *overrides, ranks=ranks)
        return case | {"untie": str(runs / of / "checkpoints" / "step-10"), "untied": str(runs / name)}

    checkpoints = [str(runs / name / "checkpoints" / "step-10") for name in ("tied", "one")]
    cases = {
        "tied": nano.case(recipe, "tied", *often),
        "one": untied("one", "tied", ranks=1),
        "dp2": untied("dp2", "tied"),
        "tp2": untied("tp2", "tied", TP2),
        "pp2": untied("pp2", "tied", PP2),
        "tied in stages": nano.case(recipe, "stages", PP2, "training.stop_after=10"),
        "begun": untied("moved", "stages", TP2, PP + "1", "training.stop_after=15"),
        "moved": nano.case(runs / "moved" / "recipe.yaml", "moved", TP + "1", PP2, "training.stop_after=null"),
        "stage": nano.case(runs / "one" / "recipe.yaml", "next", "--init-from", "one@10", TP2, "training.stop_after=2"),
        "logits": {"logits": checkpoints, "ranks": 1},
        "logits tp2": {"logits": checkpoints, "ranks": 2},
    }
    outcomes = run_forked("tests.training.test_untie:worker", list(cases.values()))
    return runs, dict(zip(cases, outcomes, strict=True))


def test_the_logits_of_the_real_model_are_equal_in_every_bit(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    _, outcomes = jobs
    for name in ("logits", "logits tp2"):
        for rank in outcomes[name]:
            assert rank.result == [True, True], rank.log


def test_end_tokens_go_with_a_run_and_with_a_stage_that_begins_from_it(
    jobs: tuple[Path, dict[str, list[Outcome]]],
) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["one"])
    nano.check(outcomes["stage"])
    for folder in (runs / "one" / "checkpoints" / "step-20", runs / "next" / "checkpoints" / "step-2"):
        assert read_manifest(folder)["state"]["text"] == TEXT
        assert open_source(folder).text.tokens == SpecialTokens(5, (6, 7))


@pytest.mark.parametrize("name", ["one", "dp2", "tp2", "pp2", "moved"])
def test_the_run_goes_on_where_the_tied_one_stood(name: str, jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["tied"])
    nano.check(outcomes[name])
    tied, steps = nano.steps(runs / "tied"), nano.steps(runs / name)
    assert list(steps) == list(range(11, 21))
    # before an update of its own it is the tied model, on the batch that comes next; fp32 sums in another order
    assert digits(steps[11][0], tied[11][0]) > 6
    assert digits(nano.held_out(runs / name, 10), nano.held_out(runs / "tied", 10)) > 6
    # and then it is another model
    assert abs(steps[20][0] - tied[20][0]) > 1e-4


def test_the_batches_are_those_of_the_tied_run(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    _, outcomes = jobs
    for rank in range(2):
        assert outcomes["dp2"][rank].result["samples"] == outcomes["tied"][rank].result["samples"][10:]


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2"])
def test_the_layout_changes_nothing(name: str, jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, _ = jobs
    first, second = nano.steps(runs / "one"), nano.steps(runs / name)
    agreement = min(digits(a, b) for step in first for a, b in zip(first[step], second[step], strict=True))
    assert agreement > 6  # measured 6.7 to 7.2


def test_a_run_tied_in_stages_is_untied_and_moves_between_layouts(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    for name in ("tied in stages", "begun", "moved"):
        nano.check(outcomes[name])
    assert "at step 15" in outcomes["moved"][0].log
    whole, moved = nano.steps(runs / "one"), nano.steps(runs / "moved")
    agreement = min(digits(a, b) for step in whole for a, b in zip(whole[step], moved[step], strict=True))
    assert agreement > 5  # 10 of the tied steps were made in two stages; measured 6.7


def test_head_and_embedding_part_by_their_own_gradients(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    """The update that follows, against AdamW written out here and the tied run's gradient, the sum of the two."""
    runs, _ = jobs
    tied, after_tied = (CheckpointReader(runs / "tied" / "checkpoints" / f"step-{step}") for step in (10, 11))
    before, after = (CheckpointReader(runs / "one" / "checkpoints" / f"step-{step}") for step in (10, 11))
    old = tied.read(EMBEDDING, "exp_avg").double()
    gradients = {}
    for name, decay in ((EMBEDDING, 0.0), (HEAD, DECAY)):
        assert torch.equal(before.read(name), tied.read(EMBEDDING))
        first, second = (after.read(name, kind).double() for kind in ("exp_avg", "exp_avg_sq"))
        gradients[name] = (first - BETAS[0] * old) / (1 - BETAS[0])
        square = BETAS[1] * tied.read(EMBEDDING, "exp_avg_sq").double() + (1 - BETAS[1]) * gradients[name] ** 2
        torch.testing.assert_close(second, square, rtol=1e-4, atol=1e-12)
        rate = after.manifest["state"]["rates"]["embedding" if name == EMBEDDING else "head"]
        update = first / (1 - BETAS[0] ** 11) / ((second / (1 - BETAS[1] ** 11)).sqrt() + EPSILON)
        wanted = before.read(name).double() * (1 - rate * decay) - rate * update
        torch.testing.assert_close(after.read(name).double(), wanted, rtol=1e-5, atol=1e-7)
    whole = (after_tied.read(EMBEDDING, "exp_avg").double() - BETAS[0] * old) / (1 - BETAS[0])
    scale = float(whole.abs().max())
    assert float((gradients[EMBEDDING] + gradients[HEAD] - whole).abs().max()) < 1e-5 * scale
    assert float((gradients[EMBEDDING] - gradients[HEAD]).abs().max()) > 0.1 * scale
    assert not torch.equal(after.read(EMBEDDING), after.read(HEAD))
    assert after.manifest["state"]["rates"]["head"] == after.manifest["state"]["rates"]["embedding"]


def test_another_stage_begins_with_its_weights_and_moments(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["stage"])
    assert digits(nano.held_out(runs / "next", 0), nano.held_out(runs / "tied", 10)) > 6
    state = nano.state(runs / "next" / "checkpoints" / "step-2")
    assert state["updates"] == 12 and state["origin"] == {"run": str(runs / "one"), "step": 10}
    origin = nano.state(runs / "one" / "checkpoints" / "step-20")["origin"]
    assert origin == {"run": str(runs / "tied"), "step": 10, "untying": {"head_moments": "copy"}}
