"""The quantities of the convergence theorem, measured on a run.

The theorem (Liang et al. 2025, Def. 5.1 and Thm. 5.2, after Frei & Gu 2021, Def. 1.2 and
Thm. 3.1): ``f ≥ 0`` satisfies the ξ-optimal PL inequality with ``α, μ > 0`` if
``‖∇f(w)‖^α ≥ (μ/2)(f(w) − ξ)`` for all ``w``. If moreover ``∇f`` is ``L₂``-Lipschitz and
``η < 1/L₂``, gradient descent has ``min_{t<T} f(w_t) ≤ ξ + ε`` after
``T = 2η⁻¹(με/2)^(−2/α) f(w₀)`` steps. (The theorem has a proxy ``g``; here ``g = f``.) This ``μ``
is four times the one of the usual inequality ``½‖∇f‖² ≥ μ(f − f*)``.

``per_step`` is the monitor that a descent needs for it; ``jaxprune.convergence`` reports on runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, PyTree

from jaxprune.descent.loop import StepView, Trace
from jaxprune.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepRecord:
    """What ``per_step`` records of every step; ``M'`` is the iterate after projection.

    Attributes:
      step_size: ``η = −⟨u, ∇L⟩/‖∇L‖²`` of the update ``u``; 0 where the gradient is zero.
      squared_step_norm: ``‖M_t − M_{t+1}‖²``, rounding of the iterates included.
      misalignment: squared sine of the angle between ``u`` and ``∇L``: zero for gradient descent,
        and where their squares underflow.
      projected: fraction of entries that the projection changed.
      same_objective: whether the step minimised the same function as the next one will.
    """

    step_size: Float[Array, "*steps"]
    squared_step_norm: Float[Array, "*steps"]
    misalignment: Float[Array, "*steps"]
    projected: Float[Array, "*steps"]
    same_objective: Bool[Array, "*steps"]


def per_step(view: StepView) -> StepRecord:
    """The monitor to give to ``Descent``: a few inner products of arrays that are there anyway.

    It looks at the update, not at the optimiser: whatever moves along the gradient is gradient
    descent, with whatever step size it used. On a CPU a loop with it takes 3 to 8% longer
    (``n`` from 64 to 256, ``d`` from 32 to 128, one head or 40), without a monitor nothing.
    """
    change = jax.tree.map(jnp.subtract, view.variable, view.projected)
    gradient = _inner_product(view.gradient, view.gradient)
    length = _inner_product(view.updates, view.updates)
    inner = _inner_product(view.updates, view.gradient)
    # Squares that underflow tell no direction; the product of those that do not may underflow.
    clear = jnp.minimum(gradient, length) > smallest_square(gradient.dtype)
    norms = jnp.where(clear, jnp.sqrt(gradient) * jnp.sqrt(length), 1)
    return StepRecord(
        step_size=jnp.where(gradient > 0, -inner / jnp.where(gradient > 0, gradient, 1), 0),
        squared_step_norm=_inner_product(change, change),
        misalignment=jnp.where(clear, 1 - (inner / norms) ** 2, 0),
        projected=_share_changed(view.moved, view.projected),
        same_objective=view.same_objective,
    )


def _inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two trees; as a product of matrices, which a CPU is quickest at."""
    product = partial(jnp.vdot, precision=lax.Precision.HIGHEST)
    return jnp.stack(jax.tree.leaves(jax.tree.map(product, a, b))).sum()


def _share_changed(moved: PyTree, projected: PyTree) -> Float[Array, ""]:
    """Fraction of entries that the projection changed."""
    pairs = list(zip(jax.tree.leaves(moved), jax.tree.leaves(projected), strict=True))
    dtype = jnp.result_type(*(a for a, _ in pairs))
    # A relaxation without projection gives back the very array: there is nothing to compare.
    counts = [jnp.zeros((), dtype) if a is b else (a != b).sum(dtype=dtype) for a, b in pairs]
    return sum(counts, jnp.zeros((), dtype)) / sum(a.size for a, _ in pairs)


class StepSeries(NamedTuple):
    """Per-step quantities of the descent lemma.

    Attributes:
      loss: ``L(M_t)``, one more entry than steps.
      squared_gradient_norm: ``‖∇L(M_t)‖²``.
      squared_mapping_norm: ``‖G_t‖²`` of the gradient mapping ``G_t = (M_t − M_{t+1})/η_t``, equal
        to the above where nothing was projected.
      step_ratio: ``(L(M_t) − L(M_{t+1})) / ((η_t/2)‖G_t‖²)``; the descent lemma says at least 1,
        and without projection it is ``2 − cη`` with ``c`` the mean curvature along the step. NaN
        where the iterate did not move.
      step_size: ``η_t``.
      projected: fraction of entries the projection changed.
    """

    loss: Float[Array, "*b steps+1"]
    squared_gradient_norm: Float[Array, "*b steps"]
    squared_mapping_norm: Float[Array, "*b steps"]
    step_ratio: Float[Array, "*b steps"]
    step_size: Float[Array, "*b steps"]
    projected: Float[Array, "*b steps"]


