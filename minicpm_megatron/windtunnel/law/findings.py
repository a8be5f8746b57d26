"""What fitted scaling laws say beside section 4.5 and figure 10 of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter

from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.scaling_law import PUBLISHED, PUBLISHED_COMPUTE, Method, ScalingLaw
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel.law.fits import METHODS, Fit, SetFits
from minicpm_megatron.windtunnel.results import Finding, Table, Verdict
from minicpm_megatron.windtunnel.verdicts import above, all_of, holds

PAPER = PUBLISHED["average"]
HOFFMANN_RATIO = 20.0
"""D_opt / N_opt of Hoffmann et al. 2022 (arXiv 2203.15556), which section 4.5 sets its own beside."""
SHARP = 10.0
"""A ratio whose limits lie further apart than this factor agrees with nothing: ours."""
_NAMES = {"c_n": "C_N", "alpha": "alpha", "c_d": "C_D", "beta": "beta", "l0": "L0"}


def quantities(compute: float) -> dict[str, Callable[[ScalingLaw], float]]:
    """Name -> what follows from a law, the columns of figure 10; N and D in 1e9."""
    return {
        **{_NAMES[field.name]: attrgetter(field.name) for field in fields(ScalingLaw)},
        "K^2": lambda law: law.k_squared,
        "eta": lambda law: law.eta,
        "N_opt (1e9)": lambda law: law.n_opt(compute),
        "D_opt (1e9)": lambda law: law.d_opt(compute),
        "D_opt / N_opt": lambda law: law.tokens_per_parameter(compute),
    }


def published_values(compute: float) -> dict[str, float]:
    """The paper's average row: what it prints, and for the rest what follows from its rounded coefficients."""
    values = {name: of(PAPER.law) for name, of in quantities(compute).items()}
    values |= {"K^2": PAPER.k_squared, "eta": PAPER.eta}
    if compute == PUBLISHED_COMPUTE:
        values["D_opt / N_opt"] = PAPER.tokens_per_parameter
    return values


def law_findings(found: Sequence[SetFits], method: Method, compute: float) -> tuple[Finding, ...]:
    """The paper's claims about the last of the fits, which is the mean of the sets where there are several.

    Args:
        method: the fit that the findings speak of.
        compute: FLOPs of the compute-optimal model.
    """
    last = found[-1]
    fit = last.fits[method]
    ratio_of, eta_of = quantities(compute)["D_opt / N_opt"], quantities(compute)["eta"]
    ratio, eta = fit.interval(ratio_of), fit.interval(eta_of)
    paper = published_values(compute)
    where = f"({method}, {last.losses.name})"
    ratio_text = f"{_limits(ratio_of(fit.law), ratio)} {where}"
    return (
        Finding(
            f"D_opt / N_opt at {compute:.3g} FLOPs (section 4.5, figure 10)",
            number(paper["D_opt / N_opt"], 5),
            ratio_text,
            _same_ratio(ratio, paper["D_opt / N_opt"]),
        ),
        Finding(
            f"A model deserves more tokens a parameter than the {HOFFMANN_RATIO:g} of Hoffmann et al. (section 4.5)",
            f"{number(paper['D_opt / N_opt'], 5)} at {compute:.3g} FLOPs",
            ratio_text,
            above(ratio, HOFFMANN_RATIO) if ratio else "undecided",
        ),
        Finding(
            "As compute grows, tokens deserve more of it than parameters: eta below 0 (figure 10)",
            f"eta {paper['eta']:g}",
            f"eta {_limits(eta_of(fit.law), eta)} {where}",
            above(Interval(-eta.high, -eta.estimate, -eta.low)) if eta else "undecided",
        ),
    )


def law_tables(found: Sequence[SetFits], method: Method, compute: float) -> tuple[Table, ...]:
    """Both fits of each set side by side with the paper's average; with several sets first all of them by `method`."""
    tables = [_set_table(each, compute) for each in found]
    return tuple([_all_sets(found, method, compute), *tables] if len(found) > 1 else tables)


def _all_sets(found: Sequence[SetFits], method: Method, compute: float) -> Table:
    asked = quantities(compute)
    paper = published_values(compute)
    rows = [(each.losses.name, *(number(of(each.fits[method].law), 4) for of in asked.values())) for each in found]
    rows.append(("paper, average", *(number(paper[name], 4) for name in asked)))
    return Table(f"All sets by {method}, optima at {compute:.3g} FLOPs", ("", *asked), tuple(rows))


def _set_table(each: SetFits, compute: float) -> Table:
    losses, paper = each.losses, published_values(compute)
    columns = ("", *(text for method in METHODS for text in (method, "95 %")), "paper, average")
    rows = [
        (
            name,
            *(text for method in METHODS for text in _with_limits(each.fits[method], of)),
            number(paper[name], 5),
        )
        for name, of in quantities(compute).items()
    ]
    errors = (text for method in METHODS for text in (number(each.fits[method].error, 3), ""))
    rows.append(("residual, root mean square", *errors, ""))
    beyond = compute / losses.largest_compute
    told = f", {number(beyond)} times the compute of the largest point" if beyond > 1 else ""
    title = (
        f"{losses.name}: {len(losses.loss)} points of {len(losses.sizes)} sizes; optima at {compute:.3g} FLOPs{told}"
    )
    return Table(title, columns, tuple(rows))


def _with_limits(fit: Fit, of: Callable[[ScalingLaw], float]) -> tuple[str, str]:
    limits = fit.interval(of)
    return number(of(fit.law), 4), "-" if limits is None else f"{number(limits.low)} to {number(limits.high)}"


def _limits(estimate: float, limits: Interval | None) -> str:
    if limits is None:
        return f"{number(estimate, 4)}, too few points for limits"
    return f"{number(estimate, 4)}, 95 % {number(limits.low)} to {number(limits.high)}"


def _same_ratio(limits: Interval | None, published: float) -> Verdict:
    if limits is None:
        return "undecided"
    sharp: Verdict = True if limits.low > 0 and limits.high <= SHARP * limits.low < math.inf else "undecided"
    return all_of((holds(limits, published), sharp))
