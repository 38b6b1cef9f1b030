"""How curved a loss is: the largest Hessian eigenvalue, measured, and a bound that is proved.

``curvature`` is an estimate from below of what the step size of gradient descent has to respect,
for any scalar function; ``certified_lipschitz`` is a bound from above for the mask loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from jaxprune.attention import accumulation_dtype, check_fused, eigh
from jaxprune.errors import InputError

Vector = Float[Array, " p"]

# Size of the random direction mixed into a warm start: an exact eigenvector that is no longer
# the top one would otherwise stay a fixed point. Costs about three products.
_STIR = 0.03
# Products before a small residual counts, from a random vector and from a warm start: where one
# eigenvalue stands a few percent above many that are alike, a random vector's is small at once.
_LEAST_COLD, _LEAST_WARM = 8, 3
# Accelerators multiply float32 with three digits by default: Hv would no longer belong to v.
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_vdot = partial(jnp.vdot, precision=lax.Precision.HIGHEST)


class Curvature(NamedTuple):
    """What was measured.

    Attributes:
      value: largest Rayleigh quotient ``vᵀHv`` reached, never above the largest eigenvalue of the
        Hessian but for rounding (a few units in the last place, times the products used).
      vector: its unit vector ``v``, shaped like the variable; start the next measurement there.
      residual: ``‖Hv − value·v‖``; some eigenvalue is this close to ``value``.
      products: Hessian-vector products used.
    """

    value: Float[Array, ""]
    vector: PyTree
    residual: Float[Array, ""]
    products: Int[Array, ""]


def hessian_product(fun: Callable[[PyTree], Array], at: PyTree, direction: PyTree) -> PyTree:
    """Product ``∇²f(at) · direction``, a forward derivative of the gradient; no matrix is held."""
    return jax.jvp(jax.grad(fun), (at,), (direction,))[1]


def curvature(
    fun: Callable[[PyTree], Array],
    at: PyTree,
    *,
    start: PyTree | None = None,
    toward: PyTree | None = None,
    points: int = 3,
    iterations: ArrayLike = 100,
    tolerance: float = 3e-3,
) -> Curvature:
    """Largest (most positive) eigenvalue of the Hessian of ``fun``, matrix-free.

    Power iteration in which ``v`` is replaced not by ``Hv`` but by the best vector of the span of
    ``v``, ``Hv`` and the previous change of ``v`` (Rayleigh–Ritz, LOBPCG of block size one). At
    one product an iteration it climbs monotonically, is much faster where eigenvalues cluster,
    and finds the *most positive* eigenvalue also where a negative one is larger in size.

    ``vmap`` over heads iterates until the slowest is done; the others stay where they stopped.

    Args:
      fun: twice differentiable scalar function of a pytree of float arrays.
      at: where; the Hessian is taken in all its entries.
      start: a vector to start from, such as ``vector`` of an earlier result (a small fixed random
        direction is added); a fixed random vector if ``None``.
      toward: other end of a segment that begins at ``at``. Given, ``value`` is the largest of
        ``points`` evenly spaced points of the segment, both ends included, each warm-started
        from the one before.
      points: points on the segment, at least 2.
      iterations: most products at a point beyond the first; may be traced.
      tolerance: stop when the residual is below this fraction of the value; not before 8 products
        (3 from a warm start), unless the residual is rounding.

    Raises:
      InputError: fewer than 2 points on a segment, or a negative tolerance.

    Source: Knyazev 2001 (LOBPCG); Lanczos's convergence at the cost of power iteration.
    """
    if points < 2 or tolerance < 0:
        raise InputError(f"points {points}, tolerance {tolerance}: expected at least 2 and 0")
    flat, unravel = ravel_pytree(at)
    noise = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    if start is None:
        vector, least = _unit(noise), jnp.asarray(_LEAST_COLD)
    else:
        known = _unit(ravel_pytree(start)[0].astype(flat.dtype))
        vector = _unit(known + _STIR * _unit(noise))
        least = jnp.where(jnp.any(known != 0), _LEAST_WARM, _LEAST_COLD)

    def measure(place: Vector, vector: Vector, least: ArrayLike) -> Curvature:
        def product(v: Vector) -> Vector:
            return ravel_pytree(hessian_product(fun, unravel(place), unravel(v)))[0]

        return _climb(product, vector, least, iterations, tolerance)

    if toward is None:
        best = measure(flat, vector, least)
    else:
        step = ravel_pytree(toward)[0] - flat

        def next_point(
            before: tuple[Vector, Array], share: Array
        ) -> tuple[tuple[Vector, Array], Curvature]:
            result = measure(flat + share * step, *before)
            return (result.vector, jnp.full_like(least, _LEAST_WARM)), result

        shares = jnp.linspace(0, 1, points, dtype=flat.dtype)
        _, along = lax.scan(next_point, (vector, least), shares)
        # NaN must not hide behind a finite value: argmax returns the first NaN.
        best = jax.tree.map(lambda a: a[jnp.argmax(along.value)], along)
        best = best._replace(products=along.products.sum())
    return best._replace(vector=unravel(best.vector))


def _unit(v: Vector) -> Vector:
    norm = jnp.linalg.norm(v)
    return v / jnp.where(norm > 0, norm, 1)


class _Climb(NamedTuple):
    """State of the iteration: Ritz vector, last change of it, and the products with both."""

    v: Vector
    hv: Vector
    p: Vector
    hp: Vector
    value: Array
    residual: Array
    products: Array


def _climb(
    product: Callable[[Vector], Vector],
    v: Vector,
    least: ArrayLike,
    iterations: ArrayLike,
    tolerance: float,
) -> Curvature:
    """Climb the Rayleigh quotient from a unit vector ``v``."""

    def ritz(v: Vector, hv: Vector, p: Vector, hp: Vector, products: Array) -> _Climb:
        value = _vdot(v, hv)
        return _Climb(v, hv, p, hp, value, jnp.linalg.norm(hv - value * v), products)

    rounding = 10 * float(jnp.finfo(v.dtype).eps)

    def going_on(c: _Climb) -> Array:
        enough = jnp.where(c.products < least, min(tolerance, rounding), tolerance)
        return (c.products <= iterations) & (c.residual > enough * jnp.abs(c.value))

    def step(c: _Climb) -> _Climb:
        p, hp, p_alive = _orthonormal(c.p, c.hp, [(c.v, c.hv)])
        r, _, r_alive = _orthonormal(c.hv - c.value * c.v, c.v, [(c.v, c.hv), (p, hp)])
        basis, images = jnp.stack([c.v, p, r]), jnp.stack([c.hv, hp, product(r)])
        weights = _top_of(_matmul(basis, images.T), jnp.stack([True, p_alive, r_alive]))
        v, hv = _matmul(weights, basis), _matmul(weights, images)
        norm = jnp.linalg.norm(v)  # one but for rounding, which must not build up
        change = weights.at[0].set(0)
        p, hp = _matmul(change, basis), _matmul(change, images)
        return ritz(v / norm, hv / norm, p, hp, c.products + 1)

    zero = jnp.zeros_like(v)
    first = ritz(v, product(v), zero, zero, jnp.ones((), jnp.int32))
    last = lax.while_loop(going_on, step, first)
    return Curvature(last.value, last.v, last.residual, last.products)


def _orthonormal(
    v: Vector, hv: Vector, others: list[tuple[Vector, Vector]]
) -> tuple[Vector, Vector, Array]:
    """``v`` orthonormalised against unit vectors, its image by linearity, and whether any is left.

    Twice, because once is not orthogonal to rounding when little is left.
    """
    before = jnp.linalg.norm(v)
    for _ in range(2):
        for other, image in others:
            share = _vdot(other, v)
            v, hv = v - share * other, hv - share * image
    norm = jnp.linalg.norm(v)
    alive = norm > 10 * jnp.finfo(v.dtype).eps * before
    scale = jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)
    return v * scale, hv * scale, alive


def _top_of(matrix: Float[Array, "3 3"], alive: Array) -> Float[Array, " 3"]:
    """Eigenvector of the largest eigenvalue among living directions (the first one lives)."""
    matrix = jnp.where(alive[:, None] & alive, 0.5 * (matrix + matrix.T), 0)
    size = jnp.max(jnp.abs(matrix))
    # A dead direction is a zero vector: it gets an eigenvalue that is below all others.
    scaled = matrix / jnp.where(size > 0, size, 1) - jnp.diag(jnp.where(alive, 0.0, 10.0))
    return eigh(scaled.astype(matrix.dtype))[1][:, -1]


def certified_lipschitz(
    x: Float[Array, "*b n d"],
    w: Float[Array, "*h d d"],
    lam: ArrayLike = 0.0,
    *,
    row_weights: Float[Array, "*b n"] | None = None,
) -> Float[Array, "*h"]:
    """Lipschitz constant of ``∇L``, proved: ``(5/4) mean_s ‖x_s‖₂⁴ ‖w‖_max² + λ``.

    ``‖x_s‖₂`` is the largest singular value of a sequence, ``‖w‖_max`` the largest ``|w_ij|``. The
    bound holds for every ``M``, inside ``[0, 1]`` or not, causal or not, for the spectral norm of
    the Hessian of ``jaxprune.mask_loss``; gradient descent with ``η ≤ 1/L₂``, projected onto a
    convex set or not, then satisfies the descent lemma at every step.

    Derivation, for one sequence and one row of logits ``s``, ``f = softmax(s)``, target ``f₀``:

    1. Along ``s + t u``, with the mean ``ū = ⟨f, u⟩`` and variance ``Var(u)`` of ``u`` under ``f``:
       ``f' = f∘(u − ū) = J u`` and ``f'' = f∘((u − ū)² − Var(u))``, because ``ū' = Var(u)``.
    2. ``J = diag(f) − f fᵀ`` is symmetric and nonnegative; by Gershgorin its eigenvalues are at
       most ``max_i f_i(1 − f_i) + f_i Σ_{j≠i} f_j = max_i 2 f_i(1 − f_i) ≤ ½``. Hence
       ``‖f'‖² ≤ ¼‖u‖²`` and ``Var(u) = uᵀJu ≤ ½‖u‖²``.
    3. ``‖f''‖₁ ≤ Σ_j f_j (u_j − ū)² + Var(u) = 2 Var(u) ≤ ‖u‖²``.
    4. ``(½‖f − f₀‖²)'' = ‖f'‖² + ⟨f'', f − f₀⟩``. Entries of ``f − f₀`` are in ``[−1, 1]``, so the
       size of this is at most ``‖f'‖² + ‖f''‖₁ ≤ (¼ + 1)‖u‖² = (5/4)‖u‖²``.
    5. Logits are linear in ``M``: a change ``E`` of ``M`` gives ``dS = x (E∘w) xᵀ`` with
       ``‖dS‖_F ≤ ‖x‖₂² ‖E∘w‖_F ≤ ‖x‖₂² ‖w‖_max ‖E‖_F``; a causal mask removes entries of ``dS``,
       which makes its norm no larger. Summing 4 over rows, ``u`` the rows of ``dS``:
       ``|∇²(error)[E, E]| ≤ (5/4) ‖x‖₂⁴ ‖w‖_max² ‖E‖_F²``.
    6. The error is a mean over sequences; the Hessian of ``½λ‖M‖²`` is ``λ`` times the identity.

    A weight on rows multiplies 4 by at most the largest weight of the sequence. Computed in
    floating point, the bound is good to about ``100 ε`` of itself (``ε`` of its type).

    Args:
      x: activations of one sequence or several.
      w: fused weights; leading axes are heads.
      lam: λ ≥ 0, may be traced; broadcasts against the heads.
      row_weights: weight of every row's error, as in ``mask_loss``.

    Returns:
      ``L₂`` of every head. Safe and very loose: it certifies, it does not set the pace.

    Source: ours; Thm. 5.2 of Liang et al. 2025 asks for such a constant.
    """
    check_fused(x, w)
    upcast = x.reshape(-1, *x.shape[-2:]).astype(accumulation_dtype(x, w))
    fourth = jnp.linalg.norm(upcast, ord=2, axis=(-2, -1)) ** 4
    if row_weights is not None:
        fourth = fourth * row_weights.reshape(fourth.shape[0], -1).max(axis=-1)
    largest = jnp.max(jnp.abs(w), axis=(-2, -1)).astype(upcast.dtype)
    return 1.25 * jnp.mean(fourth) * largest**2 + jnp.asarray(lam, upcast.dtype)
