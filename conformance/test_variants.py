"""The variants in every library: y against the definitions, gradients against differences, and what they are not."""

import functools
import math

import numpy as np
import pytest

import normkit as nk
from normkit._dispatch import backend_of
from normkit.backends import kernels
from normkit.conformance import oracle, variants
from normkit.conformance.checks import assert_close, unchanged
from normkit.conformance.libraries import LIBRARIES, first
from normkit.conformance.misfits import arrays, refused

# torch.compile's own parts warn of each other when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

MODES = [mode for library in LIBRARIES.values() for mode in library.modes]


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


@pytest.mark.parametrize("mode", MODES)
def test_compiled(library, mode):
    """One of each kind in one graph, for which a compiler takes hardly longer than for one of them."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    calls = [(case, case.operands("float32")) for case in variants.FEWER]
    given = [variants.given(library, case, values, "float32") for case, values in calls]
    flat = [a[name] for (case, _), a in zip(calls, given, strict=True) for name in case.names]
    xp = backend_of("x", flat[0]).namespace(flat[0])

    def joined(ys):
        return xp.concat([xp.reshape(y, (-1,)) for y in ys], axis=0)

    def together(*arrays):
        ys, start = [], 0
        for (case, _), a in zip(calls, given, strict=True):
            end = start + len(case.names)
            options = {**case.options, **({"mask": a["mask"]} if case.masked else {})}
            ys.append(first(getattr(nk, case.function)(*arrays[start:end], **options)))
            start = end
        return joined(ys)

    y, found = library.vjp(library.compiled(together, mode), flat, {}, joined([a["dy"] for a in given]))
    kind, at, start = library.kind(y), iter(range(len(flat))), 0
    for case, values in calls:
        wanted, reference = variants.forward(case, values), variants.vjp(case, values)
        assert_close(library, xp.reshape(y[start : start + wanted.size], wanted.shape), wanted, kind, "forward")
        start += wanted.size
        for name in case.names:
            gradient = found.get(next(at))
            if name in reference:
                assert_close(library, gradient, reference[name], kind, "gradient")
            else:
                assert gradient is None or not library.numpy(gradient).any()


def _check(library, dtype, case):
    values = case.operands(dtype)
    given = variants.given(library, case, values, dtype)
    with unchanged(library, given):
        out, found = _taken(library, case, given)
    assert_close(library, first(out), variants.forward(case, values), library.kind(given[case.names[0]]), "forward")
    assert isinstance(out, tuple) == case.function.endswith("_train")
    reference = variants.vjp(case, values)
    assert found.keys() >= reference.keys()
    for name, gradient in found.items():
        if name not in reference:
            assert not library.numpy(gradient).any()
            continue
        assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient")


@pytest.mark.grid(cases=variants.FEW, thrifty=variants.FEWER[:2])
def test_second_order(library, case):
    if not library.differentiates:
        pytest.skip(f"{library.name} differentiates nothing by itself; nk.vjp is first order")
    values = case.operands("float32")
    given = variants.given(library, case, values, "float32")
    rng = np.random.default_rng(1)
    directions = {n: variants.rounded(rng.normal(size=values[n].shape), "float32") for n in case.output}
    options = {**case.options, **({"mask": given["mask"]} if case.masked else {})}

    def function(*arrays):
        named = {**given, **dict(zip(case.output, arrays, strict=True))}
        return getattr(nk, case.function)(*(named[n] for n in case.names), **options)

    args, along = [given[n] for n in case.output], [library.array(directions[n], "float32") for n in case.output]
    found = library.hessian_product(function, args, {}, given["dy"], along)
    reference = variants.hessian_product(case, values, directions)
    for name, product in zip(case.output, found.values(), strict=True):
        assert_close(library, product, reference[name], library.kind(given[name]), "second order")


def test_virtual_batches_of_an_unknown_number(library):
    if library.name != "tensorflow":
        pytest.skip("only tf.function traces unknown sizes")
    tf, x = library.xp, library.array(np.random.default_rng(7).normal(3, 2, (6, 4, 3)), "float32")
    for shape in ((None, 4, 3), (None, None, 3)):
        for jit in (None, True):
            run = tf.function(
                lambda x: nk.batch_norm_train(x, axis=-1, virtual_batch_size=2),
                input_signature=[tf.TensorSpec(shape)], jit_compile=jit,
            )  # fmt: skip
            (y, stats), (same, whole) = run(x), nk.batch_norm_train(x, axis=-1, virtual_batch_size=2)
            assert_close(library, y, library.numpy(same).astype(variants.Real), library.kind(same), "forward")
            assert_close(library, stats.var, library.numpy(whole.var), library.kind(whole.var), "statistics")
            assert np.array_equal(library.numpy(stats.count), library.numpy(tf.fill(stats.count.shape, 24.0)))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_virtual_batches_leave_statistics_of_the_whole(library, axis):
    """Far from zero, too: they are merged from counts, means and centred squares."""
    if library.thrifty and axis != 1:
        pytest.skip("one axis is enough where each takes seconds to compile")
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
    assert_close(library, y, variants.forward(case, values), library.kind(given[case.names[0]]), "forward")
    reference = variants.vjp(case, values, h=2.0**-14 * scale)
    assert_close(library, found["x"], reference["x"], library.kind(given[case.names[0]]), "gradient")


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_running_statistics_of_norms(library, p):
    """What training returns makes inference the same function."""
    x = library.array(np.random.default_rng(3).normal(1, 2, (9, 4)), "float32")
    y, stats = nk.lp_batch_norm_train(x, p=p)
    zero = library.array(np.zeros(4), "float32")
    running = nk.RunningStats(zero, zero).update(stats, momentum=0.0, unbiased=False)
    inference = nk.batch_norm(x, running.mean, running.var)
    assert_close(library, inference, library.numpy(y).astype(variants.Real), library.kind(x), "forward")


@pytest.mark.grid(dtypes=["bfloat16", "float16"])
@pytest.mark.parametrize(("cast", "offset"), [("input", 0.0), ("output", 0.0), ("output", 1.0), ("input", 1.0)])
def test_where_rms_norm_rounds(library, dtype, cast, offset):
    """Element by element the narrow number that the definition has; of the other cast point, many are not."""
    _rounds(library, dtype, cast, offset)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.grid(dtypes=["bfloat16"])
def test_where_a_compiled_rms_norm_rounds(library, dtype, mode):
    """A compiler that computes in float32 must not leave the rounding before the weight out."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    _rounds(library, dtype, "input", 1.0, mode)


