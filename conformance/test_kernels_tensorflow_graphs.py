"""The kernels in graphs of TensorFlow: the bits of NumPy, derivatives of any order, what they leave alone."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.conformance.descriptions import MEANINGLESS, described
from normkit.conformance.kernel_inputs import DTYPES, LAYERS, SMALL, dtype_of, make, need_kernels, operands_of, run

need_kernels()
tf = pytest.importorskip("tensorflow")
op_def_library = pytest.importorskip("tensorflow.python.framework.op_def_library")
graphs = pytest.importorskip("normkit.backends.tensorflow.graphs")
need_xla = pytest.mark.skipif(graphs._operations() is None, reason=f"TensorFlow {tf.__version__} has no custom call")
#: How a kernel is called in a graph: jit_compile, and the name of what has the call.
WAYS = [pytest.param(True, marks=need_xla, id="XLA"), pytest.param(None, id="operation")]


@pytest.fixture
def count():
    """How many calls kernels serve from here on."""
    before = kernels.served()
    return lambda: kernels.served().since(before)


@pytest.fixture(params=WAYS)
def program(request):
    """Make a function a graph, of which a tape may want the gradients."""

    def made(function, signature=None):
        def recorded(*arrays):
            with tf.GradientTape():
                return function(*arrays)

        return tf.function(recorded, signature, jit_compile=request.param, autograph=False)

    return made


def xla(function):
    """The function, compiled by XLA."""
    return tf.function(function, jit_compile=True, autograph=False)


def operands(dtype="float64", shape=(7, 12)):
    """x and weight."""
    rng = np.random.default_rng(0)
    return [tf.constant(rng.standard_normal(s), dtype) for s in (shape, shape[-1:])]


def second(function, x, w):
    """Gradients of a gradient."""
    with tf.GradientTape() as outer:
        outer.watch([x, w])
        with tf.GradientTape() as inner:
            inner.watch([x, w])
            loss = tf.reduce_sum(function(x, w) ** 3)
        first = inner.gradient(loss, [x, w])
        total = tf.reduce_sum(first[0] ** 2) + tf.reduce_sum(first[1] ** 3)
    return outer.gradient(total, [x, w])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_bits_of_numpy(layer, dtype, program, count):
    shape, options = SMALL[layer]
    plan, arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(5), dtype_of(dtype))
    y, stats, gradients = run(plan, arrays)

    def call(given):
        called = operands_of(given)
        assert kernels.accelerates(plan, called, graphs.program(derived=True))
        caller = graphs.caller()
        y, packed = graphs.forward(caller, plan, called)
        return y, packed, graphs.vjp(caller, plan, called, packed, given["dy"])

    y2, packed, gradients2 = program(call)({name: tf.constant(a) for name, a in arrays.items()})
    assert count() == (2, 2)
    assert y.tobytes() == y2.numpy().tobytes()
    assert (stats is None) == (packed is None)
    assert stats is None or stats.tobytes() == packed.numpy().tobytes()
    for name, g in gradients.items():
        assert g.tobytes() == getattr(gradients2, name).numpy().tobytes(), name


UNKNOWN = {
    **{layer: (layer, *SMALL[layer]) for layer in LAYERS},
    "batch_norm_train, matrix": ("batch_norm_train", (6, 5), {"axis": 1}),
    "batch_norm_train, last": ("batch_norm_train", (5, 3, 4, 12), {"axis": 3}),
    "group_norm, last": ("group_norm", (5, 3, 4, 12), {"axis": 3, "num_groups": 4}),
    "layer_norm, one value": ("layer_norm", (5, 1, 7), {"axis": (-1,)}),
}
#: And of how many axes after the first the length may be unknown too.
MORE = {"layer_norm": 1, "rms_norm": 1, "layer_norm, one value": 1, "batch_norm_train, last": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize(("what", "more"), [(what, 0) for what in UNKNOWN] + list(MORE.items()))
def test_a_batch_of_unknown_length(what, more, length, dtype, program, count):
    """One graph for every length, and the bits of NumPy for each; a gradient summed over nothing is zero."""
    layer, shape, options = UNKNOWN[what]
    arrays = make(layer, shape, {"eps": 1e-5, **options}, np.random.default_rng(5), dtype_of(dtype))[1]
    x, dy, *params = (tf.constant(a) for a in arrays.values())
    params, given, train = params[:2], params[2:], layer == "batch_norm_train"

    def call(x, weight, bias):
        return getattr(nk, layer)(x, *given, weight=weight, bias=bias, eps=1e-5, **options)

    def both(x, dy, weight, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, weight, bias])
            found = call(x, weight, bias)
            y, *stats = (found[0], *found[1]) if train else (found,)
        return y, *stats[:2], *tape.gradient(y, [x, weight, bias], dy)

    unknown = tf.TensorSpec((None,) * (1 + more) + shape[1 + more :], x.dtype)
    like = [tf.TensorSpec(p.shape, p.dtype) for p in params]
    graph = program(both, [unknown, unknown, *like])
    if what == "batch_norm_train, matrix" and length == 1:
        length = 2  # of one value per channel there are no statistics
    x, dy = x[:length], dy[:length]
    found = graph(x, dy, *params)
    if length == 0:
        assert found[0].shape == x.shape
        assert not any(np.any(a) for a in found[1:])
        return
    assert count() == (1, 1)
    for a, b in zip(found, both(x, dy, *params), strict=True):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_derivatives_around_a_batch_of_unknown_length(program, count):
    x, w = operands()
    wanted = second(nk.layer_norm, x, w)
    before = count()
    unknown = [tf.TensorSpec((None, 12), x.dtype), tf.TensorSpec((12,), x.dtype)]
    for a, b in zip(second(program(nk.layer_norm, unknown), x, w), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    assert count().since(before) == (1, 2)


@pytest.mark.parametrize("tape", ["in the program", "around it"])
def test_axes_that_no_kernel_has(tape, program, count):
    """x is turned, and y is turned back."""
    x = operands("float32", (2, 3, 4, 5))[0]
    dy = tf.reverse(x, [0])

    normalize = functools.partial(nk.layer_norm, axis=(0, 2))

    def both(x, dy, function=normalize):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x, dy)

    wanted = both(x, dy)
    before = count()
    if tape == "in the program":
        found = program(lambda x, dy: both(x, dy))(x, dy)
    else:
        found = both(x, dy, program(lambda x: normalize(x)))
    assert count().since(before) == (1, 1)
    for a, b in zip(found, wanted, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_channels_before_samples(program, count):
    x = operands("float32", (12, 3, 4))[0]

    def normalize(x):
        return nk.group_norm(x, 4, axis=0)

    assert program(normalize)(x).numpy().tobytes() == normalize(x).numpy().tobytes()
    assert count() == (2, 0)


def test_what_a_tape_around_a_program_takes_out_of_it(program):
    """No operand is given on by an operation of ours: all would be copied, and zeros made for their gradients."""
    x, w = operands("float32", (6, 5, 12))
    graph = program(lambda x, w: nk.batch_norm_train(x, w, axis=-1)).get_concrete_function(x, w).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert sum(map(kinds.count, graphs._OPERATIONS)) == 1
    assert "IdentityN" not in kinds


@pytest.mark.parametrize("tape", ["in the program", "around it"])
def test_the_gradient_and_its_gradient(tape, program, count):
    """A gradient is a kernel's, and its gradient made of TensorFlow's operations; with and without variables."""
    x, w = operands()
    v = tf.Variable(w)
    wanted = second(nk.layer_norm, x, w)
    before = count()
    if tape == "in the program":
        found = program(lambda x, w: second(nk.layer_norm, x, w))(x, w)
    else:
        found = second(program(lambda x, _: nk.layer_norm(x, v)), x, v)
    assert count().since(before) == (1, 2)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_batch_statistics_have_no_gradient(program, count):
    x, w = operands("float32", (6, 5, 12))

    def loss(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y, stats = nk.batch_norm_train(x, w, axis=-1)
            out = tf.reduce_sum(y * y * x) + tf.reduce_sum(stats.mean) + tf.reduce_sum(stats.var)
        return stats.mean, stats.var, *tape.gradient(out, [x, w])

    for a, b in zip(program(loss)(x, w), loss(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # XLA forms y * y * x in another order
    assert count() == (2, 2)


def test_forward_mode_in_a_program(program):
    """A graph's forward accumulators do not see custom gradients: such a call is TensorFlow's."""
    x = operands()[0]

    def slope(x):
        with tf.autodiff.ForwardAccumulator(x, x) as forward:
            y = nk.layer_norm(x, eps=0.1)
        return forward.jvp(y)

    np.testing.assert_allclose(program(slope)(x), slope(x), rtol=1e-9)


DEVICES = {
    "another device": [("/device:CPU:0", "CPU"), ("/device:GPU:0", "GPU")],
    "another machine": [(f"/job:worker/replica:0/task:{n}/device:CPU:0", "CPU") for n in (0, 1)],
}


def test_what_kernels_do_not_serve(program, count, monkeypatch):
    x = operands("float32", (4, 6))[0]
    unknown = tf.TensorSpec((None, None, 6), "float32")
    program(lambda x: nk.instance_norm(x, axis=-1), [unknown])(x[None])
    program(lambda x: nk.batch_norm_train(x, axis=1, mask=tf.range(4)[:, None] > 0)[0])(x)
    program(nk.layer_norm)(x[:0])
    with kernels.off():
        program(nk.layer_norm)(x)
    for devices in DEVICES.values():
        there = [tf.config.LogicalDevice(*device) for device in devices]
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda there=there: there)
        program(nk.layer_norm)(x)
    assert count() == (0, 0)


def test_a_graph_that_may_be_converted(count, monkeypatch):
    """Who asks for a graph that no tape records needs TensorFlow alone, unless kernels are required."""
    x = operands("float32", (4, 6))[0]

    def kinds(function):
        graph = tf.function(function).get_concrete_function(x).graph
        return [operation.type for operation in graph.get_operations()]

    def slope(x):
        return nk.vjp(nk.layer_norm, x)[1](x)

    with tf.Graph().as_default() as first:
        nk.layer_norm(tf.compat.v1.placeholder("float32", (4, 6)))
    assert graphs.OPERATION not in [operation.type for operation in first.get_operations()]
    assert graphs.OPERATION not in kinds(nk.layer_norm)
    assert kinds(slope).count(graphs.OPERATION) == 2
    tf.function(nk.layer_norm)(x)
    assert count() == (1, 0)
    monkeypatch.setattr(kernels, "mode", "require")
    assert graphs.OPERATION in kinds(nk.layer_norm)


@pytest.mark.parametrize("length", [4, None])
def test_what_is_saved_runs_without_normkit(tmp_path, length, program, count):
    """TensorFlow writes a function's program again while it saves it: that one is made of its own operations."""
    module = tf.Module()
    module.f = program(nk.layer_norm, [tf.TensorSpec((length, 6), "float32")])
    before = count()
    module.f(tf.ones((4, 6)))
    assert count().since(before) == (1, 0)
    tf.saved_model.save(module, tmp_path)
    script = f"import sys, tensorflow as tf; tf.saved_model.load({str(tmp_path)!r}).f(tf.ones((4, 6)))"
    done = subprocess.run(
        [sys.executable, "-c", script + "; assert 'normkit' not in sys.modules"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_of_two_branches(program, count):
    """Kernels within control flow."""
    x = operands("float32", (4, 6))[0]
    found = program(lambda x: tf.cond(x[0, 0] > 9, lambda: nk.rms_norm(x), lambda: nk.layer_norm(x)))(x)
    assert count() == (1, 0)
    assert found.numpy().tobytes() == nk.layer_norm(x).numpy().tobytes()


def test_what_is_vectorized(program, count):
    """One call of many: TensorFlow makes it of its own operations, also where they are those of a gradient."""
    x, w = operands(shape=(4, 6))

    def rows(x):
        return tf.vectorized_map(lambda row: nk.layer_norm(row[None], w)[0], x)

    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = nk.layer_norm(x, w)
        return y, tape.jacobian(y, x)

    found = program(lambda x: (rows(x), *jacobian(x)))(x)
    assert count() == (1, 0)
    for a, b in zip(found, (nk.layer_norm(x, w), *jacobian(x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_nothing_is_rewritten(caplog):
    """TensorFlow, which rewrites what a graph's function calls, cannot rewrite all that is in here, and would warn."""
    x, w = operands()

    @tf.function
    def graph(x):
        with kernels.off():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = nk.layer_norm(x, w)
            _, pullback = nk.vjp(nk.layer_norm, x)
            return tape.gradient(y, x), pullback(y)

    tf.get_logger().addHandler(caplog.handler)
    try:
        graph(x)
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=need_xla), False])
def test_keras_trains_through_them(compiled, count):
    """Two batches of 32 and a last one of 6, in one graph of a batch of unknown length."""
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras computes with another library")
    layers = pytest.importorskip("normkit.keras")
    model = keras.Sequential([keras.Input((8,)), layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=compiled)
    x = np.random.default_rng(0).standard_normal((70, 8)).astype("f4")
    model.fit(x, x[:, :1], batch_size=32, epochs=1, verbose=0)
    assert count() == (3, 3)


def test_a_library_that_is_not_there():
    assert not kernels.tensorflow_calls(Path("libtensorflow_cc.so.0"))
    assert not kernels.tensorflow_operation(Path("libtensorflow_framework.so.0"))


def test_an_operation_is_asked_for_again():
    """By another thread, for one: it is defined once."""
    for _ in range(2):
        assert kernels.tensorflow_operation(graphs._library("framework"))


BY_HAND = """
import tensorflow as tf
from normkit.backends.tensorflow import graphs
call = graphs._operations().custom_call
tf.function(lambda x: call(operands=[x], call_target_name="normkit", backend_config="0 7", has_side_effect=False,
            result_dtypes=[tf.float32], result_shapes=[x.shape])[0], jit_compile=True, autograph=False)(tf.ones((2, 3)))
"""


@need_xla
def test_a_call_that_makes_no_sense():
    """XLA gives no way to say so: the process ends, with one sentence (test_kernels_custom_call.py has the others)."""
    done = subprocess.run([sys.executable, "-c", BY_HAND], capture_output=True, text=True, timeout=300)
    assert done.returncode == -6
    assert "normkit: what was asked for makes no sense in a call from an XLA program: 0 7\n" in done.stderr


def by_hand(text, *arrays, shapes=((-1, -2),), dtype=tf.float32):
    """What the operation makes of arrays."""
    assert graphs._operation()

    @tf.function(autograph=False)
    def graph(*given):
        return op_def_library.apply_op(
            graphs.OPERATION,
            operands=list(given),
            Tresults=[dtype] * len(shapes),
            text=text,
            shapes=[n for shape in shapes for n in (len(shape), *shape)],
        )

    return graph(*arrays)


X = tf.reshape(tf.range(24.0), (4, 6))
OUTER = "outer 0 0 1 1 6 1 1e-05 0.0 1"
REFUSED = {
    **{what: ((text, X), "makes no sense: " + text) for what, text in MEANINGLESS.items()},
    "an array too few": ((described(weight=0), X), "an array is missing in a call of 0 0 4"),
    "an array too many": ((described(), X, X), "there is an array too many in a call of 0 0 4"),
    "x of another size": ((described(), X[:3]), "an array has another size in a call of 0 0 4"),
    "x of a size between": ((described(OUTER), X[:, :5]), "an array has another size in a call of outer 0"),
    "a weight of another size": ((described(weight=0), X, X[0, :5]), "an array has another size in a call of 0 0 4"),
    "x of another dtype": ((described(), tf.cast(X, "float64")), "an array has another dtype in a call of 0 0 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_operation_that_makes_no_sense(what):
    (text, *arrays), said = REFUSED[what]
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        by_hand(text, *arrays)
    assert f"normkit: {'what was asked for ' if 'sense' in said else ''}{said}" in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(4, 6)] * 2, "there is a result too many"),
        ([(4, 5)], "a result is to have another size"),
        ([(-1, -3)], "a result is to have the length of an axis that there is not"),
        ([(4, -2, 2)], "a result is to have another size"),
    ],
)
def test_results_that_make_no_sense(shapes, said):
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"normkit: {said} in a call of 0 0 4 1 6"):
        by_hand(described(), X, shapes=shapes)
    with pytest.raises(tf.errors.InvalidArgumentError, match="normkit: a result is to have another dtype in a call of"):
        by_hand(described(), X, dtype=tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="normkit: a result is missing in a call of 0 0 4 1 6"):
        by_hand(described(rstd=0), X)
    assert by_hand(described(), X)[0].numpy().tobytes() == nk.layer_norm(X).numpy().tobytes()
