"""Convergence, checked on a run: what the theorem assumes, where it held, what it promises.

Everything to do with it is importable from here; the theorem itself is stated in
``jaxprune.convergence.theorem``. For example::

  run = descend(Descent(..., monitor=per_step), w, data, key=key)
  print(report(run.trace).describe())
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxprune.convergence.step_sizes import (
    ROUNDING_UNITS,
)
from jaxprune.convergence.theorem import (
    StepRecord,
    StepSeries,
    is_above,
    iteration_bound,
    iterations_used,
    pl_envelope,
    smallest_square,
    step_series,
)
from jaxprune.descent.loop import Trace
from jaxprune.errors import InputError

# An update is that of gradient descent if the squared sine of its angle to the gradient is below
# this; inner products of float32 arrays have errors of about 1e-6.
_ALIGNED = 1e-4
# ε of a report, as fractions of L(M_0) − ξ.
_EPSILONS = (0.1, 0.01, 0.001)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """What was checked on a run, where it held, and the first step where it did not.

    Steps count from 0; ``−1`` means never. Leading axes are heads or layers.

    Attributes:
      steps: updates looked at.
      gradient_descent: every update was along the gradient, forwards.
      same_objective: every step minimised the same function (all of the data, one relaxation).
      step_size_low: smallest ``η``; the one the bound uses.
      step_size_high: largest ``η``.
      lipschitz: the constant given, NaN if none.
      lemma_broken: first step whose loss did not fall by ``(η/2)‖G‖²``, rounding forgiven.
      lemma_loss: loss before and after that step (NaN if none).
      smallest_ratio: smallest step ratio where the promised decrease exceeds rounding.
      tolerance: rounding forgiven, relative to the loss.
      projected: first step with an entry changed by projection.
      projected_steps: how many such steps.
      projected_most: largest fraction of entries changed.
      not_finite: first step with a loss or gradient that is not finite.
      xi: ξ of the PL inequality.
      mu: envelope ``μ(ξ)`` over the visited points.
      pl_broken: first visited point above ξ whose gradient is zero, so that no ``μ > 0`` exists.
      initial_loss: ``L(M_0)``.
      epsilon: accuracies.
      bound: ``T(ε)`` of Thm. 5.2 for them.
      used: updates used to reach ``ξ + ε``; infinity if never reached.
    """

    steps: Int[Array, "*b"]
    gradient_descent: Bool[Array, "*b"]
    same_objective: Bool[Array, "*b"]
    step_size_low: Float[Array, "*b"]
    step_size_high: Float[Array, "*b"]
    lipschitz: Float[Array, "*b"]
    lemma_broken: Int[Array, "*b"]
    lemma_loss: Float[Array, "*b 2"]
    smallest_ratio: Float[Array, "*b"]
    tolerance: Float[Array, "*b"]
    projected: Int[Array, "*b"]
    projected_steps: Int[Array, "*b"]
    projected_most: Float[Array, "*b"]
    not_finite: Int[Array, "*b"]
    xi: Float[Array, "*b"]
    mu: Float[Array, "*b"]
    pl_broken: Int[Array, "*b"]
    initial_loss: Float[Array, "*b"]
    epsilon: Float[Array, "*b e"]
    bound: Float[Array, "*b e"]
    used: Float[Array, "*b e"]

    @property
    def applicable(self) -> Bool[Array, "*b"]:
        """Whether the theorem speaks of this run at all: full-batch gradient descent."""
        return self.gradient_descent & self.same_objective

    @property
    def held(self) -> Bool[Array, "*b"]:
        """Whether it does, and every check held at every step."""
        first = jnp.stack([self.lemma_broken, self.projected, self.not_finite, self.pl_broken])
        return self.applicable & (first < 0).all(axis=0) & (self.mu > 0)

    def describe(self) -> str:
        """The report in words and numbers, head after head."""
        if not self.steps.ndim:
            return "\n".join(_sentences(self))
        heads = np.ndindex(self.steps.shape)
        texts = (jax.tree.map(lambda a, i=i: a[i], self).describe() for i in heads)
        names = np.ndindex(self.steps.shape)
        return "\n".join(
            f"[{', '.join(map(str, name))}]\n{text}"
            for name, text in zip(names, texts, strict=True)
        )


def report(
    trace: Trace,
    *,
    xi: ArrayLike | None = None,
    epsilon: ArrayLike | None = None,
    lipschitz: ArrayLike | None = None,
    tolerance: float | None = None,
) -> Report:
    """Check the theorem's assumptions and conclusion on a monitored run.

    Args:
      trace: of a descent whose ``monitor`` was ``per_step``; leading axes are heads or layers.
      xi: ξ of the PL inequality, one or one for each head; the smallest loss visited if ``None``,
        the most optimistic choice the run can speak of.
      epsilon: accuracies ``[e]``; 0.1, 0.01 and 0.001 of ``L(M_0) − ξ`` if ``None``.
      lipschitz: a proved Lipschitz constant to hold ``η`` against (``certified_lipschitz``).
      tolerance: rounding forgiven in the descent lemma, relative to the loss; 64 units in the last
        place of its type if ``None``.

    Raises:
      InputError: the descent was not monitored, did no step, or the tolerance is negative.
    """
    series, record = step_series(trace), trace.monitored
    if not trace.loss.shape[-1]:
        raise InputError("this trace has no steps to report on")
    if tolerance is None:
        tolerance = 4 * ROUNDING_UNITS * float(jnp.finfo(series.loss.dtype).eps)
    if tolerance < 0:
        raise InputError(f"tolerance {tolerance}: expected 0 or more")
    lead, dtype = series.loss.shape[:-1], series.loss.dtype
    given = [None if a is None else jnp.asarray(a, dtype) for a in (xi, epsilon, lipschitz)]
    shapes = (lead, (*lead, *(given[1].shape[-1:] if given[1] is not None else ())), lead)
    given = [
        None if a is None else jnp.broadcast_to(a, s) for a, s in zip(given, shapes, strict=True)
    ]
    return _reports(series, record, *given, jnp.full(lead, tolerance, dtype))


@jax.jit
def _reports(
    series: StepSeries,
    record: StepRecord,
    xi: Array | None,
    epsilon: Array | None,
    lipschitz: Array | None,
    tolerance: Array,
) -> Report:
    """Reports of all heads."""
    one = _report
    for _ in series.loss.shape[:-1]:
        one = jax.vmap(one)
    return one(series, record, xi, epsilon, lipschitz, tolerance)


def _report(
    series: StepSeries,
    record: StepRecord,
    xi: Array | None,
    epsilon: Array | None,
    lipschitz: Array | None,
    tolerance: Array,
) -> Report:
    """The report of one head."""
    loss, before, after = series.loss, series.loss[:-1], series.loss[1:]
    squares = series.squared_gradient_norm
    finite = jnp.isfinite(before) & jnp.isfinite(squares)
    # Where squares underflow neither direction nor step size can be told.
    moving = finite & (squares > smallest_square(squares.dtype))
    slack = tolerance * jnp.maximum(jnp.abs(before), jnp.abs(after))
    size = jnp.where(record.step_size > 0, record.step_size, jnp.nan)
    moved = moving & (record.squared_step_norm > 0)
    promised = jnp.where(moved, record.squared_step_norm / (2 * size), 0)
    broken = _first(~(after <= before - promised + slack))
    ratios = jnp.where(promised > slack, series.step_ratio, jnp.inf)
    low, high = (
        reduce(jnp.where(moving, record.step_size, other))
        for reduce, other in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    xi = jnp.min(loss) if xi is None else xi
    if epsilon is None:
        epsilon = jnp.asarray(_EPSILONS, loss.dtype) * (loss[0] - xi)
    mu = pl_envelope(before, squares, xi)
    nan = jnp.asarray(jnp.nan, loss.dtype)
    touched = record.projected > 0
    return Report(
        steps=jnp.asarray(before.size, jnp.int32),
        gradient_descent=jnp.all((record.misalignment < _ALIGNED) & (size > 0) | ~moving),
        same_objective=jnp.all(record.same_objective),
        step_size_low=low,
        step_size_high=high,
        lipschitz=nan if lipschitz is None else lipschitz,
        lemma_broken=broken,
        lemma_loss=jnp.where(broken < 0, nan, jnp.stack([before[broken], after[broken]])),
        smallest_ratio=jnp.min(ratios),
        tolerance=tolerance,
        projected=_first(touched),
        projected_steps=touched.sum(),
        projected_most=record.projected.max(),
        not_finite=_first(~finite),
        xi=xi,
        mu=mu,
        pl_broken=_first(is_above(before, xi) & (squares == 0)),
        initial_loss=loss[0],
        epsilon=epsilon,
        bound=iteration_bound(mu, epsilon, low, loss[0]),
        used=iterations_used(loss, xi, epsilon),
    )


def _first(true: Bool[Array, " steps"]) -> Int[Array, ""]:
    """Index of the first true entry, −1 if there is none."""
    return jnp.where(true.any(), jnp.argmax(true), -1)


def _sentences(r: Report) -> list[str]:
    """One report in words; fields are NumPy scalars."""
    finite = "at every step" if r.not_finite < 0 else f"not from step {r.not_finite} on"
    lines = [f"Steps: {r.steps}. Loss and gradient finite: {finite}."]
    if not r.applicable:
        why = [
            text
            for text, holds in (
                ("updates are not multiples of the gradient", r.gradient_descent),
                ("the function minimised changes from step to step", r.same_objective),
            )
            if not holds
        ]
        return [
            *lines,
            f"Theorem 5.2: not applicable ({'; '.join(why)}). It covers full-batch gradient "
            "descent on one function.",
        ]
    return [*lines, *_step_sentences(r), *_pl_sentences(r)]


def _step_sentences(r: Report) -> list[str]:
    """Step size, descent lemma, projection."""
    same = r.step_size_high <= r.step_size_low * 1.001
    sizes = f"{r.step_size_low:.4g}" + ("" if same else f" to {r.step_size_high:.4g}")
    if np.isnan(r.lipschitz):
        against = "not held against a proved constant"
    elif r.step_size_high * r.lipschitz < 1:
        against = f"below 1/L₂ = {1 / r.lipschitz:.4g}, as the theorem assumes"
    elif r.step_size_high * r.lipschitz < 1 + r.tolerance:
        against = f"equal to 1/L₂ = {1 / r.lipschitz:.4g}, the limit of what the theorem assumes"
    else:
        against = f"above 1/L₂ = {1 / r.lipschitz:.4g}: only the observed descent speaks for it"
    lines = [f"Step size η: {sizes}, {against}."]
    lemma = "Descent lemma L(M_t+1) ≤ L(M_t) − (η/2)‖G_t‖²:"
    if r.lemma_broken < 0:
        ratio = f"smallest ratio {r.smallest_ratio:.4g}, promised 1"
        if np.isinf(r.smallest_ratio):
            ratio = "no step promised more than rounding"
        lines.append(
            f"{lemma} held at every step ({ratio}; rounding of {r.tolerance:.1g} of the loss "
            "forgiven)."
        )
    else:
        lines.append(
            f"{lemma} broken first at step {r.lemma_broken}, loss {r.lemma_loss[0]:.6g} → "
            f"{r.lemma_loss[1]:.6g}: the step is too large for the curvature there."
        )
    if r.projected < 0:
        lines.append("Projection: never active, G_t = ∇L(M_t).")
    else:
        lines.append(
            f"Projection: active first at step {r.projected}, at {r.projected_steps} steps, on up "
            f"to {100 * r.projected_most:.3g}% of the entries; Theorem 5.2 has no projection."
        )
    return lines


def _pl_sentences(r: Report) -> list[str]:
    """PL inequality, and the bound beside what happened."""
    inequality = f"PL inequality ‖∇L‖² ≥ (μ/2)(L − ξ), ξ = {r.xi:.6g}:"
    if r.pl_broken >= 0 or not r.mu > 0:
        where = "" if r.pl_broken < 0 else f": the gradient is zero above ξ at step {r.pl_broken}"
        return [f"{inequality} no positive μ on this run{where}."]
    if np.isinf(r.mu):
        return [f"{inequality} no visited point lies above ξ."]
    lines = [f"{inequality} μ = {r.mu:.4g} over the visited points with L > ξ."]
    for epsilon, bound, used in zip(r.epsilon, r.bound, r.used, strict=True):
        reached = f"{used:.0f} used" if np.isfinite(used) else "not reached on this run"
        lines.append(f"Theorem 5.2, ε = {epsilon:.4g}: T(ε) = {bound:.4g} updates, {reached}.")
    if r.lemma_broken >= 0:
        lines.append("As the descent lemma was broken, the theorem promises none of this.")
    lines.append("μ is measured on this run: T(ε) checks the theorem, it does not predict.")
    return lines
