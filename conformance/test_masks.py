"""Masks and lengths: what is not valid has no part in anything, and takes part in nothing."""

import dataclasses

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import cases, inputs, measure, oracle
from normkit.conformance.checks import assert_close
from normkit.conformance.libraries import first

MASKED = [dataclasses.replace(c, masked=True) for axis in (1, -1) for c in cases.SITES[axis].values()]


def _bits(library, case, values):
    """y and gradients as NumPy arrays."""
    given = measure.arrays(library, case, values, "float32")
    out, found = measure.gradients(library, case, nk, given)
    return [library.numpy(a) for a in (first(out), *found.values())]


@pytest.mark.grid(cases=MASKED)
def test_what_is_masked_may_be_anything(library, case):
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    expected = _bits(library, case, values)
    for name, odd in (("x", np.nan), ("x", np.inf), ("dy", np.nan)):
        changed = {**values, name: np.where(values["mask"], values[name], odd)}
        for a, b in zip(_bits(library, case, changed), expected, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.grid(cases=[c for c in MASKED if c.layer != "batch_norm"])
def test_a_set_that_is_masked_out(library, case):
    """Zeros come of it, and zeros go back; the others are what they are."""
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    values["mask"][..., 3] = False
    values["mask"][0] = False
    y, dx, *others = _bits(library, case, values)
    kind = library.kind(library.array(values["x"], "float32"))
    reference, scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    assert_close(
        library, library.array(y, "float32"), oracle.forward(case.layer, values, case.options), kind, "forward"
    )
    assert_close(library, library.array(dx, "float32"), reference["x"], kind, "gradient", scales["x"])
    assert not y[0].any() and not dx[0].any() and all(np.isfinite(a).all() for a in others)


@pytest.mark.grid(cases=[c for c in MASKED if c.layer == "batch_norm_train" and c.options["axis"] == 1])
def test_a_channel_that_is_masked_out(library, case):
    """No element, no statistics: y and gradients are zero, and the channel's running statistics stay what they were."""
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    values["mask"][:, 3] = False
    given = measure.arrays(library, case, values, "float32")
    (y, stats), found = measure.gradients(library, case, nk, given)
    assert_close(library, y, oracle.forward(case.layer, values, case.options), library.kind(given["x"]), "forward")
    assert not library.numpy(y)[:, 3].any() and not library.numpy(found["x"])[:, 3].any()
    assert all(np.isfinite(library.numpy(g)).all() for g in found.values())
    assert library.numpy(stats.count)[3] == 0
    before = nk.RunningStats(library.array(np.full(12, 7.0), "float32"), library.array(np.full(12, 5.0), "float32"))
    after = before.update(stats, momentum=0.5)
    mean, var = library.numpy(after.mean), library.numpy(after.var)
    assert (mean[3], var[3]) == (7, 5) and (mean[:3] != 7).all() and np.isfinite(mean).all() and np.isfinite(var).all()


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("layer", cases.LAYERS)
def test_a_padded_batch_is_its_samples(library, layer, axis):
    """Samples of several lengths, padded to one: y and gradients are those of each sample alone, or of all together."""
    rng = np.random.default_rng(0)
    lengths, channels, most = (5, 1, 8, 3), 6, 8
    samples = [rng.normal(3.0, 2.0, (channels, n)) for n in lengths]
    padded = np.full((len(lengths), channels, most), np.nan)
    for row, sample in zip(padded, samples, strict=True):
        row[:, : sample.shape[1]] = sample
    if layer in ("layer_norm", "rms_norm"):
        axis = -1
    values = {"x": padded if axis == 1 else padded.swapaxes(1, 2)}
    values["dy"] = rng.normal(size=values["x"].shape)
    values |= {"weight": rng.uniform(0.5, 1.5, channels), "bias": rng.normal(size=channels)}
    if layer == "batch_norm":
        values |= {"mean": rng.normal(size=channels), "var": rng.uniform(0.5, 1.5, channels)}
    case = cases.Case(layer, layer, values["x"].shape, {"num_groups": 2} if layer == "group_norm" else {})
    case.options["axis"] = axis
    values = {name: inputs.rounded(a, "float32") for name, a in values.items()}
    given = measure.arrays(library, case, values, "float32")
    args, options = case.arguments(given)
    options["lengths"] = library.array(np.array(lengths), "int32")
    out, found = library.vjp(getattr(nk, layer), args, options, given["dy"])
    y, dx = library.numpy(first(out)), library.numpy(found[0])

    whole = layer.startswith("batch_norm")
    valid = [np.s_[i : i + 1, :, :n] if axis == 1 else np.s_[i : i + 1, :n] for i, n in enumerate(lengths)]
    joined = -1 if axis == 1 else 1
    pieces = [np.concatenate([values["x"][v] for v in valid], joined)] if whole else [values["x"][v] for v in valid]
    slopes = [np.concatenate([values["dy"][v] for v in valid], joined)] if whole else [values["dy"][v] for v in valid]
    ours = [np.concatenate([a[v] for v in valid], joined) for a in (y, dx)] if whole else None
    weights = 0
    for i, (x, dy) in enumerate(zip(pieces, slopes, strict=True)):
        alone = {**values, "x": x, "dy": dy}
        kind = library.kind(library.array(x, "float32"))
        mine_y, mine_dx = ours if whole else (y[valid[i]], dx[valid[i]])
        reference, scales = oracle.vjp_and_scales(layer, alone, dy, case.options)
        assert_close(
            library, library.array(mine_y, "float32"), oracle.forward(layer, alone, case.options), kind, "forward"
        )
        assert_close(library, library.array(mine_dx, "float32"), reference["x"], kind, "gradient", scales["x"])
        weights = weights + reference["weight"]
    place = next(i for i, a in enumerate(args) if a is given["weight"])
    assert_close(library, found[place], weights, library.kind(given["weight"]), "gradient")
    padding = np.ones(y.shape, bool)
    for v in valid:
        padding[v] = False
    assert not y[padding].any() and not dx[padding].any()
