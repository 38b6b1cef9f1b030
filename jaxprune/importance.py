"""How weights of different columns of a matrix compete for being kept.

Within an output column weights compete by Wanda's ``|w_ic| ‖x_i‖``. Between columns that score
compares numbers of different meaning: a column that the objective hardly feels may have large
weights. Here a column's sensitivity is measured on the objective itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxprune.attention import accumulation_dtype

# Relative noise, draws, and the power with which sensitivity enters the ranking.
_NOISE = 0.1
_DRAWS = 32
_POWER = 0.5


class Importance(NamedTuple):
    """Factors of ``|w|`` in a ranking, ``rows[i] · columns[c]``."""

    rows: Float[Array, " d_in"]
    columns: Float[Array, " d_out"]

    def score(self, w: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Larger is more important."""
        return jnp.abs(w) * self.rows[:, None] * self.columns


def column_sensitivity(
    objective: Callable[[PyTree, PyTree], Float[Array, ""]],
    weights: PyTree,
    data: PyTree,
    *,
    batch_size: int,
) -> PyTree:
    """What multiplicative noise in a column does to an objective, for every column.

    With ``δ = ε r∘w``, ``r`` random signs, ``S_c = Σ_i E[δ_ic (g(w + δ) − g(w − δ))_ic] / 2``, a
    Hutchinson estimate of ``ε² Σ_i w_ic² ∂²L/∂w_ic²`` by central differences of the gradient
    ``g``. It takes no more memory than a step of a descent.

    Args:
      objective: weights and batch to a scalar.
      weights: pytree of ``[d_in, d_out]``.
      data: pytree of arrays with a leading sequence axis.
      batch_size: sequences of a draw.

    Returns:
      One vector for every matrix; may be negative where the truth is small.
    """
    count = jax.tree.leaves(data)[0].shape[0]
    leaves, form = jax.tree.flatten(weights)
    gradient = jax.grad(objective)

    def draw(total: PyTree, i: Array) -> tuple[PyTree, None]:
        chosen = (i * batch_size + jnp.arange(min(batch_size, count))) % count
        batch = jax.tree.map(lambda a: a[chosen], data)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i), len(leaves))
        noise = jax.tree.unflatten(
            form,
            [
                _NOISE * w * jax.random.rademacher(k, w.shape, w.dtype)
                for w, k in zip(leaves, keys, strict=True)
            ],
        )
        above = gradient(jax.tree.map(jnp.add, weights, noise), batch)
        below = gradient(jax.tree.map(jnp.subtract, weights, noise), batch)
        return jax.tree.map(
            lambda t, d, a, b: t + 0.5 * jnp.sum(d * (a - b), axis=0), total, noise, above, below
        ), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape[1], w.dtype), weights)
    return jax.lax.scan(draw, zeros, jnp.arange(_DRAWS))[0]


def importance(
    w: Float[Array, "d_in d_out"],
    norms: Float[Array, " d_in"],
    sensitivity: Float[Array, " d_out"],
) -> Importance:
    """Rank weights by ``p_ic S_c^½``, ``p_ic²`` the weight's share of its column's energy.

    ``p_ic = |w_ic| ‖x_i‖ / (Σ_j (w_jc ‖x_j‖)²)^½`` and ``S_c`` of ``column_sensitivity``. Columns
    of rotary frequencies, heads or neurons that the objective hardly feels are pruned harder. The
    root is empirical: between shares alone and shares times ``S_c``, it left the least held-out
    error.

    Args:
      w: dense weight; the scale of its columns is taken once, from it.
      norms: ``‖x_i‖`` of the inputs.
      sensitivity: of its columns.
    """
    energy = jnp.sum((w * norms[:, None]) ** 2, axis=0)
    floor = 1e-3 * jnp.mean(jnp.abs(sensitivity)) + jnp.finfo(w.dtype).tiny
    felt = jnp.maximum(sensitivity, floor) ** (0.5 * _POWER)
    return Importance(norms, felt / jnp.sqrt(jnp.where(energy > 0, energy, 1)))


def feature_norms(
    x: Float[Array, "*b n d"], row_weights: Float[Array, "*b n"] | None = None
) -> Float[Array, " d"]:
    """Norm of every input, ``sqrt(mean over sequences of Σ_tokens x_j²)``.

    Args:
      x: activations; leading axes count as sequences.
      row_weights: weight of every token; zero leaves it out.
    """
    squares = jnp.square(x.astype(accumulation_dtype(x)))
    if row_weights is not None:
        squares = squares * row_weights[..., None]
    per_sequence = squares.sum(axis=-2).reshape(-1, x.shape[-1])
    return jnp.sqrt(per_sequence.mean(axis=0))


@jax.jit
def shrunk_norms(
    x: Float[Array, "*b n d"], row_weights: Float[Array, "*b n"] | None = None
) -> Float[Array, " d"]:
    """Feature norms whose logarithms are shrunk towards their mean, positive-part James–Stein.

    The squared norm of feature ``j`` is a mean of ``x_j²`` over ``N`` tokens. Its logarithm has
    variance about ``σ_j² = Var(x_j²) / (N mean(x_j²)²)``; with ``V`` the variance of the
    logarithms over features, the factor is ``max(0, 1 − mean(σ²) / V)``.

    Args:
      x: activations.
      row_weights: weight of every token; zero leaves it out.

    Source: James & Stein 1961, in its empirical-Bayes form.
    """
    wide = x.reshape(-1, x.shape[-1]).astype(accumulation_dtype(x))
    weights = jnp.ones(wide.shape[0]) if row_weights is None else row_weights.reshape(-1)
    share = (weights / weights.sum())[:, None]
    squares = wide**2
    mean = jnp.sum(share * squares, axis=0)
    alive = mean > 0
    safe = jnp.where(alive, mean, 1.0)
    # Σ share² is 1/N for equal weights.
    noise = jnp.sum(share * (squares - mean) ** 2, axis=0) * jnp.sum(share**2) / safe**2
    logarithms = jnp.log(safe)
    count = jnp.maximum(alive.sum(), 1)
    centre = jnp.sum(jnp.where(alive, logarithms, 0)) / count
    spread = jnp.sum(jnp.where(alive, (logarithms - centre) ** 2, 0)) / count
    noise_mean = jnp.sum(jnp.where(alive, noise, 0)) / count
    factor = jnp.where(spread > 0, jnp.maximum(0.0, 1 - noise_mean / spread), 0.0)
    shrunk = jnp.exp(0.5 * (centre + factor * (logarithms - centre)))
    return jnp.where(alive, shrunk, 0.0)


def fused_ranking(
    x: Float[Array, "*b n d"], row_weights: Float[Array, "*b n"] | None = None
) -> Callable[[Float[Array, "d d"]], Float[Array, "d d"]]:
    """Ranking of fused weights, ``|w_ij| s_i s_j``: Wanda's score with both its inputs.

    ``s`` are the norms ``‖x_i‖`` of the features, drawn towards their mean as far as their
    differences may be noise (``shrunk_norms``): with few tokens all are equal, and the ranking is
    by magnitude.
    """
    norms = shrunk_norms(x, row_weights)
    return lambda w: jnp.abs(w) * norms[:, None] * norms