def _rounds(library, dtype, cast, offset, mode=None):
    rng = np.random.default_rng(0)
    x, w = (variants.rounded(rng.normal(size=n), dtype) for n in ((64, 96), 96))
    dy = variants.rounded(rng.normal(size=x.shape), dtype)
    given = [library.array(a, kind) for a, kind in ((x, dtype), (w, "float32"), (dy, dtype))]
    function = functools.partial(nk.rms_norm, weight_offset=offset, cast=cast)
    function = function if mode is None else library.compiled(function, mode)
    y, (dx, dweight) = _with_gradients(library, function, given[:2], {}, given[2])
    xhat = oracle.rms_norm(x).astype(float)
    expected, other = variants.rounded(variants.rounded(xhat, dtype) * (w + offset), dtype), xhat * (w + offset)
    expected, other = (expected, other) if cast == "input" else (variants.rounded(other, dtype), expected)
    off = library.numpy(y) != expected
    # Where float32 is within its own rounding of the middle between two narrow numbers.
    assert off.mean() < 1e-3 and (library.numpy(y) != variants.rounded(other, dtype)).mean() > 0.05
    met = library.numpy(nk.rms_norm(given[0])) if cast == "input" else xhat
    kinds = map(library.kind, given)
    reference = oracle.vjp("rms_norm", {"x": x, "weight": w}, dy, {"weight_offset": offset})["x"]
    assert_close(library, dx, reference, next(kinds), "gradient")
    assert library.kind(dweight) == next(kinds)
    # Two programs of a compiler may round an element in the middle to either side: that is one weight of 96.
    expected = (dy * met).sum(axis=0)
    assert (np.abs(library.numpy(dweight) - expected) > 8 * 2.0**-23 * np.abs(expected).max()).mean() < 0.05


