"""What the dry run tells: every number of it from the recipe, and nothing that cannot be trained goes unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from minicpm_megatron.cli.dry_run import format_dry_run
from minicpm_megatron.cli.train import main
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build, load_recipe
from minicpm_megatron.recipe.memory import pipeline_stages, stage_memory
from minicpm_megatron.storage.manifest import write_manifest
from tests.recipe.fields import minimal_fields
from tests.training import nano


def section(report: str, title: str) -> str:
    return report.split(f"-- {title} ")[1].partition("\n")[2].split("\n-- ")[0]


def test_first_section_is_a_recipe_that_loads_back(tmp_path: Path) -> None:
    recipe = build(minimal_fields())
    path = tmp_path / "resolved.yaml"
    path.write_text(section(format_dry_run(recipe, 2), "recipe"))
    assert load_recipe(path) == recipe


def test_schedule_table_shows_the_rate_at_the_end() -> None:
    lines = section(format_dry_run(build(minimal_fields()), 1), "schedule").strip().splitlines()
    assert lines[0].endswith("ends after 100 steps at 0.0625 of the rate, which is 0.000625")
    rows = [line.split() for line in lines[2:]]
    assert rows[0] == ["1", "0.1", "0.001", "first", "update"]
    assert rows[-1] == ["100", "0.0625", "0.000625", "run", "ends"]
    assert ["80", "1", "0.01", "stable", "ends"] in rows


def test_growing_batch_and_early_stop() -> None:
    growth = [{"after_tokens": 1024, "global_batch_size": 16}]
    recipe = build(minimal_fields(training__batch_growth=growth, training__stop_after=7))
    lines = section(format_dry_run(recipe, 2), "batches").strip().splitlines()
    assert [line.split() for line in lines[1:3]] == [["0", "8", "512", "2"], ["2", "16", "1,024", "4"]]
    assert lines[3].strip() == "100 steps, 1,584 samples, 101,376 tokens"
    assert "stops after step 7" in lines[4]


def test_memory_parts_add_up() -> None:
    report = format_dry_run(load_recipe_of("minicpm-2.4b"), 8)
    parts = [line.split() for line in section(report, "memory per rank (estimate)").strip().splitlines()]
    sizes = [float(size.replace(",", "")) * (1 if unit == "GiB" else 1 / 1024) for _, size, unit in parts]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.05)


def test_memory_on_a_cpu_has_the_libraries_and_no_fused_norm() -> None:
    recipe = load_recipe_of("quickstart")
    [tensors, libraries, total, beside] = section(
        format_dry_run(recipe, 2), "memory per rank on a CPU (estimate)"
    ).splitlines()[:4]
    assert "not counted" in beside
    layout = recipe.check_world_size(2)
    [stage] = pipeline_stages(recipe, layout)
    assert f"{stage_memory(recipe, layout, stage, fused_norm=False).total / 2**20:,.1f} MiB" in tensors
    # measured with two processes on CPUs: 0.99 and 1.19 GiB at their peak, in runs without and with a save
    assert float(total.split()[1]) == pytest.approx(1.09, rel=0.1) and total.endswith("GiB")


def load_recipe_of(stem: str):
    return load_recipe(Path(__file__).parents[2] / "examples" / "recipes" / f"{stem}.yaml")


def test_a_mixture_of_experts_is_counted() -> None:
    report = format_dry_run(build(minimal_fields(preset="minicpm-moe-8x2b")), 1)
    assert "13,590,468,864" in section(report, "parameters")
    assert "4,035,320,064" in section(report, "parameters")
    assert "the recipe is valid" in section(format_dry_run(build(minimal_fields()), 1), "verdict")


def test_a_machine_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="8 samples do not divide over 3"):
        format_dry_run(build(minimal_fields()), 3)


def test_no_line_ends_in_blanks() -> None:
    report = format_dry_run(build(minimal_fields()), 1)
    assert [line for line in report.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("size", [0, -1])
def test_no_ranks_are_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(minimal_fields()))
    with pytest.raises(UserError, match=f"--world-size: {size} is no number of ranks"):
        main(["--recipe", str(path), "--dry-run", "--world-size", str(size)])


def test_a_dry_run_refuses_what_a_resume_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nano.write_recipe(tmp_path)
    recipe = load_recipe(path, ["name=done"])
    folder = recipe.run_directory / "checkpoints" / "step-5"
    folder.mkdir(parents=True)
    write_manifest(folder, [], state={"step": 5}, facts={"recipe": recipe.model_dump(mode="json")})
    assert main(["--recipe", str(path), "--dry-run", "name=done"]) == 0
    with pytest.raises(UserError, match=r"optimizer.lr: was 0.005 in the 5 steps already done, and is 0.3 now"):
        main(["--recipe", str(path), "--dry-run", "name=done", "optimizer.lr=0.3"])
    assert main(["--recipe", str(path), "--dry-run", "name=other", "optimizer.lr=0.3"]) == 0
    assert "the data are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--world-size", "2"], "--world-size: is assumed by --dry-run alone"),
        (["--dry-run", "--finished"], "one of them"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        main(["--recipe", str(nano.write_recipe(tmp_path)), *options])
