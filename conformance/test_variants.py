"""The variants in every library: y against the definitions, gradients against differences, and what they are not."""

import math

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import variants
from normkit.conformance.checks import assert_close, unchanged
from normkit.conformance.libraries import first
from normkit.conformance.misfits import arrays, refused


@pytest.fixture(autouse=True)
def _none_required(monkeypatch):
    """No kernel is written for most of them."""
    monkeypatch.setattr(kernels, "mode", "1" if kernels.mode == "require" else kernels.mode)


def _taken(library, case, given):
    """What the function returns, and the gradients by name."""
    options = {**case.options, **({"mask": given["mask"]} if case.masked else {})}
    out, found = library.vjp(getattr(nk, case.function), [given[n] for n in case.names], options, given["dy"])
    return out, {case.names[i]: gradient for i, gradient in found.items()}


@pytest.mark.grid(cases=variants.VARIANTS, thrifty=variants.FEWER, dtypes=["float32"])
def test_value_and_gradient(library, dtype, case):
    _check(library, dtype, case)


@pytest.mark.grid(cases=variants.FEW, thrifty=variants.FEW[:1], dtypes=["float64", "float16", "bfloat16"])
def test_other_dtypes(library, dtype, case):
    _check(library, dtype, case)


def _check(library, dtype, case):
    values = case.operands(dtype)
    given = variants.given(library, case, values, dtype)
    with unchanged(library, given):
        out, found = _taken(library, case, given)
    assert_close(library, first(out), variants.forward(case, values), library.kind(given["x"]), "forward")
    reference = variants.vjp(case, values)
    assert found.keys() == reference.keys()
    for name, gradient in found.items():
        assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient")


@pytest.mark.grid(cases=variants.FEW, thrifty=variants.FEWER[:3])
def test_second_order(library, case):
    if not library.differentiates:
        pytest.skip(f"{library.name} differentiates nothing by itself; nk.vjp is first order")
    values = case.operands("float32")
    given = variants.given(library, case, values, "float32")
    rng = np.random.default_rng(1)
    directions = {n: variants.rounded(rng.normal(size=values[n].shape), "float32") for n in case.names}
    options = {**case.options, **({"mask": given["mask"]} if case.masked else {})}
    args, along = [given[n] for n in case.names], [library.array(directions[n], "float32") for n in case.names]
    found = library.hessian_product(getattr(nk, case.function), args, options, given["dy"], along)
    reference = variants.hessian_product(case, values, directions)
    for name, product in zip(case.names, found.values(), strict=True):
        assert_close(library, product, reference[name], library.kind(given[name]), "second order")


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_virtual_batches_leave_statistics_of_the_whole(library, axis):
    """Far from zero, too: they are merged from counts, means and centred squares."""
    x = variants.rounded(np.random.default_rng(0).normal(1e4, 1.0, (12, 6, 6)) + np.arange(6)[:, None], "float32")
    mask = np.random.default_rng(1).random(x.shape) > 0.5
    given, seen = library.array(x, "float32"), library.array(mask, "bool")
    for options in ({}, {"mask": seen}):
        part = nk.batch_norm_train(given, axis=axis, virtual_batch_size=3, **options)[1]
        whole = nk.batch_norm_train(given, axis=axis, **options)[1]
        kind = library.kind(whole.mean)
        assert_close(library, part.mean, library.numpy(whole.mean), kind, "statistics")
        assert_close(library, part.var, library.numpy(whole.var), kind, "statistics")
        counts = [c if isinstance(c, int) else library.numpy(c) for c in (part.count, whole.count)]
        assert np.array_equal(*counts)


def test_an_empty_batch_of_virtual_ones(library):
    y, stats = nk.batch_norm_train(library.array(np.zeros((0, 3, 2)), "float32"), virtual_batch_size=4)
    assert tuple(y.shape) == (0, 3, 2) and stats.count == 0
    assert not library.numpy(stats.mean).any() and not library.numpy(stats.var).any()


