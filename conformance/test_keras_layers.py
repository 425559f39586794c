"""normkit.keras against keras.layers, on the backend that Keras runs: arguments, values, statistics, masks, files."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

import normkit.keras as nk
from normkit.backends.keras.layers import OURS
from normkit.conformance.keras_calls import BACKEND, array, called, computing, numbers
from normkit.conformance.tolerances import tolerance, units

# Of Keras's own conversions to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Site(NamedTuple):
    """A layer of Keras, the shape of its inputs, and its arguments."""

    kind: str
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    def pair(self, **options):
        """Ours and Keras's, with the same weights, which are no identity."""
        options = {**self.options, **options}
        if self.kind == "InstanceNormalization":
            made = [nk.InstanceNormalization(**options), keras.layers.GroupNormalization(groups=-1, **options)]
        else:
            made = [getattr(module, self.kind)(**options) for module in (nk, keras.layers)]
        values = np.random.default_rng(0)
        for layer in made:
            layer.build(self.shape)
        weights = [abs(values.normal(size=w.shape)) + 0.1 for w in made[0].weights]
        for layer in made:
            layer.set_weights(weights)
        return made


BN, LN, GN, IN, RMS = (f"{kind}Normalization" for kind in ("Batch", "Layer", "Group", "Instance", "RMS"))
SITES = (
    Site(BN, (9, 6)),
    Site(BN, (3, 5, 7, 6)),
    Site(BN, (3, 6, 5, 7), {"axis": 1, "epsilon": 1e-5}),
    Site(BN, (2, 3, 4, 5, 6), {"momentum": 0.9, "center": False}),
    Site(BN, (9, 6), {"scale": False}),
    Site(LN, (3, 5, 7)),
    Site(LN, (3, 5, 7), {"axis": (1, 2), "epsilon": 1e-6, "center": False}),
    Site(LN, (3, 5, 7), {"scale": False}),
    Site(GN, (2, 5, 7, 6), {"groups": 3}),
    Site(GN, (2, 6, 5), {"groups": 2, "axis": 1, "scale": False}),
    Site(GN, (4, 6), {"groups": 2}),
    Site(IN, (2, 5, 7, 6)),
    Site(IN, (2, 6, 5), {"axis": 1, "epsilon": 1e-5, "center": False}),
    Site(RMS, (3, 5, 7)),
    Site(RMS, (3, 5, 7), {"axis": (1, 2), "epsilon": 1e-5}),
)
sites = pytest.mark.parametrize("site", SITES, ids=str)
KINDS = (BN, LN, GN, RMS)


def close(found, reference, quantity="native", scale=None, dtype="float32"):
    limit = tolerance(quantity, dtype)
    error = units(array(found), array(reference), dtype, scale)
    assert error <= limit.units, f"{error:.3g} units off: {limit.reason}"


def definition(x, axes, eps, mask=None):
    """The normalized x, mean and variance in float64."""
    x = x.astype("f8")
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    mean = x.mean(axes, where=mask, keepdims=True)
    var = x.var(axes, where=mask, keepdims=True)
    return (x - mean) / np.sqrt(var + eps), mean.squeeze(axes), var.squeeze(axes)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_and_types_are_kerass(kind):
    ours, theirs = getattr(nk, kind), getattr(keras.layers, kind)
    parameters = inspect.signature(ours).parameters
    assert {n: p for n, p in parameters.items() if n not in OURS} == dict(inspect.signature(theirs).parameters)
    assert issubclass(ours, theirs) and ours is not theirs
    assert list(inspect.signature(ours.call).parameters) == list(inspect.signature(theirs.call).parameters)


@sites
def test_weights_and_config_are_kerass(site):
    ours, theirs = site.pair()
    described = [(w.name, w.shape, w.dtype, w.trainable) for w in theirs.weights]
    assert [(w.name, w.shape, w.dtype, w.trainable) for w in ours.weights] == described
    config, theirs_config = ours.get_config(), theirs.get_config()
    if site.kind == IN:
        del theirs_config["groups"]
    assert {**config, "name": ""} == {**theirs_config, "name": ""}
    twin = type(ours).from_config(config)
    assert twin.get_config() == config
    assert ours.supports_masking == theirs.supports_masking and ours.autocast == theirs.autocast


MODES = [(site, True) for site in SITES] + [(site, False) for site in SITES if site.kind == BN]


