"""The scaling law of anybody's losses, from CSV: what `scaling-law` does with its own, without the runs."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.scaling_law import Method
from minicpm_megatron.storage.checksum import file_sha256
from minicpm_megatron.storage.claim import claim
from minicpm_megatron.storage.manifest import library_versions
from minicpm_megatron.windtunnel.law.findings import law_findings, law_tables
from minicpm_megatron.windtunnel.law.fits import fit_sets
from minicpm_megatron.windtunnel.law.losses_csv import read_losses
from minicpm_megatron.windtunnel.law.picture import draw_law
from minicpm_megatron.windtunnel.results import Picture, Results, write_results

KIND = "fit"


def fit_csv(path: Path, method: Method, compute: float, output: Path | None) -> Results:
    """Fit every set of a CSV and the mean of the sets; with `output` write results.json and the pictures there.

    Args:
        path: see `law.losses_csv`.
        method: the fit that findings and pictures speak of; tables have both.
        compute: FLOPs of the compute-optimal model.

    Raises:
        UserError: the CSV is wrong, the sets have different checkpoints, a fit does not converge, no compute, or the
            output is something else's.
    """
    sets = read_losses(path)
    settings = {"csv": str(path), "method": method, "compute": compute}
    data = {str(path): file_sha256(path)}
    try:
        found = fit_sets(sets)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=error.fix) from None
    findings, tables = law_findings(found, method, compute), law_tables(found, method, compute)
    pictures: tuple[Picture, ...] = ()
    if output is not None:
        plan = {"kind": KIND, "settings": settings, "data": data}
        claim(output, plan, "holds another experiment, or this one with other settings")
        pictures = draw_law(found, method, compute, output, loss="loss (in the unit of the CSV)")
    title = f"Scaling law of {path.name} (section 4.5 of arXiv 2404.06395)"
    results = Results(KIND, title, settings, "", data, library_versions(), findings, tables, pictures)
    if output is not None:
        write_results(results, output)
    return results
