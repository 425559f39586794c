"""Bad input: one sentence that names what was received, and nothing changed."""

import re

import numpy as np
import pytest

import normkit as nk
from normkit.backends import NAMES
from normkit.conformance import libraries
from normkit.conformance.checks import unchanged
from normkit.conformance.misfits import FLOATING, SUPPORTED, arrays, elsewhere, refused

NAN = float("nan")


class Axes(tuple):
    """Axes of a kind of their own."""


#: What is called on the arrays, the error, its text.
FUNCTIONS = {
    "axis too large": (
        lambda a: nk.layer_norm(a.x, axis=3),
        ValueError, r"axis must be in \[-3, 2\] for x of shape \(2, 4, 3\); received 3\.",
    ),
    "axis too small": (
        lambda a: nk.batch_norm_train(a.x, axis=-4),
        ValueError, r"axis must be in \[-3, 2\] for x of shape \(2, 4, 3\); received -4\.",
    ),
    "one axis of several": (
        lambda a: nk.rms_norm(a.x, axis=(1, 5)),
        ValueError, r"axis must be in \[-3, 2\] for x of shape \(2, 4, 3\); received 5\.",
    ),
    "axis by name": (
        lambda a: nk.group_norm(a.x, 2, axis="channels"),
        TypeError, r"axis must be an integer; received str 'channels'\.",
    ),
    "fractional axis": (
        lambda a: nk.instance_norm(a.x, axis=1.0), TypeError, r"axis must be an integer; received float 1\.0\.",
    ),
    "no axis": (
        lambda a: nk.layer_norm(a.x, axis=()), ValueError, r"axis must name at least one axis; received \(\)\.",
    ),
    "an axis twice": (
        lambda a: nk.layer_norm(a.x, axis=(1, -2)),
        ValueError, r"axis must not name an axis twice; received \(1, -2\) for x of shape \(2, 4, 3\)\.",
    ),
    "groups that do not divide": (
        lambda a: nk.group_norm(a.x, 3), ValueError, r"num_groups must divide the number of channels, 4; received 3\.",
    ),
    "no groups": (
        lambda a: nk.group_norm(a.x, 0), ValueError, r"num_groups must be a positive integer; received 0\.",
    ),
    "fractional groups": (
        lambda a: nk.group_norm(a.x, 2.0), TypeError, r"num_groups must be a positive integer; received float 2\.0\.",
    ),
    "weight of another shape": (
        lambda a: nk.batch_norm_train(a.x, a.short),
        ValueError, r"weight must have shape \(4,\); received shape \(3,\)\.",
    ),
    "bias of another shape": (
        lambda a: nk.group_norm(a.x, 2, a.weight, a.short),
        ValueError, r"bias must have shape \(4,\); received shape \(3,\)\.",
    ),
    "weight in another order": (
        lambda a: nk.layer_norm(a.x, a.turned, axis=(2, 1)),
        ValueError, r"weight must have shape \(4, 3\); received shape \(3, 4\)\.",
    ),
    "integer weight": (
        lambda a: nk.instance_norm(a.x, a.int_weight),
        TypeError, rf"weight must be {FLOATING}; received int32: convert it first\.",
    ),
    "list as weight": (
        lambda a: nk.rms_norm(a.x, [1.0, 1.0, 1.0]), TypeError, rf"weight must be {SUPPORTED}; received list\.",
    ),
    "integer x": (
        lambda a: nk.layer_norm(a.ints), TypeError, rf"x must be {FLOATING}; received int32: convert it first\.",
    ),
    "boolean x": (
        lambda a: nk.batch_norm_train(a.flags), TypeError, rf"x must be {FLOATING}; received bool: convert it first\.",
    ),
    "list as x": (lambda a: nk.layer_norm([1.0, 2.0]), TypeError, rf"x must be {SUPPORTED}; received list\."),
    "nothing as x": (lambda a: nk.layer_norm(None), TypeError, rf"x must be {SUPPORTED}; received None\."),
    "number as x": (lambda a: nk.layer_norm(3.0), TypeError, rf"x must be {SUPPORTED}; received float 3\.0\."),
    "0-d x": (
        lambda a: nk.layer_norm(a.scalar),
        ValueError, r"x must have at least one axis; received an array of shape \(\)\.",
    ),
    "a long text as axis": (
        lambda a: nk.layer_norm(a.x, axis="x" * 500),
        TypeError, r"axis must be an integer; received str 'x{59}…\.",
    ),
    "negative eps": (
        lambda a: nk.layer_norm(a.x, eps=-1e-5), ValueError, r"eps must be a finite number >= 0; received -1e-05\.",
    ),
    "eps NaN": (
        lambda a: nk.rms_norm(a.x, eps=NAN), ValueError, r"eps must be a finite number >= 0; received nan\.",
    ),
    "infinite eps": (
        lambda a: nk.batch_norm_train(a.x, eps=float("inf")),
        ValueError, r"eps must be a finite number >= 0; received inf\.",
    ),
    "eps as text": (
        lambda a: nk.group_norm(a.x, 2, eps="1e-5"), TypeError, r"eps must be a number; received str '1e-5'\.",
    ),
    "eps as bytes": (
        lambda a: nk.layer_norm(a.x, eps=b"1e-5"), TypeError, r"eps must be a number; received bytes\.",
    ),
    "eps as text in an array": (
        lambda a: nk.layer_norm(a.x, eps=np.array("1e-5")),
        TypeError, r"eps must be a number; received numpy\.ndarray\.",
    ),
    "eps as a flag in an array": (
        lambda a: nk.layer_norm(a.x, eps=np.True_), TypeError, r"eps must be a number; received numpy\.bool\.",
    ),
    "complex eps": (
        lambda a: nk.layer_norm(a.x, eps=np.complex64(1)),
        TypeError, r"eps must be a number; received numpy\.complex64\.",
    ),
    "eps beyond floats": (
        lambda a: nk.layer_norm(a.x, eps=10**400),
        ValueError, r"eps must be a number that a float can hold; received a larger integer\.",
    ),
    "axis True in a tuple of a kind": (
        lambda a: [nk.layer_norm(a.x, axis=Axes(axes)) for axes in ((1,), (True,))],
        TypeError, r"axis must be an integer; received True\.",
    ),
    "unbiased as text": (
        lambda a: _running(a).update(_batch(a), unbiased="no"),
        ValueError, r"unbiased must be True or False; received 'no'\.",
    ),
    "centred as a number": (
        lambda a: nk.lp_layer_norm(a.x, p=1, centred=1), ValueError, r"centred must be True or False; received 1\.",
    ),
    "negative count": (
        lambda a: _running(a).update(_batch(a)._replace(count=-1)),
        ValueError, r"batch_stats\.count must not be negative; received -1\.",
    ),
    "fractional count": (
        lambda a: _running(a).update(_batch(a)._replace(count=NAN)),
        TypeError, r"batch_stats\.count must be an integer or an array; received float nan\.",
    ),
    "num_batches as text": (
        lambda a: _running(a)._replace(num_batches="a").update(_batch(a)),
        TypeError, r"num_batches must be an integer or an array; received str 'a'\.",
    ),
    "no eps": (lambda a: nk.layer_norm(a.x, eps=None), TypeError, r"eps must be a number; received None\."),
    "weight_offset NaN": (
        lambda a: nk.rms_norm(a.x, weight_offset=NAN), ValueError, r"weight_offset must be finite; received nan\.",
    ),
    "momentum above 1": (
        lambda a: _running(a).update(_batch(a), momentum=1.5),
        ValueError, r"momentum must be in \[0, 1\]; received 1\.5\.",
    ),
    "momentum below 0": (
        lambda a: _running(a).update(_batch(a), momentum=-0.1),
        ValueError, r"momentum must be in \[0, 1\]; received -0\.1\.",
    ),
    "momentum NaN": (
        lambda a: _running(a).update(_batch(a), momentum=NAN),
        ValueError, r"momentum must be in \[0, 1\]; received nan\.",
    ),
    "mean of another shape": (
        lambda a: nk.batch_norm(a.x, a.short, a.var),
        ValueError, r"mean must have shape \(4,\); received shape \(3,\)\.",
    ),
    "var of another shape": (
        lambda a: nk.batch_norm(a.x, a.mean, a.short),
        ValueError, r"var must have shape \(4,\); received shape \(3,\)\.",
    ),
    "no var": (lambda a: nk.batch_norm(a.x, a.mean, None), TypeError, rf"var must be {SUPPORTED}; received None\."),
    "integer var": (
        lambda a: nk.batch_norm(a.x, a.mean, a.int_weight),
        TypeError, rf"var must be {FLOATING}; received int32: convert it first\.",
    ),
    "running statistics of another shape": (
        lambda a: nk.RunningStats(a.short, a.short).update(_batch(a)),
        ValueError, r"batch_stats\.mean must have shape \(3,\); received shape \(4,\)\.",
    ),
    "running mean and var that differ": (
        lambda a: nk.RunningStats(a.mean, a.short).update(_batch(a)),
        ValueError, r"var must have shape \(4,\); received shape \(3,\)\.",
    ),
    "y and statistics in place of statistics": (
        lambda a: _running(a).update(nk.batch_norm_train(a.x)),
        TypeError, r"batch_stats must be the BatchStats that batch_norm_train returns beside y; received tuple\.",
    ),
    "unbiased variance of one value": (
        lambda a: _running(a).update(nk.BatchStats(a.mean, a.var, 1)),
        ValueError,
        (r"unbiased=True needs more than one value per channel; received a count of 1: use unbiased=False, or "
         r'single_value="zero", which leaves such statistics out\.'),
    ),
    "one value per channel": (
        lambda a: nk.batch_norm_train(a.lone),
        ValueError,
        (r"batch_norm_train needs more than one value per channel, one has no variance; received x of shape "
         r"\(1, 4, 1\): "
         r'use a larger batch, single_value="zero", or batch_norm with running statistics '
         r'\(in a layer: single_value="running"\)\.'),
    ),
    "empty channel axis": (
        lambda a: nk.batch_norm_train(a.no_channel),
        ValueError, r"The channel axis 1 must not be empty; received x of shape \(2, 0, 3\)\.",
    ),
    "empty channel axis in groups": (
        lambda a: nk.group_norm(a.no_channel, 2),
        ValueError, r"The channel axis 1 must not be empty; received x of shape \(2, 0, 3\)\.",
    ),
    "empty normalized axis": (
        lambda a: nk.layer_norm(a.no_column),
        ValueError, r"The normalized axis 2 must not be empty; received x of shape \(2, 4, 0\)\.",
    ),
    "nothing to take statistics over": (
        lambda a: nk.instance_norm(a.matrix),
        ValueError, r"instance_norm needs an axis to take statistics over; received x of shape \(2, 4\)\.",
    ),
    "one row of batch norm": (
        lambda a: nk.batch_norm_train(a.row, axis=0),
        ValueError, r"batch_norm_train needs an axis to take statistics over; received x of shape \(3,\)\.",
    ),
    "mask of numbers": (
        lambda a: nk.batch_norm_train(a.x, mask=a.x),
        TypeError, r"mask must be a boolean array; received dtype float32\.",
    ),
    "mask of another shape": (
        lambda a: nk.batch_norm_train(a.x, mask=a.wide_flags),
        ValueError, r"mask must broadcast to x of shape \(2, 4, 3\); received shape \(2, 4, 2\)\.",
    ),
    "mask of another shape for layer norm": (
        lambda a: nk.layer_norm(a.x, mask=a.wide_flags),
        ValueError, r"mask must broadcast to x of shape \(2, 4, 3\); received shape \(2, 4, 2\)\.",
    ),
    "mask and lengths": (
        lambda a: nk.rms_norm(a.x, mask=a.flags, lengths=a.lengths),
        ValueError, r"mask and lengths exclude each other; received both\.",
    ),
    "lengths that are no integers": (
        lambda a: nk.layer_norm(a.x, lengths=a.short),
        TypeError, r"lengths must be of dtype int32 or int64; received float32\.",
    ),
    "lengths of too many samples": (
        lambda a: nk.layer_norm(a.x, lengths=a.int_weight),
        ValueError, r"lengths must have shape \(2,\); received shape \(4,\)\.",
    ),
    "lengths without positions": (
        lambda a: nk.batch_norm_train(a.matrix, lengths=a.lengths),
        ValueError, r"lengths needs an axis of positions, and x of shape \(2, 4\) has none here: pass a mask\.",
    ),
    "lengths where axis 0 is the channels'": (
        lambda a: nk.batch_norm_train(a.x, axis=0, lengths=a.lengths),
        ValueError, r"lengths needs an axis of positions, and x of shape \(2, 4, 3\) has none here: pass a mask\.",
    ),
    "gradient of another shape": (
        lambda a: nk.vjp(nk.layer_norm, a.x)[1](a.weight),
        ValueError, r"dy must have shape \(2, 4, 3\); received shape \(4,\)\.",
    ),
    "a list's gradient": (
        lambda a: nk.vjp([], a.x), TypeError, r"fn must be one of layer_norm, [a-z_, ]+; received \[\]\.",
    ),
    "another function's gradient": (
        lambda a: nk.vjp(len, a.x),
        TypeError,
        (r"fn must be one of layer_norm, rms_norm, group_norm, instance_norm, batch_norm, batch_norm_train, "
         r"[a-z_, ]+; received <built-in function len>\."),
    ),
}  # fmt: skip

