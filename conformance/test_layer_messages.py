"""Bad arguments, calls and states of layers: one sentence that names what was received, and nothing changed."""

import copy
import sys

import numpy as np
import pytest

import normkit as nk
from normkit.backends import NAMES, MissingLibraryError, UnknownBackendError
from normkit.backends import get as backend_named
from normkit.conformance import libraries
from normkit.conformance.checks import unchanged
from normkit.conformance.misfits import FLOATING, SUPPORTED, arrays, elsewhere, refused

NAN = float("nan")

#: What is made of nothing but arguments.
CONSTRUCTORS = {
    "no channels": (lambda: nk.BatchNorm(0), ValueError, r"num_features must be a positive integer; received 0\."),
    "fractional channels": (
        lambda: nk.InstanceNorm(2.5), TypeError, r"num_features must be a positive integer; received float 2\.5\.",
    ),
    "no shape": (
        lambda: nk.LayerNorm(()), ValueError, r"normalized_shape must hold at least one length; received \(\)\.",
    ),
    "a length of zero": (
        lambda: nk.RMSNorm((3, 0)),
        ValueError, r"normalized_shape must be a positive integer or a tuple of them; received \(3, 0\)\.",
    ),
    "an axis twice": (
        lambda: nk.LayerNorm((3, 4), axis=(1, 1)), ValueError, r"axis must not name an axis twice; received \(1, 1\)\.",
    ),
    "too few axes": (
        lambda: nk.LayerNorm((3, 4), axis=1),
        ValueError, r"axis must name one axis for each of the layer's 2 lengths; received 1\.",
    ),
    "too many axes": (
        lambda: nk.BatchNorm(4, axis=(0, 1)),
        ValueError, r"axis must name one axis for the layer's length; received \(0, 1\)\.",
    ),
    "axis by name": (
        lambda: nk.GroupNorm(2, 4, axis="C"),
        TypeError, r"axis must be an integer or a tuple of them; received str 'C'\.",
    ),
    "groups that do not divide": (
        lambda: nk.GroupNorm(3, 4), ValueError, r"num_groups must divide the number of channels, 4; received 3\.",
    ),
    "negative eps": (
        lambda: nk.BatchNorm(4, eps=-1), ValueError, r"eps must be a finite number >= 0; received -1\.",
    ),
    "eps NaN": (lambda: nk.LayerNorm(4, eps=NAN), ValueError, r"eps must be a finite number >= 0; received nan\."),
    "momentum": (lambda: nk.BatchNorm(4, momentum=1.5), ValueError, r"momentum must be in \[0, 1\]; received 1\.5\."),
    "update_rate": (
        lambda: nk.BatchNorm(4, update_rate=-0.1), ValueError, r"update_rate must be in \[0, 1\]; received -0\.1\.",
    ),
    "both conventions": (
        lambda: nk.BatchNorm(4, momentum=0.9, update_rate=0.1),
        ValueError,
        (r"momentum \(the weight of the old statistics\) and update_rate \(that of the new\) exclude each other; "
         r"received momentum=0\.9 and update_rate=0\.1\."),
    ),
    "affine as text": (
        lambda: nk.LayerNorm(4, affine="no"), ValueError, r"affine must be True or False; received 'no'\.",
    ),
    "bias as text": (lambda: nk.GroupNorm(2, 4, bias="no"), ValueError, r"bias must be True or False; received 'no'\."),
    "unbiased as a number": (
        lambda: nk.BatchNorm(4, unbiased=0), ValueError, r"unbiased must be True or False; received 0\.",
    ),
    "a mode as text": (lambda: nk.BatchNorm(4).train("no"), ValueError, r"mode must be True or False; received 'no'\."),
    "unknown policy": (
        lambda: nk.BatchNorm(4, single_value="skip"),
        ValueError, r"single_value must be 'raise', 'running' or 'zero'; received 'skip'\.",
    ),
    "integer dtype": (
        lambda: nk.BatchNorm(4, dtype="int32"),
        ValueError, r"dtype must be one of bfloat16, float16, float32, float64; received 'int32'\.",
    ),
    "a dtype that the library has not": (
        lambda: nk.BatchNorm(4, dtype="bfloat16"),
        ValueError, r"dtype must be one that numpy has; received 'bfloat16'\.",
    ),
    "unknown backend": (
        lambda: nk.BatchNorm(4, backend="numpyy"),
        UnknownBackendError, rf"There is no backend 'numpyy'; there are: {', '.join(NAMES)}.*\.",
    ),
    "unknown backend asked for": (
        lambda: backend_named("mxnet"),
        UnknownBackendError, rf"There is no backend 'mxnet'; there are: {', '.join(NAMES)}.*\.",
    ),
    "a number as backend": (
        lambda: nk.BatchNorm(4, backend=3),
        TypeError, r"backend must be a library's name or its array namespace; received int 3\.",
    ),
}  # fmt: skip