@pytest.mark.parametrize(("site", "training"), MODES, ids=str)
def test_values_and_gradients(site, training):
    ours, theirs = site.pair()
    x, dy = numbers(*site.shape), numbers(*site.shape, seed=1, offset=0)
    options = {"training": training} if site.kind == BN else {}
    (y, found), (y0, found0) = (called(layer, x, dy, **options) for layer in (ours, theirs))
    close(y, y0)
    for gradient, reference in zip(found, found0, strict=True):
        close(gradient, reference)
    for weight, reference in zip(ours.weights, theirs.weights, strict=True):
        close(weight.value, reference.value, "running")


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0, 1.0])
def test_ten_steps_of_moving_statistics(momentum):
    ours, theirs = Site(BN, (3, 5, 7, 6), {"momentum": momentum}).pair()
    for k in range(10):
        x = numbers(3, 5, 7, 6, seed=k)
        ours(x, training=True), theirs(x, training=True)
    close(ours.moving_mean, theirs.moving_mean, "running", np.asarray(8.0))
    close(ours.moving_variance, theirs.moving_variance, "running")


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("site", [SITES[1], SITES[5], SITES[8], SITES[11]], ids=str)
def test_far_from_zero(site, offset):
    """What Keras is out of tolerance on; so this is not what Keras computes."""
    ours, theirs = site.pair()
    x = numbers(*site.shape, offset=offset)
    axes = {BN: (0, 1, 2), LN: (2,), GN: (1, 2), IN: (1, 2)}[site.kind]
    grouped = x.reshape(2, 5, 7, 3, 2) if site.kind == GN else x
    reference = definition(grouped, (1, 2, 4) if site.kind == GN else axes, ours.epsilon)[0].reshape(x.shape)
    reference = reference * array(ours.gamma) + array(ours.beta)
    options = {"training": True} if site.kind == BN else {}
    close(ours(x, **options), reference, "forward")
    assert units(array(theirs(x, **options)), reference, "float32") > tolerance("forward", "float32").units


MASKS = {
    "time": ((4, 6, 3), -1, (4, 6)),
    "one channel": ((4, 6, 1), -1, (4, 6)),
    "samples": ((7, 3), -1, (7,)),
    "samples of pictures": ((7, 4, 5, 3), -1, (7,)),
    "time of pictures": ((3, 4, 5, 6, 2), -1, (3, 4)),
    "places": ((2, 4, 5, 3), -1, (2, 4, 5)),
    "channels first": ((4, 3, 6), 1, (4, 1, 6)),
    "channels first, one": ((4, 1, 6), 1, (4, 1, 6)),
    "as many axes": ((4, 6, 3), 2, (4, 6, 3)),
    "middle": ((2, 4, 3, 5), -2, (2, 1, 1, 5)),
}


@pytest.mark.parametrize("case", MASKS)
def test_mask_of_any_rank_and_axis(case):
    """Statistics are of the unmasked elements; y is normalized everywhere, and so are gradients."""
    shape, axis, lengths = MASKS[case]
    x, dy = numbers(*shape), numbers(*shape, seed=1, offset=0)
    mask = np.random.default_rng(2).random(lengths) < 0.6
    mask.flat[:2] = True
    full = np.broadcast_to(mask.reshape(*lengths, *[1] * (len(shape) - len(lengths))), shape)
    layer = nk.BatchNormalization(axis=axis, momentum=0.0)
    layer.build(shape)
    axes = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    y, (dx, *_) = called(layer, x, dy, training=True, mask=keras.ops.convert_to_tensor(mask))
    xhat, mean, var = definition(x, axes, 1e-3, full)
    close(y, xhat, "gradient")
    close(layer.moving_mean, mean, "statistics", np.asarray(8.0))
    close(layer.moving_variance, var, "statistics")
    keep = {"axis": axes, "keepdims": True}
    share = np.where(full, (dy.sum(**keep) + xhat * (dy * xhat).sum(**keep)) / full.sum(**keep), 0)
    close(dx, (dy - share) / np.sqrt(np.expand_dims(var, axes) + 1e-3), "gradient")


