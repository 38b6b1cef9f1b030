"""The list of baselines: what every script, figure and test knows of them.

A baseline is a function of the inputs of a linear layer, its weight and a sparsity. Registered, it
is a method of ``jaxprune prune``, of the comparisons, the figures and the conformance tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxprune.baselines.linear import PrunedLinear
from jaxprune.errors import InputError
from jaxprune.sparsity import Group, Sparsity


class Baseline(NamedTuple):
    """A pruning method of one linear layer.

    Attributes:
      name: what it is called in flags and metrics.
      label: what it is called in tables and figures.
      prune: inputs ``[..., n, d_in]``, weight ``[d_in, d_out]`` and sparsity to the pruned layer.
      group: entries that compete by default, as in ``sparsity.keep_mask``.
      updates: whether kept weights change.
      moment: what of the inputs is enough, a mean over sequences of a function of each; a model is
        then pruned without holding the inputs of a layer. ``None`` where all of them are needed.
      prune_from: ``prune`` with ``moment(x)`` for ``x``; of both or neither.
    """

    name: str
    label: str
    prune: Callable[[Array, Array, Any], PrunedLinear]
    group: Group = "matrix"
    updates: bool = False
    moment: Callable[[Array], Array] | None = None
    prune_from: Callable[[Array, Array, Sparsity], PrunedLinear] | None = None


BASELINES: dict[str, Baseline] = {}
"""All baselines by name, in the order of registration."""


def register(baseline: Baseline) -> None:
    """Add a baseline to ``BASELINES``.

    Raises:
      InputError: the name is taken, or only one of ``moment`` and ``prune_from`` is given.
    """
    if BASELINES.get(baseline.name, baseline) is not baseline:
        raise InputError(f"name {baseline.name}: there is such a baseline already")
    if (baseline.moment is None) != (baseline.prune_from is None):
        raise InputError(f"{baseline.name}: expected moment and prune_from, or neither")
    BASELINES[baseline.name] = baseline
