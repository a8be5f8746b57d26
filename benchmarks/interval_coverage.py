"""How often the intervals of the scaling law hold what they claim to: known laws, random noise, many draws.

    python benchmarks/interval_coverage.py --draws 1000
    python benchmarks/interval_coverage.py --draws 300 --method huber --noise 0.002

Six sizes with six amounts of tokens each, as section 4.5 of arXiv 2404.06395 has them, losses from a law of its figure
10 plus normal noise of the given standard deviation. Printed is the share of draws, in percent, whose interval holds
the truth; its standard error is 0.7 at 95 % and 1000 draws.
"""

from __future__ import annotations

import argparse

import numpy as np

from minicpm_megatron.methods.scaling_law import PUBLISHED, PUBLISHED_COMPUTE
from minicpm_megatron.methods.scaling_law_bootstrap import bootstrap

SIZES = (0.04, 0.1, 0.3, 0.5, 0.85, 2.0)  # 1e9 parameters
RATIOS = (10, 20, 30, 40, 50, 60)  # tokens a parameter
NAMES = ("c_n", "alpha", "c_d", "beta", "l0", "k_squared", "eta", "tokens_per_parameter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--law", choices=PUBLISHED, default="average", help="the true law")
    parser.add_argument("--method", choices=("curve_fit", "huber"), default="curve_fit", help="how it is fitted")
    parser.add_argument("--noise", type=float, default=0.002, help="standard deviation, in the loss's unit")
    parser.add_argument("--level", type=float, nargs="+", default=[0.8, 0.95, 0.99], help="of the intervals")
    parser.add_argument("--draws", type=int, default=200, help="sets of losses")
    parser.add_argument("--resamples", type=int, default=1000, help="of each bootstrap")
    arguments = parser.parse_args()

    law = PUBLISHED[arguments.law].law
    n = np.repeat(SIZES, len(RATIOS))
    d = n * np.tile(RATIOS, len(SIZES))
    truth = {name: getattr(law, name) for name in NAMES[:5]} | {"k_squared": law.k**2, "eta": law.eta}
    truth["tokens_per_parameter"] = law.tokens_per_parameter(PUBLISHED_COMPUTE)
    held = {level: dict.fromkeys((*NAMES, "all five coefficients"), 0) for level in arguments.level}
    for draw in range(arguments.draws):
        noise = arguments.noise * np.random.default_rng([draw, 1]).standard_normal(len(n))
        found = bootstrap(
            n, d, law.loss(n, d) + noise, method=arguments.method, resamples=arguments.resamples, seed=draw
        )
        for level, counts in held.items():
            inside = {name: truth[name] in limits for name, limits in found.summary(level=level).items()}
            inside["all five coefficients"] = all(inside[name] for name in NAMES[:5])
            for name, holds in inside.items():
                counts[name] += holds
    print(
        f"{arguments.method}, law {arguments.law}, noise {arguments.noise},"
        f" {arguments.draws} draws of {arguments.resamples} resamples"
    )
    print("| level |", " | ".join((*NAMES, "all five coefficients")), "|")
    for level, counts in held.items():
        print(f"| {level:.0%} |", " | ".join(f"{100 * count / arguments.draws:.1f}" for count in counts.values()), "|")


if __name__ == "__main__":
    main()