def _with_gradients(library, function, args, options, dy):
    out, found = library.vjp(function, args, options, dy)
    return first(out), list(found.values())


def test_renormalization_between_training_and_inference(library):
    """With r = 1 and d = 0 batch norm in training; without bounds, batch norm in inference."""
    rng = np.random.default_rng(4)
    x, mean, w = (library.array(rng.normal(1, 2, n), "float32") for n in ((8, 5), 5, 5))
    var = library.array(rng.uniform(0.5, 3, 5), "float32")
    y, stats = nk.batch_renorm_train(x, mean, var, w, r_max=1, d_max=0)
    same, whole = nk.batch_norm_train(x, w)
    assert np.array_equal(library.numpy(y), library.numpy(same))
    assert np.array_equal(library.numpy(stats.var), library.numpy(whole.var)) and stats.count == whole.count
    y, _ = nk.batch_renorm_train(x, mean, var, w, r_max=math.inf, d_max=math.inf)
    expected = oracle.batch_norm(*(library.numpy(a) for a in (x, mean, var, w)))
    assert_close(library, y, expected, library.kind(x), "forward")


@pytest.mark.parametrize(("offset", "spread"), [(1e6, 1.0), (1e4, 0.01)])
def test_renormalization_far_from_zero(library, offset, spread):
    """d is a difference of means, of which the batch's keeps what rounding took from it."""
    rng = np.random.default_rng(6)
    x = library.array(rng.normal(offset, spread, (64, 3)), "float32")
    mean, var = (library.array(np.full(3, a), "float32") for a in (offset, spread**2))
    mask = library.array(rng.random((64, 3)) > 0.3, "bool")
    for kept in (None, mask):
        y, _ = nk.batch_renorm_train(x, mean, var, r_max=math.inf, d_max=math.inf, mask=kept)
        named = {} if kept is None else {"mask": library.numpy(kept)}
        expected = variants.batch_renorm_train(
            *map(library.numpy, (x, mean, var)), r_max=math.inf, d_max=math.inf, **named
        )
        assert_close(library, y, expected, library.kind(x), "forward")


def test_bounds_as_arrays(library):
    """So that a compiled step takes new ones."""
    rng = np.random.default_rng(5)
    x, mean = (library.array(rng.normal(2, 2, n), "float32") for n in ((8, 5), 5))
    var = library.array(np.ones(5), "float32")
    xp = backend_of("x", x).namespace(x)
    bounds = [xp.reshape(library.array(np.array([n]), "float32"), ()) for n in (1.5, 0.5)]
    y, _ = nk.batch_renorm_train(x, mean, var, r_max=bounds[0], d_max=bounds[1])
    same, _ = nk.batch_renorm_train(x, mean, var, r_max=1.5, d_max=0.5)
    assert np.array_equal(library.numpy(y), library.numpy(same))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_vectors_below_the_floor(library, p):
    """They are divided by eps, and so is their gradient; zero stays zero."""
    x = library.array(np.array([[0.0, 0.0, 0.0], [1e-4, 0.0, -2e-4], [3.0, 4.0, 0.0]]), "float32")
    dy = library.array(np.ones((3, 3)), "float32")
    y, (dx,) = _with_gradients(library, nk.normalize, [x], {"p": p, "eps": 1e-3}, dy)
    y, dx = library.numpy(y), library.numpy(dx)
    assert not y[0].any() and np.allclose(y[1], [0.1, 0, -0.2], rtol=1e-6)
    assert np.allclose(dx[:2], 1e3, rtol=1e-6) and np.abs(dx[2]).max() < 1
    assert np.isclose(np.linalg.norm(y[2], p), 1, rtol=1e-6)
    assert not library.numpy(nk.normalize(x, p=p))[0].any()