def test_mask_against_keras():
    """Where Keras takes a mask: rank one less, channels last, more than one. Its count is 1e-7 too large."""
    ours, theirs = Site(BN, (4, 6, 3)).pair()
    x, dy = numbers(4, 6, 3), numbers(4, 6, 3, seed=1, offset=0)
    mask = keras.ops.convert_to_tensor(np.arange(24).reshape(4, 6) % 5 < 3)
    (y, found), (y0, found0) = (called(layer, x, dy, training=True, mask=mask) for layer in (ours, theirs))
    close(y, y0)
    for gradient, reference in zip(found, found0, strict=True):
        close(gradient, reference)
    for weight, reference in zip(ours.weights, theirs.weights, strict=True):
        close(weight.value, reference.value, "running")


def test_mask_comes_from_the_layer_before():
    model = keras.Sequential([keras.Input((5, 2)), keras.layers.Masking(0.0), nk.BatchNormalization(momentum=0.0)])
    x = numbers(3, 5, 2)
    x[:, 3:] = 0
    model(x, training=True)
    close(model.layers[-1].moving_mean, x[:, :3].astype("f8").mean((0, 1)), "statistics", np.asarray(8.0))


@pytest.mark.parametrize("case", ["empty", "masked"])
def test_a_batch_without_elements_moves_nothing(case):
    layer = nk.BatchNormalization()
    layer.build((None, 4, 3))
    before = [array(w.value) for w in layer.weights]
    x = numbers(0 if case == "empty" else 2, 4, 3)
    y = layer(x, training=True, mask=None if case == "empty" else np.zeros((2, 4), bool))
    assert np.isfinite(array(y)).all() and tuple(y.shape) == x.shape
    assert all((array(w.value) == old).all() for w, old in zip(layer.weights, before, strict=True))


def test_one_value_per_channel_is_the_bias_as_in_keras():
    for shape in ((1, 6), (1, 1, 1, 6)):
        ours, theirs = Site(BN, shape).pair()
        x = numbers(*shape)
        (y, (dx, dgamma, dbeta)), (y0, _) = (called(layer, x, x, training=True) for layer in (ours, theirs))
        close(y, y0)
        # What rounding leaves of g - mean(g), times 1 / sqrt(epsilon) = 32.
        assert abs(dx).max() < 1e-5 and not dgamma.any() and (dbeta == x.ravel()).all()
        for weight, reference in zip(ours.weights, theirs.weights, strict=True):
            close(weight.value, reference.value, "running")


def test_not_trainable_is_inference():
    layer = Site(BN, (9, 6)).pair()[0]
    before = [array(w.value) for w in layer.weights]
    inference = array(layer(numbers(9, 6), training=False))
    layer.trainable = False
    assert (array(layer(numbers(9, 6), training=True)) == inference).all()
    assert all((array(w.value) == old).all() for w, old in zip(layer.weights, before, strict=True))


ANY_AXES = {
    "layer, middle": (LN, (1,), (3, 5, 7)),
    "layer, not the last": (LN, (1, 2), (3, 5, 7, 2)),
    "layer, mixed signs": (LN, (1, -1), (3, 5, 7)),
    "layer, apart": (LN, (-1, 1), (3, 5, 2, 7)),
    "rms, middle": (RMS, 1, (3, 5, 7)),
    "rms, not the last": (RMS, (1, 2), (3, 5, 7, 2)),
}


@pytest.mark.parametrize("case", ANY_AXES)
def test_any_axes_on_any_backend(case):
    """Keras takes those that are not the last on some backends, or none."""
    kind, axis, shape = ANY_AXES[case]
    layer = getattr(nk, kind)(axis=axis)
    layer.build(shape)
    scale = layer.gamma if kind == LN else layer.scale
    scale.assign(numbers(*scale.shape))
    axes = tuple(sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))))
    x = numbers(*shape)
    view = [n if a in axes else 1 for a, n in enumerate(shape)]
    if kind == LN:
        reference = definition(x, axes, 1e-3)[0]
    else:
        reference = x / np.sqrt((x.astype("f8") ** 2).mean(axes, keepdims=True) + 1e-6)
    close(layer(x), reference * array(scale.value).reshape(view), "forward")


def _built(kind):
    """For inputs of length 4."""
    layer = kind()
    layer.build((2, 4))
    return layer