def test_the_centred_2_norm_is_the_standard_deviation(library):
    """Bit for bit, where neither is a kernel's."""
    rng = np.random.default_rng(2)
    x, w = library.array(rng.normal(3, 2, (6, 5, 4)), "float32"), library.array(rng.normal(size=5), "float32")
    with kernels.off():
        y, stats = nk.lp_batch_norm_train(x, w, p=2, centred=True)
        same, whole = nk.batch_norm_train(x, w)
        assert np.array_equal(library.numpy(y), library.numpy(same))
        assert np.array_equal(library.numpy(stats.var), library.numpy(whole.var))
        y, same = nk.lp_layer_norm(x, p=2.0, centred=True), nk.layer_norm(x)
        assert np.array_equal(library.numpy(y), library.numpy(same))


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_at_the_ends_of_the_range(library, p, scale):
    case = variants.Variant("lp_layer_norm", (4, 9), {"p": p, "eps": 0.0}, ("x",))
    values = case.operands("float32", np.random.default_rng(0).normal(0.5, 1.5, case.shape) * scale)
    given = variants.given(library, case, values, "float32")
    y, found = _taken(library, case, given)
    assert_close(library, y, variants.forward(case, values), library.kind(given["x"]), "forward")
    reference = variants.vjp(case, values, h=2.0**-14 * scale)
    assert_close(library, found["x"], reference["x"], library.kind(given["x"]), "gradient")


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_running_statistics_of_norms(library, p):
    """What training returns makes inference the same function."""
    x = library.array(np.random.default_rng(3).normal(1, 2, (9, 4)), "float32")
    y, stats = nk.lp_batch_norm_train(x, p=p)
    zero = library.array(np.zeros(4), "float32")
    running = nk.RunningStats(zero, zero).update(stats, momentum=0.0, unbiased=False)
    inference = nk.batch_norm(x, running.mean, running.var)
    assert_close(library, inference, library.numpy(y).astype(variants.Real), library.kind(x), "forward")


REFUSED = {
    "virtual batches that do not divide": (
        lambda a: nk.batch_norm_train(a.x, virtual_batch_size=3),
        ValueError, r"virtual_batch_size must divide the batch, 2 samples; received 3\.",
    ),
    "no virtual batch": (
        lambda a: nk.batch_norm_train(a.x, virtual_batch_size=0),
        ValueError, r"virtual_batch_size must be a positive integer; received 0\.",
    ),
    "virtual batches of one value": (
        lambda a: nk.batch_norm_train(a.matrix, virtual_batch_size=1),
        ValueError, r"batch_norm_train needs more than one value per channel.*",
    ),
    "p = 3": (
        lambda a: nk.lp_layer_norm(a.x, p=3), ValueError, r"p must be 1, 2 or infinity; received 3\.",
    ),
    "p = 0.5": (
        lambda a: nk.lp_batch_norm_train(a.x, p=0.5), ValueError, r"p must be 1, 2 or infinity; received 0\.5\.",
    ),
    "p NaN": (
        lambda a: nk.lp_layer_norm(a.x, p=math.nan), ValueError, r"p must be 1, 2 or infinity; received nan\.",
    ),
    "p as text": (lambda a: nk.lp_layer_norm(a.x, p="inf"), TypeError, r"p must be a number; received str 'inf'\."),
    "the largest of some": (
        lambda a: nk.lp_layer_norm(a.x, p=math.inf, consistent=True, mask=a.flags),
        ValueError, r"consistent=True with p=inf needs as many elements in each set; received a mask or lengths\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_bad_input(library, row):
    call, error, text = REFUSED[row]
    a = arrays(library)
    refused(lambda: call(a), error, text)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: nk.batch_norm_train(x, virtual_batch_size=2), "the batch is normalized as several."),
        (lambda x: nk.lp_layer_norm(x, p=1), "x is divided by a p-norm."),
    ],
)
def test_no_kernel_is_written_for_it(library, monkeypatch, call, words):
    if not kernels.built or library.name not in ("numpy", "torch", "tensorflow", "jax"):
        pytest.skip("there are no kernels")
    monkeypatch.setattr(kernels, "mode", "require")
    with pytest.raises(kernels.KernelError, match=words):
        call(library.array(np.ones((4, 3)), "float32"))
