"""What is true of batch normalization exactly, held to float64: identities with the bound of rounding alone."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
from normkit import diagnostics
from normkit.diagnostics import _vectors as vectors

#: Some sums of a hundred numbers, relative to the largest.
EXACT = 1e-12
rng = np.random.default_rng(0)
M, D, K = 64, 7, 5


def network(eps=0.0, norm=True):
    """Dense, batch norm, ReLU, dense on one batch; without eps the weights before the norm have no scale."""
    nd = diagnostics
    weights = rng.normal(size=(K, D)), rng.normal(size=(3, K))
    layers = {"first": nd.Dense(weights[0]), "bn": nk.BatchNorm(K, eps=eps, dtype="float64")}
    layers |= {"relu": nd.Activation("relu"), "last": nd.Dense(weights[1])}
    if not norm:
        del layers["bn"]
    return nd.objective(layers, nd.cross_entropy, rng.normal(size=(M, D)), rng.integers(0, 3, M))


def test_scale_invariance_and_no_radial_gradient():
    """L(aW) = L(W), ∇L(aW) = ∇L(W) / a, ⟨W, ∇L⟩ = 0; and none of it without the norm."""
    objective = network()
    found = diagnostics.scale_response(objective, objective.params, ["first.weight"], [1e-3, 0.5, 7, 1e4])
    assert found.spread <= EXACT * found.loss0
    assert np.allclose(found.grad_norm * found.factor, found.grad_norm0, rtol=EXACT)
    assert abs(found.radial[0]) <= EXACT
    # The same holds unit by unit.
    params = objective.params
    w, g = params["first.weight"], objective(params)[1]["first.weight"]
    assert np.abs((w * g).sum(1)).max() <= EXACT * np.linalg.norm(w) * np.linalg.norm(g)
    plain = network(norm=False)
    assert diagnostics.scale_response(plain, plain.params, ["first.weight"], [2.0]).spread > 0.1


def test_a_step_makes_invariant_weights_longer():
    """‖W - ηg‖² = ‖W‖² + η²‖g‖², as g is orthogonal to W; so the effective step shrinks."""
    objective = network()
    params = objective.params
    g = objective(params)[1]["first.weight"]
    ahead = params["first.weight"] - 0.3 * g
    assert (ahead**2).sum() == pytest.approx((params["first.weight"] ** 2).sum() + 0.09 * (g**2).sum(), rel=EXACT)


def test_the_curvature_along_invariant_weights():
    """⟨∇L(aW), ·⟩ is homogeneous of degree -1, so HW = -g and WᵀHW = 0: H is indefinite there."""
    objective = network()
    params = {"first.weight": objective.params["first.weight"]}
    rest = objective.params

    def own(p):
        loss, gradients = objective({**rest, **p})
        return loss, {"first.weight": gradients["first.weight"]}

    _, g = own(params)
    r = 1e-5
    ahead, behind = (own(vectors.scaled(params, 1 + sign * r))[1] for sign in (1, -1))
    along = vectors.scaled(vectors.moved(ahead, -1.0, behind), 0.5 / r)
    # Differences: 1e-10 of the third derivative, 1e-16 / 1e-5 of the gradient.
    assert vectors.norm(vectors.moved(along, 1.0, g)) <= 1e-8 * vectors.norm(g)
    found = diagnostics.curvature(own, params, k=D * K)
    assert found.smallest < 0 < found.largest


@pytest.mark.parametrize("gamma", [0.5, -2.0])
def test_the_jacobian_is_a_projector(gamma):
    """J = γ/σ (I - 11ᵀ/m - x̂x̂ᵀ/m): symmetric, and its singular values are γ/σ (m - 2 times) and 0 (twice)."""
    x = rng.normal(3.0, 2.0, (M, 1))
    _, pullback = nk.vjp(nk.batch_norm_train, x, np.full(1, gamma), np.zeros(1), eps=0.0)
    jacobian = np.stack([pullback(row[:, None])[0][:, 0] for row in np.eye(M)])
    sigma, hat = x.std(), ((x - x.mean()) / x.std())[:, 0]
    expected = gamma / sigma * (np.eye(M) - 1 / M - np.outer(hat, hat) / M)
    assert np.abs(jacobian - expected).max() <= EXACT * abs(gamma) / sigma
    values = np.linalg.svd(jacobian, compute_uv=False)
    assert np.allclose(values[:-2], abs(gamma) / sigma, rtol=EXACT) and values[-2:].max() <= EXACT


def test_theorem_4_1_is_an_equality():
    """‖∇_y L̂‖² = γ²/σ² (‖∇_ŷ L‖² - ⟨1, ∇L⟩²/m - ⟨∇L, ŷ⟩²/m), channel by channel, at the same activations."""
    x, gamma = rng.normal(rng.normal(size=K), 1 + rng.random(K), (M, K)), rng.normal(size=K)
    upstream = rng.normal(size=(M, K)) + 0.5
    _, pullback = nk.vjp(nk.batch_norm_train, x, gamma, np.zeros(K), eps=0.0)
    left = (pullback(upstream)[0] ** 2).sum(0)
    hat, var = (x - x.mean(0)) / x.std(0), x.var(0)
    right = (upstream**2).sum(0) - upstream.sum(0) ** 2 / M - (upstream * hat).sum(0) ** 2 / M
    right *= gamma**2 / var
    assert np.abs(left - right).max() <= EXACT * right.max()
    # Without the last two terms it is the bound of a layer that only divides by σ: strictly more.
    assert (left < gamma**2 / var * (upstream**2).sum(0)).all()


def test_the_gradient_of_a_bias_before_the_norm_is_zero():
    """x + b has the same statistics but for the mean: β takes b's place."""
    x, upstream = rng.normal(size=(M, K)), rng.normal(size=(M, K))
    _, pullback = nk.vjp(nk.batch_norm_train, x, np.ones(K), np.zeros(K))
    assert np.abs(pullback(upstream)[0].sum(0)).max() <= EXACT