#: Arrays of NumPy that are more or less than arrays.
HEIRS = {
    "a masked array": (
        lambda: nk.layer_norm(np.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3))),
        TypeError,
        r"x must be a plain array; received numpy\.ma\.\S*MaskedArray: pass its data, and what is valid as mask\.",
    ),
    "a masked weight": (
        lambda: nk.layer_norm(np.ones((2, 3)), np.ma.masked_array(np.ones(3))),
        TypeError, r"weight must be a plain array; received numpy\.ma(\.core)?\.MaskedArray: .*\.",
    ),
    "a matrix": (
        lambda: nk.layer_norm(np.ones((2, 3)).view(np.matrix)),
        TypeError, r"x must be a plain array; received numpy\.matrix: numpy\.asarray makes it one\.",
    ),
    "a heir of matrix": (
        lambda: nk.layer_norm(np.ones((2, 3)).view(type("Table", (np.matrix,), {}))),
        TypeError, r"x must be a plain array; received .*Table: numpy\.asarray makes it one\.",
    ),
    "a wider float": (
        lambda: nk.layer_norm(np.ones(3, "V4")), TypeError, rf"x must be {FLOATING}; received .*: convert it first\.",
    ),
}  # fmt: skip


def _batch(a):
    return nk.batch_norm_train(a.x)[1]


