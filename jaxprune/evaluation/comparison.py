"""Every method on the same heads: calibration and held-out error, and what is stored.

One problem is one head. A method prunes it to a fused weight and keep masks, and one program
judges them all; both are mapped over problems (seeds or heads) and ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.attention import contract, relative_error
from jaxprune.baselines import BASELINES, Baseline, PrunedLinear, magnitude
from jaxprune.errors import InputError
from jaxprune.methods.fused import (
    GRID_POINTS,
    algorithm1,
    algorithm1_grid,
    closed_form,
    prune_attention,
    prune_by_ranking,
    round_and_judge,
)
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

    @classmethod
    def of_layer(
        cls,
        x: Float[Array, "b n d"],
        x_heldout: Float[Array, "c m d"],
        wq: Float[Array, "d h k"],
        wk: Float[Array, "d g k"],
    ) -> FusedProblem:
        """The heads of one layer: each query head with the key head it shares, ``1/√k`` in ``wq``.

        Args:
          x: inputs of the projections to calibrate on, shared by all heads.
          x_heldout: inputs to judge by.
          wq: query projection.
          wk: key projection; key head ``j`` serves the query heads ``j·h/g … (j+1)·h/g − 1``.
        """
        heads, width = wq.shape[1:]
        wk = jnp.repeat(wk, heads // wk.shape[1], axis=1)
        scaled = wq * jnp.asarray(width**-0.5, wq.dtype)
        return cls(x, x_heldout, jnp.moveaxis(scaled, 1, 0), jnp.moveaxis(wk, 1, 0))

    @property
    def w(self) -> Float[Array, "*p d d"]:
        """Fused weight ``W_Q W_Kᵀ``."""
        return _fuse(self.wq, self.wk)

    def heads(self, chosen: slice) -> FusedProblem:
        """Some of the problems, where all share their activations."""
        return replace(self, wq=self.wq[chosen], wk=self.wk[chosen])


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


def _fused_magnitude(x: Array, w: Array, sparsity: Sparsity) -> tuple[Array, Array]:
    pruned = magnitude(w, sparsity)
    return pruned.weight, pruned.keep_mask


def _closed_form(x: Array, w: Array, sparsity: Sparsity) -> tuple[Array, Array]:
    found = closed_form(x, w, sparsity)
    return found.weight, found.keep_mask


def _descent(
    x: Array, w: Array, sparsity: Sparsity, steps: int | None = None
) -> tuple[Array, Array]:
    """From dense weights, as it finds a mask of its own; from the closed form it hardly moves."""
    pruned = prune_attention(x, w, sparsity, preset="descent", start="dense", steps=steps)
    return pruned.weight, pruned.keep_mask


_ON_FUSED: dict[str, Callable[..., tuple[Array, Array]]] = {
    "fused_magnitude": _fused_magnitude,
    "descent": _descent,
}
# Made of programs that they compile themselves, some of them the same for all lengths.
_IN_STAGES: dict[str, Callable[..., tuple[Array, Array]]] = {
    # Where the presets stay if nothing better validates.
    "ranking": prune_by_ranking,
    "gauss_newton": _closed_form,
}
ON_PROJECTIONS = tuple(BASELINES)
METHODS = (*ON_PROJECTIONS, "fused_magnitude", "ranking", "gauss_newton", "descent")


def compare(
    problems: FusedProblem, ratios: Float[Array, " r"], *, method: str, steps: int | None = None
) -> Outcome:
    """Outcomes ``[problems, ratios]`` of one of ``METHODS``.

    Args:
      problems: with one leading axis.
      ratios: fractions removed.
      method: baselines prune both projections, the others the fused weight.
      steps: of ``descent``; the preset's if ``None``.
    """
    return judge(problems, *prune(problems, ratios, method=method, steps=steps))


def prune(
    problems: FusedProblem, ratios: Float[Array, " r"], *, method: str, steps: int | None = None
) -> Pruned:
    """Effective fused weights ``[problems, ratios, d, d]`` and keep masks; see ``compare``."""
    if method not in METHODS:
        raise InputError(f"method {method!r:.40}: expected one of {', '.join(METHODS)}")
    x = problems.x
    if method in ON_PROJECTIONS:
        on = partial(_projection, x, ratios=ratios, baseline=BASELINES[method])
        q, k = on(problems.wq), on(problems.wk)
        return _fuse(q.weight, k.weight), (q.keep_mask, k.keep_mask)
    if method in _IN_STAGES:
        found = _mapped(_IN_STAGES[method], x, problems.w, ratios, _problem_axis(x))
    else:
        steps = steps if method == "descent" else None
        found = _fused(x, problems.w, ratios, method=method, steps=steps)
    weight, kept = found
    return weight, (kept,)


def _problem_axis(x: Array) -> int | None:
    """Axis of problems of activations: none where they are shared, ``[b, n, d]``."""
    return 0 if x.ndim == 4 else None


def _mapped(
    prune: Callable[..., Any], known: Array, w: Array, ratios: Array, axis: int | None
) -> Any:
    """``prune`` at all ratios of every problem, from what is known of its inputs."""
    over_ratios = jax.vmap(lambda known, w, r: prune(known, w, Sparsity(r)), (None, None, 0))
    return jax.vmap(over_ratios, (axis, 0, None))(known, w, ratios)


def _projection(x: Array, w: Array, *, ratios: Array, baseline: Baseline) -> PrunedLinear:
    """A baseline applied to one of the projections, as the paper compares it.

    From a moment of the inputs where that is enough, so that one program serves all lengths.
    """
    axis = _problem_axis(x)
    if baseline.moment is None or baseline.prune_from is None:
        return _linear(x, w, ratios, prune=baseline.prune, axis=axis)
    moment = _moment(x, of=baseline.moment, axis=axis)
    return _linear(moment, w, ratios, prune=baseline.prune_from, axis=axis)


@partial(jax.jit, static_argnames=("of", "axis"))
def _moment(x: Array, *, of: Callable[[Array], Array], axis: int | None) -> Array:
    return of(x) if axis is None else jax.vmap(of)(x)


@partial(jax.jit, static_argnames=("prune", "axis"))
def _linear(
    known: Array,
    w: Array,
    ratios: Array,
    *,
    prune: Callable[..., PrunedLinear],
    axis: int | None,
) -> PrunedLinear:
    return _mapped(prune, known, w, ratios, axis)


@partial(jax.jit, static_argnames=("method", "steps"))
def _fused(
    x: Array, w: Array, ratios: Array, *, method: str, steps: int | None
) -> tuple[Array, Array]:
    prune = _ON_FUSED[method]
    if steps is not None:
        prune = partial(prune, steps=steps)
    return _mapped(prune, x, w, ratios, _problem_axis(x))


def judge(
    problems: FusedProblem,
    weight: Float[Array, "p r d d"],
    keep_masks: tuple[Bool[Array, "p r _ _"], ...],
    *,
    calibration_error: Float[Array, "p r"] | None = None,
) -> Outcome:
    """Errors of pruned heads and what they store.

    Args:
      problems: with one leading axis.
      weight: effective fused weights.
      keep_masks: of the fused weight, or of both projections.
      calibration_error: where it is known.

    Raises:
      InputError: logits beyond float32.
    """
    if calibration_error is None:
        calibration_error = _errors(problems.x, problems.w, weight)
    heldout_error = _errors(problems.x_heldout, problems.w, weight)
    # NumPy would wait for ever for what a failed computation, short of memory, never gives.
    errors = jax.block_until_ready((calibration_error, heldout_error))
    if not all(np.isfinite(error).all() for error in errors):
        raise InputError("attention is not finite: activations or weights are too large")
    return Outcome(calibration_error, heldout_error, _stored(keep_masks), keep_masks)


@jax.jit
def _errors(x: Array, w: Array, pruned: Array) -> Array:
    """Errors ``[problems, ratios]`` on ``x`` of fused weights ``[problems, ratios, d, d]``."""

    def one(x: Array, w: Array, pruned: Array) -> Array:
        return jax.lax.map(partial(relative_error, x, w), pruned)

    return jax.vmap(one, (_problem_axis(x), 0, 0))(x, w, pruned)


@jax.jit
def _stored(keep_masks: tuple[Array, ...]) -> Array:
    return sum((mask.sum(axis=(-1, -2)) for mask in keep_masks), jnp.zeros((), int))


def compare_algorithm1(
    problems: FusedProblem,
    ratios: Float[Array, " r"],
    lams: Float[Array, " l"],
    rates: Float[Array, "l s"],
    *,
    steps: int = 300,
    batch_size: int | None = None,
) -> list[tuple[Outcome, Float[Array, "p r"]]]:
    """Algorithm 1 for several λ, the step size of each problem chosen on calibration error.

    One descent per step size serves all ratios: the last mask is rounded to each of them. All λ
    and step sizes of a problem descend together, on the same activations.

    Args:
      problems: with one leading axis.
      ratios: fractions removed.
      lams: λ to try.
      rates: step sizes to choose from, for each of them.
      steps: updates of gradient descent.
      batch_size: sequences of a step; all if ``None``.

    Returns:
      For every λ, outcomes ``[problems, ratios]`` and the step sizes chosen.
    """
    w = problems.w
    found = _algorithm1(problems.x, w, ratios, lams, rates, steps=steps, batch_size=batch_size)
    return [
        (judge(problems, weight, (kept,), calibration_error=error), chosen)
        for weight, kept, error, chosen in found
    ]


@partial(jax.jit, static_argnames=("steps", "batch_size"))
def _algorithm1(
    x: Array,
    w: Array,
    ratios: Array,
    lams: Array,
    rates: Array,
    *,
    steps: int,
    batch_size: int | None,
) -> list[tuple[Array, ...]]:
    """Weights, keep masks, errors and step sizes ``[problems, ratios]`` for every λ."""

    def one(x: Array, w: Array) -> tuple[Array, ...]:
        def learn(lam: Array, rate: Array) -> Array:
            result = algorithm1(
                x,
                w,
                lam=lam,
                learning_rate=rate,
                sparsity=Sparsity(0.5),
                steps=steps,
                batch_size=batch_size,
            )
            return result.state.variable

        def best(masks: Array, rates: Array, ratio: Array) -> tuple[Array, ...]:
            kept, errors = round_and_judge(partial(relative_error, x, w), w, masks, ratio)
            i = jnp.argmin(errors)
            return jnp.where(kept[i], w, 0), kept[i], errors[i], rates[i]

        def of_lam(each: tuple[Array, Array]) -> tuple[Array, ...]:
            return jax.vmap(partial(best, *each))(ratios)

        masks = jax.vmap(jax.vmap(learn, (None, 0)))(lams, rates)
        return jax.lax.map(of_lam, (masks, rates))

    found = jax.vmap(one, (_problem_axis(x), 0))(x, w)
    return [tuple(a[:, i] for a in found) for i in range(lams.size)]


# Successive halving of the grid of Algorithm 1: every point runs for the first number of steps,
# as many as the second go on to the end, and they are judged on so many sequences.
_SCREEN_STEPS = 60
_FINALISTS = 3
_JUDGED = 16


def search_operations(n: int, d: int, *, steps: int, batch_size: int) -> float:
    """Operations of ``search_algorithm1`` for one head: ``4nd(n + d)`` an update and sequence.

    Args:
      n: tokens of a sequence.
      d: width of the model.
      steps: updates of gradient descent.
      batch_size: sequences of a step.
    """
    updates = GRID_POINTS * min(_SCREEN_STEPS, steps) + _FINALISTS * steps
    return 4.0 * n * d * (n + d) * batch_size * updates


def search_algorithm1(
    problems: FusedProblem,
    ratios: Float[Array, " r"],
    *,
    steps: int = 300,
    batch_size: int | None = None,
) -> tuple[Pruned, Float[Array, "p r"], Float[Array, "p r"]]:
    """Algorithm 1 with λ and step size found on the calibration error, head by head.

    All points of ``methods.fused.algorithm1_grid`` run for a few steps; those with the least
    calibration error at the middle ratio start again and run to the end, and each ratio takes the
    best of them. Errors are taken on at most 16 of the calibration sequences.

    Args:
      problems: with one leading axis, activations shared.
      ratios: fractions removed, ascending.
      steps: updates of gradient descent.
      batch_size: sequences of a step; all if ``None``.

    Returns:
      Pruned weights and keep masks ``[problems, ratios]``, and the λ and step sizes chosen.
    """
    weight, kept, lam, rate = _search(
        problems.x, problems.w, ratios, steps=steps, batch_size=batch_size
    )
    return (weight, (kept,)), lam, rate


@partial(jax.jit, static_argnames=("steps", "batch_size"))
def _search(
    x: Array, w: Array, ratios: Array, *, steps: int, batch_size: int | None
) -> tuple[Array, ...]:
    judged = x[..., :: -(-x.shape[-3] // _JUDGED), :, :]

    def one(x: Array, judged: Array, w: Array) -> tuple[Array, ...]:
        def learn(lam: Array, rate: Array, steps: int) -> Array:
            result = algorithm1(
                x,
                w,
                lam=lam,
                learning_rate=rate,
                sparsity=Sparsity(0.5),
                steps=steps,
                batch_size=batch_size,
            )
            return result.state.variable

        def errors(masks: Array, ratio: Array) -> Array:
            return round_and_judge(partial(relative_error, judged, w), w, masks, ratio)[1]

        lams, rates = (a.reshape(-1) for a in algorithm1_grid(x, w))
        screened = jax.vmap(partial(learn, steps=min(_SCREEN_STEPS, steps)))(lams, rates)
        order = jnp.argsort(errors(screened, ratios[ratios.size // 2]))
        lams, rates = (a[order[:_FINALISTS]] for a in (lams, rates))
        masks = jax.vmap(partial(learn, steps=steps))(lams, rates)

        def at_ratio(ratio: Array) -> tuple[Array, ...]:
            best = jnp.argmin(errors(masks, ratio))
            kept = keep_mask(masks[best], Sparsity(ratio))
            return jnp.where(kept, w, 0), kept, lams[best], rates[best]

        return jax.lax.map(at_ratio, ratios)

    return jax.vmap(one, (_problem_axis(x), _problem_axis(x), 0))(x, judged, w)
