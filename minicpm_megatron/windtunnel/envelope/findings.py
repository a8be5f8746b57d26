"""What continued training tells: the envelope and its form, and a small model against a larger one (section 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.batch_size_law import tokens_to_loss
from minicpm_megatron.methods.economics import break_even_tokens, training_flops
from minicpm_megatron.methods.intervals import Interval, mean_interval
from minicpm_megatron.methods.loss_envelope import Array, Envelope, compare_envelopes, optimal_points
from minicpm_megatron.methods.scaling_law import COMPUTE_UNIT
from minicpm_megatron.recipe.flops import flops_per_token
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell, size_name
from minicpm_megatron.windtunnel.envelope.picture import PICTURE, draw_envelope
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.noise import noise_of
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.verdicts import above

EVIDENCE = 4.0
"""Difference in AIC from which on the worse form has 'considerably less' support (Burnham & Anderson 2002, 2.6)."""
PAPER_TRAINING, PAPER_SERVING = "about 4 times", "about a fifth"  # section 4.3, 0.036B for 0.17B


@dataclass(frozen=True, eq=False)
class Ends:
    """The decayed ends of one size.

    Attributes:
        name: the size as the user writes it.
        cells: [points][seeds], by rising tokens.
        tokens: [points], D.
        losses: [points, seeds], held-out nats per token; nan where a run is missing or diverged.
    """

    name: str
    cells: list[list[Cell]]
    tokens: Array
    losses: Array

    @property
    def parameters(self) -> int:
        """N."""
        return self.cells[0][0].parameters

    @property
    def compute(self) -> Array:
        """[points], C = 6 N D in FLOPs."""
        return training_flops(self.parameters, 1) * self.tokens

    @property
    def mean(self) -> Array:
        """[points], over the seeds; nan where one is missing, since seeds differ by more than their mean may move."""
        return np.asarray(self.losses.mean(axis=1))

    @property
    def whole(self) -> Array:
        """[points], whether every seed is there."""
        return np.isfinite(self.mean)


@dataclass(frozen=True)
class Trade:
    """What the small model needs for the loss of one decayed end of the large one.

    Attributes:
        tokens: of the large model.
        loss: of the large model, mean over the seeds.
        needed: tokens of the small one, by the mean over the seeds; nan where its ends do not enclose that loss.
        ratio: of the training computes, small over large; limits over the seeds, infinite for one.
        all_seeds: whether every seed reaches its loss.
        extrapolated: tokens by the power law where they do not; math.inf where the law never gets there.
    """

    tokens: float
    loss: float
    needed: float
    ratio: Interval
    all_seeds: bool
    extrapolated: float


def read_ends(experiment: Experiment) -> list[Ends]:
    """The small size, and the large one where there is one."""
    seeds = list(experiment.settings["seeds"])
    found = []
    for width, layers in experiment.settings["sizes"]:
        own = [each for each in experiment.cells if (each.labels["width"], each.labels["layers"]) == (width, layers)]
        by_tokens: dict[int, list[Cell]] = {}
        for cell in own:
            if cell.labels["role"] == "decayed":
                by_tokens.setdefault(cell.labels["end_tokens"], []).append(cell)
        cells = [sorted(by_tokens[at], key=lambda cell: seeds.index(cell.labels["seed"])) for at in sorted(by_tokens)]
        losses = np.array([[progress.measured(cell).held_out for cell in row] for row in cells])
        found.append(Ends(size_name(width, layers), cells, np.array(sorted(by_tokens), dtype=np.float64), losses))
    return found


def fit_forms(small: Ends) -> tuple[Envelope, Envelope]:
    """Both forms through the mean losses over C in 1e18 FLOPs, the better one first.

    Raises:
        UserError: too few ends have been reached.
    """
    return compare_envelopes(small.compute[small.whole] / COMPUTE_UNIT, small.mean[small.whole])


def trades(small: Ends, large: Ends, power: Envelope | None) -> list[Trade]:
    """Of every end of the large model that all seeds have reached."""
    found = []
    for place in np.flatnonzero(large.whole):
        tokens, loss = float(large.tokens[place]), float(large.mean[place])
        needed = _needed(small, small.mean, loss)
        seeds = [
            _needed(small, small.losses[:, seed], float(large.losses[place, seed]))
            for seed in range(large.losses.shape[1])
        ]
        a_token = small.parameters / (large.parameters * tokens)
        ratio = _limits_over_seeds(needed * a_token, np.array(seeds) * a_token)
        extrapolated = math.nan
        if math.isnan(needed) and power is not None:
            extrapolated = power.compute_for(loss) * COMPUTE_UNIT / training_flops(small.parameters, 1)
        found.append(Trade(tokens, loss, needed, ratio, bool(np.isfinite(seeds).all()), extrapolated))
    return found


def _needed(small: Ends, losses: Array, target: float) -> float:
    there = np.isfinite(losses)
    return tokens_to_loss(small.tokens[there], losses[there], target) if there.any() else math.nan


def _limits_over_seeds(estimate: float, seeds: Array) -> Interval:
    """Student's t of the logs."""
    if len(seeds) < 2 or not np.isfinite(seeds).all() or not math.isfinite(estimate):
        return Interval(0.0, estimate, math.inf)
    logs = mean_interval(list(np.log(seeds)))
    reach = logs.high - logs.estimate
    with np.errstate(over="ignore"):
        return Interval(float(estimate * np.exp(-reach)), estimate, float(estimate * np.exp(reach)))