def test_the_threshold_where_y_meets_it(library):
    """A tie's gradient is the threshold's, in every library; NaN is not cut off."""
    x = library.array(np.array([[[0.0, 1.0, -1.0]]]), "float32")
    zero, dy = library.array(np.zeros(1), "float32"), library.array(np.ones((1, 1, 3)), "float32")
    y, (_, dt) = _with_gradients(library, nk.filter_response_norm, [x, None, None, zero], {}, dy)
    assert library.numpy(dt).tolist() == [2.0] and library.numpy(y)[0, 0, 0] == 0
    nan = library.array(np.array([[[np.nan, 1.0, 2.0]]]), "float32")
    assert np.isnan(library.numpy(nk.filter_response_norm(nan, threshold=zero))).all()


def test_a_bound_of_another_library(library):
    a = arrays(library)
    other = pytest.importorskip("array_api_strict").asarray(3.0) if library.name == "numpy" else np.array(3.0)
    text = r"r_max must be of the same library as x \([\w-]+\); received .*: convert one of them\."
    refused(lambda: nk.batch_renorm_train(a.x, a.mean, a.var, r_max=other), TypeError, text)


REFUSED = {
    "r_max below 1": (
        lambda a: nk.batch_renorm_train(a.x, a.mean, a.var, r_max=0.5),
        ValueError, r"r_max must be at least 1; received 0\.5\.",
    ),
    "d_max below 0": (
        lambda a: nk.batch_renorm_train(a.x, a.mean, a.var, d_max=-1.0),
        ValueError, r"d_max must be at least 0; received -1\.0\.",
    ),
    "d_max NaN": (
        lambda a: nk.batch_renorm_train(a.x, a.mean, a.var, d_max=math.nan),
        ValueError, r"d_max must be at least 0; received nan\.",
    ),
    "running statistics of another shape": (
        lambda a: nk.batch_renorm_train(a.x, a.short, a.var),
        ValueError, r"mean must have shape \(4,\); received shape \(3,\)\.",
    ),
    "a cast to nowhere": (
        lambda a: nk.rms_norm(a.x, cast="float32"),
        ValueError, r"cast must be 'output' or 'input'; received 'float32'\.",
    ),
    "kernels of one value": (
        lambda a: nk.weight_standardization(a.mean),
        ValueError, r"weight_standardization needs more than one value for each output channel.*",
    ),
    "gain of another shape": (
        lambda a: nk.weight_standardization(a.x, a.weight),
        ValueError, r"gain must have shape \(2,\); received shape \(4,\)\.",
    ),
    "threshold of another shape": (
        lambda a: nk.filter_response_norm(a.x, threshold=a.short),
        ValueError, r"threshold must have shape \(4,\); received shape \(3,\)\.",
    ),
    "p = 4": (lambda a: nk.normalize(a.x, p=4), ValueError, r"p must be 1, 2 or infinity; received 4\."),
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
        (lambda x: nk.normalize(x), "x is divided by a p-norm."),
        (lambda x: nk.rms_norm(x, cast="input"), "what is normalized is rounded before the weight."),
        (lambda x: nk.filter_response_norm(x[None]), "channels are not centred."),
    ],
)
def test_no_kernel_is_written_for_it(library, monkeypatch, call, words):
    if not kernels.built or library.name not in ("numpy", "torch", "tensorflow", "jax"):
        pytest.skip("there are no kernels")
    monkeypatch.setattr(kernels, "mode", "require")
    with pytest.raises(kernels.KernelError, match=words):
        call(library.array(np.ones((4, 3)), "float32"))
