"""The case table by the fused kernels and by the core: who serves what, and that it makes no difference."""

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import cases, inputs, measure, oracle, plain
from normkit.conformance.kernel_inputs import need_kernels
from normkit.conformance.libraries import first
from normkit.conformance.tolerances import tolerance, units

need_kernels()


@pytest.fixture(autouse=True)
def _kernels_on(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "1")


def _compare(library, case, dtype):
    if not library.kernels:
        pytest.skip(f"{library.name} has no kernels")
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype)
    given = measure.arrays(library, case, values, dtype)
    before = kernels.served()
    out, gradients = measure.gradients(library, case, nk, given)
    count = 0 if plain.reason("", case) else 1
    assert kernels.served().since(before) == (count, count)
    if not count:
        return
    with kernels.off():
        other, others = measure.gradients(library, case, nk, given)
    assert kernels.served().since(before) == (count, count)

    def apart(a, b, quantity, scale=None):
        assert library.kind(a) == library.kind(b)
        a, b = library.numpy(a), library.numpy(b)
        # Two answers, each within the tolerance of the right one.
        assert units(a, b, dtype, scale) <= 2 * tolerance(quantity, dtype).units

    apart(first(out), first(other), "forward")
    if case.layer == "batch_norm_train":
        scale = np.abs(values["x"]).max()
        assert np.array_equal(np.broadcast_to(out[1].count, np.shape(other[1].count)), other[1].count)
        for mine, core in zip(out[1][:2], other[1][:2], strict=True):
            assert library.kind(mine) == library.kind(core)
            kept = "float64" if dtype == "float64" else "float32"
            limit = 2 * tolerance("statistics", kept).units
            assert units(library.numpy(mine), library.numpy(core), kept, scale**2) <= limit
    scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)[1]
    for name, gradient in gradients.items():
        apart(gradient, others[name], "gradient", scales[name])


@pytest.mark.grid(cases=cases.CASES, thrifty=cases.SHORT, dtypes=["float32"])
def test_float32_is_the_core_s(library, dtype, case):
    _compare(library, case, dtype)


@pytest.mark.grid(cases=cases.SHORT, thrifty=cases.SHORTEST, dtypes=["float64", "float16", "bfloat16"])
def test_other_dtypes_are_the_core_s(library, dtype, case):
    _compare(library, case, dtype)


def _views(x):
    """The same values, otherwise in memory."""
    wide = np.zeros((*x.shape[:-1], 3 * x.shape[-1]), x.dtype)
    wide[..., 1::3] = x
    return {
        "every third": wide[..., 1::3],
        "Fortran": np.asfortranarray(x),
        "backwards": np.ascontiguousarray(x[::-1, ..., ::-1])[::-1, ..., ::-1],
        "channels last": np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
        "repeated": np.broadcast_to(x[:1], x.shape),
    }


@pytest.mark.grid(cases=[c for c in cases.SHORT if not c.masked], dtypes=["float32", "float64", "bfloat16"])
def test_a_second_call_has_the_bits_of_the_first(library, dtype, case, monkeypatch):
    """It takes a short way, past the checks: the kernel that the first was bound to, its sizes known."""
    if not library.kernels:
        pytest.skip(f"{library.name} has no kernels")
    given = measure.arrays(library, case, inputs.operands(case, inputs.BY_NAME["offset 1e4"], dtype), dtype)
    once = measure.gradients(library, case, nk, given)
    short = library.name == "torch" or (library.name == "numpy" and dtype != "bfloat16")
    if short and case.layout == "contiguous":
        monkeypatch.setattr(kernels, "forward", None)
    again = measure.gradients(library, case, nk, given)

    def bits(out, gradients):
        y, *stats = out if isinstance(out, tuple) else (out,)
        arrays = [y, *(stats[0][:2] if stats else ()), *gradients.values()]
        return [library.numpy(a).tobytes() for a in arrays]

    assert bits(*again) == bits(*once)


@pytest.mark.parametrize("axis", [-1, 0, 1, (1, 2), (0, 3), (0, 1, 2, 3)])
def test_an_array_has_the_bits_of_its_copy(axis):
    """Wherever x, dy and the parameters lie; y and dx lie as x does."""
    rng = np.random.default_rng(2)
    dense = rng.standard_normal((4, 6, 5, 7)).astype("f4")
    shape = nk.layer_norm(dense, axis=axis).shape
    params = [
        rng.standard_normal([dense.shape[a] for a in np.sort(np.atleast_1d(axis) % 4)]).astype("f4") for _ in "wb"
    ]
    spread = [np.repeat(p, 2, -1)[..., ::2] for p in params]
    for name, x in _views(dense).items():
        copy, dy = np.ascontiguousarray(x), rng.standard_normal(shape).astype("f4")
        before = kernels.served()
        y, pullback = nk.vjp(nk.layer_norm, x, *spread, axis=axis)
        gradients = pullback(np.asfortranarray(dy))
        assert kernels.served().since(before) == (1, 1), name
        like = np.empty_like(x)
        assert y.strides == like.strides and gradients[0].strides == like.strides, name
        wanted, pullback = nk.vjp(nk.layer_norm, copy, *params, axis=axis)
        assert np.array_equal(y, wanted), name
        for mine, theirs in zip(gradients, pullback(dy), strict=True):
            assert np.array_equal(mine, theirs), name
