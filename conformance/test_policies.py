"""Policies of batch norm: single values, empty batches, statistics that are not finite, and the three switches."""

import copy
import itertools

import numpy as np
import pytest

import normkit as nk
from normkit.backends import NAMES
from normkit.conformance import cases, inputs, libraries, measure, oracle
from normkit.conformance.checks import assert_close
from normkit.conformance.libraries import first
from normkit.conformance.misfits import SUPPORTED, arrays, refused

#: The modes that compile, of all libraries.
MODES = [m for a in libraries.LIBRARIES.values() for m in a.modes]
#: What torch.compile's own parts say of each other when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CHANNELS = 5
#: Channel 1 has one valid element, channel 3 none.
MASK = np.ones((4, CHANNELS, 6), bool)
MASK[:, (1, 3)] = False
MASK[2, 1, 4] = True
LONE = np.array([False, True, False, True, False])
#: Where it costs nothing to look at a mask.
LOOKS = ("numpy", "torch", "tensorflow")


def _layer(library, **options):
    """A layer with parameters and statistics of its own."""
    layer = nk.BatchNorm(CHANNELS, backend=library.name if library.name in NAMES else library.xp, **options)
    start = iter(np.random.default_rng(1).uniform(0.5, 2.0, (4, CHANNELS)))
    layer.weight, layer.bias, mean, var = (library.array(a, "float32") for a in start)
    layer.running = nk.RunningStats(mean, var, 7)
    return layer


def _known(library, layer):
    """Parameters and statistics as NumPy arrays, by the oracle's names."""
    arrays = {"weight": layer.weight, "bias": layer.bias, "mean": layer.running.mean, "var": layer.running.var}
    return {name: library.numpy(a) for name, a in arrays.items()}


def _step(library, layer, x, dy, **valid):
    """y, the gradients of x, weight and bias in the library's own way, and the running statistics after; undone."""
    before = layer.weight, layer.bias, layer.running

    def call(x, weight, bias):
        layer.weight, layer.bias = weight, bias
        return layer(x, **valid), layer.running

    try:
        if library.differentiates:
            (y, after), found = library.vjp(call, before_x := [x, *before[:2]], {}, dy)
            return y, [found.get(i) for i in range(len(before_x))], after
        y, pullback = layer.vjp(x, **valid)
        dx, found = pullback(dy)
        return y, [dx, found.get("weight"), found.get("bias")], layer.running
    finally:
        layer.weight, layer.bias, layer.running = before


def _numbers(shape=MASK.shape):
    rng = np.random.default_rng(0)
    return (inputs.rounded(a, "float32") for a in (rng.normal(3, 2, shape), rng.normal(size=shape)))


def _merged(known, statistics, present, momentum=0.9):
    """Running statistics after a batch, in the channels that are present."""
    mean, var, count = (np.asarray(a, "f8") for a in statistics)
    var = var * count / np.maximum(count - 1, 1)
    new = (
        np.where(present, momentum * known[n] + (1 - momentum) * a, known[n]) for n, a in (("mean", mean), ("var", var))
    )
    return tuple(new)


def _assert_running(library, running, mean, var, num_batches):
    kind = library.kind(running.mean)
    assert_close(library, running.mean, mean, kind, "running", np.abs(mean).max())
    assert_close(library, running.var, var, kind, "running")
    assert int(running.num_batches) == num_batches


@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1, 1)])
def test_one_value_per_channel(library, policy, shape):
    layer = _layer(library, single_value=policy)
    known, (x, dy) = _known(library, layer), _numbers(shape)
    given = library.array(x, "float32"), library.array(dy, "float32")
    if policy == "raise":
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(given[0])
        assert int(layer.running.num_batches) == 7
        return
    y, (dx, dweight, dbias), after = _step(library, layer, *given)
    over = tuple(a for a in range(len(shape)) if a != 1)
    kind = library.kind(given[0])
    if policy == "zero":
        wanted = np.broadcast_to(known["bias"].reshape(-1, *[1] * (len(shape) - 2)), shape)
        assert np.array_equal(library.numpy(y), wanted)
        assert not library.numpy(dweight).any()
        found, scales = oracle.vjp_and_scales("batch_norm_train", {"x": x, "weight": known["weight"]}, dy, {})
        assert not found["x"].any()
        assert_close(library, dx, found["x"], kind, "gradient", scales["x"])
    else:
        found, scales = oracle.vjp_and_scales("batch_norm", {"x": x, **known}, dy, {})
        assert_close(library, y, oracle.batch_norm(x, **known), kind, "forward")
        assert_close(library, dx, found["x"], kind, "gradient", scales["x"])
        assert_close(library, dweight, found["weight"], kind, "gradient", scales["weight"])
    assert_close(library, dbias, dy.sum(over), kind, "gradient")
    _assert_running(library, after, known["mean"], known["var"], 7)


