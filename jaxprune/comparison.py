"""Every method on the same heads: calibration and held-out error, and what is stored.

One problem is one head. A method prunes it to a fused weight and keep masks, and one program
judges them all; both are mapped over problems (seeds or heads) and ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.attention import contract, relative_error
from jaxprune.baselines import PrunedLinear, magnitude, sparsegpt, wanda
from jaxprune.fused import algorithm1, prune_attention
from jaxprune.sparsity import Sparsity, keep_mask

# Algorithm 1 has a grid of λ and step sizes, hence a function of its own below.
ALGORITHM1 = "algorithm1"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedProblem:
    """One head: activations to calibrate on and to judge by, and its two projections.

    Attributes:
      x: calibration activations; without the leading axis where all problems share them.
      x_heldout: activations that no method sees, likewise.
      wq: query projection, the scale ``1/√k`` included where there is one.
      wk: key projection.
    """

    x: Float[Array, "... b n d"]
    x_heldout: Float[Array, "... c m d"]
    wq: Float[Array, "*p d k"]
    wk: Float[Array, "*p d k"]

    @property
    def w(self) -> Float[Array, "*p d d"]:
        """Fused weight ``W_Q W_Kᵀ``."""
        return _fuse(self.wq, self.wk)


def _fuse(wq: Array, wk: Array) -> Array:
    return contract("...dk,...ek->...de", wq, wk).astype(wq.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outcome:
    """Relative errors of a pruned head, and the number of weights it stores.

    Attributes:
      calibration_error: on ``x``.
      heldout_error: on ``x_heldout``.
      stored_weights: kept entries, of the fused matrix or of both projections.
      keep_masks: one mask for a fused matrix, two for projections.
    """

    calibration_error: Float[Array, "*p"]
    heldout_error: Float[Array, "*p"]
    stored_weights: Int[Array, "*p"]
    keep_masks: tuple[Bool[Array, "*p _ _"], ...]


Pruned = tuple[Array, tuple[Array, ...]]  # effective fused weight, keep masks
Projection = Callable[[Array, Array, Sparsity], PrunedLinear]


def _projections(prune: Projection, x: Array, wq: Array, wk: Array, ratio: Array) -> Pruned:
    """A baseline applied to both projections, as the paper compares it."""
    q, k = (prune(x, w, Sparsity(ratio)) for w in (wq, wk))
    return _fuse(q.weight, k.weight), (q.keep_mask, k.keep_mask)


def _fused_magnitude(x: Array, w: Array, ratio: Array) -> Pruned:
    pruned = magnitude(w, Sparsity(ratio))
    return pruned.weight, (pruned.keep_mask,)


def _descent(x: Array, w: Array, ratio: Array, steps: int | None = None) -> Pruned:
    pruned = prune_attention(x, w, Sparsity(ratio), preset="descent", steps=steps)
    return pruned.weight, (pruned.keep_mask,)


_ON_PROJECTIONS: dict[str, Callable[..., Pruned]] = {
    "wanda": partial(_projections, wanda),
    "sparsegpt": partial(_projections, sparsegpt),
}
_ON_FUSED: dict[str, Callable[..., Pruned]] = {
    "fused_magnitude": _fused_magnitude,
    # Where preset `descent` starts, and stays if nothing better validates.
    "ranking": partial(_descent, steps=0),
    "descent": _descent,
}
METHODS = (*_ON_PROJECTIONS, *_ON_FUSED)


def compare(problems: FusedProblem, ratios: Float[Array, " r"], *, method: str) -> Outcome:
    """Outcomes ``[problems, ratios]`` of one of ``METHODS``.

    Args:
      problems: with one leading axis.
      ratios: fractions removed.
      method: Wanda and SparseGPT prune both projections, the others the fused weight.
    """
    on_projections = method in _ON_PROJECTIONS
    weights = (problems.wq, problems.wk) if on_projections else (problems.w,)
    return _judge(problems, *_prune(problems.x, weights, ratios, method=method))


def _problem_axis(x: Array) -> int | None:
    """Axis of problems of activations: none where they are shared, ``[b, n, d]``."""
    return 0 if x.ndim == 4 else None


@partial(jax.jit, static_argnames="method")
def _prune(x: Array, weights: tuple[Array, ...], ratios: Array, *, method: str) -> Pruned:
    prune = (_ON_PROJECTIONS | _ON_FUSED)[method]
    over_ratios = jax.vmap(lambda x, weights, r: prune(x, *weights, r), (None, None, 0))
    return jax.vmap(over_ratios, (_problem_axis(x), 0, None))(x, weights, ratios)


def _judge(problems: FusedProblem, weight: Array, keep_masks: tuple[Array, ...]) -> Outcome:
    calibration, heldout = _errors(problems.x, problems.x_heldout, problems.w, weight)
    stored = [mask.sum(axis=(-1, -2)) for mask in keep_masks]
    return Outcome(calibration, heldout, jnp.asarray(sum(stored)), keep_masks)


@jax.jit
def _errors(x: Array, x_heldout: Array, w: Array, pruned: Array) -> tuple[Array, Array]:
    """Both errors ``[problems, ratios]`` of fused weights ``[problems, ratios, d, d]``."""

    def one(x: Array, w: Array, pruned: Array) -> Array:
        return jax.lax.map(partial(relative_error, x, w), pruned)

    return (
        jax.vmap(one, (_problem_axis(x), 0, 0))(x, w, pruned),
        jax.vmap(one, (_problem_axis(x_heldout), 0, 0))(x_heldout, w, pruned),
    )


def compare_algorithm1(
    problems: FusedProblem,
    ratios: Float[Array, " r"],
    lam: Float[Array, " p"],
    rates: Float[Array, "p s"],
    *,
    steps: int = 300,
    batch_size: int | None = None,
) -> tuple[Outcome, Float[Array, "p r"]]:
    """Outcomes ``[problems, ratios]`` of Algorithm 1, the step size chosen on calibration error.

    One descent per step size serves all ratios: the last mask is rounded to each of them.

    Args:
      problems: with one leading axis.
      ratios: fractions removed.
      lam: λ of every problem.
      rates: step sizes to choose from, for every problem.
      steps: updates of gradient descent.
      batch_size: sequences of a step; all if ``None``.

    Returns:
      Outcomes and the step sizes chosen.
    """
    w = problems.w
    weight, kept, chosen = _algorithm1(
        problems.x, w, ratios, lam, rates, steps=steps, batch_size=batch_size
    )
    return _judge(problems, weight, (kept,)), chosen


@partial(jax.jit, static_argnames=("steps", "batch_size"))
def _algorithm1(
    x: Array,
    w: Array,
    ratios: Array,
    lam: Array,
    rates: Array,
    *,
    steps: int,
    batch_size: int | None,
) -> tuple[Array, Array, Array]:
    def one(x: Array, w: Array, lam: Array, rates: Array) -> tuple[Array, Array, Array]:
        def learn(rate: Array) -> Array:
            found = algorithm1(
                x,
                w,
                lam=lam,
                learning_rate=rate,
                sparsity=Sparsity(0.5),
                steps=steps,
                batch_size=batch_size,
            )
            return found.state.variable

        masks = jax.vmap(learn)(rates)

        def at_ratio(ratio: Array) -> tuple[Array, Array, Array]:
            kept = jax.vmap(lambda mask: keep_mask(mask, Sparsity(ratio)))(masks)
            pruned = jnp.where(kept, w, 0)
            errors = jax.lax.map(partial(relative_error, x, w), pruned)
            # NaN, from a step size that diverged, must not win.
            best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
            return pruned[best], kept[best], rates[best]

        return jax.vmap(at_ratio)(ratios)

    return jax.vmap(one, (_problem_axis(x), 0, 0, 0))(x, w, lam, rates)