def _running(a):
    return nk.RunningStats(a.mean, a.var)


@pytest.mark.parametrize("row", FUNCTIONS)
def test_functions(library, row):
    call, error, text = FUNCTIONS[row]
    given = arrays(library)
    with unchanged(library, vars(given)):
        refused(lambda: call(given), error, text)


@pytest.mark.parametrize(("axis", "shown"), [(1.0, "float 1.0"), (True, "True")])
def test_what_equals_an_axis_seen_before(library, axis, shown):
    x = arrays(library).x
    nk.group_norm(x, 2, axis=1)
    nk.rms_norm(x, axis=(1, 2))
    refused(lambda: nk.group_norm(x, 2, axis=axis), TypeError, rf"axis must be an integer; received {shown}\.")
    refused(lambda: nk.rms_norm(x, axis=(axis, 2)), TypeError, rf"axis must be an integer; received {shown}\.")


@pytest.mark.parametrize("row", HEIRS)
def test_heirs_of_numpys_array(row):
    refused(*HEIRS[row])


def test_complex(library):
    x = library.array(np.ones((2, 3)), "complex64")
    refused(lambda: nk.layer_norm(x), TypeError, rf"x must be {FLOATING}; received complex64: convert it first\.")


def test_memory_that_is_not_dense(library):
    if library.name != "torch":
        pytest.skip("only torch has layouts")
    a, sparse = arrays(library), library.xp.eye(4).to_sparse()
    text = rf"must be {FLOATING}; received float32 in layout torch\.sparse_coo: convert it first\."
    refused(lambda: nk.layer_norm(sparse), TypeError, f"x {text}")
    refused(lambda: nk.group_norm(a.x, 2, sparse[0]), TypeError, f"weight {text}")
    text = r"mask must be a boolean array; received dtype bool in layout torch\.sparse_coo\."
    refused(lambda: nk.rms_norm(a.matrix, mask=(a.matrix > 0).to_sparse()), TypeError, text)