@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_one_value_per_channel_where_running_statistics_normalize(library, policy):
    """It is in nobody's way but the update's: what cannot be merged is refused, or left alone."""
    layer = _layer(library, single_value=policy, use_batch_stats=False, update_stats=True)
    known, x = _known(library, layer), next(_numbers((1, CHANNELS)))
    given = library.array(x, "float32")
    if policy == "raise":
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(given)
    else:
        assert_close(library, layer(given), oracle.batch_norm(x, **known), library.kind(given), "forward")
    _assert_running(library, layer.running, known["mean"], known["var"], 7)


def _by_mask(policy, x, dy, known):
    """y and gradients, where MASK leaves channel 1 one element and channel 3 none."""
    operands = {"x": x, **known, "mask": MASK}
    batch, batch_scales = oracle.vjp_and_scales(
        "batch_norm_train", {k: operands[k] for k in ("x", "weight", "bias", "mask")}, dy, {}
    )
    y = oracle.batch_norm_train(x, known["weight"], known["bias"], mask=MASK)[0]
    if policy != "running":
        return y, batch, batch_scales
    given, given_scales = oracle.vjp_and_scales("batch_norm", operands, dy, {})
    y = np.where(LONE[:, None], oracle.batch_norm(**operands), y)

    def chosen(by_running, by_batch):
        return {n: np.where(LONE[:, None] if n == "x" else LONE, by_running[n], by_batch[n]) for n in batch}

    return y, chosen(given, batch), chosen(given_scales, batch_scales)


@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_one_valid_value_of_a_channel(library, policy):
    """Channel by channel: what has values enough is as ever."""
    layer = _layer(library, single_value=policy)
    known, (x, dy) = _known(library, layer), _numbers()
    x_, dy_, mask = (
        library.array(np.where(MASK, x, np.nan), "float32"),
        library.array(dy, "float32"),
        library.array(MASK, "bool"),
    )
    if policy == "raise" and library.name in LOOKS and "cpu" in library.kind(x_).device.lower():
        text = (
            r"batch_norm_train needs more than one value per channel, one has no variance; received a mask that leaves "
            r'one in 1 of 5 channels: use a larger batch, single_value="zero", or batch_norm with running statistics '
            r'\(in a layer: single_value="running"\)\.'
        )
        refused(lambda: layer(x_, mask=mask), ValueError, text)
        refused(lambda: layer.vjp(x_, mask=mask), ValueError, text)
        assert int(layer.running.num_batches) == 7
        return
    y, found, after = _step(library, layer, x_, dy_, mask=mask)
    wanted, gradients, scales = _by_mask(policy, x, dy, known)
    assert_close(library, y, wanted, library.kind(x_), "forward")
    if policy != "running":
        assert np.array_equal(library.numpy(y)[2, 1, 4], known["bias"][1])
    for name, gradient in zip(("x", "weight", "bias"), found, strict=True):
        assert_close(library, gradient, gradients[name], library.kind(x_), "gradient", scales[name])
    _assert_running(library, after, *_merged(known, oracle.batch_statistics(x, mask=MASK), ~LONE), 8)


