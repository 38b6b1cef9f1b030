"""Descents that go on where they stopped: their problem, their saved state, their progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxprune.attention import accumulation_dtype
from jaxprune.descent.gradual import split_sequences
from jaxprune.descent.loop import Descent, DescentState, Trace, descend
from jaxprune.errors import InputError
from jaxprune.runs.folder import RunFolder
from jaxprune.sharding import broadcast_flag, gather, on_process_zero, split_columns
from jaxprune.storage import read_arrays, write_arrays

# A descent's state is written when that costs less than this part of the time since the last.
_SAVING_SHARE = 0.1

Report = Callable[[int, str], None]  # units done, and of what


class Problem(NamedTuple):
    """A descent on some matrices of a model, whichever they are.

    Attributes:
      make: weights, context and settings to the descent.
      settings: hashable, static under ``jit``; its ``steps`` are those of the descent.
      weights: where it starts, float32; the dense ones, or pruned ones that are to adapt.
      data: arrays with a leading axis of windows; every eighth validates, if nothing else does.
      context: other arrays; one program serves all blocks because they are arguments of it.
      names: of the leaves of ``weights``, in their order.
      validation: like ``data``.
    """

    make: Callable[[PyTree, PyTree, Any], Descent]
    settings: Any
    weights: PyTree
    data: PyTree
    context: PyTree
    names: tuple[str, ...]
    validation: PyTree | None = None

    def named(self, tree: PyTree) -> dict[str, Array]:
        """Leaves of a tree like ``weights`` by name."""
        return dict(zip(self.names, jax.tree.leaves(tree), strict=True))


class Solution(NamedTuple):
    """What a descent found: weights and keep masks by name, and what to say of it."""

    weights: dict[str, Array]
    keep_masks: dict[str, Array]
    remarks: dict[str, Any]


class Work:
    """Keeps the state of a part under way, and reports its progress."""

    def __init__(self, run: RunFolder, name: str, before: int, report: Report) -> None:
        self.run, self.name = run, name
        self._before, self._report = before, report
        self._file = run.part_file(f"{name}-state")
        self._saved_at = time.monotonic()
        self._cost = 0.0

    def report(self, units: int) -> None:
        """Say that so many units of this part are done."""
        self._report(self._before + units, self.name)

    def load(self, start: DescentState) -> DescentState:
        """The saved state, or ``start``."""
        if not broadcast_flag(self._file.exists()):
            return start
        leaves, form = jax.tree.flatten(start)
        remedy = "delete it to begin this part anew"
        saved = read_arrays(self._file, remedy)
        form_of = {str(i): (leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)}
        if {name: (array.shape, array.dtype) for name, array in saved.items()} != form_of:
            raise InputError(f"{self._file}: not the state of this descent; {remedy}")
        placed = [jax.device_put(saved[str(i)], leaf.sharding) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(form, placed)

    def save(self, state: DescentState, trace: Trace) -> None:
        """Called after every chunk; writes where that is cheap enough."""
        del trace
        now = time.monotonic()
        if broadcast_flag(now - self._saved_at >= self._cost / _SAVING_SHARE):
            arrays = {str(i): gather(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            on_process_zero(lambda: write_arrays(self._file, **arrays))
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - now
        self.report(math.ceil(int(state.step) / Descent.chunk_size))

    def finish(self, **arrays: np.ndarray) -> None:
        """Keep a finished part's arrays; the state is of no more use."""

        def write() -> None:
            write_arrays(self.run.part_file(self.name), **arrays)
            self._file.unlink(missing_ok=True)

        on_process_zero(write)


def solve(problem: Problem, key: Key[Array, ""], work: Work) -> Solution:
    """Run a descent from its saved state where there is one.

    Raises:
      InputError: the loss was never finite.
    """
    fit, validation = problem.data, problem.validation
    if validation is None:
        fit, validation = split_sequences(fit)
    make, settings, weights, context = problem[0], problem[1], problem[2], problem[4]

    def chunk(
        state: DescentState, weights: PyTree, data: PyTree, validation: PyTree, key: Array
    ) -> tuple[DescentState, Trace]:
        return advance(make, settings, state, weights, data, validation, context, key)

    result = descend(
        make(weights, context, settings),
        weights,
        fit,
        key=key,
        validation=validation,
        state=work.load(start(make, settings, weights, validation, context)),
        on_chunk=work.save,
        chunk=chunk,
    )
    assert result.state.best is not None
    if int(result.state.rejected) == settings.steps:
        raise InputError(f"{work.name}: the loss was never finite; check weights and activations")
    remarks = {
        "best_step": int(result.state.best.step),
        "rejected_steps": int(result.state.rejected),
    }
    return Solution(problem.named(result.weights), problem.named(result.keep_masks), remarks)


def movable(weights: PyTree) -> PyTree:
    """Weights as a descent moves them: float32, whatever the model computes in."""
    return split_columns(jax.tree.map(upcast, weights))


def upcast(w: Array) -> Array:
    """In float32, or float64 where it is."""
    return w.astype(accumulation_dtype(w))


@partial(jax.jit, static_argnums=(0, 1))
def start(
    make: Callable[..., Descent],
    settings: Any,
    weights: PyTree,
    validation: PyTree,
    context: PyTree,
) -> DescentState:
    """The state before the first step."""
    return split_columns(make(weights, context, settings).init(weights, validation))


# One program for all blocks: what differs between them are arguments.
@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advance(
    make: Callable[..., Descent],
    settings: Any,
    state: DescentState,
    weights: PyTree,
    fit: PyTree,
    validation: PyTree,
    context: PyTree,
    key: Key[Array, ""],
) -> tuple[DescentState, Trace]:
    """A chunk of steps."""
    descent = make(weights, context, settings)
    state, trace = descent.chunk(state, weights, fit, validation, key)
    return split_columns(state), trace
