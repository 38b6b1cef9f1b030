import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import InputError, mask_loss, prune_attention, softmax_error
from jaxprune.convergence.curvature import certified_lipschitz, curvature, hessian_product
from jaxprune.convergence.report import report
from jaxprune.convergence.step_sizes import gradient_descent, record_curvature, scale_by_curvature
from jaxprune.convergence.theorem import (
    iteration_bound,
    iterations_used,
    per_step,
    pl_envelope,
    step_series,
)
from jaxprune.descent.loop import Descent, descend
from jaxprune.descent.relaxations import box, none, sigmoid
from jaxprune.sparsity import Sparsity

slow = pytest.mark.slow

# Rounding that measured curvatures and certified bounds may have, relative to the bound.
MARGIN = 1e-4


def head(key, n=24, d=8, b=None, dtype=jnp.float32, scale=0.5):
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (n, d) if b is None else (b, n, d), dtype)
    return x, scale * jax.random.normal(keys[1], (d, d), dtype)


def quadratic(key, eigenvalues, offset=0.0):
    """``½ vᵀAv + offset`` with the eigenvalues given, and the matrix ``A``."""
    p = len(eigenvalues)
    q, _ = jnp.linalg.qr(jax.random.normal(key, (p, p)))
    a = (q * jnp.asarray(eigenvalues)) @ q.T
    return (lambda v: 0.5 * v @ a @ v + offset), a


def mask_descent(x, w, optimizer, *, lam=0.05, steps=60, relaxation=None, **options):
    """The descent of Algorithm 1 on one sequence, monitored."""
    descent = Descent(
        objective=lambda mask_w, batch: mask_w_error(mask_w, batch, w),
        relaxation=none() if relaxation is None else relaxation,
        optimizer=optimizer,
        sparsity=Sparsity(0.5),
        steps=steps,
        penalty=lambda mask: 0.5 * lam * jnp.sum(mask**2),
        **{"monitor": per_step, "chunk_size": 20, **options},
    )
    return descend(descent, w, x if x.ndim == 3 else x[None], key=jax.random.key(1))


def mask_w_error(mask_w, x, w):
    """Error term for the effective weight: ``mask_loss`` of a mask of ones against ``w``."""
    safe = jnp.where(w == 0, 1, w)
    return mask_loss(mask_w / safe, x, w, lam=0.0)


IDENTITY = none()._replace(
    init=lambda weights: weights,
    apply=lambda variable, weights, step: variable,
    finish=lambda variable, weights, sparsity: (variable, variable > 0),
)


def plain_descent(fun, start, optimizer, steps, **options):
    """A descent on any function of one matrix, as the loop sees it."""
    weights = jnp.asarray(start)
    descent = Descent(
        objective=lambda variable, batch: fun(variable),
        relaxation=options.pop("relaxation", IDENTITY),
        optimizer=optimizer,
        sparsity=Sparsity(0.0),
        steps=steps,
        **{"monitor": per_step, "chunk_size": 10, **options},
    )
    return descend(descent, weights, jnp.zeros(1), key=jax.random.key(0))


