"""Compiled modes, unknown sizes, vmap and autocast: the same y and gradients as without."""

import contextlib
import re

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance import cases, inputs, measure, natives, oracle
from normkit.conformance.checks import assert_close
from normkit.conformance.libraries import LIBRARIES, first
from normkit.conformance.package import fresh

# torch.compile's own parts warn of each other when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LAYERS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_train"]


def _function(case, given):
    """normkit's function of the case's differentiable arrays alone."""

    def call(*arrays):
        return case.call(getattr(nk, case.layer), {**given, **dict(zip(case.names, arrays, strict=True))})

    return call


def _check(library, case, mode, dtype):
    values = inputs.operands(case, inputs.BY_NAME["offset 1e2"], dtype)
    given = measure.arrays(library, case, values, dtype)
    compiled = library.compiled(_function(case, given), mode)
    arrays = [given[n] for n in case.names]
    out, found = library.vjp(compiled, arrays, {}, given["dy"])
    assert isinstance(out, tuple) == (case.layer == "batch_norm_train")
    reference, scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    y = oracle.forward(case.layer, values, case.options)
    assert_close(library, first(out), y, library.kind(given["x"]), "forward")
    assert_close(library, first(compiled(*arrays)), y, library.kind(given["x"]), "forward")
    for name, gradient in zip(case.names, found.values(), strict=True):
        assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient", scales[name])


@pytest.mark.parametrize("mode", [m for a in LIBRARIES.values() for m in a.modes])
@pytest.mark.grid(cases=cases.SHORTEST)
def test_compiled(library, case, mode):
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    _check(library, case, mode, "float32")


@pytest.mark.parametrize("mode", [m for a in LIBRARIES.values() for m in a.modes])
@pytest.mark.grid(
    cases=[c for c in cases.SHORTEST if c.layer in ("layer_norm", "batch_norm_train")][:2], dtypes=["bfloat16"]
)
def test_compiled_in_a_narrow_dtype(library, dtype, case, mode):
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    _check(library, case, mode, dtype)


@pytest.fixture
def without_kernels():
    with kernels.off():
        yield