@pytest.mark.parametrize("seed", range(20))
def test_normalizing_the_output_never_worsens_the_condition(seed):
    """κ(H*) <= κ(H), with eigenvalues between those of H (interlacing)."""
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(60, 6)) * np.exp(numbers.normal(0, 2, 6))
    y = x @ numbers.normal(size=6) + numbers.normal(size=60)
    found = diagnostics.conditioning(x, y)
    *_, plain, normalized = range(4)
    assert found.names[plain:] == ("centred inputs", "normalized output")
    assert found.condition[normalized] <= found.condition[plain] * (1 + EXACT)
    assert found.largest[normalized] <= found.largest[plain] * (1 + EXACT)
    assert found.smallest[normalized] >= found.smallest[plain] * (1 - EXACT)
    assert found.rank.tolist()[plain:] == [6, 5]


@pytest.mark.parametrize("seed", range(5))
def test_kohlers_rate(seed):
    """Gradient descent on ρ(w) = -(uᵀw)² / wᵀSw with η = wᵀSw / 2L|ρ|: ρ_t - ρ* <= (1 - μ/L)^2t (ρ_0 - ρ*)."""
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(80, 4)) * [1, 1.5, 2, 3]
    s, u = np.cov(x.T, bias=True), numbers.normal(size=4)
    low, *_, high = np.linalg.eigvalsh(s)
    best = -u @ np.linalg.solve(s, u)
    w, errors = numbers.normal(size=4), []

    def rho(w):
        return -((u @ w) ** 2) / (w @ s @ w)

    # Down to 1e-10 of the start: below, rounding decides.
    while not errors or errors[-1] > 1e-10 * errors[0]:
        errors.append(rho(w) - best)
        gradient = -2 * ((u @ w) * u + rho(w) * (s @ w)) / (w @ s @ w)
        w = w - (w @ s @ w) / (2 * high * abs(rho(w))) * gradient
    bound = errors[0] * (1 - low / high) ** (2 * np.arange(len(errors)))
    assert len(errors) > 5 and (errors <= bound * (1 + 1e-6)).all()
    found = diagnostics.convergence(errors, 0.0)
    assert found.rate <= (1 - low / high) ** 2 and found.r2 > 0.9