def test_running_statistics_that_are_not_wanted_may_be_anything(library):
    """NaN in channels with values enough reaches no gradient."""
    layer = _layer(library, single_value="running")
    (x, dy), known = _numbers(), _known(library, layer)
    x_, dy_, mask = library.array(x, "float32"), library.array(dy, "float32"), library.array(MASK, "bool")
    odd = (library.array(np.where(LONE, known[name], np.nan), "float32") for name in ("mean", "var"))
    layer.running = nk.RunningStats(*odd)
    y, found, _ = _step(library, layer, x_, dy_, mask=mask)
    wanted, gradients, scales = _by_mask("running", x, dy, known)
    assert_close(library, y, wanted, library.kind(x_), "forward")
    for name, gradient in zip(("x", "weight", "bias"), found, strict=True):
        assert_close(library, gradient, gradients[name], library.kind(x_), "gradient", scales[name])


def test_one_valid_value_by_lengths(library):
    """A mask of fewer elements counts by what it stands for."""
    x = library.array(np.ones((2, CHANNELS, 3)), "float32")
    one, none = (library.array(np.array(n), "int32") for n in ([0, 1], [0, 0]))
    layer = _layer(library, single_value="running")
    wanted = oracle.batch_norm(library.numpy(x), **_known(library, layer), mask=np.arange(3) < np.array([[[0]], [[1]]]))
    assert_close(library, layer(x, lengths=one), wanted, library.kind(x), "forward")
    assert int(layer.running.num_batches) == 7 and not library.numpy(layer(x, lengths=none)).any()
    if library.name in LOOKS:
        with pytest.raises(ValueError, match="received a mask that leaves one in 5 of 5 channels"):
            nk.batch_norm_train(x, lengths=one)
        with pytest.raises(ValueError, match="received a mask that leaves one in 5 of 5 channels"):
            nk.batch_norm_train(x, mask=library.array(np.eye(2, 1)[:, :, None] * np.eye(3)[0] > 0, "bool"))
    nk.batch_norm_train(x, lengths=none)
    nk.batch_norm_train(x, mask=library.array(np.eye(1, 2).T[:, :, None] > 0, "bool"))


