"""Decompositions and triangular solves: what they are, and that batches of them come to an end."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune.attention import cholesky, eigh, qr, triangular_solve

PACKAGE = Path(jaxprune.__file__).parent


@pytest.fixture
def matrices(key):
    return jax.random.normal(key, (3, 5, 5)) + 4 * jnp.eye(5)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_triangles_are_solved_one_by_one_or_mapped(matrices, key, lower, transpose):
    triangles = np.tril(matrices) if lower else np.triu(matrices)
    b = jax.random.normal(key, (3, 5, 2))
    found = jax.jit(
        jax.vmap(lambda t, b: triangular_solve(t, b, lower=lower, transpose=transpose))
    )(jnp.asarray(triangles), b)
    expected = np.linalg.solve(triangles.swapaxes(1, 2) if transpose else triangles, b)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_columns_are_orthonormal_and_their_product_is_the_matrix(matrices):
    q, r = jax.vmap(qr)(matrices[:, :, :3])
    np.testing.assert_allclose(q @ r, matrices[:, :, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(q.swapaxes(1, 2) @ q, np.tile(np.eye(3), (3, 1, 1)), atol=1e-5)
    np.testing.assert_array_equal(np.tril(r, -1), 0)


TWO_OF_EACH = """
import jax, jax.numpy as jnp
from jaxprune.attention import cholesky, eigh, qr, triangular_solve

@jax.jit
@jax.vmap
def both(a, b):
    pairs = [(cholesky(m), qr(m), eigh(m), triangular_solve(m, b, lower=True)) for m in (a, a + b)]
    return jax.tree.map(lambda *leaves: sum(leaves), *pairs)

w = jax.random.normal(jax.random.key(0), (9, 320, 320))
a = jnp.einsum("pij,pkj->pik", w, w) + 320 * jnp.eye(320)
for _ in range(3):
    jax.block_until_ready(both(a, jnp.broadcast_to(jnp.eye(320), a.shape)))
"""


@pytest.mark.slow
def test_independent_batches_do_not_wait_for_each_other():
    """Two batched triangular solves of JAX 0.10 stood still for ever on two cores."""
    subprocess.run([sys.executable, "-c", TWO_OF_EACH], check=True, timeout=240)


def test_nothing_else_calls_those_of_jax():
    calls = re.compile(r"linalg\.(cholesky|eigh|qr|svd|solve|inv|lstsq|triangular_solve)\(")
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if calls.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"attention.py"}


def test_decompositions_are_those_of_numpy(matrices):
    symmetric = jnp.einsum("pij,pkj->pik", matrices, matrices)
    values, vectors = jax.vmap(eigh)(symmetric)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(symmetric), rtol=1e-4)
    np.testing.assert_allclose(
        vectors * values[:, None] @ vectors.swapaxes(1, 2), symmetric, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        jax.vmap(cholesky)(symmetric), np.linalg.cholesky(symmetric), rtol=1e-4, atol=1e-5
    )