def evaluate_envelope(experiment: Experiment) -> Findings:
    """Findings, tables, and figure 6."""
    ends = read_ends(experiment)
    small, large = ends[0], ends[1] if len(ends) > 1 else None
    try:
        forms: tuple[Envelope, ...] = fit_forms(small)
        why = ""
    except UserError as error:  # what was run is too little, which a failed cell can make it, too
        forms, why = (), str(error)
    power = next((form for form in forms if form.form == "power"), None)
    found = [] if large is None else trades(small, large, power)
    findings = [_better_form(small, forms, why), _still_falls(small)]
    tables = [_ends_table(ends), _forms_table(small, forms)]
    if large is not None:
        findings.append(_trade_finding(small, large, found))
        tables.append(_trade_table(small, large, found))
    draw_envelope(experiment, ends, forms, found, experiment.output / PICTURE)
    caption = "Decayed losses over compute with both fits, the stable stages, and the larger model (figure 6)"
    return Findings(tuple(findings), tuple(tables), (Picture(PICTURE, caption),))


def _better_form(small: Ends, forms: tuple[Envelope, ...], why: str) -> Finding:
    claim = "The loss envelope of continued training is a power law rather than an exponential (section 4.3)"
    paper = "L(C) = beta C^-alpha + L0 fits better"
    if not forms:
        return Finding(claim, paper, f"no fit: {why}", "undecided")
    better, worse = forms
    lead = worse.aic - better.aic
    ours = f"{better.form} by {number(lead)} in AIC, R^2 {better.r_squared:.4f} against {worse.r_squared:.4f}"
    own = [_form_of_seed(small, seed) for seed in range(small.losses.shape[1])]
    if len(own) > 1:
        ours += f"; by its own seeds {', '.join(own)}"
    decided = lead >= EVIDENCE and set(own) == {better.form}
    return Finding(claim, paper, ours, better.form == "power" if decided else "undecided")


def _form_of_seed(small: Ends, seed: int) -> str:
    losses = small.losses[:, seed]
    there = np.isfinite(losses)
    try:
        return compare_envelopes(small.compute[there] / COMPUTE_UNIT, losses[there])[0].form
    except UserError:
        return "none"


def _still_falls(small: Ends) -> Finding:
    claim = "Trained far beyond what its size deserves, the model still gets better (section 4.3, figure 6)"
    paper = "space for improvement at the last point"
    there = np.flatnonzero(small.whole)
    if len(there) < 2:
        return Finding(claim, paper, "not measured", "undecided")
    before, last = there[-2:]
    fall = noise_of(small.losses).difference(float(small.mean[before]), float(small.mean[last]))
    known = f" ({fall.low:.4f} to {fall.high:.4f})" if fall.is_bounded else " (one seed: limits not known)"
    per = [f"{tokens / small.parameters:.3g} N" for tokens in small.tokens[[before, last]]]
    ours = f"from {per[0]} to {per[1]} tokens the loss falls by {fall.estimate:.4f}{known}"
    return Finding(claim, paper, ours, above(fall))


def _trade_finding(small: Ends, large: Ends, found: list[Trade]) -> Finding:
    claim = f"{small.name}, trained longer, reaches the loss of {large.name} and is cheaper to serve (section 4.3)"
    paper = f"0.036B reaches 0.17B with {PAPER_TRAINING} its training compute; a token costs {PAPER_SERVING}"
    if not found:
        return Finding(claim, paper, f"no loss of {large.name}", "undecided")
    each = found[-1]  # the one that is furthest trained
    saved = f"a served token costs 1/{large.parameters / small.parameters:.2g}"
    at = f"{large.name} at {each.tokens / large.parameters:.3g} N tokens has {each.loss:.4f}"
    if math.isnan(each.needed):
        first, last = (tokens / small.parameters for tokens in small.tokens[[0, -1]])
        ours = f"{at}, outside what {small.name} has from {first:.3g} N to {last:.3g} N; {_beyond(each)}"
        return Finding(claim, paper, ours, "undecided")
    ours = (
        f"{at}; {small.name} needs {each.needed / small.parameters:.3g} N, {_ratio(each.ratio)} the training compute;"
        f" {saved}; that has paid after {_break_even(small, large, each.tokens, each.needed):.3g} served tokens"
    )
    verdict: Verdict = True if each.all_seeds and each.ratio.is_bounded else "undecided"
    return Finding(claim, paper, ours, verdict)


