"""The solver: exact counts, invariances, optimality, and a NumPy twin of its iteration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import Sparsity
from jaxprune.errors import InputError
from jaxprune.gauss_newton import (
    QueryKeyMoments,
    factorise,
    kronecker_admm,
    prune_query_key_on,
    redamped,
    ridge_solution,
)
from jaxprune.gauss_newton import admm as module

D_IN, BLOCKS, K = 12, 3, 4
D_OUT = BLOCKS * K


def moments(random, size, tokens=40):
    """Second moments of correlated vectors of unequal scale."""
    mixing = np.eye(size) + random.normal(size=(size, size)) / np.sqrt(size)
    x = random.normal(size=(tokens, size)) @ mixing * np.exp(random.normal(size=size))
    return x.T @ x / tokens


def draw(seed=0):
    random = np.random.default_rng(seed)
    b = np.stack([moments(random, K) for _ in range(BLOCKS)])
    return random.normal(size=(D_IN, D_OUT)), moments(random, D_IN), b


def full(blocks):
    return np.einsum("pq,pkl->pkql", np.eye(len(blocks)), blocks).reshape(D_OUT, D_OUT)


def damped(f, damping=0.01):
    return (f + damping * np.diag(np.diag(f))) / (1 + damping)


def loss(e, a, b):
    return 0.5 * np.trace(damped(a) @ e @ damped(b) @ e.T)


def jaxed(*arrays):
    return [jnp.asarray(a) for a in arrays]


def numpy_twin(w, a, b, drop, iterations=40):
    """The iteration as written, dense, with linear solves in place of eigenbases."""
    sa, sb = np.sqrt(np.diag(a)), np.sqrt(np.diag(b))
    unit_a, unit_b = damped(a / np.outer(sa, sa)), damped(b / np.outer(sb, sb))
    target = w * np.outer(sa, sb)
    big = np.kron(unit_a, unit_b)
    first, last = module._FIRST_PENALTY, module._LAST_PENALTY
    sparse, dual = target, np.zeros_like(target)
    for rho in np.geomspace(first, last, iterations):
        right = unit_a @ target @ unit_b - dual + rho * sparse
        x = np.linalg.solve(big + rho * np.eye(len(big)), right.ravel()).reshape(w.shape)
        candidate = x + dual / rho
        kept = reference.keep(np.abs(candidate).ravel(), drop).reshape(w.shape)
        sparse = np.where(kept, candidate, 0)
        dual = dual + rho * (x - sparse)
    return kept


def optimum_on(kept, w, a, b):
    """Least quadratic form over weights of a support, by a dense solve."""
    big = np.kron(damped(a), damped(b))
    on = kept.ravel()
    right = (damped(a) @ w @ damped(b)).ravel()[on]
    found = np.zeros(w.size)
    found[on] = np.linalg.solve(big[np.ix_(on, on)], right)
    return found.reshape(w.shape)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_masks_are_those_of_the_iteration_and_weights_their_optimum(x64, seed):
    w, a, b = draw(seed)
    found = kronecker_admm(*jaxed(w, a, b), 0.5, iterations=40, refinements=200)
    kept = numpy_twin(w, a, full(b), w.size // 2)
    assert (found.keep_mask == kept).all()
    expected = optimum_on(kept, w, a, full(b))
    np.testing.assert_allclose(found.weight, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.loss, loss(expected - w, a, full(b)), rtol=1e-9)
    np.testing.assert_allclose(found.masked_loss, loss(np.where(kept, 0, w), a, full(b)), rtol=1e-9)
    assert 0 <= found.primal_residual < 0.1
    assert 0 <= found.dual_residual < 0.1


def test_few_steps_in_float32_come_close(x64):
    w, a, b = draw()
    wide = kronecker_admm(*jaxed(w, a, b), 0.5)
    narrow = kronecker_admm(*(m.astype(jnp.float32) for m in jaxed(w, a, b)), 0.5)
    assert narrow.weight.dtype == jnp.float32
    assert (narrow.keep_mask == wide.keep_mask).mean() > 0.95
    np.testing.assert_allclose(narrow.loss, wide.loss, rtol=0.05)
    best = optimum_on(np.asarray(wide.keep_mask), w, a, full(b))
    assert wide.loss <= 1.02 * loss(best - w, a, full(b))


def test_forms_of_b_agree(x64):
    w, a, b = draw()
    prune = partial(kronecker_admm, *jaxed(w, a), refinements=200)
    for same, other in (
        (b, full(b)),
        (np.ones(D_OUT), np.eye(D_OUT)),
        (None, np.eye(D_OUT)),
        (np.arange(1.0, 1 + D_OUT), np.diag(np.arange(1.0, 1 + D_OUT))),
    ):
        one = prune(None if same is None else jnp.asarray(same), 0.5)
        two = prune(jnp.asarray(other), 0.5)
        assert (one.keep_mask == two.keep_mask).all()
        np.testing.assert_allclose(one.weight, two.weight, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(one.loss, two.loss, rtol=1e-9)
    shared = kronecker_admm(
        jnp.asarray(w), factorise(jnp.asarray(a)), factorise(jnp.asarray(b)), 0.5, refinements=200
    )
    assert (shared.weight == prune(jnp.asarray(b), 0.5).weight).all()


def test_units_of_inputs_and_outputs_do_not_matter(x64):
    """Powers of two rescale exactly: the same mask, and the same weights in their own units."""
    w, a, b = draw()
    random = np.random.default_rng(1)
    left, right = (2.0 ** random.integers(-6, 7, size) for size in (D_IN, D_OUT))
    one = kronecker_admm(*jaxed(w, a, full(b)), 0.5, refinements=200)
    two = kronecker_admm(
        *jaxed(
            w * np.outer(left, right),
            a / np.outer(left, left),
            full(b) / np.outer(right, right),
        ),
        0.5,
        refinements=200,
    )
    assert (one.keep_mask == two.keep_mask).all()
    np.testing.assert_allclose(two.weight / np.outer(left, right), one.weight, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sparsity=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.77, 0.99, 1.0, "2:4"]),
    rank=st.integers(1, D_IN),
    dead=st.integers(0, D_IN),
    indefinite=st.booleans(),
)
def test_any_factors_give_exact_counts_and_no_worse_weights(seed, sparsity, rank, dead, indefinite):
    """Singular factors, one token, dead inputs and outputs, negative eigenvalues."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rank, D_IN))
    x[:, :dead] = 0
    a, b = x.T @ x, moments(random, K, tokens=1)[None] * np.array([0.0, 1, 1e4])[:, None, None]
    if indefinite:
        a = a - 0.1 * np.ones_like(a) * (x.any(axis=0)[:, None] & x.any(axis=0))
    w = random.normal(size=(D_IN, D_OUT))
    w, a, b = (jnp.asarray(m, jnp.float32) for m in (w, a, b))
    found = kronecker_admm(w, a, b, sparsity)
    kept, weight = np.asarray(found.keep_mask), np.asarray(found.weight)
    assert np.isfinite(weight).all()
    assert np.isfinite([found.loss, found.masked_loss, found.primal_residual]).all()
    assert not weight[~kept].any()
    assert not weight[:dead].any()
    pattern = Sparsity.parse(sparsity)
    if pattern.m is None:
        assert (~kept).sum() == pattern.drop_count(kept.size)
    else:
        groups = kept.reshape(D_IN // pattern.m, pattern.m, D_OUT)
        assert (groups.sum(axis=1) == pattern.n).all()
    assert found.loss <= found.masked_loss
    if sparsity == 0.0:
        seen = np.diag(np.asarray(a)) > 0
        assert (weight == np.where(seen[:, None], w, 0)).all()


@pytest.mark.parametrize(
    ("group", "counts"),
    [("matrix", None), ("input", 1), ("output", 0), ("block", None)],
)
def test_groups_have_exact_counts(group, counts):
    w, a, b = (m.astype(jnp.float32) for m in jaxed(*draw()))
    size = {"block_size": 5} if group == "block" else {}
    kept = np.asarray(kronecker_admm(w, a, b, 0.5, group=group, **size).keep_mask)
    if counts is not None:
        assert (kept.sum(axis=counts) == 6).all()
    rows = [kept] if group == "matrix" else [kept[i : i + 5] for i in (0, 5, 10)]
    if counts is None:
        assert all((~r).sum() == r.size // 2 for r in rows)


def test_a_dense_target_on_dense_inputs(x64):
    """``C W B``: the weight without pruning is least squares; ``C = A`` changes nothing."""
    w, a, b = draw()
    random = np.random.default_rng(5)
    x = random.normal(size=(60, D_IN))
    pruned_x = x + 0.3 * random.normal(size=x.shape)
    a, c = pruned_x.T @ pruned_x, pruned_x.T @ x
    found = kronecker_admm(*jaxed(w, a, b), 0.0, c=jnp.asarray(c), damping=0.0)
    np.testing.assert_allclose(found.weight, np.linalg.solve(a, c @ w), rtol=1e-8)
    assert found.masked_loss >= found.loss
    same = kronecker_admm(*jaxed(w, a, b), 0.5, c=jnp.asarray(a))
    plain = kronecker_admm(*jaxed(w, a, b), 0.5)
    np.testing.assert_allclose(same.weight, plain.weight, rtol=1e-6, atol=1e-9)
    pruned = kronecker_admm(*jaxed(w, a, b), 0.5, c=jnp.asarray(c), damping=0.0)

    def error(weight):
        e = pruned_x @ weight - x @ w
        return np.trace(e @ full(b) @ e.T)

    assert error(np.asarray(pruned.weight)) < error(np.asarray(plain.weight))


@pytest.mark.parametrize(("damping", "ridge"), [(0.0, None), (0.3, None), (0.3, 0.05), (0.0, 2.0)])
def test_a_ridge_solution_is_the_damped_least_squares(x64, damping, ridge):
    random = np.random.default_rng(4)
    x, y = random.normal(size=(60, 7)) * np.arange(1, 8), random.normal(size=(60, 3))
    x[:, 2] = 0  # an input without a signal
    a, cross = x.T @ x, x.T @ y
    factor = factorise(jnp.asarray(a), damping)
    factor = factor if ridge is None else redamped(factor, ridge)
    found = ridge_solution(factor, jnp.asarray(cross))
    seen = np.flatnonzero(np.diag(a))
    fraction = damping if ridge is None else ridge
    inside = (a + fraction * np.diag(np.diag(a)))[np.ix_(seen, seen)]
    np.testing.assert_allclose(found[seen], np.linalg.solve(inside, cross[seen]), rtol=1e-9)
    assert not found[2].any()


@pytest.mark.parametrize(
    ("cross", "message"), [(np.ones((4, 2)), "cross"), (np.full((3, 2), np.nan), "cross")]
)
def test_a_cross_moment_that_cannot_be_is_named(cross, message):
    with pytest.raises(InputError, match=message):
        ridge_solution(factorise(jnp.eye(3)), jnp.asarray(cross))


def test_vmap_equals_a_loop_and_ratios_share_a_program(compiled):
    problems = [draw(seed) for seed in range(2)]
    w, a, b = (jnp.stack([jnp.asarray(p[i], jnp.float32) for p in problems]) for i in range(3))
    mapped = jax.jit(jax.vmap(lambda w, a, b: kronecker_admm(w, a, b, 0.5)))(w, a, b)
    loops = [kronecker_admm(w[i], a[i], b[i], 0.5) for i in range(2)]
    for i, one in enumerate(loops):
        assert (mapped.keep_mask[i] == one.keep_mask).all()
        np.testing.assert_allclose(mapped.weight[i], one.weight, rtol=1e-3, atol=1e-4)
    ratios = [0.0, 0.29, 0.9, 1.0]
    arguments = w[0], a[0], b[0]
    traced = jax.jit(jax.vmap(lambda r: kronecker_admm(*arguments, Sparsity(r))))(
        jnp.asarray(ratios)
    )
    kronecker_admm(*arguments, 0.5)
    compiled.clear()
    masks = [kronecker_admm(*arguments, ratio).keep_mask for ratio in ratios]
    assert not compiled
    assert (jnp.stack(masks) == traced.keep_mask).all()


def test_both_projections_of_a_layer():
    w, a, b = (m.astype(jnp.float32) for m in jaxed(*draw()))
    moments = QueryKeyMoments(a, b, b[:1])
    wq, wk = w.reshape(D_IN, BLOCKS, K), w[:, :K].reshape(D_IN, 1, K)
    q, k = prune_query_key_on(moments, wq, wk, 0.5)
    assert (q.weight == kronecker_admm(w, a, b, 0.5).weight).all()
    assert (~k.keep_mask).sum() == D_IN * K // 2


W, A = jnp.ones((D_IN, D_OUT)), jnp.eye(D_IN)
WRONG = [
    ({"w": jnp.ones(4)}, r"w of shape \(4,\)"),
    ({"a": jnp.eye(5)}, r"a \(5, 5\) do not match w"),
    ({"c": jnp.eye(5)}, r"and c \(5, 5\) do not match w"),
    ({"b": jnp.eye(5)}, r"b \(5, 5\) does not match w"),
    ({"b": jnp.ones((2, 5, 5))}, r"b \(2, 5, 5\) does not match w"),
    ({"b": factorise(jnp.eye(5))}, r"b \(5, 5\) does not match w"),
    ({"a": A.at[0, 0].set(jnp.nan)}, "a holds 1 non-finite"),
    ({"b": jnp.full(D_OUT, jnp.inf)}, "b holds 12 non-finite"),
    ({"sparsity": 2}, "sparsity 2"),
    ({"sparsity": "2:5"}, "groups of 5 do not divide"),
    ({"damping": -1.0}, "damping -1.0"),
    ({"iterations": -1}, "iterations -1"),
    ({"group": "row"}, "group 'row'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_input_is_named(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        kronecker_admm(**{"w": W, "a": A, "b": None, "sparsity": 0.5} | change)


def test_a_large_matrix_takes_its_threshold_from_a_sample(monkeypatch):
    w, a, b = (m.astype(jnp.float32) for m in jaxed(*draw()))
    exact = kronecker_admm(w, a, b, 0.5)
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_STRIDES", (3, 5))  # the first divides the columns
    module._admm.clear_cache()
    for ratio in (0.0, 0.5, 1.0):
        sampled = kronecker_admm(w, a, b, ratio)
        assert (~sampled.keep_mask).sum() == int(w.size * ratio)
        if ratio == 0.5:
            assert sampled.loss < 1.5 * exact.loss
            assert (sampled.keep_mask == exact.keep_mask).mean() > 0.7
    module._admm.clear_cache()
