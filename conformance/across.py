"""What libraries are compared in: the ladder of offsets, and outputs on the same numbers, held against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import normkit as nk
from normkit.conformance import inputs, measure, natives, oracle
from normkit.conformance.cases import Case
from normkit.conformance.inputs import Input
from normkit.conformance.libraries import LIBRARIES, Library, first

DTYPE = "float32"
#: Mean over spread: two steps to a power of ten.
OFFSETS = tuple(10.0 ** (k / 2) for k in range(13))
#: What outputs are held against each other on.
INPUTS = ("normal", "offset 1e4", "mixed offsets", "scale 1e25", "constant", "tabular columns")

#: y by layer, input and whose it is: a native layer's name, nothing for normkit's.
Outputs = dict[tuple[str, str, str], np.ndarray]


@dataclass(frozen=True)
class Rung:
    """Forward errors at an offset, in units of float32; those of native are ``nan`` where there is no such layer."""

    library: str
    layer: str
    native: str
    offset: float
    error: float
    native_error: float


@dataclass(frozen=True)
class Pair:
    """How far two libraries are apart on an input: normkit in both, or a native layer of each."""

    a: str
    b: str
    #: Whose layers: nothing where they are normkit's.
    native_a: str
    native_b: str
    input: str
    #: In units of float32, relative to the largest |y|, of the layer that differs most.
    distance: float
    layer: str


def sites(library: Library) -> list[Case]:
    """One case of each layer, with parameters."""
    return [case for case in measure.sites(library, ("contiguous",)) if case.affine != "none"]


def ladder(library: Library) -> Iterator[Rung]:
    """The errors of each layer at each offset."""
    for case in sites(library):
        for offset in OFFSETS:
            for m in measure.forward(library, case, Input(f"offset {offset:.3g}", inputs.normal(offset)), DTYPE):
                yield Rung(library.name, case.layer, m.native, offset, m.error, m.native_error)


def outputs(library: Library) -> Outputs:
    """y of normkit and of the native layers on the same numbers in each library, channels where it has them."""
    found: Outputs = {}
    for case in sites(LIBRARIES["numpy"]):
        moved = library.channel_axis == -1 and len(case.shape) == 4
        for name in INPUTS:
            values = inputs.operands(case, inputs.BY_NAME[name], DTYPE)
            here = case
            if moved:
                values = {key: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for key, v in values.items()}
                here = dataclasses.replace(case, shape=values["x"].shape, options={**case.options, "axis": -1})
            given = measure.arrays(library, here, values, DTYPE)
            for whose, module in {"": nk, **{m.NAME: m for m in natives.of(library.name)}}.items():
                try:
                    with natives.quiet():
                        y = library.numpy(first(measure.call(here, module, given))).astype(DTYPE)
                except natives.Unsupported:
                    continue
                found[case.layer, name, whose] = np.moveaxis(y, -1, 1) if moved else y
    return found


def pairs(found: Mapping[str, Outputs]) -> list[Pair]:
    """Every two libraries' outputs, and every two native layers', held against each other."""
    owners = [(name, whose) for name, own in found.items() for whose in dict.fromkeys(key[2] for key in own)]
    both = [(a, b) for a, b in itertools.combinations(owners, 2) if bool(a[1]) == bool(b[1])]
    if not both:
        return []
    apart: dict[tuple, list[tuple[float, str]]] = {}
    for case in sites(LIBRARIES["numpy"]):
        for name in INPUTS:
            reference = oracle.forward(case.layer, inputs.operands(case, inputs.BY_NAME[name], DTYPE), case.options)
            for a, b in both:
                y, other = (found[who].get((case.layer, name, whose)) for who, whose in (a, b))
                if y is not None and other is not None:
                    distance = measure.apart(y, other, reference, DTYPE)
                    apart.setdefault((a, b, name), []).append((distance, case.layer))
    return [Pair(a[0], b[0], a[1], b[1], name, *max(far)) for (a, b, name), far in apart.items()]


def worst(found: Sequence[Pair]) -> dict[tuple[tuple[str, str], tuple[str, str]], Pair]:
    """The pair that is furthest apart, for each two."""
    tops: dict[tuple[tuple[str, str], tuple[str, str]], Pair] = {}
    for pair in found:
        key = (pair.a, pair.native_a), (pair.b, pair.native_b)
        if key not in tops or pair.distance > tops[key].distance:
            tops[key] = pair
    return tops