class TestCurvature:
    @pytest.mark.parametrize(
        "spectrum",
        [
            np.linspace(0.1, 7.0, 60),
            np.linspace(-20.0, 3.0, 60),  # a negative one is the largest in size
            np.linspace(-9.0, -2.0, 60),
            np.r_[np.full(59, 1.0), 50.0],
            1e-12 * np.linspace(1, 2, 60),
            1e12 * np.linspace(1, 2, 60),
        ],
    )
    def test_finds_the_largest_eigenvalue_of_quadratics_within_a_percent(self, key, spectrum):
        fun, _ = quadratic(key, spectrum)
        found = curvature(fun, jnp.ones(60))
        np.testing.assert_allclose(found.value, spectrum.max(), rtol=0.01)
        assert found.value <= spectrum.max() + MARGIN * np.abs(spectrum).max()
        np.testing.assert_allclose(jnp.linalg.norm(found.vector), 1, rtol=1e-5)

    @pytest.mark.parametrize("gap", [0.02, 0.05, 0.2])
    @pytest.mark.parametrize("start", [None, jnp.zeros(256), jnp.eye(256)[0]])
    def test_finds_one_eigenvalue_a_little_above_many_that_are_alike(self, gap, start):
        """A random vector is nearly an eigenvector then: a small residual says nothing yet."""
        spectrum = jnp.ones(256).at[255].set(1 + gap)
        found = curvature(lambda v: 0.5 * jnp.sum(spectrum * v**2), jnp.ones(256), start=start)
        np.testing.assert_allclose(found.value, 1 + gap, rtol=1e-3)
        assert found.products <= 10

    def test_multiplies_at_the_highest_precision(self):
        """By default accelerators multiply float32 with three digits."""
        program = str(jax.make_jaxpr(lambda v: curvature(lambda v: jnp.sum(v**4), v))(jnp.ones(5)))
        assert program.count("dot_general") == program.count("(Precision.HIGHEST,") > 0

    def test_of_a_flat_function_is_zero_and_of_one_variable_exact(self):
        assert curvature(lambda v: v.sum(), jnp.ones(5)).value == 0
        found = curvature(lambda v: 3 * v[0] ** 2, jnp.ones(1))
        assert found.value == 6
        assert found.products == 1

    def test_equals_the_eigenvalue_of_the_whole_hessian_of_the_loss(self, key, x64):
        x, w = head(key, n=12, d=5, dtype=jnp.float64)
        mask = jax.random.uniform(key, (5, 5), jnp.float64)

        def loss(flat):
            return mask_loss(flat.reshape(5, 5), x, w, lam=0.1)

        exact = jnp.linalg.eigvalsh(jax.jit(jax.hessian(loss))(mask.reshape(-1)))[-1]
        found = curvature(lambda m: mask_loss(m, x, w, lam=0.1), mask, tolerance=1e-6)
        np.testing.assert_allclose(found.value, exact, rtol=1e-9)
        assert found.vector.shape == (5, 5)

    def test_takes_pytrees(self, key):
        fun, _ = quadratic(key, np.linspace(1, 5, 12))
        start = {"a": jnp.ones((2, 4)), "b": jnp.ones(4)}
        tree = curvature(lambda t: fun(jnp.concatenate([t["a"].reshape(-1), t["b"]])), start)
        np.testing.assert_allclose(tree.value, 5, rtol=0.01)
        assert tree.vector["a"].shape == (2, 4)

    def test_a_warm_start_needs_fewer_products(self, key):
        x, w = head(key, n=48, d=16)

        @jax.jit
        def measure(at, start):
            return curvature(lambda m: mask_loss(m, x, w, lam=0.0), at, start=start)

        cold_start, there = jnp.zeros((16, 16)), jnp.full((16, 16), 0.89)
        first = measure(jnp.full((16, 16), 0.9), cold_start)
        warm, cold = measure(there, first.vector), measure(there, cold_start)
        assert warm.products < cold.products
        np.testing.assert_allclose(warm.value, cold.value, rtol=0.01)

    def test_a_warm_start_at_an_eigenvector_that_was_overtaken_is_left(self):
        fun = lambda v: 0.5 * (v[0] ** 2 + 4 * v[1] ** 2)  # noqa: E731
        found = curvature(fun, jnp.ones(2), start=jnp.array([1.0, 0.0]))
        np.testing.assert_allclose(found.value, 4, rtol=0.01)

    def test_along_a_segment_is_the_largest_of_its_points(self):
        fun = lambda v: jnp.sum(v**4) / 12  # curvature v² at v  # noqa: E731
        at, toward = jnp.array([-1.0]), jnp.array([3.0])
        assert curvature(fun, at, toward=toward, points=5).value == 9
        assert curvature(fun, toward, toward=at, points=2).value == 9
        middle = curvature(lambda v: jnp.sum(1.5 * v**2 - v**4 / 12), at, toward=-at, points=3)
        assert middle.value == 3

    def test_not_a_number_shows(self):
        fun = lambda v: jnp.sum(v**2) / v[0]  # noqa: E731
        found = curvature(fun, jnp.ones(3), toward=jnp.array([-1.0, 1.0, 1.0]), points=3)
        assert not jnp.isfinite(found.value)

    def test_vmapped_over_forty_heads_equals_one_at_a_time(self, key):
        x, _ = head(key)
        w = 0.5 * jax.random.normal(key, (40, 8, 8))
        masks = jax.random.uniform(key, w.shape)
        one = jax.jit(lambda m, w: curvature(lambda m: mask_loss(m, x, w, lam=0.1), m))
        together = jax.vmap(one)(masks, w)
        for i in range(40):
            alone = one(masks[i], w[i])
            np.testing.assert_allclose(together.value[i], alone.value, rtol=1e-4)

    def test_wrong_settings_are_named(self):
        with pytest.raises(InputError, match="points 1"):
            curvature(jnp.sum, jnp.ones(3), toward=jnp.ones(3), points=1)

    @pytest.mark.parametrize("causal", [True, False])
    def test_hessian_products_agree_with_finite_differences(self, key, x64, causal):
        x, w = head(key, b=2, dtype=jnp.float64)
        mask, direction = jax.random.normal(key, (2, 8, 8), jnp.float64)
        gradient = jax.grad(lambda m: mask_loss(m, x, w, lam=0.2, causal=causal))
        product = hessian_product(
            lambda m: mask_loss(m, x, w, lam=0.2, causal=causal), mask, direction
        )
        h = 1e-5
        difference = (gradient(mask + h * direction) - gradient(mask - h * direction)) / (2 * h)
        np.testing.assert_allclose(product, difference, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("causal", [True, False])
    def test_hessian_products_are_the_same_in_row_blocks(self, key, x64, causal):
        """The kernel's own derivative, differentiated again through its scans: 3 rows a block."""
        q, k, q0, k0, direction = jax.random.normal(key, (5, 2, 11, 4), jnp.float64)

        def error(block_size):
            return lambda q: softmax_error(q, k, q0, k0, causal=causal, block_size=block_size).sum()

        product = hessian_product(error(3), q, direction)
        np.testing.assert_allclose(product, hessian_product(error(11), q, direction), rtol=1e-10)
        h = 1e-5
        gradient = jax.grad(error(3))
        difference = (gradient(q + h * direction) - gradient(q - h * direction)) / (2 * h)
        np.testing.assert_allclose(product, difference, rtol=1e-6, atol=1e-8)


class TestCertifiedLipschitz:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(
        ("n", "d", "b"),
        [
            pytest.param(1, 3, None, marks=slow),
            pytest.param(2, 1, None, marks=slow),
            pytest.param(9, 4, None, marks=slow),
            pytest.param(33, 8, None, marks=slow),
            (5, 8, 3),
        ],
    )
    def test_is_never_below_the_measured_curvature(self, n, d, b, causal):
        """300 heads of a shape: scales over four decades, masks inside and far outside [0, 1]."""

        def one(seed):
            keys = jax.random.split(jax.random.key(seed), 6)
            x, w = head(keys[0], n, d, b)
            w = w * 10 ** jax.random.uniform(keys[1], minval=-3, maxval=1)
            x = x * 10 ** jax.random.uniform(keys[2], minval=-1, maxval=0.5)
            spread = jax.random.choice(keys[3], jnp.array([0.0, 1.0, 5.0]))
            mask = jax.random.uniform(keys[4], (d, d))
            mask = mask + spread * jax.random.normal(keys[5], (d, d))
            lam = jnp.array([0.0, 1e-3, 10.0])[seed % 3]

            def measured(sign):  # the most negative eigenvalue too: the bound is on the norm
                loss = lambda m: sign * mask_loss(m, x, w, lam=lam, causal=causal)  # noqa: E731
                return curvature(loss, mask, iterations=15).value

            return jax.vmap(measured)(jnp.array([1.0, -1.0])).max(), certified_lipschitz(x, w, lam)

        found, bound = jax.jit(jax.vmap(one))(jnp.arange(300))
        assert jnp.isfinite(found).all()
        assert (found <= bound * (1 + MARGIN)).all()

    def test_is_within_a_factor_of_twenty_for_a_single_hard_row(self, x64):
        """Target at one end, the approximation where the softmax turns: the bound is not idle."""
        x, w = jnp.array([[1.0], [-1.0]]), jnp.array([[-8.0]])

        def one(mask):
            return curvature(lambda m: mask_loss(m, x, w, lam=0.0, causal=False), mask).value

        masks = jnp.linspace(-0.75, 0.75, 121).reshape(-1, 1, 1)
        worst = jnp.abs(jax.jit(jax.vmap(one))(masks)).max() / certified_lipschitz(x, w)
        assert 0.05 < worst < 1

    def test_is_the_formula(self, key, x64):
        x, w = head(key, b=3, dtype=jnp.float64)
        norms = [np.linalg.norm(s, 2) for s in np.asarray(x)]
        expected = 1.25 * np.mean(np.power(norms, 4)) * np.abs(w).max() ** 2 + 0.7
        np.testing.assert_allclose(certified_lipschitz(x, w, 0.7), expected, rtol=1e-12)
        weights = jnp.array([[2.0] * 24, [0.0] * 24, [0.5] * 24])
        weighted = 1.25 * np.mean(np.power(norms, 4) * [2, 0, 0.5]) * np.abs(w).max() ** 2
        np.testing.assert_allclose(
            certified_lipschitz(x, w, row_weights=weights), weighted, rtol=1e-12
        )
        heads = certified_lipschitz(x, jnp.stack([w, 2 * w]), jnp.array([0.0, 1.0]))
        assert heads.shape == (2,)
        np.testing.assert_allclose(heads[1] - 1, 4 * heads[0], rtol=1e-12)


class TestTheorem:
    @pytest.mark.parametrize("spectrum", [np.linspace(0.5, 4, 16), np.r_[0.2, np.full(15, 3.0)]])
    def test_envelope_of_a_quadratic_is_four_times_its_smallest_eigenvalue(
        self, key, x64, spectrum
    ):
        """``½‖∇f‖² ≥ m(f − f*)`` holds with the smallest eigenvalue ``m``; Def. 5.1 has ``4m``."""
        fun, _ = quadratic(key, spectrum, offset=0.3)
        run = plain_descent(
            fun,
            jax.random.normal(key, (16,), jnp.float64),
            gradient_descent("certified", lipschitz=spectrum.max()),
            400 if spectrum.min() > 0.3 else 800,
            chunk_size=400,
        )
        mu = pl_envelope(run.trace.loss, run.trace.squared_gradient_norm, 0.3)
        np.testing.assert_allclose(mu, 4 * spectrum.min(), rtol=0.01)
        # Below the optimum the inequality is harder.
        both = pl_envelope(run.trace.loss, run.trace.squared_gradient_norm, np.array([0.2, 0.3]))
        assert both[0] < both[1]

    def test_envelope_of_a_run_that_underflows_is_that_of_its_larger_losses(self):
        loss = 0.5 * 4.0 ** -jnp.arange(80, dtype=jnp.float32)  # ½v² of v halved at every step
        assert pl_envelope(loss, 2 * loss, 0.0) == 4
        assert pl_envelope(loss, jnp.where(loss < 1e-36, 0, 2 * loss), 0.0) == 4

    def test_envelope_by_hand(self):
        loss, squares = jnp.array([4.0, 2.0, 1.0]), jnp.array([9.0, 1.0, 0.5])
        found = pl_envelope(loss, squares, jnp.array([0.0, 1.0, 2.0, 4.0]))
        np.testing.assert_allclose(found, [1.0, 2.0, 9.0, jnp.inf])
        cubes = pl_envelope(loss, squares, 1.0, alpha=3.0)
        np.testing.assert_allclose(cubes, 2.0)  # min(2·27/3, 2·1/1)
        assert jnp.isnan(pl_envelope(loss.at[1].set(jnp.nan), squares, 0.0))
        assert pl_envelope(loss, squares.at[0].set(0.0), 0.0) == 0

    def test_bound_is_the_theorems(self):
        np.testing.assert_allclose(iteration_bound(2.0, 0.1, 0.05, 3.0), 4 * 3 / (0.05 * 2 * 0.1))
        np.testing.assert_allclose(
            iteration_bound(2.0, 0.1, 0.05, 3.0, alpha=1.0), 2 / 0.05 * 0.1**-2 * 3, rtol=1e-6
        )
        assert iteration_bound(0.0, 0.1, 0.05, 3.0) == jnp.inf
        assert iteration_bound(2.0, jnp.array([0.1, 0.2]), 0.05, 3.0).shape == (2,)

    def test_iterations_used_count_updates(self):
        loss = jnp.array([4.0, 2.0, 1.5, 1.0])
        found = iterations_used(loss, 1.0, jnp.array([5.0, 1.0, 0.4, 0.0, -1.0]))
        np.testing.assert_array_equal(found, [0, 1, 3, 3, jnp.inf])

    @pytest.mark.parametrize(
        "lam",
        [
            pytest.param(0.0, marks=pytest.mark.slow),
            0.02,
            pytest.param(0.5, marks=pytest.mark.slow),
        ],
    )
    def test_bound_covers_what_a_head_needs(self, key, lam):
        x, w = head(key)
        run = mask_descent(x, w, gradient_descent("curvature"), lam=lam, steps=100)
        found = report(run.trace)
        if lam:
            assert (found.used <= found.bound).all()
            assert np.isfinite(found.used).all()
        else:  # started at the optimum
            assert found.mu == jnp.inf
            assert "no visited point lies above" in found.describe()


class TestStepSizes:
    @pytest.mark.parametrize("rule", [pytest.param("certified", marks=slow), "curvature"])
    @pytest.mark.parametrize("projected", [pytest.param(False, marks=slow), True])
    @pytest.mark.parametrize(
        "scale", [pytest.param(0.05, marks=slow), 0.5, pytest.param(4.0, marks=slow)]
    )
    def test_descent_lemma_holds_at_every_step(self, key, rule, projected, scale):
        x, w = head(key, scale=scale)
        relaxation = box() if projected else none()
        lipschitz = certified_lipschitz(x, w, 0.5)
        optimizer = gradient_descent(rule, lipschitz=lipschitz, project=relaxation.project)
        run = mask_descent(x, w, optimizer, lam=0.5, relaxation=relaxation, steps=120)
        found = report(run.trace, lipschitz=lipschitz)
        assert found.lemma_broken == -1, found.describe()
        assert found.applicable
        assert run.trace.final_loss < run.trace.loss[0]

    @slow
    @pytest.mark.parametrize("rule", ["certified", "curvature"])
    @pytest.mark.parametrize("projected", [False, True])
    def test_descent_lemma_holds_to_the_last_digit_in_float64(self, key, x64, rule, projected):
        x, w = head(key, dtype=jnp.float64, scale=1.0)
        relaxation = box() if projected else none()
        optimizer = gradient_descent(
            rule, lipschitz=certified_lipschitz(x, w, 0.5), project=relaxation.project
        )
        run = mask_descent(x, w, optimizer, lam=0.5, relaxation=relaxation)
        found = report(run.trace)
        assert found.tolerance < 1e-13
        assert found.lemma_broken == -1, found.describe()
        assert found.smallest_ratio >= 1 - 1e-9
        assert (found.projected >= 0) == (projected and bool((run.state.variable <= 0).any()))

    def test_projection_is_active_and_the_lemma_holds_with_the_gradient_mapping(self, x64):
        """Towards a point outside the box, where ``‖∇L‖`` stays large and ``‖G‖`` falls to zero."""
        fun = lambda v: 0.5 * jnp.sum((v + 1) ** 2 * jnp.array([1.0, 4.0]))  # noqa: E731
        run = plain_descent(
            fun,
            jnp.array([[1.0, 1.0]], jnp.float64)[0],
            gradient_descent("certified", lipschitz=4.0),
            30,
            relaxation=IDENTITY._replace(project=box().project),
        )
        found, series = report(run.trace), step_series(run.trace)
        assert found.projected == 0  # the second entry overshoots at once
        assert found.projected_most == 1
        assert found.lemma_broken == -1
        np.testing.assert_array_equal(run.state.variable, 0)
        assert series.squared_mapping_norm[-1] == 0
        assert series.squared_gradient_norm[-1] > 1
        assert "active first at step 0" in found.describe()

    @pytest.mark.parametrize("rule", [pytest.param("curvature", marks=slow), "backtracking"])
    def test_a_curvature_that_changes_from_step_to_step_is_followed(self, rule):
        """Rosenbrock's valley: curvature grows by two orders on the way."""
        fun = lambda v: (1 - v[0]) ** 2 + 100 * (v[1] - v[0] ** 2) ** 2  # noqa: E731
        run = plain_descent(fun, jnp.array([-1.2, 1.0]), gradient_descent(rule), 200)
        found = report(run.trace)
        assert found.lemma_broken == -1, found.describe()
        assert run.trace.final_loss < 5

    def test_curvature_of_a_quadratic_sets_the_step(self, key):
        fun, _ = quadratic(key, np.linspace(1, 5, 12))
        optimizer = scale_by_curvature(every=5, margin=1.5)
        run = plain_descent(fun, jnp.ones(12), optimizer, 12)
        np.testing.assert_allclose(run.trace.monitored.step_size, 1 / 7.5, rtol=0.01)

    def test_concave_regions_do_not_stop_it(self):
        run = plain_descent(
            lambda v: jnp.sum(jnp.cos(v)), jnp.full(3, 0.1), gradient_descent("curvature"), 40
        )
        assert report(run.trace).lemma_broken == -1
        np.testing.assert_allclose(run.trace.final_loss, -3, atol=1e-3)

    def test_numbers_and_schedules_are_plain_gradient_descent(self, key):
        fun, a = quadratic(key, np.linspace(1, 5, 6))
        for step in (0.1, optax.constant_schedule(0.1)):
            run = plain_descent(fun, jnp.ones(6), gradient_descent(step), 3)
            expected = jnp.linalg.matrix_power(jnp.eye(6) - 0.1 * a, 3) @ jnp.ones(6)
            np.testing.assert_allclose(run.state.variable, expected, rtol=1e-4)

    def test_works_in_a_loop_of_ones_own(self, key):
        fun, _ = quadratic(key, np.linspace(1, 5, 6))
        optimizer, params = gradient_descent("curvature"), jnp.ones(6)

        @jax.jit
        def step(params, state):
            value, grad = jax.value_and_grad(fun)(params)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, value_fn=fun
            )
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(60):
            params, state = step(params, state)
        assert fun(params) < 1e-4

    def test_wrong_rules_are_named(self, unchecked):
        with pytest.raises(InputError, match=r"'newton'.*certified, curvature, backtracking"):
            gradient_descent("newton")
        with pytest.raises(InputError, match="needs lipschitz="):
            gradient_descent("certified")
        for wrong in ({"every": 0}, {"margin": 0.5}, {"iterations": 0}):
            with pytest.raises(InputError, match=next(iter(wrong))):
                scale_by_curvature(**wrong)
        with pytest.raises(InputError, match="checkpoints"):
            record_curvature(10, 0)

    @pytest.mark.parametrize("optimizer", [record_curvature(5, 2), scale_by_curvature()])
    def test_under_vmap_nothing_is_measured_while_nobody_is_due(self, optimizer):
        """A batched predicate would turn the branch into a select that computes always."""

        def step(params, state):
            value, grad = jax.value_and_grad(lambda p: jnp.sum(p**4))(params)
            return optimizer.update(
                grad, state, params, value=value, value_fn=lambda p: jnp.sum(p**4)
            )

        params = jnp.ones((3, 4))
        program = jax.make_jaxpr(jax.vmap(step))(params, jax.vmap(optimizer.init)(params))
        outside = [e.primitive.name for e in program.eqns]
        assert "cond" in outside
        assert "while" not in outside

    @slow
    def test_recorded_curvatures_leave_the_descent_alone(self, key):
        x, w = head(key)
        plain = mask_descent(x, w, optax.sgd(0.1))
        watched = mask_descent(x, w, optax.chain(record_curvature(20, 4), optax.sgd(0.1)))
        np.testing.assert_array_equal(plain.weights, watched.weights)
        # Of two programs, which round sums in orders of their own.
        np.testing.assert_allclose(plain.trace.loss, watched.trace.loss, rtol=1e-6)
        values = watched.state.optimizer_state[0].value
        assert jnp.isfinite(values[:3]).all()
        assert jnp.isnan(values[3])  # a checkpoint after the last step
        exact = curvature(lambda m: mask_loss(m, x, w, lam=0.05), jnp.ones((8, 8)))
        np.testing.assert_allclose(values[0], exact.value, rtol=0.01)