def test_the_functions(library):
    """What batch_norm_train lets pass, RunningStats.update leaves out or counts, as it is told."""
    x = library.array(np.arange(1.0, 1 + CHANNELS).reshape(1, -1), "float32")
    bias = library.array(np.arange(CHANNELS), "float32")
    y, stats = nk.batch_norm_train(x, None, bias, single_value="zero")
    assert np.array_equal(library.numpy(y)[0], np.arange(CHANNELS)) and not library.numpy(stats.var).any()
    running = _layer(library).running
    for policy in ("zero", "running"):
        after = running.update(stats, single_value=policy)
        assert int(after.num_batches) == 7 and np.array_equal(library.numpy(after.var), library.numpy(running.var))
    after = running.update(stats, 0.5, False)
    assert_close(library, after.var, library.numpy(running.var) / 2, library.kind(running.var), "running")
    assert int(after.num_batches) == 8
    for options in ({}, {"single_value": "raise", "unbiased": False}):
        with pytest.raises(ValueError, match="needs more than one value per channel; received a count of 1"):
            running.update(stats, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_compiled_by_mask(library, mode, policy):
    """Counts that are not known when a program is traced: each channel as the policy has it, where none can raise."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    layer = _layer(library, single_value=policy, nonfinite="skip")
    known, (x, _) = _known(library, layer), _numbers()
    odd = x.copy()
    odd[0, 4] = np.inf
    start = layer.running[:2]

    def step(x, mask, mean, var):
        layer.running = nk.RunningStats(mean, var, 7)
        y = layer(x, mask=mask)
        return y, *layer.running

    y, *after = library.compiled(step, mode)(library.array(odd, "float32"), library.array(MASK, "bool"), *start)
    wanted = _by_mask(policy, x, np.zeros_like(x), known)[0]
    fine = [0, 1, 2, 3]
    got = library.array(library.numpy(y)[:, fine], "float32")
    assert_close(library, got, wanted[:, fine], library.kind(got), "forward")
    present = ~LONE & (np.arange(CHANNELS) != 4)
    _assert_running(
        library, nk.RunningStats(*after), *_merged(known, oracle.batch_statistics(x, mask=MASK), present), 8
    )


@pytest.mark.parametrize("mode", [m for m in MODES if m.startswith("tf.")])
@pytest.mark.parametrize("policy", ["running", "zero", "raise"])
def test_compiled_for_any_number_of_samples(library, mode, policy):
    """Where the graph does not know the batch: one sample by the policy, "raise" as "zero", and two as ever."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    layer, tf = _layer(library, single_value=policy), library.xp
    known, start = _known(library, layer), layer.running[:2]

    def step(x, mean, var):
        layer.running = nk.RunningStats(mean, var, 7)
        return layer(x), *layer.running

    shapes = [tf.TensorSpec((None, CHANNELS)), *[tf.TensorSpec((CHANNELS,))] * 2]
    compiled = tf.function(step, input_signature=shapes, jit_compile=mode.endswith("(jit_compile=True)") or None)
    for rows in (1, 2):
        (x, _) = _numbers((rows, CHANNELS))
        y, *after = compiled(library.array(x, "float32"), *start)
        if rows == 2:
            wanted = oracle.batch_norm_train(x, known["weight"], known["bias"])[0]
            statistics = _merged(known, oracle.batch_statistics(x), True)
        else:
            wanted = oracle.batch_norm(x, **known) if policy == "running" else known["bias"][None]
            statistics = known["mean"], known["var"]
        assert_close(library, y, wanted, library.kind(y), "forward")
        _assert_running(library, nk.RunningStats(*after), *statistics, 6 + rows)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_skip_leaves_a_channel_that_is_not_finite(library, odd, momentum):
    layer = _layer(library, nonfinite="skip", momentum=momentum)
    known, (x, _) = _known(library, layer), _numbers()
    x[1, 2, 3] = odd
    with np.errstate(all="ignore"):
        y = library.numpy(layer(library.array(x, "float32")))
        statistics = oracle.batch_statistics(x)
    assert not np.isfinite(y[1, 2, 3]) and np.isfinite(y[:, [0, 1, 3, 4]]).all()
    present = np.arange(CHANNELS) != 2
    keep = 0.9 if momentum else 7 / 8
    _assert_running(library, layer.running, *_merged(known, statistics, present, keep), 8)
    x[:, :, 0] = odd
    before = layer.running
    with np.errstate(all="ignore"):
        layer(library.array(x, "float32"))
    _assert_running(library, layer.running, *(library.numpy(a) for a in before[:2]), 8)


def test_propagate_and_raise(library):
    (x, _) = _numbers()
    text = (
        r'BatchNorm has nonfinite="raise"; received statistics that are not finite in 2 of 5 channels: look for '
        r'the first NaN or infinity before it, or set nonfinite="skip"\.'
    )
    x[1, 2:4, 3] = np.nan
    x_, layer, strict = library.array(x, "float32"), _layer(library), _layer(library, nonfinite="raise")
    with np.errstate(all="ignore"):
        layer(x_)
        refused(lambda: strict(x_), ValueError, text)
        refused(
            lambda: strict.running.update(nk.batch_norm_train(x_)[1], nonfinite="raise"),
            ValueError,
            text.replace("BatchNorm", "RunningStats.update"),
        )
    assert np.array_equal(np.isnan(library.numpy(layer.running.var)), [False, False, True, True, False])
    assert int(strict.running.num_batches) == 7
    strict.eval()(x_)
    strict.train()(library.array(np.nan_to_num(x), "float32"))
    assert int(strict.running.num_batches) == 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["nonfinite", "empty_batch"])
def test_raise_is_refused_in_a_program(library, mode, setting):
    """Where it is traced, as nothing can raise where it runs."""
    if mode not in library.modes:
        pytest.skip(f"{mode} is another library's")
    layer = _layer(library, single_value="zero", **{setting: "raise"})
    (x, _), mask = _numbers(), library.array(MASK, "bool")
    text = (
        rf'BatchNorm with {setting}="raise" looks at values, and a program that is being traced has none: '
        r'set it to "(skip|keep)", or call it outside\.'
    )

    def step(x, mask):
        before = layer.running
        try:
            return layer(x, mask=mask)
        finally:
            layer.running = before

    with pytest.raises(Exception, match=text):
        library.compiled(step, mode)(library.array(x, "float32"), mask)