@pytest.mark.grid(dtypes=("float32", "float64", "float16", "bfloat16"))
def test_negative_variance(library, dtype):
    """Refused where values are at hand in host memory; elsewhere looking would wait for the device, and y is NaN."""
    a = arrays(library)
    a.negative = library.array(library.numpy(a.negative), dtype)
    if library.name in ("numpy", "torch", "tensorflow") and "cpu" in library.kind(a.x).device.lower():
        text = r"var must not be negative; received a smallest value of -0\.5\."
        refused(lambda: nk.batch_norm(a.x, a.mean, a.negative), ValueError, text)
        ones = library.array(np.ones(4), dtype)
        stats = nk.BatchStats(ones, a.negative, 5), nk.BatchStats(ones, ones, 5)
        refused(lambda: nk.RunningStats(ones, ones).update(stats[0], momentum=0.9), ValueError, rf"batch_stats\.{text}")
        refused(lambda: nk.RunningStats(ones, a.negative).update(stats[1], momentum=0.9), ValueError, text)
        none = library.array(np.array([0.0, -0.0, np.nan, 1.0]), dtype)  # is negative
        assert np.isfinite(library.numpy(nk.batch_norm(a.x, a.mean, none))[:, [0, 1, 3]]).all()
    else:
        with np.errstate(invalid="ignore"):
            y = library.numpy(nk.batch_norm(a.x, a.mean, a.negative))
        assert np.isnan(y[:, 2]).all() and np.isfinite(y[:, [0, 1, 3]]).all()