class TestReport:
    def test_a_step_that_is_too_large_is_caught_where_it_happens(self, key):
        fun, _ = quadratic(key, np.linspace(1, 5, 12))
        schedule = lambda step: jnp.where(step == 17, 3.0, 0.1)  # 1/L is 0.2  # noqa: E731
        run = plain_descent(fun, jnp.ones(12), gradient_descent(schedule), 40)
        found = report(run.trace, lipschitz=5.0)
        assert found.lemma_broken == 17
        np.testing.assert_allclose(found.step_size_high, 3, rtol=1e-5)
        assert found.lemma_loss[1] > found.lemma_loss[0]
        text = found.describe()
        assert "broken first at step 17" in text
        assert "above 1/L₂ = 0.2" in text
        assert not found.held

    def test_a_step_too_large_for_the_lemma_though_the_loss_falls_is_caught(self):
        """Between 1/L and 2/L the loss of a quadratic falls, but by less than the lemma says."""
        run = plain_descent(lambda v: 2.5 * jnp.sum(v**2), jnp.ones(3), optax.sgd(0.3), 5)
        found = report(run.trace)
        assert found.lemma_broken == 0
        assert found.lemma_loss[1] < found.lemma_loss[0]
        np.testing.assert_allclose(step_series(run.trace).step_ratio, 2 - 5 * 0.3, rtol=1e-4)

    @pytest.mark.parametrize("at", [0, 23])
    def test_a_head_with_a_step_that_is_too_large(self, key, at):
        x, w = head(key)
        lipschitz = certified_lipschitz(x, w, 0.05)
        schedule = lambda step: jnp.where(step == at, 45.0, 1 / lipschitz)  # noqa: E731
        assert report(mask_descent(x, w, optax.sgd(schedule)).trace).lemma_broken == at

    def test_an_ordinary_run_held(self, key):
        x, w = head(key)
        lipschitz = certified_lipschitz(x, w, 0.05)
        optimizer = gradient_descent("certified", lipschitz=1.01 * lipschitz)
        found = report(mask_descent(x, w, optimizer).trace, lipschitz=lipschitz)
        assert found.held
        text = found.describe()
        for words in ("below 1/L₂", "held at every step", "never active", "T(ε)"):
            assert words in text
        assert "not reached" not in text

    @pytest.mark.parametrize("rate", [0.2, 1e-3, 30.0])
    def test_a_run_down_to_zero_is_gradient_descent_to_the_end(self, key, rate):
        """Squares of the gradient and of the step underflow on the way, not at the same step."""
        spectrum = np.linspace(1, 4, 12) * 0.2 / rate
        fun, _ = quadratic(key, spectrum)
        run = plain_descent(fun, jnp.ones(12), optax.sgd(rate), 800)
        assert run.trace.squared_gradient_norm[-1] == 0
        found = report(run.trace, lipschitz=1.001 * spectrum.max())
        assert found.held, found.describe()
        np.testing.assert_allclose(found.mu, 4 * spectrum.min(), rtol=0.01)
        np.testing.assert_allclose(found.step_size_low, rate, rtol=1e-3)

    def test_loss_that_overflows_is_named(self):
        run = plain_descent(lambda v: jnp.sum(v**4), jnp.ones(3), optax.sgd(1e4), 20)
        found = report(run.trace)
        assert found.lemma_broken == 0
        assert found.not_finite > 0
        assert f"not from step {found.not_finite} on" in found.describe()

    def test_a_saddle_above_xi_has_no_positive_constant(self):
        run = plain_descent(lambda v: jnp.sum(v**2) + 1, jnp.zeros(3), optax.sgd(0.1), 5)
        found = report(run.trace, xi=0.5)
        assert found.mu == 0
        assert found.pl_broken == 0
        assert not found.held
        assert "no positive μ" in found.describe()

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"optimizer": optax.adam(0.01)}, "not multiples of the gradient"),
            ({"optimizer": optax.sgd(0.01, momentum=0.9)}, "not multiples of the gradient"),
            ({"batch_size": 2}, "changes from step to step"),
            ({"augment": lambda key, batch: batch[:, ::-1]}, "changes from step to step"),
            (
                {"relaxation": sigmoid(optax.linear_schedule(1.0, 0.5, 60))},
                "changes from step to step",
            ),
        ],
    )
    def test_is_not_applicable_to_other_descents(self, key, options, reason):
        x, w = head(key, b=4)
        run = mask_descent(x, w, **{"optimizer": optax.sgd(0.01), **options})
        found = report(run.trace)
        assert not found.applicable
        assert not found.held
        assert "not applicable" in found.describe()
        assert reason in found.describe()

    def test_a_batch_of_everything_is_applicable(self, key):
        x, w = head(key, b=4)
        assert report(mask_descent(x, w, optax.sgd(0.01), batch_size=4).trace).applicable

    @slow
    def test_vmapped_over_forty_heads_equals_one_at_a_time(self, key):
        x, _ = head(key)
        w = 0.5 * jax.random.normal(key, (40, 8, 8))

        def run(w):
            return mask_descent(x, w, gradient_descent("curvature"), steps=40).trace

        together = jax.jit(jax.vmap(run))(w)
        found = report(together)
        assert found.held.all(), found.describe()
        assert found.steps.shape == (40,)
        one = jax.jit(run)
        for i in range(0, 40, 5):
            alone = report(one(w[i]))
            for name in ("mu", "bound", "step_size_low", "initial_loss"):
                np.testing.assert_allclose(
                    getattr(found, name)[i], getattr(alone, name), rtol=2e-3, err_msg=name
                )
            series, single = step_series(together), step_series(one(w[i]))
            np.testing.assert_allclose(series.loss[i], single.loss, rtol=1e-4)
        assert found.describe().count("Descent lemma") == 40

    def test_unmonitored_and_empty_traces_are_refused(self, key):
        x, w = head(key)
        with pytest.raises(InputError, match="not monitored"):
            report(mask_descent(x, w, optax.sgd(0.1), monitor=None).trace)
        with pytest.raises(InputError, match="no steps"):
            report(mask_descent(x, w, optax.sgd(0.1), steps=0).trace)
        with pytest.raises(InputError, match="tolerance"):
            report(mask_descent(x, w, optax.sgd(0.1)).trace, tolerance=-1.0)


