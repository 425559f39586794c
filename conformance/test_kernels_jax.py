"""The fused kernels inside JAX programs: where they serve, under every transformation, and where they do not."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import normkit as nk
from normkit.backends import kernels
from normkit.backends.jax import backend
from normkit.backends.kernels import programs
from normkit.conformance import kernel_inputs
from normkit.conformance.jax_inputs import as_usual, called, jax, same
from normkit.conformance.kernel_inputs import LAYERS
from normkit.core.normalize import Operands

__all__ = ["as_usual"]

CALL = "stablehlo.custom_call @normkit("


def _forward(plan, operands):
    return backend._compiled(plan, kernels.mode)(*operands)[0]


def _both(plan, operands, dy):
    y, pullback = jax.vjp(functools.partial(_forward, plan), operands)
    return y, pullback(dy)[0]


@pytest.mark.parametrize("dtype", kernel_inputs.DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_program_is_the_call(layer, dtype):
    """One custom call forward, one backward, and nothing that the core would have computed."""
    plan, _, operands, _, dy = called(layer, dtype=dtype)
    text = jax.jit(functools.partial(_forward, plan)).lower(operands).as_text()
    assert text.count(CALL) == 1
    assert "stablehlo.reduce" not in text
    assert jax.jit(functools.partial(_both, plan)).lower(operands, dy).as_text().count(CALL) == 2
    start = kernels.served()
    jax.block_until_ready(_both(plan, operands, dy))
    assert kernels.served().since(start) == (1, 1)
    jax.block_until_ready(jax.jit(functools.partial(_both, plan))(operands, dy))
    assert kernels.served().since(start) == (2, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_only_what_is_asked_for(layer):
    """Gradients that nobody uses are not computed, nor statistics that no gradient needs."""
    plan, _, operands, _, dy = called(layer)

    def results(function):
        """What the calls in a program return, in their order."""
        bits = re.findall(r"results = (\d+) : i64", jax.jit(function).lower(operands, dy).as_text())
        return [{name for i, name in enumerate(programs.SLOTS) if int(found) >> i & 1} for found in bits]

    def gradients(*names):
        def some(operands, dy):
            found = _both(plan, operands, dy)[1]
            return [getattr(found, name) for name in names]

        return some

    assert results(lambda operands, dy: _forward(plan, operands)) == [{"y"}]
    if layer == "batch_norm":  # whose statistics are at hand, without a forward call
        assert results(gradients("x")) == [{"y"}]
        assert results(gradients("var", "mean")) == [{"dmean", "dvar"}]
        return
    saved = {"y", "mean", "residue", "rstd"} if plan.center else {"y", "rstd"}
    assert results(gradients("x")) == [saved, {"y"}]
    assert results(gradients("weight")) == [saved, {"dweight"}]
    assert results(gradients("x", "bias")) == [saved, {"y", "dbias"}]
    if layer == "batch_norm_train":
        batch = lambda operands, dy: nk.batch_norm_train(operands.x)[1]  # noqa: E731
        assert results(batch) == [{"y", "mean", "residue", "var"}]


def _agree(found, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(np.asarray(b, "f8")).max(initial=1e-30)
        np.testing.assert_allclose(np.asarray(a, "f8") / scale, np.asarray(b, "f8") / scale, atol=tolerance)


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivatives(layer):
    """Forward over reverse, as of ``jax.hessian``: those of the core. The suite takes reverse over reverse."""
    plan, _, operands, _, dy = called(layer)

    def product(operands):
        slope = jax.grad(lambda operands: (_forward(plan, operands) * dy).sum())
        return jax.jvp(slope, (operands,), (jax.tree.map(jax.numpy.sin, operands),))[1]

    start = kernels.served()
    found = jax.block_until_ready(jax.jit(product)(operands))
    assert kernels.served() == start
    with kernels.off():
        _agree(found, jax.jit(lambda operands: product(operands))(operands), 1e-5)


@pytest.mark.parametrize("mapped", ["x", "x dy", "x weight bias", "weight", "dy", "x dy weight bias mean var"])
@pytest.mark.parametrize("size", [3, 700])
@pytest.mark.parametrize("layer", LAYERS)
def test_vmap(layer, size, mapped):
    """Over any of the operands, each slice is what a call of its own gives, whichever thread takes it."""
    plan, _, operands, _, dy = called(layer)
    mapped = [name for name in mapped.split() if name == "dy" or getattr(operands, name) is not None]
    if not mapped:
        pytest.skip("nothing to map")
    given = {**{k: a for k, a in operands._asdict().items() if a is not None}, "dy": dy}
    growing = 1 + np.arange(size) / size
    many = {
        name: jax.numpy.asarray(np.multiply.outer(np.asarray(a), growing), a.dtype) if name in mapped else a
        for name, a in given.items()
    }

    def call(given):
        given = dict(given)
        dy = given.pop("dy")
        return _both(plan, Operands(**given), dy)

    axes = {name: -1 if name in mapped else None for name in given}
    start = kernels.served()
    found = jax.block_until_ready(jax.jit(jax.vmap(call, (axes,)))(many))
    assert min(kernels.served().since(start)) >= 1
    for i in (0, 1, size - 1):
        one = call({name: a[..., i] if name in mapped else a for name, a in many.items()})
        _agree(jax.tree.map(lambda a, i=i: a[i], found), one, 3e-6)  # rows of four are summed in another order


@pytest.mark.parametrize("layer", LAYERS)
def test_nested_vmap(layer):
    plan, _, operands, _, dy = called(layer)
    x = jax.numpy.stack([operands.x * k for k in (1, 2, 3)])
    dys = jax.numpy.stack([dy, -dy])

    def call(x, dy):
        return _both(plan, operands._replace(x=x), dy)

    found = jax.vmap(jax.vmap(call, (0, None)), (None, 0))(x, dys)
    for i, j in ((0, 0), (1, 2)):
        _agree(jax.tree.map(lambda a, i=i, j=j: a[i, j], found), call(x[j], dys[i]), 3e-6)
    empty = jax.vmap(call, (0, None))(x[:0], dy)
    assert empty[0].shape == (0, *operands.x.shape)


def test_loops_checkpoints_and_threads():
    plan, _, operands, _, dy = called("layer_norm", (600, 257), {"axis": (-1,)})
    wanted = np.asarray(_forward(plan, operands))
    looped = jax.lax.scan(lambda c, _: (c, _forward(plan, operands._replace(x=c))), operands.x, None, length=3)[1]
    assert all(same(y, wanted) for y in looped)
    step = jax.checkpoint(functools.partial(_forward, plan))
    kept = jax.vjp(step, operands)[1](dy)
    assert all(map(same, jax.tree.leaves(kept[0]), jax.tree.leaves(_both(plan, operands, dy)[1])))
    wrong = []

    def work():
        for _ in range(20):
            if not same(_forward(plan, operands), wanted):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_without_jit_it_is_the_formula():
    plan, _, operands, _, dy = called("batch_norm_train")
    wanted = _both(plan, operands, dy)
    start = kernels.served()
    with jax.disable_jit():
        _agree(_both(plan, operands, dy), wanted)
    assert kernels.served() == start


def _program(function, *args):
    return jax.jit(lambda *a: function(*a)).lower(*args).as_text()


def test_switched_off():
    plan, _, operands, _, dy = called("layer_norm")
    _forward(plan, operands)  # what was compiled before is not what is wanted now
    start = kernels.served()
    with kernels.off():
        assert CALL not in _program(functools.partial(_both, plan), operands, dy)
        jax.block_until_ready(_both(plan, operands, dy))
    assert kernels.served() == start
    jax.block_until_ready(_both(plan, operands, dy))
    assert kernels.served().since(start) == (1, 1)


def test_what_a_kernel_cannot_serve(monkeypatch):
    """A mask, an export, unknown sizes, another platform: the formula, and where a kernel is required an error."""
    x, mask = jax.numpy.ones((4, 6, 5)), jax.numpy.ones((4, 6, 5), bool)

    def masked(x):
        return nk.batch_norm_train(x, mask=mask)[0]

    assert CALL not in _program(masked, x)
    cuda = jax.jit(lambda x: nk.layer_norm(x)).trace(x)
    assert CALL not in cuda.lower(lowering_platforms=("cuda",)).as_text()
    sizes = jax.export.symbolic_shape("b, 6, 5")
    unknown = jax.ShapeDtypeStruct(sizes, x.dtype)
    free = jax.export.export(jax.jit(lambda x: nk.layer_norm(x)))(unknown)
    assert free.call(x + mask).shape == x.shape
    exported = jax.export.export(jax.jit(lambda x: nk.layer_norm(x)))(x)
    assert CALL not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    _agree(again.call(x + mask), nk.layer_norm(x + mask))
    monkeypatch.setattr(kernels, "mode", "require")
    jax.block_until_ready(nk.layer_norm(x))
    assert nk.layer_norm(x[:0]).shape == (0, 6, 5)
    required = jax.jit(lambda x: nk.layer_norm(x))
    with pytest.raises(kernels.KernelError, match="batch_norm_train: a mask was given"):
        _program(masked, x)
    with pytest.raises(kernels.KernelError, match=r"layer_norm: there is none for axes \(2,\) of shape \(b, 6"):
        jax.export.export(required)(unknown)
    with pytest.raises(kernels.KernelError, match="layer_norm: the program is for cuda"):
        required.trace(x).lower(lowering_platforms=("cuda",))
    with pytest.raises(kernels.KernelError, match="layer_norm: the program is exported"):
        jax.export.export(required)(x)


SEVERAL = """
import functools, jax, numpy as np, normkit as nk
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from normkit.backends import kernels
mesh = jax.make_mesh((2,), ("data",), axis_types=({axis_type},))
x = np.random.default_rng(0).standard_normal((8, 6)).astype("f4")
weight = np.linspace(1, 2, 6).astype("f4")
def loss(x, weight):
    return (nk.layer_norm(x, weight) ** 3).sum()