def step_series(trace: Trace) -> StepSeries:
    """Per-step loss, gradient and gradient mapping, step ratio, projection activity of a run.

    Args:
      trace: of a descent whose ``monitor`` was ``per_step``; leading axes are heads or layers.

    Raises:
      InputError: the descent was not monitored.
    """
    record = trace.monitored
    if not isinstance(record, StepRecord) or trace.final_loss is None:
        raise InputError("this trace was not monitored: descend with monitor=per_step")
    loss = jnp.concatenate([trace.loss, trace.final_loss[..., None]], axis=-1)
    moved = record.squared_step_norm > 0
    step = jnp.where(moved & (record.step_size != 0), record.step_size, jnp.nan)
    promised = record.squared_step_norm / (2 * step)
    return StepSeries(
        loss=loss,
        squared_gradient_norm=trace.squared_gradient_norm,
        squared_mapping_norm=jnp.where(moved, record.squared_step_norm / step**2, 0),
        step_ratio=(loss[..., :-1] - loss[..., 1:]) / promised,
        step_size=record.step_size,
        projected=record.projected,
    )


def smallest_square(dtype: DTypeLike) -> float:
    """A squared norm below which what underflows in its sum may be seen in its digits."""
    return float(jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)


def is_above(loss: Float[Array, "..."], xi: ArrayLike) -> Bool[Array, "..."]:
    """Whether a loss is above ``ξ`` by more than rounding and underflow; NaN counts as above.

    Rounding is 1024 units in the last place of the larger of the two.
    """
    rounding = 1024 * float(jnp.finfo(loss.dtype).eps)
    larger = jnp.maximum(jnp.abs(loss), jnp.abs(xi))
    return ~(loss - xi <= smallest_square(loss.dtype) + rounding * larger)


@jax.jit
def pl_envelope(
    loss: Float[Array, " steps"],
    squared_gradient_norm: Float[Array, " steps"],
    xi: ArrayLike,
    alpha: ArrayLike = 2.0,
) -> Float[Array, "..."]:
    """PL envelope: the largest ``μ`` for which the PL inequality holds at all visited points.

    ``μ(ξ) = min_t 2‖∇L(M_t)‖^α / (L(M_t) − ξ)`` over points with ``L(M_t) > ξ``. It says nothing of
    points that were not visited, so it bounds the theorem's ``μ`` from above. Points nearer to ξ
    than 1024 units in the last place of the loss are left out: what is left of ``L − ξ`` there is
    rounding. So are those so near that their squared gradients underflow.

    Args:
      loss: ``L`` at the visited points.
      squared_gradient_norm: ``‖∇L‖²`` there.
      xi: candidates for ``ξ``, any shape.
      alpha: exponent ``α``.

    Returns:
      ``μ`` for every candidate, in Def. 5.1's convention; infinity where no point lies above ξ,
      NaN where a loss or gradient is.

    Source: Liang et al. 2025, Def. 5.1; the minimum over a run is ours.
    """
    power = squared_gradient_norm ** (jnp.asarray(alpha) / 2)

    def one(xi: Array) -> Array:
        above = is_above(loss, xi)
        return jnp.min(jnp.where(above, 2 * power / jnp.where(above, loss - xi, 1), jnp.inf))

    candidates = jnp.asarray(xi, loss.dtype)
    return jax.vmap(one)(candidates.reshape(-1)).reshape(candidates.shape)


def iteration_bound(
    mu: ArrayLike,
    epsilon: ArrayLike,
    step_size: ArrayLike,
    initial_loss: ArrayLike,
    alpha: ArrayLike = 2.0,
) -> Float[Array, "..."]:
    """Iterations that suffice, ``T(ε) = 2η⁻¹(με/2)^(−2/α) f(w₀)``; ``4 f(w₀)/(ημε)`` for ``α = 2``.

    Arguments broadcast. Infinite where ``μ`` is not positive.

    Source: Liang et al. 2025, Thm. 5.2 (Frei & Gu 2021, Thm. 3.1).
    """
    product = jnp.asarray(mu) * jnp.asarray(epsilon) / 2
    positive = jnp.where(product <= 0, 1, product)
    bound = 2 / jnp.asarray(step_size) * positive ** (-2 / jnp.asarray(alpha)) * initial_loss
    return jnp.where(product <= 0, jnp.inf, bound)


def iterations_used(
    loss: Float[Array, " steps"], xi: ArrayLike, epsilon: ArrayLike
) -> Float[Array, "..."]:
    """Updates done when the loss first was at most ``ξ + ε``; infinity if it never was.

    The first iterate counts as no update. ``ξ`` and ``ε`` broadcast; these are the ``t`` with
    ``L(M_t) ≤ ξ + ε``, which Thm. 5.2 bounds by ``T(ε)``.
    """
    goal = jnp.asarray(xi, loss.dtype) + jnp.asarray(epsilon, loss.dtype)
    reached = loss <= goal[..., None]
    return jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), jnp.inf)
