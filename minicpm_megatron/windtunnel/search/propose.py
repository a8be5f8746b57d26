"""The next set of values to try: expected improvement under a Gaussian process (Optuna's GPSampler).

The study is made anew for every proposal from what is known, so that nothing but the trials and their results decides
it, and no state of a sampler can be lost or be another process's. The process is fitted to the logarithm of what a loss
lies above the best: the worst sets are whole nats above, and a surface through them would not see the differences that
matter. What is running counts as unknown, and the expected
improvement is that of several runs at once (qLogEI), so that two runs do not try the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from minicpm_megatron.windtunnel.search.space import Range, Values

RANDOM_TRIALS = 10
"""Results from which on the Gaussian process decides: Optuna's default; until then values are drawn at random."""
_RESOLUTION = 0.01  # of the best loss: differences below it are not stretched by the logarithm, they are noise
_DIGITS = 4  # of proposed values: more say nothing and make recipes hard to read


def propose(
    ranges: Mapping[str, Range], results: Sequence[tuple[Values, float]], running: Sequence[Values], seed: int
) -> dict[str, float]:
    """A set of values inside the ranges, evenly over their logarithms where nothing is known.

    Args:
        ranges: name of an axis -> (low, high).
        results: sets with their losses (positive); not finite: the run diverged, which counts as the highest finite
            loss, as no surface goes through infinity.
        running: sets whose loss is not known yet.
        seed: decides, together with the others, the result.
    """
    import optuna

    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(low, high, log=True) for name, (low, high) in ranges.items()
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    study = optuna.create_study(sampler=sampler)
    losses = [loss for _, loss in results]
    finite = [loss for loss in losses if math.isfinite(loss)] or [1.0]
    best, worst = min(finite), max(finite)
    for values, loss in results:
        value = math.log(min(loss, worst) - best + _RESOLUTION * best)
        study.add_trial(optuna.trial.create_trial(params=dict(values), distributions=space, value=value))
    for values in running:
        state = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.trial.create_trial(params=dict(values), distributions=space, state=state))
    found = study.ask(space).params
    return {name: min(max(float(f"{found[name]:.{_DIGITS}g}"), low), high) for name, (low, high) in ranges.items()}


def seed_of(seed: int, number: int) -> int:
    """The seed of one proposal of a search."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