KEYS = "weight, bias, running_mean, running_var, num_batches_tracked"

#: What a trained batch norm layer of four channels is given, in place of the arrays that fit.
STATES = {
    "keys missing": (
        lambda a, state: {"weight": a.weight, "num_batches_tracked": 1},
        ValueError,
        (rf"The state of BatchNorm must have exactly the keys {KEYS}; received one with "
         r"bias, running_mean, running_var missing\."),
    ),
    "extra keys": (
        lambda a, state: {**state, "scale": a.weight},
        ValueError, rf"The state of BatchNorm must have exactly the keys {KEYS}; received one with scale unknown\.",
    ),
    "another convention's keys": (
        lambda a, state: {"gamma" if k == "weight" else k: v for k, v in state.items()},
        ValueError,
        (rf"The state of BatchNorm must have exactly the keys {KEYS}; received one with weight missing and gamma "
         r"unknown\."),
    ),
    "no mapping": (
        lambda a, state: list(state),
        TypeError, r"The state of BatchNorm must be a mapping of names to arrays; received list\.",
    ),
    "a parameter of another shape": (
        lambda a, state: {**state, "weight": a.weight, "bias": a.short},
        ValueError, r"bias must have shape \(4,\); received shape \(3,\)\.",
    ),
    "a parameter of integers": (
        lambda a, state: {**state, "weight": a.int_weight},
        TypeError, rf"weight must be {FLOATING}; received int32: convert it first\.",
    ),
    "a parameter of NumPy integers": (
        lambda a, state: {**state, "weight": np.ones(4, "int16")},
        TypeError, rf"weight must be {FLOATING}; received int16: convert it first\.",
    ),
    "statistics of another shape": (
        lambda a, state: {**state, "running_mean": a.short},
        ValueError, r"running_mean must have shape \(4,\); received shape \(3,\)\.",
    ),
    "negative variance": (
        lambda a, state: {**state, "weight": a.weight, "running_var": a.negative},
        ValueError, r"running_var must not be negative; received a smallest value of -0\.5\.",
    ),
    "a negative number of batches": (
        lambda a, state: {**state, "weight": a.weight, "num_batches_tracked": -1},
        ValueError, r"num_batches_tracked must be an integer >= 0; received -1\.",
    ),
    "a fraction of a batch": (
        lambda a, state: {**state, "num_batches_tracked": 1.5},
        TypeError, r"num_batches_tracked must be an integer >= 0; received float 1\.5\.",
    ),
    "a list": (
        lambda a, state: {**state, "bias": [0.0] * 4}, TypeError, rf"bias must be {SUPPORTED}; received list\.",
    ),
}  # fmt: skip

