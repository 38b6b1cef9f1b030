"""What one entry of a matrix costs on a Kronecker-factored quadratic form, the others adapting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.attention import accumulation_dtype
from jaxprune.gauss_newton.admm import unit_diagonal


@jax.jit
def conditional_diagonal(
    f: Float[Array, "*p d d"], damping: float | Array = 0.01
) -> Float[Array, "*p d"]:
    """``1 / [F⁻¹]_ii``: what is left of ``F_ii`` when all other coordinates adapt.

    Of a covariance it is the variance of a feature given the others.

    Args:
      f: a factor or several.
      damping: see ``factorise``, which scales and damps alike.

    Returns:
      Between ``δ / (1 + δ) F_ii`` and ``F_ii``; zero where ``F_ii`` is.
    """
    unit, scale, _ = unit_diagonal(f, jnp.asarray(damping, accumulation_dtype(f)))
    lower = jnp.linalg.cholesky(unit)
    identity = jnp.broadcast_to(jnp.eye(f.shape[-1], dtype=unit.dtype), unit.shape)
    # F⁻¹ = L⁻ᵀ L⁻¹, whose diagonal are squared norms of the columns of L⁻¹.
    columns = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    return scale**2 / jnp.sum(columns**2, axis=-2)


def saliency(
    w: Float[Array, "d_in d_out"], a: Float[Array, "p i i"], b: Float[Array, "q o o"]
) -> Float[Array, "d_in d_out"]:
    """``½ w_ij² / ([A⁻¹]_ii [B⁻¹]_jj)``: what ``½ tr(A E B Eᵀ)`` grows by without ``w_ij``.

    The least that it grows by, all other entries adapting. The sum of the least of these is near
    to what ``kronecker_admm`` leaves: on matrices of SmolLM2-135M that was 0.9 to 1.5 times as much
    at half the weights, where ``½ A_ii B_jj w_ij²`` is 4 to 40 times too large.

    Args:
      w: weight.
      a: blocks of ``A`` on the diagonal, ``p · i = d_in``.
      b: blocks of ``B``, ``q · o = d_out``.

    Source: the saliency of Hassibi and Stork 1993 (Optimal Brain Surgeon), for a Kronecker product.
    """
    inputs, outputs = (conditional_diagonal(f).reshape(-1) for f in (a, b))
    return 0.5 * inputs[:, None] * outputs * jnp.square(w.astype(inputs.dtype))
