"""Properties that hold for all numbers, shapes, axes, dtypes and strides, on examples that hypothesis makes up."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np

import normkit as nk
from normkit.conformance import inputs, measure, oracle
from normkit.conformance.cases import Case
from normkit.conformance.checks import strided
from normkit.conformance.libraries import first
from normkit.conformance.tolerances import judged, tolerance, units
from normkit.core import population

LAYERS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm_train")
#: x is of whole numbers up to the first, shifted by up to the second: each dtype holds their sum.
WHOLE = {"float64": (100, 2**40), "float32": (100, 2**20), "float16": (30, 1000), "bfloat16": (15, 100)}
#: Powers of two that x is scaled by.
EXPONENT = {"float64": 20, "float32": 20, "float16": 4, "bfloat16": 20}
#: Where each new shape costs a second of compiling.
FEW_SHAPES = ((3, 4), (2, 4, 3))
EXAMPLES, FEW_EXAMPLES = 25, 4


def examples(test):
    """The same ones in each run, fewer where they take long; the fixture only switches the library's dtypes on."""

    def run(library):
        settings = hypothesis.settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=FEW_EXAMPLES if library.thrifty else EXAMPLES,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(data=st.data())(lambda data: test(library, data.draw)))()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer: its case, the dtype, float64 numbers, and how x is strided."""

    case: Case
    dtype: str
    values: dict
    strides: str = ""

    def __str__(self):
        where = f"{self.case.layer} {self.case.shape} {self.case.options} {self.case.affine} {self.dtype}"
        return f"{where} {self.case.layout} {self.strides}: {self.values}"

    __repr__ = __str__

    def given(self, library):
        given = measure.arrays(library, self.case, self.values, self.dtype)
        return {**given, "x": strided(library, given["x"]).get(self.strides, given["x"])}

    def y(self, library):
        return library.numpy(first(measure.call(self.case, nk, self.given(library))))

    def gradients(self, library):
        found = measure.gradients(library, self.case, nk, self.given(library))[1]
        return {name: library.numpy(g) for name, g in found.items()}

    def scales(self):
        """What errors of the gradients are compared with."""
        return oracle.vjp_and_scales(self.case.layer, self.values, self.values["dy"], self.case.options)[1]

    def but(self, options=None, **values):
        """The same call with other options or numbers."""
        case = dataclasses.replace(self.case, options={**self.case.options, **(options or {})})
        return dataclasses.replace(self, case=case, values={**self.values, **values})

    def size(self, y):
        """What errors of y are compared with: the largest of y and of the terms that it is a sum of."""
        params = (self.values[name] for name in ("weight", "bias") if name in self.values)
        return max(np.abs(a).max(initial=0) for a in (y, *params))


def assert_same(call, y, other):
    """Two results of one number: each is within the forward tolerance, which is what "cross" stands for."""
    assert units(y, other, call.dtype, call.size(other)) <= tolerance("cross", call.dtype).units


def calls(draw, library, layers=LAYERS, dtypes=("float64", "float32", "float16", "bfloat16"), ranks=(2, 3, 4)):
    """Any call: its layer, shape, axes, parameters, dtype, numbers and strides."""
    layer = draw(st.sampled_from(layers))
    dtype = draw(st.sampled_from([d for d in dtypes if d in library.dtypes and judged(d)]))
    ranks = [r for r in ranks if r > 2 or layer != "instance_norm"]
    if library.thrifty:
        shape = draw(st.sampled_from([s for s in FEW_SHAPES if len(s) in ranks]))
    else:
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=min(ranks), max_size=max(ranks))))
    options = draw(_options(layer, len(shape), shape))
    affine = draw(st.sampled_from(("both", "weight", "bias", "none")))
    layout = draw(st.sampled_from(library.layouts)) if len(shape) == 4 else "contiguous"
    case = Case("drawn", layer, shape, options, affine, layout)
    hypothesis.assume(layer != "batch_norm_train" or case.count > 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = WHOLE[dtype][0]
    values = {name: inputs.operands(case, np.zeros(shape), dtype).get(name) for name in ("weight", "bias")}
    values = {name: rng.integers(-8, 9, p.shape) / 4.0 for name, p in values.items() if p is not None}
    values |= {name: rng.integers(-whole, whole + 1, shape).astype(np.float64) for name in ("x", "dy")}
    strides = draw(st.sampled_from(("", *STRIDES))) if layout == "contiguous" else ""
    return Call(case, dtype, values, strides)


#: As :func:`checks.strided` has them.
STRIDES = ("every second", "transposed", "Fortran", "negative strides")


@st.composite
def _options(draw, layer, rank, shape):
    options = {"eps": draw(st.sampled_from((1e-3, 1e-5)))}
    if layer in ("layer_norm", "rms_norm"):
        return {**options, "axis": tuple(draw(st.sets(st.integers(0, rank - 1), min_size=1)))}
    axis = draw(st.integers(0 if layer == "batch_norm_train" else 1, rank - 1))
    if layer == "group_norm":
        groups = [n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]
        options["num_groups"] = draw(st.sampled_from(groups))
    return {**options, "axis": axis}


@examples
def test_shift_and_scale(library, draw):
    """f(2^k x + c, eps 4^k) = f(x, eps), and its gradient is 2^k times smaller; without centring, c is 0."""
    call = calls(draw, library)
    factor = 2.0 ** draw(st.integers(-EXPONENT[call.dtype], EXPONENT[call.dtype]))
    shift = 0 if call.case.layer == "rms_norm" else WHOLE[call.dtype][1] * draw(st.integers(-1, 1))
    moved = call.but({"eps": call.case.options["eps"] * factor**2}, x=(call.values["x"] + shift) * factor)
    assert_same(call, moved.y(library), call.y(library))
    if call.dtype != "float16":  # whose gradient may leave its range
        dx, other = call.gradients(library)["x"], moved.gradients(library)["x"] * factor
        limit = 2 * tolerance("gradient", call.dtype).units  # each is within it
        assert units(other, dx, call.dtype, call.scales()["x"]) <= limit


@examples
def test_permutations(library, draw):
    """Samples, channels or places in another order, parameters with them, give y and gradients in that order."""
    call = calls(draw, library)
    axis = draw(st.integers(0, len(call.case.shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = rng.permutation(call.case.shape[axis])
    groups = call.case.options.get("num_groups")
    if groups and axis == call.case.options["axis"]:  # groups stay together, in another order inside and among them
        order = rng.permuted(rng.permutation(np.arange(len(order)).reshape(groups, -1)), axis=1).ravel()
    params = call.case.sets.params

    def taken(name, a):
        if name in ("x", "dy"):
            return np.take(a, order, axis)
        return np.take(a, order, params.index(axis)) if axis in params else a

    moved = call.but(**{name: taken(name, a) for name, a in call.values.items()})
    assert_same(call, moved.y(library), taken("x", call.y(library)))
    found, other, scales = call.gradients(library), moved.gradients(library), moved.scales()
    for name in found:
        limit = 2 * tolerance("gradient", call.dtype).units  # each is within it
        assert units(other[name], taken(name, found[name]), call.dtype, scales[name]) <= limit, name


@examples
def test_one_group_is_a_layer_norm(library, draw):
    call = calls(draw, library, ("group_norm",))
    call = call.but({"num_groups": 1}, weight=None, bias=None)
    call = dataclasses.replace(call, case=dataclasses.replace(call.case, affine="none"),
                               values={name: call.values[name] for name in ("x", "dy")})  # fmt: skip
    axes = tuple(range(1, len(call.case.shape)))
    x, eps = call.given(library)["x"], call.case.options["eps"]
    assert_same(call, call.y(library), library.numpy(nk.layer_norm(x, axis=axes, eps=eps)))


@examples
def test_a_group_for_each_channel_is_an_instance_norm(library, draw):
    call = calls(draw, library, ("instance_norm",))
    groups = call.case.shape[call.case.options["axis"]]
    other = dataclasses.replace(call.case, layer="group_norm", options={**call.case.options, "num_groups": groups})
    assert_same(call, dataclasses.replace(call, case=other).y(library), call.y(library))


@examples
def test_batch_norm_of_one_sample_is_an_instance_norm(library, draw):
    call = calls(draw, library, ("instance_norm",))
    case = dataclasses.replace(call.case, shape=(1, *call.case.shape[1:]))
    call = dataclasses.replace(call, case=case, values={**call.values, "x": call.values["x"][:1]})
    hypothesis.assume(case.count > 1)
    values = {name: call.values[name] for name in call.values if name != "dy"}
    call = dataclasses.replace(call, values=values)
    other = dataclasses.replace(call, case=dataclasses.replace(case, layer="batch_norm_train"))
    assert_same(call, other.y(library), call.y(library))


@examples
def test_pullbacks_are_linear(library, draw):
    """p(a dy + b dy') = a p(dy) + b p(dy'), for each operand."""
    call = calls(draw, library, dtypes=("float64", "float32"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a, b = draw(st.sampled_from((-2, 0.5, 4))), draw(st.sampled_from((-1, 0, 8)))
    second = call.but(dy=rng.integers(-100, 101, call.case.shape).astype(np.float64))
    both = call.but(dy=a * call.values["dy"] + b * second.values["dy"])
    one, two, sum_ = (c.gradients(library) for c in (call, second, both))
    scales = [c.scales() for c in (call, second, both)]
    for name in one:
        # Each of the three is within its tolerance, and the sum of two of them is taken in float64.
        scale = abs(a) * scales[0][name] + abs(b) * scales[1][name] + scales[2][name]
        error = units(sum_[name], a * one[name] + b * two[name], call.dtype, scale)
        assert error <= tolerance("gradient", call.dtype).units, name


@examples
def test_gradients_are_orthogonal_to_what_is_taken_out(library, draw):
    """In each set, sum(dx) = 0 where the layer centres, and sum(dx x̂) = eps rstd³ sum(g x̂): 0, but for eps."""
    call = calls(draw, library)
    sets, values, eps = call.case.sets, call.values, call.case.options["eps"]
    over = sets.over
    x = values["x"].reshape(sets.view)
    centred = call.case.layer != "rms_norm"
    d = x - x.mean(over, keepdims=True) * centred
    rstd = 1 / np.sqrt((d * d).mean(over, keepdims=True) + eps)
    shape = [call.case.shape[a] if a in sets.params else 1 for a in range(len(call.case.shape))]
    g = (values["dy"] * values.get("weight", np.ones(call.case.param_shape)).reshape(shape)).reshape(sets.view)
    dx = call.gradients(library)["x"].reshape(sets.view)
    # A sum of n errors, each within the tolerance of its scale: at most n times as large.
    scale = np.broadcast_to(call.scales()["x"], call.case.shape).reshape(sets.view).max(over, keepdims=True)
    limit = call.case.count * tolerance("gradient", call.dtype).units
    if centred:
        total = dx.sum(over, keepdims=True)
        assert units(total, np.zeros_like(total), call.dtype, scale) <= limit
    xhat = d * rstd
    along = (g * xhat).sum(over, keepdims=True) * eps * rstd**3
    largest = np.maximum(np.abs(xhat).max(over, keepdims=True), 1)
    assert units((dx * xhat).sum(over, keepdims=True), along, call.dtype, scale * largest) <= limit


@examples
def test_statistics_merge_in_any_order(library, draw):
    """Counts, means and sums of squares of parts: associative, commutative, and together those of the whole."""
    parts = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from((0, 2**20)))
    values = rng.integers(-100, 101, (sum(parts), 3)) + offset
    found = (population.of_channels(np, v, -1) for v in np.split(values.astype(np.float64), np.cumsum(parts)[:-1]))
    a, b, c = (p._replace(mean=library.array(p.mean, "float64"), m2=library.array(p.m2, "float64")) for p in found)
    limit = tolerance("statistics", "float64").units
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert merged.count == len(values)
        if not merged.count:
            continue
        mean, m2 = (library.numpy(v) for v in merged[1:])
        assert units(mean, values.mean(0), "float64", np.abs(values).max()) <= limit
        # A mean is off by a unit of itself, and m2 by its product with the deviations, twice.
        d = values - values.mean(0)
        scale = (d * d).sum(0) + 2 * np.abs(values.mean(0)) * np.abs(d).sum(0)
        assert units(m2, (d * d).sum(0), "float64", scale) <= limit


@examples
def test_inference_by_the_statistics_of_training(library, draw):
    """With all of the batch's statistics in the running ones, inference gives what training gave."""
    call = calls(draw, library, ("batch_norm_train",), ("float64", "float32"))
    given, options = call.given(library), call.case.options
    weight, bias = (given.get(name) for name in ("weight", "bias"))
    y, stats = nk.batch_norm_train(given["x"], weight, bias, **options)
    channels = call.case.shape[options["axis"]]
    start = (library.array(a(channels), call.dtype) for a in (np.zeros, np.ones))
    running = nk.RunningStats(*start).update(stats, momentum=0.0, unbiased=False)
    again = library.numpy(nk.batch_norm(given["x"], running.mean, running.var, weight, bias, **options))
    y = library.numpy(y)
    # A mean in the statistics' dtype is off by half a unit of itself, which is so much in y.
    largest = np.abs(library.numpy(stats.mean) / np.sqrt(library.numpy(stats.var) + options["eps"])).max()
    scale = call.size(y) + largest * np.abs(call.values.get("weight", np.ones(1))).max()
    assert units(again, y, call.dtype, scale) <= tolerance("cross", call.dtype).units