REFUSED = {
    "renorm": (lambda: nk.BatchNormalization(renorm=True), "takes no renorm=True: use keras.layers"),
    "rms_scaling": (lambda: nk.LayerNormalization(rms_scaling=True), "takes no rms_scaling=True"),
    "groups": (lambda: nk.GroupNormalization(groups=0), "invalid value for argument `groups`"),
    "channels": (lambda: nk.GroupNormalization(groups=4)(numbers(2, 6)), "must be a multiple"),
    "axis": (lambda: nk.LayerNormalization(axis=5)(numbers(2, 3)), "out of range"),
    "instance": (lambda: nk.InstanceNormalization()(numbers(2, 6)), "at least one axis more; received inputs of shape"),
    "mask": (lambda: nk.BatchNormalization()(numbers(4, 6), training=True, mask=np.ones((4, 6, 2), bool)), "broadcast"),
    "length": (lambda: _built(nk.LayerNormalization)(numbers(2, 6)), r"weight must have shape \(6,\); received .*\(4,"),
    "length, RMS": (lambda: _built(nk.RMSNormalization)(numbers(2, 6)), r"weight must have shape \(6,\); received"),
    "rank": (lambda: Site(BN, (9, 6)).pair()[0](numbers(2, 3, 6)), "expected ndim=2"),
}
if BACKEND == "tensorflow":
    REFUSED["synchronized"] = (lambda: nk.BatchNormalization(synchronized=True), "takes no synchronized=True: use")
else:
    REFUSED["synchronized"] = (lambda: nk.BatchNormalization(synchronized=True), "only supported with the TensorFlow")


@pytest.mark.parametrize("case", REFUSED)
def test_misuse(case):
    build, text = REFUSED[case]
    with pytest.raises((ValueError, IndexError), match=text):
        build()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize("site", [SITES[i] for i in (1, 5, 8, 11, 13)], ids=str)
def test_dtypes(site, policy):
    """Parameters, results and statistics have Keras's dtypes; sums are not those of the narrow one."""
    ours, theirs = site.pair(dtype=policy)
    x = numbers(*site.shape)
    options = {"training": True} if site.kind == BN else {}
    y, y0 = ours(x, **options), theirs(x, **options)
    assert y.dtype == y0.dtype
    assert [w.dtype for w in ours.weights] == [w.dtype for w in theirs.weights]
    dtype = keras.backend.standardize_dtype(y.dtype)
    # A weight that Keras rounds to the dtype moves y by a unit more; what is stored in it may be rounded otherwise.
    limit = tolerance("native", dtype).units + 1
    assert units(array(y), array(y0), dtype) <= limit
    for weight, reference in zip(ours.weights, theirs.weights, strict=True):
        assert units(array(weight.value), array(reference.value), weight.dtype) <= limit


def test_integers():
    x = np.arange(24).reshape(4, 6) ** 2
    for layer in (nk.BatchNormalization(momentum=0.0), nk.LayerNormalization(), nk.RMSNormalization()):
        y = layer(x, training=True) if isinstance(layer, nk.BatchNormalization) else layer(x)
        assert keras.backend.standardize_dtype(y.dtype) == "float32" and array(y).std() > 0.4


@pytest.mark.parametrize("site", [SITES[i] for i in (1, 5, 8, 11, 13)], ids=str)
def test_nothing_that_keras_computes_with_is_called(site, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Keras computes")

    ours, theirs = site.pair()
    for name in ("batch_normalization", "layer_normalization", "rms_normalization", "moments", "rsqrt"):
        monkeypatch.setattr(f"keras.src.ops.{name}", refuse)
    options = {"training": True} if site.kind == BN else {}
    ours(numbers(*site.shape), **options)
    with pytest.raises(AssertionError, match="Keras computes"):
        theirs(numbers(*site.shape), **options)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 unless it is asked for")
@pytest.mark.parametrize("kind", [BN, LN, RMS])
def test_float64_stays(kind):
    """Keras itself widens to it on TensorFlow alone."""
    with computing("float64"):
        layer, x = getattr(nk, kind)(), numbers(4, 5, 6).astype("f8")
        y = array(layer(x, training=True) if kind == BN else layer(x))
    axes = (0, 1) if kind == BN else -1
    d = x - (0 if kind == RMS else x.mean(axes, keepdims=True))
    reference = d / np.sqrt((d**2).mean(axes, keepdims=True) + layer.epsilon)
    assert units(y, reference, "float64") <= tolerance("forward", "float64").units