@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch(library, masked):
    x = library.array(np.ones((2 * masked, CHANNELS)), "float32")
    valid = {"mask": library.array(np.zeros((2, 1), bool), "bool")} if masked else {}
    layer, strict = _layer(library), _layer(library, empty_batch="raise")
    known = _known(library, layer)
    y, (dx, dweight, dbias), after = _step(library, layer, x, x, **valid)
    assert not any(library.numpy(a).any() for a in (y, dx, dweight, dbias))
    _assert_running(library, after, known["mean"], known["var"], 7)
    text = r'BatchNorm has empty_batch="raise"; received a batch without elements\.'
    refused(lambda: strict(x, **valid), ValueError, text)
    assert int(strict.running.num_batches) == 7
    strict.eval()(x, **valid)


SWITCHES = list(itertools.product((True, False), (None, True, False), (None, True, False)))


@pytest.mark.parametrize(("training", "use", "update"), SWITCHES)
def test_switches(library, training, use, update):
    """Each by itself, at construction and later: what y and its gradient are made of, and what is counted."""
    layer = _layer(library, use_batch_stats=use, update_stats=update).train(training)
    later = _layer(library).train(training)
    later.use_batch_stats, later.update_stats = use, update
    assert repr(later) == repr(layer)
    by_batch = training if use is None else use
    counted = (training and by_batch) if update is None else update
    known, (x, dy) = _known(library, layer), _numbers()
    x_, dy_ = library.array(x, "float32"), library.array(dy, "float32")
    wanted = (
        oracle.batch_norm_train(x, known["weight"], known["bias"])[0] if by_batch else oracle.batch_norm(x, **known)
    )
    parameters = {k: known[k] for k in ("weight", "bias")}
    found, scales = oracle.vjp_and_scales(
        *(("batch_norm_train", {"x": x, **parameters}) if by_batch else ("batch_norm", {"x": x, **known})), dy, {}
    )
    statistics = _merged(known, oracle.batch_statistics(x), True) if counted else (known["mean"], known["var"])
    for each in (layer, later, copy.deepcopy(layer)):
        y, gradients, after = _step(library, each, x_, dy_)
        assert_close(library, y, wanted, library.kind(x_), "forward")
        for name, gradient in zip(("x", "weight", "bias"), gradients, strict=True):
            assert_close(library, gradient, found[name], library.kind(x_), "gradient", scales[name])
        _assert_running(library, after, *statistics, 7 + counted)


@pytest.mark.grid(cases=[c for c in cases.SITES[1].values() if c.layer != "batch_norm"])
def test_an_affine_part_that_is_not_trained(library, case):
    """The same y and gradient of x; none, or zero where the library has no none, of weight and bias."""
    values = inputs.operands(case, inputs.BY_NAME["normal"], "float32")
    given = measure.arrays(library, case, values, "float32")
    kinds = {"layer_norm": nk.LayerNorm, "rms_norm": nk.RMSNorm, "group_norm": nk.GroupNorm}
    kinds |= {"instance_norm": nk.InstanceNorm, "batch_norm_train": nk.BatchNorm}
    options = {**case.options, "backend": library.name if library.name in NAMES else library.xp}
    groups = [options.pop("num_groups")] if "num_groups" in options else []
    layer = kinds[case.layer](*groups, *case.param_shape, train_affine=False, **options)
    layer.weight, layer.bias = given["weight"], given.get("bias")
    wanted = oracle.forward(case.layer, values, case.options)
    reference, scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    y, pullback = layer.vjp(given["x"])
    dx, parameters = pullback(given["dy"])
    assert parameters == {}
    for value in (y, first(layer(given["x"]))):
        assert_close(library, value, wanted, library.kind(given["x"]), "forward")
    assert_close(library, dx, reference["x"], library.kind(given["x"]), "gradient", scales["x"])
    if library.differentiates:
        start = getattr(layer, "running", None)

        def call(x, weight):
            layer.weight, layer.running = weight, start
            return layer(x)

        _, found = library.vjp(call, [given["x"], given["weight"]], {}, given["dy"])
        assert found.get(1) is None or not library.numpy(found[1]).any()
        assert_close(library, found[0], reference["x"], library.kind(given["x"]), "gradient", scales["x"])
        layer.weight, layer.train_affine = given["weight"], True
        _, found = library.vjp(call, [given["x"], given["weight"]], {}, given["dy"])
        assert library.numpy(found[1]).any()