step = jax.jit(jax.value_and_grad(loss, (0, 1)))
wanted = step(jax.numpy.asarray(x), jax.numpy.asarray(weight))
jax.block_until_ready(wanted)
start = kernels.served()
assert min(start) == 1
def local(x, weight):
    dx, dweight = jax.grad(loss, (0, 1))(x, weight)
    return jax.lax.psum(loss(x, weight), "data"), (dx, jax.lax.psum(dweight, "data"))
specs = dict(mesh=mesh, in_specs=(P("data"), P()), out_specs=(P(), (P("data"), P())))
each = jax.jit(jax.shard_map(local, **specs, check_vma=False))
there = jax.device_put(x, NamedSharding(mesh, P("data"))), jax.device_put(weight, NamedSharding(mesh, P()))
with {context}:
    found = {call}(*there)
    assert "data" in str(found[1][0].sharding.spec), found[1][0].sharding
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-5)
assert kernels.served() == start
"""


@pytest.mark.parametrize(
    ("axis_type", "context", "call"),
    [
        ("AxisType.Auto", "jax.set_mesh(mesh)", "step"),
        ("AxisType.Auto", "__import__('contextlib').nullcontext()", "step"),
        ("AxisType.Explicit", "jax.set_mesh(mesh)", "step"),
        (
            "AxisType.Auto",
            "jax.set_mesh(mesh)",
            "each",
        ),
    ],
)
def test_on_several_devices_it_is_the_formula(axis_type, context, call):
    """Which XLA can cut into parts, as it cannot a call."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL.format(axis_type=axis_type, context=context, call=call)],
        env={**os.environ, "NORMKIT_KERNELS": "1", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


SHARED = """
import jax, numpy as np, normkit as nk
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
numbers = np.random.default_rng(0).standard_normal((5, 4)).astype("f4")
x = np.random.default_rng(1).standard_normal((8, 4, 6)).astype("f4")
x[:, 1] = 7  # a constant channel
of = {
    "layer_norm": lambda x, w, b, m, v: nk.layer_norm(x, w, b, axis=1),
    "instance_norm": lambda x, w, b, m, v: nk.instance_norm(x, w, b),
    "batch_norm": lambda x, w, b, m, v: nk.batch_norm(x, m, v, w, b),
    "batch_norm_train": lambda x, w, b, m, v: nk.batch_norm_train(x, w, b)[0],
    "masked": lambda x, w, b, m, v: nk.batch_norm_train(x, w, b, mask=x > -1)[0],
}
for layer, function in of.items():
    step = jax.value_and_grad(lambda *arrays: (function(*arrays) ** 3).sum(), range(5))
    given = [jax.numpy.asarray(a) for a in (x, *numbers[:3], numbers[3] ** 2)]
    wanted = step(*given)
    for spec in (P("i"), P(None, "i"), P(None, None, "i")):
        with jax.set_mesh(mesh):
            there = [jax.device_put(a, NamedSharding(mesh, spec if a.ndim > 1 else P())) for a in given]
            for found in (step(*there), jax.jit(step)(*there)):
                assert found[1][0].sharding.is_equivalent_to(there[0].sharding, 3), (layer, spec)
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
                    np.testing.assert_allclose(a, b, rtol=3e-5, atol=2e-4, err_msg=layer)
"""


def test_any_axis_that_several_devices_share():
    """What each array is shared by is part of its type: no slice of one value, and gradients where their arrays are."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
