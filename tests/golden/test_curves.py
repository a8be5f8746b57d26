"""Three tiny runs give the committed losses and gradient norms, and twice the same ones."""

from __future__ import annotations

import pytest

from tests.distributed.parity import DIGITS, agreement
from tests.golden.files import CURVES, RENEW, curve, read_curve

pytestmark = pytest.mark.cpu_only("the golden files were written on a CPU")


@pytest.mark.parametrize("name", CURVES)
def test_a_run_has_its_golden_curve(name: str) -> None:
    first, second = curve(CURVES[name]), curve(CURVES[name])
    assert first == second, "two runs on one machine are equal in every bit"
    # another CPU adds in another order: as many digits as other layouts have
    found = agreement(read_curve(name), first)
    assert found >= DIGITS, f"{found:.1f} digits agree; last step {first[-1]}; if that is meant: {RENEW}"


def test_the_files_are_of_runs_that_learn_and_differ() -> None:
    curves = {name: read_curve(name) for name in CURVES}
    assert all(len(lines) == 20 and lines[-1][0] < lines[0][0] - 0.5 for lines in curves.values())
    assert agreement(curves["dense"], curves["experts"]) < 3
    assert agreement(curves["dense"], curves["tensor-parallel-2-zero-1"]) >= DIGITS