#: What a layer is told, and what it says.
WRONG = {
    "single_value": ("skip", r"single_value must be 'raise', 'running' or 'zero'; received 'skip'\."),
    "empty_batch": (0, r"empty_batch must be 'keep' or 'raise'; received 0\."),
    "nonfinite": (None, r"nonfinite must be 'propagate', 'skip' or 'raise'; received None\."),
    "use_batch_stats": (1, r"use_batch_stats must be None, True or False; received 1\."),
    "update_stats": ("no", r"update_stats must be None, True or False; received 'no'\."),
    "train_affine": (None, r"train_affine must be True or False; received None\."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    value, text = WRONG[name]
    refused(lambda: nk.BatchNorm(4, **{name: value}), ValueError, text)
    layer = nk.BatchNorm(4)
    refused(lambda: setattr(layer, name, value), ValueError, text)
    assert repr(layer) == "BatchNorm(4)"
    if name in ("single_value", "empty_batch", "nonfinite"):
        stats = nk.batch_norm_train(np.ones((2, 4)))[1]
        refused(lambda: nk.RunningStats(np.zeros(4), np.ones(4)).update(stats, **{name: value}), ValueError, text)


def test_a_policy_that_a_function_cannot_have():
    text = (
        r"single_value must be 'raise' or 'zero' in batch_norm_train, which has no running statistics; received "
        r"'running': use a layer, or batch_norm for such a batch\."
    )
    refused(lambda: nk.batch_norm_train(np.ones((2, 4)), single_value="running"), ValueError, text)
    refused(
        lambda: nk.batch_norm_train(np.ones((2, 4)), single_value="skip"),
        ValueError, r"single_value must be 'raise' or 'zero'; received 'skip'\.",
    )  # fmt: skip


#: Of each layer: how it is made for x of shape (2, 4, 3).
KINDS = {
    "BatchNorm": lambda **o: nk.BatchNorm(4, **o),
    "InstanceNorm": lambda **o: nk.InstanceNorm(4, **o),
    "GroupNorm": lambda **o: nk.GroupNorm(2, 4, **o),
    "LayerNorm": lambda **o: nk.LayerNorm(3, **o),
    "RMSNorm": lambda **o: nk.RMSNorm(3, **o),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_do_not_fit(library, kind):
    layer, a = KINDS[kind](backend=library.name if library.name in NAMES else library.xp), arrays(library)
    text = r"mask must broadcast to x of shape \(2, 4, 3\); received shape \(2, 4, 2\)\."
    refused(lambda: layer(a.x, mask=a.wide_flags), ValueError, text)
    refused(lambda: layer.vjp(a.x, mask=a.wide_flags), ValueError, text)
    text = r"mask must be a boolean array; received dtype float32\."
    refused(lambda: layer(a.x, mask=a.x), TypeError, text)
    text = rf"mask must be {SUPPORTED}; received list\."
    refused(lambda: layer(a.x, mask=[True]), TypeError, text)
    text = r"mask and lengths exclude each other; received both\."
    refused(lambda: layer(a.x, mask=a.flags, lengths=a.lengths), ValueError, text)
    text = r"lengths must be of dtype int32 or int64; received float32\."
    refused(lambda: layer(a.x, lengths=a.short), TypeError, text)
    if library.name in LOOKS:
        text = r"lengths must be in \[0, [34]\], axis [12] of x; received 5\."
        refused(lambda: layer(a.x, lengths=library.array(np.array([5, 1]), "int32")), ValueError, text)


def test_repr():
    text = "BatchNorm(3, single_value='zero', nonfinite='skip', use_batch_stats=False, train_affine=False)"
    layer = eval(text, vars(nk))
    assert repr(layer) == text and layer.use_batch_stats is False and layer.update_stats is None
    layer.single_value, layer.nonfinite, layer.use_batch_stats, layer.train_affine = "raise", "propagate", None, True
    assert repr(layer) == "BatchNorm(3)"