@pytest.mark.parametrize("mode", [m for a in LIBRARIES.values() for m in a.modes])
@pytest.mark.parametrize("layer", ["layer_norm", "rms_norm", "batch_norm_train"])
@pytest.mark.parametrize("way", ["", "plain", "plain as if large"])
def test_the_bound_holds_compiled(library, layer, mode, way, request, monkeypatch):
    """On every ladder, whichever formula a compiler is given; a constant is exactly the bias."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    if way:
        if library.name == "torch":
            pytest.skip("of this size Inductor has the formula")
        request.getfixturevalue("without_kernels")
    if way == "plain as if large":
        if library.name != "tensorflow":
            pytest.skip(f"{library.name} has one formula for every size")
        for name in ("SHORT_CALL", "SHORT_RUN"):
            monkeypatch.setattr(f"normkit.backends.tensorflow.backend.{name}", 0)
    case = cases.SITES[library.channel_axis][layer]
    compiled = library.compiled(lambda *arrays: first(_function(case, {})(*arrays)), mode)
    for x in inputs.INPUTS:
        values = inputs.operands(case, x, "float32")
        if x.finite and inputs.holds("float32", values):
            given = measure.arrays(library, case, values, "float32")
            y = compiled(*(given[n] for n in case.names))
            assert_close(library, y, oracle.forward(layer, values, case.options), library.kind(given["x"]), "forward")
            if x.name == "constant" and layer != "rms_norm":
                bias = oracle._expand(values["bias"], case.shape, case.sets.params)
                assert np.array_equal(library.numpy(y), np.broadcast_to(bias, case.shape))


def _twice_by_tapes(tf, call, x, v):
    with tf.GradientTape() as outer:
        outer.watch(x)
        slope = _slope(tf, call, x)
    return outer.gradient(slope, x, output_gradients=v)


def _forward(tf, call, x, v):
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        y = call(x)
    return forward.jvp(y)


def _forward_over_a_tape(tf, call, x, v):
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        slope = _slope(tf, call, x)
    return forward.jvp(slope)


def _slope(tf, call, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(call(x) ** 3)
    return tape.gradient(y, x)


@pytest.mark.parametrize("derivative", [_twice_by_tapes, _forward, _forward_over_a_tape])
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("way", ["", "plain", "masked", "turned"])
def test_derivatives_around_a_graph(library, way, jit, derivative):
    """From outside, of any order: XLA has not all that is in the gradient of a conditional's gradient."""
    if library.name != "tensorflow":
        pytest.skip("only TensorFlow compiles the parts and differentiates around them")
    tf = library.xp
    x = tf.constant(np.random.default_rng(0).normal(size=(5, 3, 6)), tf.float32)

    def call(x):
        return nk.layer_norm(x, axis=(0, 2) if way == "turned" else -1, mask=x > -1 if way == "masked" else None)

    graph = tf.function(call, jit_compile=jit or None)
    with kernels.off() if way == "plain" else contextlib.nullcontext():
        found, expected = derivative(tf, graph, x, tf.cos(x)), derivative(tf, call, x, tf.cos(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # two float32 formulas, each within units


def test_one_program_for_any_batch(library):
    """The mode that is timed: x and what has its shape may be longer, and parameters may not."""
    if not library.batch_modes:
        pytest.skip(f"{library.name} compiles for each length")
    traced = []

    def call(x, weight):
        traced.append((x.shape[0], weight.shape[0]))
        return nk.layer_norm(x, weight)

    (mode,) = library.batch_modes
    program = library.compiled(call, mode)
    for length in (4, 3):
        x, weight = library.array(np.eye(length, 4), "float32"), library.array(np.ones(4), "float32")
        np.testing.assert_allclose(library.numpy(program(x, weight)), library.numpy(call(x, weight)), atol=1e-6)
        traced.pop()
    assert traced == [(None, 4)]


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("unknown", ["batch", "all but channels"])
def test_one_graph_for_unknown_sizes(library, layer, unknown, jit):
    if library.name != "tensorflow":
        pytest.skip("only tf.function traces unknown sizes")
    tf = library.xp
    site = cases.SITES[-1][layer]
    known = range(1, len(site.shape)) if unknown == "batch" else (len(site.shape) - 1,)

    def spec(name, array):
        shape = [n if i in known else None for i, n in enumerate(array.shape)] if name in ("x", "dy") else array.shape
        return tf.TensorSpec(shape, array.dtype)

    def run(arrays, dy):
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            y = first(case.call(getattr(nk, layer), dict(zip(case.names, arrays, strict=True))))
        return y, tape.gradient(y, arrays, output_gradients=dy)

    graph = None
    for size in (2, 5):
        shape = tuple(size if i == 0 else n if i in known else n + size for i, n in enumerate(site.shape))
        case = cases.Case(site.id, layer, shape, site.options)
        values = inputs.operands(case, inputs.BY_NAME["offset 1e2"], "float32")
        given = measure.arrays(library, case, values, "float32")
        arrays = [given[n] for n in case.names]
        if graph is None:
            signature = ([spec(n, given[n]) for n in case.names], spec("dy", given["dy"]))
            graph = tf.function(run, input_signature=signature, jit_compile=jit or None)
        y, found = graph(arrays, given["dy"])
        reference, scales = oracle.vjp_and_scales(layer, values, values["dy"], case.options)
        assert_close(library, y, oracle.forward(layer, values, case.options), library.kind(given["x"]), "forward")
        for name, gradient in zip(case.names, found, strict=True):
            assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient", scales[name])
    assert graph.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_graph_for_each_signature(library, layer, jit):
    """Each shape is traced once, whatever the values are, to a graph of y and gradients.

    Inside are no other graphs than the two branches that values near overflow or underflow decide between.
    """
    if library.name != "tensorflow":
        pytest.skip("only TensorFlow counts its graphs")
    tf = library.xp
    site = cases.SITES[-1][layer]
    traced = []

    @tf.function(jit_compile=jit or None)
    def run(arrays, dy):
        traced.append(dy.shape)
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            y = first(site.call(getattr(nk, layer), dict(zip(site.names, arrays, strict=True))))
        return tape.gradient(y, arrays, output_gradients=dy)

    shapes = [site.shape, (site.shape[0] + 1, *site.shape[1:])]
    for name in ("normal", "offset 1e2", "scale 1e9"):
        for shape in shapes:
            case = cases.Case(site.id, layer, shape, site.options)
            given = measure.arrays(library, case, inputs.operands(case, inputs.BY_NAME[name], "float32"), "float32")
            arguments = [given[n] for n in case.names], given["dy"]
            run(*arguments)
            inside = run.get_concrete_function(*arguments).graph.as_graph_def().library.function
            assert {re.sub(r"_\d+$", "", f.signature.name) for f in inside} <= {"cond_true", "cond_false"}
    assert run.experimental_get_tracing_count() == len(traced) == len(shapes)


def test_the_first_call_in_a_graph(library, tmp_path):
    """What the backend learns of TensorFlow when it is imported, it does not learn of the graph that is being made."""
    if library.name != "tensorflow":
        pytest.skip("only tf.function runs the import of a backend in a graph")
    code = """
import tensorflow as tf, normkit as nk
x = tf.ones((2, 3))
tf.function(nk.layer_norm, autograph=False)(x)
try:
    nk.batch_norm(x, x[0], -x[0])
except ValueError as error:
    print(error)
"""
    assert fresh.run(code, tmp_path) == "var must not be negative; received a smallest value of -1.0."


@pytest.mark.parametrize("layer", LAYERS)
def test_vmap(library, layer):
    """Mapped over a new first axis, y, statistics and per-sample gradients are those of each slice."""
    if library.name not in ("torch", "jax"):
        pytest.skip(f"{library.name} has no vmap")
    case = cases.Case(layer, layer, (3, 4, 5, 2), {"num_groups": 2} if layer == "group_norm" else {})
    slices = [inputs.operands(case, inputs.BY_NAME[name], "float32") for name in ("normal", "offset 1e2", "scale 1e9")]
    shared = slices[0]
    x, dy = (library.array(np.stack([s[name] for s in slices]), "float32") for name in ("x", "dy"))
    given = measure.arrays(library, case, shared, "float32")

    def forward(x):
        out = case.call(getattr(nk, layer), {**given, "x": x})
        return (out[0], out[1].var, out[1].count) if isinstance(out, tuple) else out

    def slope(x, dy):
        if library.name == "torch":
            return library.xp.func.vjp(lambda x: first(forward(x)), x)[1](dy)[0]
        return library.xp.vjp(lambda x: first(forward(x)), x)[1](dy)[0]

    out, dx = library.vmap(forward)(x), library.vmap(slope)(x, dy)
    for i, s in enumerate(slices):
        values = {**shared, "x": s["x"]}
        kind = library.kind(given["x"])
        assert_close(library, first(out)[i], oracle.forward(layer, values, case.options), kind, "forward")
        reference, scales = oracle.vjp_and_scales(layer, values, s["dy"], case.options)
        assert_close(library, dx[i], reference["x"], kind, "gradient", scales["x"])
        if layer == "batch_norm_train":
            assert_close(library, out[1][i], oracle.batch_statistics(s["x"]).var, kind, "statistics")
            assert int(out[2][i]) == 3 * 5 * 2


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_gives_the_native_dtype(library, layer, x_dtype):
    """Under autocast y and the gradients have the dtypes that torch's own layer gives them."""
    if library.name != "torch":
        pytest.skip("only torch has autocast")
    torch = library.xp
    case = cases.SITES[1][layer]
    if layer == "rms_norm":
        case = cases.Case(case.id, layer, case.shape, case.options, "weight")
    values = inputs.operands(case, inputs.BY_NAME["normal"], x_dtype, params="float32")
    given = measure.arrays(library, case, values, x_dtype, "float32")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        with natives.quiet():
            native = measure.call(case, natives.of("torch")[0], given)
        y = first(measure.call(case, nk, given))
    assert library.kind(y).dtype == library.kind(native).dtype
    assert_close(library, y, oracle.forward(layer, values, case.options), library.kind(native), "forward")


@pytest.mark.parametrize("mode", [m for a in LIBRARIES.values() for m in a.modes])
def test_running_statistics_are_carried_through(library, mode):
    """A compiled step takes RunningStats and returns them, as a NamedTuple of the library's arrays."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    case = cases.SITES[library.channel_axis]["batch_norm_train"]
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    x = library.array(values["x"], "float32")
    stats = nk.RunningStats(library.array(np.zeros(12), "float32"), library.array(np.ones(12), "float32"))

    def step(x, stats):
        return stats.update(nk.batch_norm_train(x, axis=case.options["axis"])[1], momentum=0.9)

    compiled = library.compiled(step, mode)
    for _ in range(2):
        stats = compiled(x, stats)
    mean, var, n = oracle.running_statistics([values["x"]] * 2, np.zeros(12), np.ones(12), axis=case.options["axis"])
    assert isinstance(stats, nk.RunningStats) and int(stats.num_batches) == n == 2
    assert_close(
        library, stats.mean, mean, library.kind(x)._replace(layout="contiguous"), "running", np.abs(values["x"]).max()
    )
    assert_close(library, stats.var, var, library.kind(x)._replace(layout="contiguous"), "running")


@pytest.mark.parametrize("jit_compile", [None, True])
def test_what_a_graph_learns_when_it_runs(library, jit_compile):
    """A mask is x's, of whatever lengths that the graph does not know; a rank that it does not know is refused."""
    if library.name != "tensorflow":
        pytest.skip("TensorFlow's graphs alone have lengths that are not known")
    tf = library.xp
    x = tf.constant(np.random.default_rng(0).standard_normal((4, 6, 5)), "float32")
    of_x, of_mask = tf.TensorSpec((None, None, 5)), tf.TensorSpec((None, None, None), tf.bool)

    @tf.function(input_signature=[of_x, of_mask], jit_compile=jit_compile)
    def call(x, mask):
        return nk.layer_norm(x, mask=mask)

    for mask in (x > -1, x[:, :1] > -1, x[:1, :, :1] > -2):
        np.testing.assert_allclose(call(x, mask), nk.layer_norm(x, mask=mask), atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="broadcast"):
        call(x[:1], x > -1)
    for of_x, of_weight in ((None, (5,)), ((4, 6, 5), None)):
        function = tf.function(nk.layer_norm, [tf.TensorSpec(of_x), tf.TensorSpec(of_weight)], jit_compile=jit_compile)
        text = r"Arrays must have a known number of axes; received a tensor of unknown rank: give it a shape\."
        with pytest.raises(ValueError, match=text):
            function(x, tf.ones(5))