class TestMonitor:
    def test_off_leaves_the_result_and_the_trace_as_they_are(self, key):
        x, w = head(key)
        off, on = (mask_descent(x, w, optax.sgd(0.1), monitor=m) for m in (None, per_step))
        assert off.trace.monitored is None
        assert off.trace.final_loss is None
        blank = dataclasses.replace(on.trace, monitored=None, final_loss=None)
        cleared = dataclasses.replace(on, trace=blank)
        assert jax.tree.structure(off) == jax.tree.structure(cleared)
        for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(cleared), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_chunks_called_from_python_leave_the_same_record(self, key):
        x, w = head(key)
        lams = {"lam": 0.05, "steps": 50}
        whole = mask_descent(x, w, optax.sgd(0.1), **lams)
        seen = []
        descent = Descent(
            objective=lambda mask_w, batch: mask_w_error(mask_w, batch, w),
            relaxation=none(),
            optimizer=optax.sgd(0.1),
            sparsity=Sparsity(0.5),
            steps=50,
            penalty=lambda mask: 0.025 * jnp.sum(mask**2),
            monitor=per_step,
            chunk_size=20,
        )
        pieces = descend(
            descent, w, x[None], key=jax.random.key(1), on_chunk=lambda s, t: seen.append(t)
        )
        assert len(seen) == 3
        assert pieces.trace.monitored.step_size.shape == (50,)
        both = zip(jax.tree.leaves(whole.trace), jax.tree.leaves(pieces.trace), strict=True)
        for a, b in both:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_records_the_definitions(self, x64):
        """Two steps by hand, the second one clipped."""
        fun = lambda v: jnp.sum(v**2)  # noqa: E731
        run = plain_descent(
            fun,
            jnp.array([1.0, 0.5], jnp.float64),
            optax.sgd(lambda step: jnp.where(step == 0, 0.25, 0.75)),
            2,
            relaxation=IDENTITY._replace(project=box().project),
        )
        record, series = run.trace.monitored, step_series(run.trace)
        np.testing.assert_allclose(record.step_size, [0.25, 0.75])
        np.testing.assert_allclose(record.squared_step_norm, [0.3125, 0.3125])
        np.testing.assert_array_equal(record.projected, [0, 1])
        np.testing.assert_allclose(series.loss, [1.25, 0.3125, 0])
        np.testing.assert_allclose(series.squared_gradient_norm, [5, 1.25])
        np.testing.assert_allclose(series.squared_mapping_norm, [5, 0.3125 / 0.75**2])
        np.testing.assert_allclose(series.step_ratio, [0.9375 / 0.625, 0.3125 / (0.3125 / 1.5)])