def _break_even(small: Ends, large: Ends, large_tokens: float, small_tokens: float) -> float:
    return break_even_tokens((large.parameters, large_tokens), (small.parameters, small_tokens))


def _beyond(trade: Trade) -> str:
    if math.isnan(trade.extrapolated):
        return "no fit to extrapolate by"
    if math.isinf(trade.extrapolated):
        return "the power law never gets there (extrapolated)"
    return f"by the power law after {trade.extrapolated:.3g} tokens (extrapolated)"


def _ratio(ratio: Interval) -> str:
    known = f" ({ratio.low:.2g} to {ratio.high:.2g})" if ratio.is_bounded else " (limits not known)"
    return f"{ratio.estimate:.3g} times{known}"


def _ends_table(ends: list[Ends]) -> Table:
    compute = np.concatenate([each.compute[each.whole] for each in ends])
    best: set[float] = set()
    if len(compute):
        best = {
            float(compute[place]) for place in optimal_points(compute, np.concatenate([e.mean[e.whole] for e in ends]))
        }
    rows = []
    for each in ends:
        for place, tokens in enumerate(each.tokens):
            losses, flops = each.losses[place], float(each.compute[place])
            known = math.isfinite(each.mean[place])
            spread = f"{float(np.ptp(losses)):.4f}" if known and len(losses) > 1 else "-"
            shown = f"{each.mean[place]:.4f}" if known else "-"
            mark = "yes" if known and flops in best else ""
            head = (each.name, f"{tokens:,.0f}", f"{tokens / each.parameters:.3g}", f"{flops:.3g}")
            rows.append((*head, shown, spread, mark))
    columns = ("size", "D", "D / N", "C = 6ND", "loss", "spread of seeds", "none has less for no more compute")
    return Table("Held-out loss (nats per token, mean of the seeds) of the decayed ends", columns, tuple(rows))


def _forms_table(small: Ends, forms: tuple[Envelope, ...]) -> Table:
    formula = {"power": "beta C^-alpha + L0", "exponential": "alpha e^(-beta C) + L0"}
    rows = []
    for each in forms:
        values = (number(value, 4) for value in (each.alpha, each.beta, each.l0))
        rows.append((f"{each.form}, {formula[each.form]}", *values, f"{each.r_squared:.5f}", f"{each.aic:.2f}"))
    columns = ("", "alpha", "beta", "L0", "R^2", "AIC (corrected)")
    return Table(f"The envelope of {small.name}, C in 1e18 FLOPs; the better form first", columns, tuple(rows))


def _trade_table(small: Ends, large: Ends, found: list[Trade]) -> Table:
    rows = []
    for each in found:
        head = (f"{each.tokens:,.0f}", f"{each.tokens / large.parameters:.3g}", f"{each.loss:.4f}")
        if not math.isnan(each.needed):
            paid = f"{_break_even(small, large, each.tokens, each.needed):.3g}"
            rows.append((*head, f"{each.needed:,.0f}", _ratio(each.ratio), paid, "measured"))
        elif math.isfinite(each.extrapolated):
            ratio = each.extrapolated * small.parameters / (each.tokens * large.parameters)
            paid = f"{_break_even(small, large, each.tokens, each.extrapolated):.3g}"
            rows.append((*head, f"{each.extrapolated:,.0f}", f"{ratio:.3g} times", paid, "extrapolated"))
        else:
            rows.append(
                (*head, "-", "-", "-", "never, by the power law" if math.isinf(each.extrapolated) else "outside")
            )
    counted = [flops_per_token(each.cells[0][0].recipe.model, _length(each)) for each in (small, large)]
    title = (
        f"What {small.name} needs for the losses of {large.name}: 6ND to train, 2N a served token, which is"
        f" 1/{large.parameters / small.parameters:.3g}; with attention and LM head 1/{counted[1] / counted[0]:.3g}"
    )
    columns = (
        f"D of {large.name}",
        "D / N",
        "loss",
        f"D of {small.name}",
        "training compute",
        "served tokens that pay",
        "",
    )
    return Table(title, columns, tuple(rows))


def _length(ends: Ends) -> int:
    return ends.cells[0][0].recipe.data.sequence_length
