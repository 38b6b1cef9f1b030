"""Mask descent: one scanned loop for every weight, objective, relaxation and optimiser.

The loop is a ``lax.scan`` over chunks of fixed length. Inside one program (``descend`` under
``jit`` and ``vmap``) chunks are scanned too; with ``on_chunk`` the same compiled chunk is called
from Python, so that progress, saving and stopping happen in between. Between chunks the iterate
is rounded and scored on validation data, and the best one is kept. The first candidate is the
rounded initial point, and a later one must beat it beyond the noise of the validation samples,
so that a descent that helps nothing returns its initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxprune.descent.relaxations import KeepMasks, Relaxation, Weights
from jaxprune.sparsity import Sparsity

Objective = Callable[[Weights, PyTree], Float[Array, ""]]
"""Effective weights and a batch (arrays with a leading sequence axis) to a scalar."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidate:
    """A rounded iterate, the mean of its validation errors, and the step it is from."""

    weights: Weights
    keep_masks: KeepMasks
    error: Float[Array, "*b"]
    step: Int[Array, "*b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DescentState:
    """Everything a descent needs to go on; one pytree, so that saving it is enough to resume.

    Attributes:
      step: updates done.
      variable: of the relaxation.
      optimizer_state: of the optax transformation.
      rejected: updates left out because the loss or gradient was not finite.
      initial_errors: validation errors, one a sample, of the rounded initial point.
      best: best validated iterate so far, the rounded initial point at first.
    """

    step: Int[Array, "*b"]
    variable: PyTree
    optimizer_state: PyTree
    rejected: Int[Array, "*b"]
    initial_errors: Float[Array, "*b samples"] | None
    best: Candidate | None


class StepView(NamedTuple):
    """One step as a monitor sees it.

    Attributes:
      variable: before the step.
      gradient: of the loss there.
      updates: what the optimiser adds.
      moved: the sum, before projection.
      projected: the variable after the step.
      same_objective: whether the next step will have the same function to minimise: all of the
        data, unchanged, and a relaxation that does not depend on the step.
    """

    variable: PyTree
    gradient: PyTree
    updates: PyTree
    moved: PyTree
    projected: PyTree
    same_objective: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """What was seen at every step, before its update.

    Attributes:
      loss: objective plus penalty.
      squared_gradient_norm: ``‖∇‖²`` over all entries of the variable.
      validation_error: of the rounded iterate after each chunk; empty without validation data.
      monitored: what ``Descent.monitor`` returned at every step; ``None`` without a monitor.
      final_loss: loss after the last step; ``None`` without a monitor.
    """

    loss: Float[Array, "*b steps"]
    squared_gradient_norm: Float[Array, "*b steps"]
    validation_error: Float[Array, "*b chunks"]
    monitored: PyTree = None
    final_loss: Float[Array, "*b"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DescentResult:
    """Rounded weights and keep masks, the rounded initial point, the trace, the last state."""

    weights: Weights
    keep_masks: KeepMasks
    initial_weights: Weights
    trace: Trace
    state: DescentState


@dataclass(frozen=True)
class Descent:
    """A descent, ready to run: which objective, relaxation and optimiser, for how long.

    Attributes:
      objective: effective weights and batch to a scalar, a mean over the batch's sequences.
      relaxation: see ``jaxprune.descent.relaxations``.
      optimizer: any optax transformation; receives ``value``, ``grad`` and ``value_fn``.
      sparsity: that of rounded iterates.
      steps: updates in all.
      batch_size: sequences drawn without replacement for every step; all of them if ``None``.
      penalty: function of the variable added to the objective, for instance ``½λ‖M‖²``.
      augment: random change of a batch, ``(key, batch) -> batch``, anew at every step.
      sample_errors: effective weights and validation data to one error for each sample (a row, a
        sequence); the objective as a single sample if ``None``.
      margin: standard errors of the paired difference by which an iterate must beat the rounded
        initial point on the validation samples to replace it.
      chunk_size: steps between validations, at most; chunks are as even as they can be.
      monitor: step to a pytree of scalars that ends up in the trace, for instance
        ``jaxprune.convergence.per_step``; nothing is computed or stored if ``None``.
    """

    objective: Objective
    relaxation: Relaxation
    optimizer: optax.GradientTransformation
    sparsity: Sparsity
    steps: int
    batch_size: int | None = None
    penalty: Callable[[PyTree], Float[Array, ""]] | None = None
    augment: Callable[[Key[Array, ""], PyTree], PyTree] | None = None
    sample_errors: Callable[[Weights, PyTree], Float[Array, " samples"]] | None = None
    margin: float = 3.0
    chunk_size: int = 50
    monitor: Callable[[StepView], PyTree] | None = None

    @property
    def chunks(self) -> int:
        """Number of chunks; the steps of the last one beyond ``steps`` do nothing."""
        return math.ceil(self.steps / self.chunk_size)

    @property
    def chunk_length(self) -> int:
        """Steps of every chunk, so that few of the last one's do nothing."""
        return math.ceil(self.steps / max(self.chunks, 1))

    def init(self, weights: Weights, validation: PyTree | None = None) -> DescentState:
        """The state before the first step."""
        variable = self.relaxation.init(weights)
        state = DescentState(
            step=jnp.zeros((), jnp.int32),
            variable=variable,
            optimizer_state=self.optimizer.init(variable),
            rejected=jnp.zeros((), jnp.int32),
            initial_errors=None,
            best=None,
        )
        if validation is None:
            return state
        best, errors = self._round(state, weights, validation)
        return _with(state, best=best, initial_errors=errors)

    def chunk(
        self,
        state: DescentState,
        weights: Weights,
        data: PyTree,
        validation: PyTree | None,
        key: Key[Array, ""],
    ) -> tuple[DescentState, Trace]:
        """Run ``chunk_length`` steps, then score the rounded iterate on the validation data."""

        def one_step(state: DescentState, _: None) -> tuple[DescentState, tuple[Any, ...]]:
            return self._step(state, weights, data, key)

        state, (loss, norm, monitored) = lax.scan(one_step, state, length=self.chunk_length)
        errors = jnp.zeros((0,), loss.dtype)
        if validation is not None:
            assert state.best is not None
            assert state.initial_errors is not None
            candidate, samples = self._round(state, weights, validation)
            gain = state.initial_errors - samples
            noise = jnp.std(gain) / math.sqrt(gain.size)
            # Comparisons with NaN are false: the finite best stays.
            better = (candidate.error < state.best.error) & (gain.mean() > self.margin * noise)
            best = jax.tree.map(partial(jnp.where, better), candidate, state.best)
            state, errors = _with(state, best=best), candidate.error[None]
        return state, Trace(loss, norm, errors, monitored)

    def finish(self, state: DescentState, weights: Weights) -> tuple[Weights, KeepMasks]:
        """The best validated iterate, or the last one rounded where nothing was validated."""
        if state.best is not None:
            return state.best.weights, state.best.keep_masks
        return self.relaxation.finish(state.variable, weights, self.sparsity)

    def _round(
        self, state: DescentState, weights: Weights, validation: PyTree
    ) -> tuple[Candidate, Float[Array, " samples"]]:
        rounded, kept = self.relaxation.finish(state.variable, weights, self.sparsity)
        if self.sample_errors is None:
            samples = self.objective(rounded, validation)[None]
        else:
            samples = self.sample_errors(rounded, validation)
        return Candidate(rounded, kept, samples.mean(), state.step), samples

    def loss(
        self, variable: PyTree, weights: Weights, batch: PyTree, step: Int[Array, ""]
    ) -> Float[Array, ""]:
        """What a step minimises: the objective of the effective weights, plus the penalty."""
        loss = self.objective(self.relaxation.apply(variable, weights, step), batch)
        return loss if self.penalty is None else loss + self.penalty(variable)

    def _batch(self, data: PyTree, key: Key[Array, ""], step: Int[Array, ""]) -> PyTree:
        draw, change = jax.random.split(jax.random.fold_in(key, step))
        count = jax.tree.leaves(data)[0].shape[0]
        if self.batch_size is not None and self.batch_size < count:
            drawn = jax.random.choice(draw, count, (self.batch_size,), replace=False)
            data = jax.tree.map(lambda a: a[drawn], data)
        return data if self.augment is None else self.augment(change, data)

    def _step(
        self, state: DescentState, weights: Weights, data: PyTree, key: Key[Array, ""]
    ) -> tuple[DescentState, tuple[Array, Array, PyTree]]:
        batch = self._batch(data, key, state.step)

        def loss_of(variable: PyTree) -> Float[Array, ""]:
            return self.loss(variable, weights, batch, state.step)

        loss, gradient = jax.value_and_grad(loss_of)(state.variable)
        updates, optimizer_state = optax.with_extra_args_support(self.optimizer).update(
            gradient,
            state.optimizer_state,
            state.variable,
            value=loss,
            grad=gradient,
            value_fn=loss_of,
        )
        moved_freely = optax.apply_updates(state.variable, updates)
        variable = self.relaxation.project(moved_freely)
        norm = optax.tree.norm(gradient, squared=True)
        monitored = None
        if self.monitor is not None:
            same = self._same_objective(state, weights, data)
            view = StepView(state.variable, gradient, updates, moved_freely, variable, same)
            monitored = self.monitor(view)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        active = state.step < self.steps
        moved, old = (variable, optimizer_state), (state.variable, state.optimizer_state)
        variable, optimizer_state = jax.tree.map(partial(jnp.where, finite & active), moved, old)
        state = _with(
            state,
            step=state.step + active,
            variable=variable,
            optimizer_state=optimizer_state,
            rejected=state.rejected + (active & ~finite),
        )
        return state, (loss, norm, monitored)

    def _same_objective(
        self, state: DescentState, weights: Weights, data: PyTree
    ) -> Bool[Array, ""]:
        count = jax.tree.leaves(data)[0].shape[0]
        if self.augment is not None or (self.batch_size is not None and self.batch_size < count):
            return jnp.zeros((), bool)
        here, next_step = (
            self.relaxation.apply(state.variable, weights, step)
            for step in (state.step, state.step + 1)
        )
        # NaN equals itself here: it is not the relaxation that changed.
        same = jax.tree.map(lambda a, b: jnp.array_equal(a, b, equal_nan=True), here, next_step)
        return jnp.all(jnp.stack(jax.tree.leaves(same)))


def _with(state: DescentState, **changes: Any) -> DescentState:
    return DescentState(**{**vars(state), **changes})


def descend(
    descent: Descent,
    weights: Weights,
    data: PyTree,
    *,
    key: Key[Array, ""],
    validation: PyTree | None = None,
    state: DescentState | None = None,
    on_chunk: Callable[[DescentState, Trace], None] | None = None,
    chunk: Callable[..., tuple[DescentState, Trace]] | None = None,
) -> DescentResult:
    """Run a descent to its end.

    Args:
      descent: what to run.
      weights: dense weights, a pytree of ``[d_in, d_out]``.
      data: pytree of arrays with a leading sequence axis, handed in batches to the objective.
      key: randomness of the batches; step ``t`` uses ``fold_in(key, t)``, so that a resumed run
        draws the same ones.
      validation: like ``data``; decides which iterate is kept. Without it the last one is.
      state: where to go on from; the start if ``None``.
      on_chunk: called between chunks with the state and the trace of the chunk. Given, chunks
        are called from Python; else all is one scan, which ``jit``, ``vmap`` and ``grad`` take.
      chunk: what to call for ``descent.chunk`` with ``on_chunk``, where a caller has it compiled
        already, for instance for an earlier layer of the same shape.

    Returns:
      Rounded weights and keep masks with exact counts, the trace of this call, the last state.
    """
    # Under tracing the steps of a given state are unknown: the scan is of full length then.
    done = 0 if state is None or isinstance(state.step, jax.core.Tracer) else int(state.step)
    left = max(descent.steps - done, 0)
    state = descent.init(weights, validation) if state is None else state
    if on_chunk is None or not left:
        last, trace = lax.scan(
            lambda state, _: descent.chunk(state, weights, data, validation, key),
            state,
            length=math.ceil(left / max(descent.chunk_length, 1)),
        )
        trace = jax.tree.map(lambda a: a.reshape(-1), trace)
    else:
        chunk = jax.jit(descent.chunk) if chunk is None else chunk
        last, pieces = state, []
        while int(last.step) < descent.steps:
            last, piece = chunk(last, weights, data, validation, key)
            pieces.append(piece)
            on_chunk(last, piece)
        trace = jax.tree.map(lambda *a: jnp.concatenate(a), *pieces)
    loss, norm, monitored = jax.tree.map(
        lambda a: a[:left], (trace.loss, trace.squared_gradient_norm, trace.monitored)
    )
    final_loss = None
    if descent.monitor is not None:
        final_loss = descent.loss(last.variable, weights, data, last.step)
    trace = Trace(loss, norm, trace.validation_error, monitored, final_loss)
    rounded, kept = descent.finish(last, weights)
    relaxation = descent.relaxation
    initial, _ = relaxation.finish(relaxation.init(weights), weights, descent.sparsity)
    return DescentResult(rounded, kept, initial, trace, last)
