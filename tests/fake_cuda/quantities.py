"""Counts of a case as flat quantities, which `counts.json` holds and tests compare."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fake_cuda.counting import Total, Work

Quantities = dict[str, int]


def of(work: Work, synchronisations: Mapping[str, int]) -> Quantities:
    """Operations, bytes and flops; the same of each kind of collective; synchronisations by kind and place."""
    found = _of(work.total)
    for kind, total in sorted(work.collectives.items()):
        found |= {f"{kind} {name}": value for name, value in _of(total).items()}
    return found | {f"host waits: {place}": times for place, times in synchronisations.items()}


def _of(total: Total) -> Quantities:
    sums = {"operations": total.operations, "bytes": total.bytes, "flops": total.flops}
    return {name: value for name, value in sums.items() if value}


def named(what: str, quantities: Quantities) -> Quantities:
    """The same quantities, of `what`."""
    return {f"{what}: {name}": value for name, value in quantities.items()}


def per_layer(what: str, one: Quantities, two: Quantities) -> Quantities:
    """Quantities of a layer, and of all else, from those of models of one and two layers."""
    layer = {name: two.get(name, 0) - one.get(name, 0) for name in one | two}
    rest = {name: one.get(name, 0) - value for name, value in layer.items()}
    found = named(f"{what}, a layer", layer) | named(f"{what}, all else", rest)
    return {name: value for name, value in found.items() if value}