#: What a batch norm layer of four channels in training is called with.
CALLS = {
    "another length": (
        lambda a, layer: layer(a.square),
        ValueError, r"BatchNorm needs x of length 4 along axis 1; received x of shape \(3, 3\)\.",
    ),
    "too few axes": (
        lambda a, layer: layer(a.row), ValueError, r"axis must be in \[-1, 0\] for x of shape \(3,\); received 1\.",
    ),
    "one value per channel": (
        lambda a, layer: layer(a.lone),
        ValueError, r'batch_norm_train needs more than one value .*\(in a layer: single_value="running"\)\.',
    ),
    "integers": (
        lambda a, layer: layer(a.ints), TypeError, rf"x must be {FLOATING}; received int32: convert it first\.",
    ),
    "a mask of another shape": (
        lambda a, layer: layer(a.x, mask=a.wide_flags),
        ValueError, r"mask must broadcast to x of shape \(2, 4, 3\); received shape \(2, 4, 2\)\.",
    ),
    "a mask of another shape in inference": (
        lambda a, layer: copy.copy(layer).eval()(a.x, mask=a.wide_flags),
        ValueError, r"mask must broadcast to x of shape \(2, 4, 3\); received shape \(2, 4, 2\)\.",
    ),
    "a gradient of another shape, masked, in inference": (
        lambda a, layer: copy.copy(layer).eval().vjp(a.x, mask=a.flags)[1](a.row),
        ValueError, r"dy must have shape \(2, 4, 3\); received shape \(3,\)\.",
    ),
}  # fmt: skip


def _layer(library):
    return nk.BatchNorm(4, backend=library.name if library.name in NAMES else library.xp)


def _untouched(library, layer):
    """What a layer holds, to be compared by identity and by value."""
    return unchanged(library, {name: a for name, a in layer._state().items() if name != "num_batches_tracked"})


@pytest.mark.parametrize("row", CONSTRUCTORS)
def test_constructors_and_subclasses(row):
    refused(*CONSTRUCTORS[row])


@pytest.mark.parametrize("row", STATES)
def test_states(library, row):
    state_of, error, text = STATES[row]
    given, layer = arrays(library), _layer(library)
    layer(given.x)
    held = layer.weight, layer.bias, layer.running
    with unchanged(library, vars(given)), _untouched(library, layer):
        refused(lambda: layer.load_state_dict(state_of(given, layer.state_dict())), error, text)
    assert layer.weight is held[0] and layer.bias is held[1] and layer.running is held[2]


@pytest.mark.parametrize("row", CALLS)
def test_calls_of_a_layer(library, row):
    call, error, text = CALLS[row]
    given, layer = arrays(library), _layer(library)
    layer(given.x)
    running = layer.running
    with unchanged(library, vars(given)), _untouched(library, layer):
        refused(lambda: call(given, layer), error, text)
    assert layer.running is running


def test_a_state_without_keys():
    layer = nk.LayerNorm(3, affine=False)
    assert layer.state_dict() == {}
    text = r"The state of LayerNorm must have exactly the keys \(none\); received one with weight unknown\."
    refused(lambda: layer.load_state_dict({"weight": np.ones(3)}), ValueError, text)


def test_a_missing_library(monkeypatch):
    for name in NAMES[1:]:
        monkeypatch.setitem(sys.modules, name, None)
        text = rf"Backend '{name}' needs {name}, which is not installed.*\."
        refused(lambda name=name: nk.BatchNorm(4, backend=name), MissingLibraryError, text)


def test_a_layer_of_another_library(library):
    layer = nk.BatchNorm(4) if library.name != "numpy" else _layer(libraries.LIBRARIES["strict"])
    a, running = arrays(library), layer.running
    home = f"'{library.name}'" if library.name in NAMES else "x's namespace"
    text = rf"BatchNorm holds parameters of type .*; received x of type .*: make the layer with backend={home}\."
    refused(lambda: layer(a.x), TypeError, text)
    assert layer.running is running
    if library.name != "numpy":
        text = r"weight must be of the same library as the layer \(numpy\); received .*: convert one of them\."
        state = {**layer.state_dict(), "weight": a.weight}
        refused(lambda: layer.load_state_dict(state), TypeError, text)
        assert not layer.bias.any() and layer.running is running


def test_a_state_on_another_device(library):
    there = elsewhere(library)
    layer = _layer(library)
    text = r"bias must be on the same device as the layer \(.*\); received one on .*: move one of them\."
    with _untouched(library, layer):
        refused(lambda: layer.load_state_dict({**layer.state_dict(), "bias": there}), ValueError, text)
