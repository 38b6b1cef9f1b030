"""What an entry costs while the others adapt, against quadratic programs solved in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.gauss_newton import conditional_diagonal, kronecker_admm, saliency


def factor(key, width, blocks=1):
    """Blocks of a covariance of features that have much in common."""
    x = jax.random.normal(key, (blocks, 4 * width, width))
    x = x + 2 * x[..., :1]
    return jnp.einsum("pti,ptj->pij", x, x) / x.shape[1]


def test_it_is_what_the_form_grows_by_when_one_entry_goes_and_the_others_adapt(key):
    keys = jax.random.split(key, 3)
    w, a, b = jax.random.normal(keys[0], (4, 6)), factor(keys[1], 4), factor(keys[2], 3, 2)
    found = np.asarray(saliency(w, a, b))

    def damped(f):
        f = np.asarray(f, np.float64)
        return (f + 0.01 * np.diag(np.diag(f))) / 1.01

    whole = np.kron(
        damped(a[0]), np.block([[damped(b[0]), np.zeros((3, 3))], [np.zeros((3, 3)), damped(b[1])]])
    )
    flat = np.asarray(w, np.float64).reshape(-1)
    for entry in range(w.size):
        # min ½ eᵀ H e with e_entry = −w_entry: the others solve a linear system.
        others = np.delete(np.arange(w.size), entry)
        right = whole[others, entry] * flat[entry]
        adapted = np.zeros(w.size)
        adapted[others] = np.linalg.solve(whole[np.ix_(others, others)], right)
        adapted[entry] = -flat[entry]
        cost = 0.5 * adapted @ whole @ adapted
        np.testing.assert_allclose(found.reshape(-1)[entry], cost, rtol=2e-3)


def test_dead_features_cost_nothing_and_units_do_not_matter(key):
    f = factor(key, 5)[0].at[2].set(0).at[:, 2].set(0)
    found = conditional_diagonal(f)
    assert found[2] == 0
    assert (found <= jnp.diagonal(f) * (1 + 1e-5)).all()
    scale = jnp.array([1.0, 1e-3, 7.0, 1e4, 2.0])
    scaled = conditional_diagonal(scale[:, None] * f * scale)
    np.testing.assert_allclose(scaled, scale**2 * found, rtol=1e-3)


def test_their_sum_is_nearer_to_what_the_solver_leaves_than_that_of_the_diagonals(key):
    keys = jax.random.split(key, 3)
    w, a, b = jax.random.normal(keys[0], (24, 16)), factor(keys[1], 24), factor(keys[2], 16)
    drop = w.size // 2
    left = kronecker_admm(w, a[0], b[0], 0.5).loss
    diagonals = 0.5 * jnp.diagonal(a[0])[:, None] * jnp.diagonal(b[0]) * w**2
    sums = [float(jnp.sort(s.reshape(-1))[:drop].sum()) for s in (saliency(w, a, b), diagonals)]
    near, far = (abs(np.log(total / float(left))) for total in sums)
    assert near < far / 2
