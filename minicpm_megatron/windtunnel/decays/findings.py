"""What the decays and cosines tell: the claims of sections 4.1 to 4.3 beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.methods.economics import DECAY_SHARE
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.branching import shared_costs
from minicpm_megatron.windtunnel.decays.picture import COSINES, DECAYS, draw_cosines, draw_decays
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.noise import Noise, noise_of
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.verdicts import EQUAL, above, all_of, at_most

TOO_SHORT = 0.025  # the share that section 4.3 finds too little

Arm = tuple[str, float, str]
"""("wsd", share, shape) or ("cosine" or "cosine_loop", T as a share of S, "")."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was trained to one length.

    Attributes:
        end: the length as a share of S.
        losses: arm -> [seeds], held-out nats per token at that length; nan where there is none.
        noise: of the differences between arms.
    """

    end: float
    losses: Mapping[Arm, NDArray[np.float64]]
    noise: Noise = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", noise_of(np.array(list(self.losses.values()))))

    def mean(self, arm: Arm) -> float:
        """Over the seeds."""
        return float(self.losses[arm].mean())

    def difference(self, first: Arm, second: Arm) -> Interval | None:
        """first - second; None where one of them was not measured."""
        if first not in self.losses or second not in self.losses:
            return None
        found = self.noise.difference(self.mean(first), self.mean(second))
        return found if math.isfinite(found.estimate) else None


def compare(experiment: Experiment) -> list[Comparison]:
    """The losses of all arms at every length, the longest first."""
    seeds = list(experiment.settings["seeds"])
    wsd = [cell for cell in experiment.cells if cell.labels["role"] == "wsd"]
    ends = {cell.labels["end"]: cell.labels["end_step"] for cell in wsd}
    found = []
    for end, step in sorted(ends.items(), reverse=True):
        losses: dict[Arm, NDArray[np.float64]] = {}
        for cell in experiment.cells:
            labels = cell.labels
            if labels["role"] == "wsd" and labels["end"] == end:
                arm, at = ("wsd", labels["share"], labels["shape"]), cell.last_step
            elif labels["role"] in ("cosine", "cosine_loop"):
                arm, at = (labels["role"], labels["period"], ""), step
                if arm[0] == "cosine_loop" and arm[1] >= end:  # the same as Cosine up to here
                    continue
            else:
                continue
            row = losses.setdefault(arm, np.full(len(seeds), np.nan))
            row[seeds.index(labels["seed"])] = progress.measured(cell, at).held_out
        found.append(Comparison(end, losses))
    return found


def evaluate_decays(experiment: Experiment) -> Findings:
    """Findings, a table a length, what the trunk has saved, and figures 4 and 5."""
    comparisons = compare(experiment)
    shape = experiment.settings["shapes"][0]
    findings = [
        _reaches_cosine(comparisons, shape),
        _best_period(comparisons),
        *_shares_enough(comparisons, shape),
        _one_trunk(experiment),
    ]
    draw_cosines(experiment, experiment.output / COSINES)
    draw_decays(experiment, comparisons, experiment.output / DECAYS)
    pictures = (
        Picture(
            COSINES, "Validation loss under Cosine(T) and CosineLoop(T), after figure 4; S is the length of the run"
        ),
        Picture(
            DECAYS,
            "The trunk, the decays that leave it, and cosines, after figure 5; final loss over the share of decay",
        ),
    )
    tables = (*(_table(each) for each in comparisons), _costs(experiment))
    return Findings(tuple(findings), tables, pictures)


def _reaches_cosine(comparisons: Sequence[Comparison], shape: str) -> Finding:
    claim = f"WSD with {DECAY_SHARE:.0%} of decay ({shape}) ends at Cosine(T = S) or below (section 4.3, figure 5)"
    found = [(each, each.difference(("wsd", DECAY_SHARE, shape), ("cosine", each.end, ""))) for each in comparisons]
    verdicts = [None if limits is None else at_most(limits, _margin(each)) for each, limits in found]
    return Finding(claim, "equal or lower", _differences(found), all_of(verdicts))


def _best_period(comparisons: Sequence[Comparison]) -> Finding:
    claim = "Cosine(T) is best at T = S, above T < S and T > S alike (section 4.1, figure 4)"
    verdicts: list[Verdict | None] = []
    texts = []
    for each in comparisons:
        for arm in each.losses:
            if arm[0] == "cosine" and arm[1] != each.end:
                limits = each.difference(arm, ("cosine", each.end, ""))
                if limits is not None:
                    verdicts.append(above(limits))
                    texts.append(f"T = {arm[1] / each.end:g} S at {each.end:g}: {_limits(limits)}")
    return Finding(claim, "the lowest loss is at T = S", "; ".join(texts) or "not measured", all_of(verdicts))


def _shares_enough(comparisons: Sequence[Comparison], shape: str) -> list[Finding]:
    shares = sorted({arm[1] for each in comparisons for arm in each.losses if arm[0] == "wsd"})
    findings = []

    def less(share: float, other: float) -> list[tuple[Comparison, Interval | None]]:
        return [(each, each.difference(("wsd", share, shape), ("wsd", other, shape))) for each in comparisons]

    if DECAY_SHARE in shares and shares[-1] > DECAY_SHARE:
        found = less(DECAY_SHARE, shares[-1])
        verdicts = [None if limits is None else at_most(limits, _margin(each)) for each, limits in found]
        claim = f"A decay of {DECAY_SHARE:.0%} is enough: as good as one of {100 * shares[-1]:.3g} % (section 4.3)"
        findings.append(Finding(claim, "sufficient", _differences(found), all_of(verdicts)))
    if DECAY_SHARE in shares and TOO_SHORT in shares:
        found = less(TOO_SHORT, DECAY_SHARE)
        longer = [None if limits is None else above(limits) for _, limits in found]
        claim = f"A decay of {TOO_SHORT:.1%} falls short of one of {DECAY_SHARE:.0%} (section 4.3)"
        findings.append(Finding(claim, "falls short", _differences(found), all_of(longer)))
    return findings


def _one_trunk(experiment: Experiment) -> Finding:
    costs = shared_costs(experiment.cells)
    trained, separate = costs.tokens, costs.separate_tokens
    claim = "One trunk serves decays at every length, where a cosine needs a run of its own for each (section 4.2)"
    ours = f"{trained:,} tokens trained for what separate runs would have taken {separate:,}: {trained / separate:.0%}"
    return Finding(claim, "the stable stage is reused", ours, trained < separate)


def _costs(experiment: Experiment) -> Table:
    costs = shared_costs(experiment.cells)
    rows = []
    for role in ("trunk", "wsd", "cosine", "cosine_loop"):
        cells = [cell for cell in experiment.cells if cell.labels["role"] == role]
        tokens, flops = sum(cell.tokens() for cell in cells), sum(cell.flops() for cell in cells)
        rows.append((role, str(len(cells)), f"{tokens:,}", f"{flops:.3g}"))
    rows.append(("trunk and wsd", "", f"{costs.tokens:,}", ""))
    rows.append(("wsd as separate runs", "", f"{costs.separate_tokens:,}", ""))
    return Table("What was trained", ("", "runs", "tokens", "FLOPs"), tuple(rows))


def _table(comparison: Comparison) -> Table:
    seeds = comparison.noise.seeds
    columns = ("", *(f"run {number + 1}" for number in range(seeds)), "mean", "spread", "less Cosine(T = S)", "95 %")
    rows = []
    for arm in sorted(comparison.losses, key=lambda arm: (arm[0], arm[2], arm[1])):
        row = comparison.losses[arm]
        reference: Arm = ("cosine", comparison.end, "")
        limits = None if arm == reference else comparison.difference(arm, reference)
        spread = f"{float(np.ptp(row)):.4f}" if len(row) > 1 else "-"
        rows.append(
            (
                _name(arm, comparison.end),
                *(_loss(value) for value in row),
                _loss(float(row.mean())),
                spread,
                "-" if limits is None else f"{limits.estimate:+.4f}",
                f"{limits.low:+.4f} to {limits.high:+.4f}" if limits is not None and limits.is_bounded else "-",
            )
        )
    noise = comparison.noise
    told = f"noise of a run {noise.deviation:.4f}" if math.isfinite(noise.deviation) else "one seed: noise not known"
    title = f"Held-out loss (nats per token) after {comparison.end:g} of S; {told}"
    return Table(title, columns, tuple(rows))


def _name(arm: Arm, end: float) -> str:
    kind, amount, shape = arm
    if kind == "wsd":
        return f"WSD, {100 * amount:.3g} % {shape} decay"
    return f"{'Cosine' if kind == 'cosine' else 'CosineLoop'}(T = {amount / end:.3g} S)"


def _margin(comparison: Comparison) -> float:
    return EQUAL * comparison.mean(("cosine", comparison.end, ""))


def _differences(found: Sequence[tuple[Comparison, Interval | None]]) -> str:
    return "; ".join(
        f"at {each.end:g} S: {'not measured' if limits is None else _limits(limits)}" for each, limits in found
    )


def _limits(limits: Interval) -> str:
    if not limits.is_bounded:
        return f"{limits.estimate:+.4f} (one seed: limits not known)"
    return f"{limits.estimate:+.4f} ({limits.low:+.4f} to {limits.high:+.4f})"


def _loss(value: Any) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
