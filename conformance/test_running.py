"""Running statistics over ten batches, in every framework's convention."""

import dataclasses

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import differences, inputs, measure, natives, oracle
from normkit.conformance.cases import SITES
from normkit.conformance.checks import assert_close
from normkit.conformance.tolerances import tolerance, units

#: Momentum as the weight of the old value; torch's 0.1, Keras's and Flax's 0.99; None averages.
MOMENTA = (0.9, 0.99, 0.0, 1.0, None)


def _steps(library, x, dtype, count=measure.STEPS):
    case = SITES[library.channel_axis]["batch_norm_train"]
    values = [inputs.operands(dataclasses.replace(case, id=str(k)), x, dtype)["x"] for k in range(count)]
    return values, [library.array(v, dtype) for v in values], case.options["axis"]


def _start(library, dtype, channels=12):
    return nk.RunningStats(library.array(np.zeros(channels), dtype), library.array(np.ones(channels), dtype))


def _updated(library, steps, axis, dtype, **options):
    stats = _start(library, dtype)
    for step in steps:
        stats = stats.update(nk.batch_norm_train(step, axis=axis)[1], **options)
    return stats


@pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("name", ["normal", "offset 1e4", "tabular columns"])
@pytest.mark.grid(dtypes=["float32", "float64"])
def test_ten_steps(library, dtype, name, momentum, unbiased):
    values, steps, axis = _steps(library, inputs.BY_NAME[name], dtype)
    stats = _updated(library, steps, axis, dtype, momentum=momentum, unbiased=unbiased)
    start = np.zeros(12), np.ones(12)
    mean, var, n = oracle.running_statistics(values, *start, axis=axis, momentum=momentum, unbiased=unbiased)
    kind = library.kind(_start(library, dtype).mean)
    assert_close(library, stats.mean, mean, kind, "running", np.abs(values).max())
    assert_close(library, stats.var, var, kind, "running")
    assert int(stats.num_batches) == n == measure.STEPS


@pytest.mark.grid(dtypes=["float16", "bfloat16"])
def test_narrow_batches_keep_float32_statistics(library, dtype):
    values, steps, axis = _steps(library, inputs.BY_NAME["normal"], dtype)
    stats = _updated(library, steps, axis, "float32")
    mean, var, _ = oracle.running_statistics(values, np.zeros(12), np.ones(12), axis=axis)
    kind = library.kind(_start(library, "float32").mean)
    assert_close(library, stats.mean, mean, kind, "running", np.abs(values).max())
    assert_close(library, stats.var, var, kind, "running")


def test_an_empty_batch_changes_nothing(library):
    _, steps, axis = _steps(library, inputs.BY_NAME["normal"], "float32", 1)
    before = _updated(library, steps, axis, "float32")
    shape = [0, *library.numpy(steps[0]).shape[1:]]
    y, batch = nk.batch_norm_train(library.array(np.zeros(shape), "float32"), axis=axis)
    after = before.update(batch)
    assert library.numpy(y).shape == tuple(shape)
    assert np.array_equal(library.numpy(after.mean), library.numpy(before.mean))
    assert np.array_equal(library.numpy(after.var), library.numpy(before.var))
    assert int(after.num_batches) == int(before.num_batches) == 1


def _native_error(library, module, **options):
    """The worse error of a native layer's mean and variance against the definition in the convention of ``options``."""
    values, steps, axis = _steps(library, inputs.BY_NAME["normal"], "float32")
    momentum = options.pop("literal", measure.MOMENTUM)
    pair = module.running_statistics(steps, "float32", axis=axis, momentum=momentum)
    reference = oracle.running_statistics(values, np.zeros(12), np.ones(12), axis=axis, **options)
    return max(units(library.numpy(a), r, "float32") for a, r in zip(pair, reference[:2], strict=True))


def test_native_layers_keep_to_their_convention(library):
    modules = natives.of(library.name)
    if not modules:
        pytest.skip(f"{library.name} has no layers of its own")
    for module in modules:
        for momentum in (0.9, 0.99, None) if module.CONVENTION.cumulative else (0.9, 0.99):
            options = {"momentum": momentum, "unbiased": module.CONVENTION.unbiased, "literal": momentum}
            assert _native_error(library, module, **options) <= tolerance("native", "float32").units, module.NAME


def test_what_native_layers_cannot_average(library):
    for module in natives.of(library.name):
        if not module.CONVENTION.cumulative:
            with pytest.raises(natives.Unsupported, match="no cumulative average"):
                _native_error(library, module, momentum=None, literal=None)


@pytest.mark.parametrize("id", ["runvar-bias", "momentum-sense"])
def test_known_differences(library, id, request):
    """Strict: a framework that stores the definition's variance, or weights the old value, after all makes it pass."""
    found = [(m, d) for m in natives.of(library.name) for d in differences.named(id, m.NAME)]
    if not found:
        pytest.skip(f"{library.name} has no layer with {id}")
    for module, difference in found:
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=difference.reason))
        literal = 1 - measure.MOMENTUM if id == "momentum-sense" else measure.MOMENTUM
        unbiased = True if id == "runvar-bias" else module.CONVENTION.unbiased
        error = _native_error(library, module, literal=literal, momentum=measure.MOMENTUM, unbiased=unbiased)
        assert error <= tolerance("native", "float32").units
