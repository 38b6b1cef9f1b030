"""Step sizes of gradient descent from theory, as optax transformations.

All of them give plain gradient descent, ``−η∇L``, and differ in where ``η`` comes from. They need
what optax's own line searches need (``value``, ``grad``, ``value_fn``) and nothing of jaxprune's
loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from jaxprune.convergence.curvature import curvature
from jaxprune.errors import InputError

StepRule = Literal["certified", "curvature", "backtracking"]

# Rounding that a comparison of two losses forgives, in units of the last place of the larger.
ROUNDING_UNITS = 16
# Halvings after which a step is taken as it is: with it a step has shrunk by 1e-18.
_HALVINGS = 60


def gradient_descent(
    step: ArrayLike | optax.Schedule | StepRule,
    *,
    lipschitz: ArrayLike | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    every: int = 25,
    margin: float = 1.2,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with a step size from theory.

    For example, with any loss ``f`` whose gradient has a known Lipschitz constant::

      optimizer = gradient_descent("certified", lipschitz=certified_lipschitz(x, w, lam))

    Args:
      step: a number or optax schedule; ``"certified"``, ``1/lipschitz``; ``"curvature"``, see
        ``scale_by_curvature``; ``"backtracking"``, optax's backtracking line search, asked for
        the decrease ``(η/2)‖∇L‖²`` of the descent lemma.
      lipschitz: Lipschitz constant of the gradient, for ``"certified"``; may be traced.
      project: what the loop applies after every update, for ``"curvature"``.
      every: updates between measurements of ``"curvature"``.
      margin: factor on the curvature measured.

    Raises:
      InputError: an unknown rule, ``"certified"`` without its constant, or settings that
        ``scale_by_curvature`` refuses.
    """
    if not isinstance(step, str):
        return optax.with_extra_args_support(optax.sgd(cast(Any, step)))
    if step == "certified":
        if lipschitz is None:
            raise InputError('step "certified" needs lipschitz=, such as certified_lipschitz(...)')
        return optax.with_extra_args_support(optax.sgd(1 / jnp.asarray(lipschitz)))
    if step == "curvature":
        return scale_by_curvature(every=every, margin=margin, project=project)
    if step == "backtracking":
        return backtracking()
    raise InputError(f"step {step!r}: expected a number or one of {', '.join(get_args(StepRule))}")


def backtracking() -> optax.GradientTransformationExtraArgs:
    """Gradient descent by optax's backtracking line search, with the descent lemma's decrease.

    A step is halved until ``L(M − η∇L) ≤ L(M) − (η/2)‖∇L‖²``, and starts at twice the last one.
    The search knows no projection: with one, the lemma is promised for the free step only.
    """
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=_HALVINGS,
        slope_rtol=0.5,
        decrease_factor=0.5,
        increase_factor=2.0,
        max_learning_rate=jnp.inf,
        rtol=ROUNDING_UNITS * float(jnp.finfo(jnp.float32).eps),
    )
    return optax.chain(optax.sgd(1.0), search)


class CurvatureStepState(NamedTuple):
    """State of ``scale_by_curvature``: updates done, last vector and curvature, ``η`` in use."""

    done: Int[Array, ""]
    vector: PyTree
    curvature: Float[Array, ""]
    step_size: Float[Array, ""]