@pytest.mark.parametrize("length", [-1, 4])
def test_lengths_out_of_range(library, length):
    """Refused where values are at hand in host memory; elsewhere nothing is before 0 or after the end."""
    a = arrays(library)
    lengths = library.array(np.array([length, 1]), "int32")
    if library.name in ("numpy", "torch", "tensorflow") and "cpu" in library.kind(a.x).device.lower():
        text = rf"lengths must be in \[0, 3\], axis 2 of x; received {length}\."
        refused(lambda: nk.instance_norm(a.x, lengths=lengths), ValueError, text)
    else:
        near = library.array(np.array([min(max(length, 0), 3), 1]), "int32")
        y, expected = (library.numpy(nk.instance_norm(a.x, lengths=n)) for n in (lengths, near))
        assert np.array_equal(y, expected)


def _others(library):
    """An array of every other library here; array-api-strict's is always one of them, or NumPy's."""
    return {o.name: o for o in map(libraries.LIBRARIES.get, libraries.available()[0]) if o.name != library.name}


def test_mixed_libraries(library, request):
    loaded = {a.name for a in request.config.libraries} | {"numpy", "strict"}
    others = [other for name, other in _others(library).items() if name in loaded]
    assert others
    a = arrays(library)
    for other in others:
        with other.session():
            b = arrays(other)
        kind = re.escape(f"{type(b.weight).__module__}.{type(b.weight).__qualname__}")
        ours = library.name if library.name in NAMES else "array-api"
        text = rf"must be of the same library as x \({ours}\); received {kind}: convert one of them\."
        with unchanged(library, vars(a)):
            refused(lambda b=b: nk.layer_norm(a.x, b.row), TypeError, f"weight {text}")
            refused(lambda b=b: nk.group_norm(a.x, 2, a.weight, b.weight), TypeError, f"bias {text}")
            refused(lambda b=b: nk.batch_norm(a.x, b.mean, a.var), TypeError, f"mean {text}")
            refused(lambda b=b: nk.batch_norm(a.x, a.mean, b.var), TypeError, f"var {text}")
            refused(lambda b=b: nk.batch_norm_train(a.x, mask=b.flags), TypeError, f"mask {text}")
            refused(lambda b=b: nk.layer_norm(a.x, lengths=b.lengths), TypeError, f"lengths {text}")
            refused(lambda b=b: nk.vjp(nk.layer_norm, a.x)[1](b.x), TypeError, f"dy {text}")
            text = text.replace("as x", "as mean")
            refused(lambda b=b: _running(b).update(_batch(a)), TypeError, r"batch_stats\.mean must be of the .*\.")
            refused(lambda b=b: nk.RunningStats(a.mean, b.var).update(_batch(a)), TypeError, f"var {text}")


def test_mixed_libraries_without_entries(library):
    """Two that are served by their array API namespace alone are two."""
    other = type("Other", (), {"__module__": "other.arrays", "__array_namespace__": None, "shape": (3,)})()
    ours = library.name if library.name in NAMES else "array-api"
    text = rf"weight must be of the same library as x \({ours}\); received other\.arrays\.Other: convert one of them\."
    refused(lambda: nk.layer_norm(arrays(library).x, other), TypeError, text)


def test_another_device(library):
    a, there = arrays(library), elsewhere(library)
    here, other = (re.escape(str(x.device)) for x in (a.x, there))
    text = rf"must be on the same device as x \({here}\); received one on {other}: move one of them\."
    with unchanged(library, vars(a)):
        refused(lambda: nk.batch_norm_train(a.x, there), ValueError, f"weight {text}")
        refused(lambda: nk.batch_norm(a.x, a.mean, there), ValueError, f"var {text}")
        refused(lambda: nk.batch_norm_train(a.x, mask=there > 0), ValueError, f"mask {text}")
