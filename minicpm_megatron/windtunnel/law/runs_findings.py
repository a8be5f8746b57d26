"""The losses of a scaling law's own runs: collected, kept as CSV, fitted, and set beside the paper."""

from __future__ import annotations

from minicpm_megatron.errors import UserError
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.branching import shared_costs
from minicpm_megatron.windtunnel.cells import Cell, size_name
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.law.findings import law_findings, law_tables
from minicpm_megatron.windtunnel.law.fits import fit_sets
from minicpm_megatron.windtunnel.law.losses import Measurement
from minicpm_megatron.windtunnel.law.losses_csv import write_losses
from minicpm_megatron.windtunnel.law.picture import draw_law
from minicpm_megatron.windtunnel.results import Finding, Table

LOSSES = "losses.csv"


def measured_sets(experiment: Experiment) -> dict[str, list[Measurement]]:
    """Held-out set -> the losses per byte of the decays that are done; what diverged or is missing is left out."""
    sets: dict[str, list[Measurement]] = {}
    for cell in _decayed(experiment):
        for name, loss in progress.per_byte(cell).items():
            sets.setdefault(name, []).append(Measurement(cell.parameters, cell.labels["end_tokens"], loss))
    return sets


def evaluate_scaling(experiment: Experiment) -> Findings:
    """The fits with their findings, tables and pictures; losses.csv for `fit`."""
    sets = measured_sets(experiment)
    write_losses(sets, experiment.output / LOSSES)
    method, compute = experiment.settings["method"], experiment.settings["compute"]
    shared = (_one_trunk_a_size(experiment),)
    try:
        found = fit_sets(sets)
    except UserError as error:  # what was run is too little, which a failed cell can make it, too
        reason = f"no fit: {error}"
        failed = Finding("L(N, D) = C_N N^-alpha + C_D D^-beta + L0 (section 4.5)", "figure 10", reason, "undecided")
        return Findings((failed, *shared), (_losses(experiment),), ())
    return Findings(
        (*law_findings(found, method, compute), *shared),
        (*law_tables(found, method, compute), _losses(experiment)),
        draw_law(found, method, compute, experiment.output, loss="validation loss (nats per byte)"),
    )


def _one_trunk_a_size(experiment: Experiment) -> Finding:
    costs = shared_costs(experiment.cells)
    return Finding(
        "One stable run a size gives all its points: O(m) runs, not O(m^2) (section 4.5)",
        "the stable stage is reused",
        f"{costs.flops:.3g} FLOPs for what separate runs would have taken {costs.separate_flops:.3g}:"
        f" {costs.flops / costs.separate_flops:.0%}",
        costs.flops < costs.separate_flops,
    )


def _losses(experiment: Experiment) -> Table:
    names = tuple(experiment.base.data.validation)
    rows = []
    for cell in _decayed(experiment):
        labels, losses = cell.labels, progress.per_byte(cell)
        size = size_name(labels["width"], labels["layers"])
        tokens = labels["end_tokens"]
        head = (size, f"{cell.parameters:,}", f"{tokens:,}", number(tokens / cell.parameters))
        rows.append((*head, *(f"{losses[name]:.4f}" if name in losses else "-" for name in names)))
    columns = ("size", "N", "D", "D / N", *names)
    return Table("Held-out loss (nats per byte) of the decayed checkpoints", columns, tuple(rows))


def _decayed(experiment: Experiment) -> list[Cell]:
    return [cell for cell in experiment.cells if cell.labels["role"] == "decayed"]