def scale_by_curvature(
    *,
    every: int = 25,
    margin: float = 1.2,
    iterations: int = 30,
    project: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with ``η = 1/(margin · curvature)``, measured along the step to be taken.

    Every ``every`` updates the largest Hessian eigenvalue is measured at ``M`` and then on the
    segment to where the step would lead. Measurements are estimates from below and curvature
    changes in between, so every step is tried before it is taken: the descent lemma holds if

    ``L(M⁺) ≤ L(M) + ⟨∇L, M⁺ − M⟩ + ‖M⁺ − M‖²/(2η)``,  ``M⁺ = Π(M − η∇L)``,

    because projection onto a convex set gives ``⟨∇L, M⁺ − M⟩ ≤ −‖M⁺ − M‖²/η``. If it does not
    hold, the segment is measured again and the step at least halved. The trial costs one
    evaluation of the loss for each update, a measurement about three gradients a product: in all
    about the time of the gradients once more.

    Args:
      every: updates between measurements.
      margin: factor on the curvature measured, at least 1.
      iterations: most Hessian-vector products at each point measured.
      project: projection onto a convex set that the loop applies after the update; none if
        ``None``.

    Raises:
      InputError: ``every`` or ``iterations`` below 1, or ``margin`` below 1.
    """
    if every < 1 or iterations < 1 or margin < 1:
        raise InputError(
            f"every {every}, iterations {iterations}, margin {margin}: expected 1 or more of each"
        )
    projection = (lambda variable: variable) if project is None else project

    def init(params: PyTree) -> CurvatureStepState:
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        # A zero vector leaves the start to the fixed random direction that ``curvature`` adds.
        vector = jax.tree.map(jnp.zeros_like, params)
        return CurvatureStepState(jnp.zeros((), jnp.int32), vector, zero, zero)

    def update(
        updates: PyTree,
        state: CurvatureStepState,
        params: PyTree,
        *,
        value: Array,
        value_fn: Callable[[PyTree], Array],
        **_: Any,
    ) -> tuple[PyTree, CurvatureStepState]:
        gradient = updates
        # Where nothing is curved upwards any step descends; ours is as long as the iterate.
        flat = optax.tree.norm(gradient) / (1 + optax.tree.norm(params))

        def after(step_size: Array) -> PyTree:
            return projection(jax.tree.map(lambda p, g: p - step_size * g, params, gradient))

        def measured(state: CurvatureStepState, toward: PyTree | None) -> CurvatureStepState:
            result = curvature(
                value_fn,
                params,
                start=state.vector,
                toward=toward,
                points=2,
                iterations=iterations,
                tolerance=1e-2,
            )
            curved = jnp.where(result.value > 0, result.value, flat).astype(state.curvature.dtype)
            size = 1 / (margin * jnp.where(curved > 0, curved, 1))
            return CurvatureStepState(state.done, result.vector, curved, size)

        def refresh(state: CurvatureStepState) -> CurvatureStepState:
            here = measured(state, None)
            return measured(here, after(here.step_size))

        def too_long(state: CurvatureStepState) -> Array:
            there = after(state.step_size)
            change = jax.tree.map(jnp.subtract, there, params)
            bound = (
                value
                + optax.tree.vdot(gradient, change)
                + optax.tree.norm(change, squared=True) / (2 * state.step_size)
            )
            new = value_fn(there)
            slack = ROUNDING_UNITS * jnp.finfo(new.dtype).eps * jnp.maximum(abs(value), abs(new))
            return ~(new <= bound + slack)

        def shorten(tried: tuple[Array, Array, CurvatureStepState]) -> tuple:
            halvings, _, state = tried
            again = measured(state, after(state.step_size))
            size = jnp.minimum(again.step_size, state.step_size / 2)
            again = again._replace(step_size=size)
            return halvings + 1, too_long(again), again

        def shorten_enough(state: CurvatureStepState) -> CurvatureStepState:
            first = (jnp.zeros((), jnp.int32), jnp.ones((), bool), state)
            return lax.while_loop(lambda t: t[1] & (t[0] < _HALVINGS), shorten, first)[2]

        state = _where_due(state.done % every == 0, refresh, state)
        # A loss that is not finite is left to the loop: no step makes it comparable.
        state = _where_due(too_long(state) & jnp.isfinite(value), shorten_enough, state)
        scaled = jax.tree.map(lambda g: -state.step_size * g, gradient)
        return scaled, state._replace(done=state.done + 1)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.custom_batching.custom_vmap
def _any_of(due: Array) -> Array:
    """The argument; under ``vmap``, one value for all: whether any is true."""
    return due


@_any_of.def_vmap
def _any_of_batch(axis_size: int, in_batched: list[bool], due: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _any_of(jnp.any(due, axis=0)), False


def _where_due(due: Array, compute: Callable[[Any], Any], operand: Any) -> Any:
    """``compute(operand)`` where ``due``, else ``operand``; costs nothing while nobody is due.

    Under ``vmap`` a ``cond`` whose predicate is batched becomes a select and computes always, so
    the predicate asks whether anybody is due. A loop of no or one turn would do as well, but the
    compiler moves what does not change from turn to turn, most of a Hessian-vector product, out
    of it and computes that always.
    """

    def chosen(operand: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), compute(operand), operand)

    return lax.cond(_any_of(due), chosen, lambda operand: operand, operand)


class RecordedCurvature(NamedTuple):
    """State of ``record_curvature``.

    Attributes:
      done: updates so far.
      vector: of the last measurement.
      value: curvature at the checkpoints passed; NaN at those to come.
    """

    done: Int[Array, ""]
    vector: PyTree
    value: Float[Array, " checkpoints"]


def record_curvature(
    every: int, checkpoints: int, *, iterations: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Leave updates as they are and measure the curvature at updates ``0, every, 2 every, …``.

    Chain it with any optimiser: ``optax.chain(record_curvature(100, 10), optax.sgd(0.1))``. The
    values are in its state. Every measurement starts from the vector of the one before; the first
    one takes up to three times the products. On a CPU 10 checkpoints lengthen a run of 1000 steps
    by 7 to 11% (``n`` from 64 to 256, ``d`` from 32 to 128, one head or 40).

    Args:
      every: updates between checkpoints.
      checkpoints: how many.
      iterations: most Hessian-vector products at a checkpoint.

    Raises:
      InputError: an argument below 1.
    """
    if min(every, checkpoints, iterations) < 1:
        raise InputError("every, checkpoints, iterations: expected 1 or more of each")

    def init(params: PyTree) -> RecordedCurvature:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        vector = jax.tree.map(jnp.zeros_like, params)  # as above
        return RecordedCurvature(
            jnp.zeros((), jnp.int32), vector, jnp.full(checkpoints, jnp.nan, dtype)
        )

    def update(
        updates: PyTree,
        state: RecordedCurvature,
        params: PyTree,
        *,
        value_fn: Callable[[PyTree], Array],
        **_: Any,
    ) -> tuple[PyTree, RecordedCurvature]:
        def measure(state: RecordedCurvature) -> RecordedCurvature:
            most = jnp.where(state.done == 0, 3 * iterations, iterations)
            result = curvature(
                value_fn, params, start=state.vector, iterations=most, tolerance=1e-2
            )
            value = state.value.at[state.done // every].set(result.value.astype(state.value.dtype))
            return RecordedCurvature(state.done, result.vector, value)

        due = (state.done % every == 0) & (state.done < every * checkpoints)
        state = _where_due(due, measure, state)
        return updates, state._replace(done=state.done + 1)

    return optax.GradientTransformationExtraArgs(init, update)
