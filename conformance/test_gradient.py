"""Gradients, taken in each library's own way, against the closed form; second derivatives against its differences."""

import numpy as np
import pytest

import normkit as nk
from normkit.conformance import cases, inputs, measure, oracle
from normkit.conformance.checks import assert_close, unchanged


def _check(library, case, values, dtype, params=""):
    given = measure.arrays(library, case, values, dtype, params)
    with unchanged(library, given):
        out, found = measure.gradients(library, case, nk, given)
    y = out[0] if case.layer == "batch_norm_train" else out
    assert_close(library, y, oracle.forward(case.layer, values, case.options), library.kind(given["x"]), "forward")
    reference, scales = oracle.vjp_and_scales(case.layer, values, values["dy"], case.options)
    assert set(found) == set(case.names)
    for name, gradient in found.items():
        assert_close(library, gradient, reference[name], library.kind(given[name]), "gradient", scales[name])


@pytest.mark.grid(cases=cases.CASES, thrifty=cases.SHORT, dtypes=["float32"])
def test_float32(library, dtype, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["normal"], dtype), dtype)


@pytest.mark.grid(cases=cases.SHORT, thrifty=cases.SHORTEST, dtypes=["float64", "float16", "bfloat16"])
def test_other_dtypes(library, dtype, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["normal"], dtype), dtype)


@pytest.mark.grid(cases=cases.LARGE[1:4])
def test_a_million_elements_in_one_statistic(library, case):
    _check(library, case, inputs.operands(case, inputs.BY_NAME["offset 1e2"], "float32"), "float32")


@pytest.mark.grid(cases=cases.SHORTEST, dtypes=["float32", "float64"])
def test_second_order(library, dtype, case):
    if not library.differentiates:
        pytest.skip(f"{library.name} differentiates nothing by itself; nk.vjp is first order")
    values = inputs.operands(case, inputs.BY_NAME["normal"], dtype)
    given = measure.arrays(library, case, values, dtype)
    rng = np.random.default_rng(1)
    directions = {n: inputs.rounded(rng.normal(size=values[n].shape), dtype) for n in case.names}
    args, options = case.arguments(given)
    arrays = [library.array(directions[n], library.kind(given[n]).dtype) for n in case.names]
    found = library.hessian_product(getattr(nk, case.layer), args, options, given["dy"], arrays)
    reference = oracle.hessian_product(case.layer, values, values["dy"], case.options, directions)
    for name, product in zip(case.names, found.values(), strict=True):
        like = library.kind(given[name])._replace(layout=library.kind(product).layout)  # as autograd leaves it
        assert_close(library, product, reference[name], like, "second order")


def test_statistics_have_no_gradient(library):
    """Mean and variance of a batch are for inference: in no mode does a gradient pass through them."""
    x = library.array(np.random.default_rng(0).normal(size=(6, 3)), "float32")
    if library.name == "tensorflow":
        with library.xp.GradientTape() as tape:
            tape.watch(x)
            mean, var, _ = nk.batch_norm_train(x)[1]
        gradient = tape.gradient([mean, var], x)
        assert gradient is None or not library.numpy(gradient).any()
        return
    if library.name not in ("torch", "jax"):
        pytest.skip(f"{library.name} differentiates nothing by itself")

    def total(x):
        stats = nk.batch_norm_train(x)[1]
        return stats.mean.sum() + stats.var.sum()

    gradient = (library.xp.func if library.name == "torch" else library.xp).grad(total)(x)
    assert not library.numpy(gradient).any()
    if library.name == "torch":
        assert not total(x.clone().requires_grad_()).requires_grad