class TestPruneAttention:
    @slow
    def test_takes_step_rules_and_monitors(self, key):
        x, w = head(key, b=2)
        lam = 0.05
        for rule in ("certified", "curvature"):
            pruned = prune_attention(x, w, 0.5, lam=lam, learning_rate=rule, steps=30, monitor=True)
            found = report(pruned.trace, lipschitz=certified_lipschitz(x, w, lam))
            assert found.applicable
            assert found.lemma_broken == -1
            assert jnp.isnan(pruned.learning_rate)
            assert int(pruned.keep_mask.sum()) == 32

    def test_other_presets_are_monitored_and_not_applicable(self, key):
        x, w = head(key, b=4)
        pruned = prune_attention(x, w, 0.5, preset="descent", steps=10, monitor=True)
        assert "not applicable" in report(pruned.trace).describe()

    def test_wrong_rules_are_named(self, key, unchecked):
        x, w = head(key, b=2)
        with pytest.raises(InputError, match=r"'newton'.*certified"):
            prune_attention(x, w, 0.5, learning_rate="newton")
        with pytest.raises(InputError, match="numbers only"):
            prune_attention(x, w, 0.5, preset="descent", learning_rate="curvature")
        with pytest.raises(InputError, match="no batch_size"):
            prune_attention(x, w, 0.5, learning_rate="curvature", batch_size=1)
