"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.baselines.linear import PrunedLinear, check_linear, prune_by_score
from jaxprune.baselines.registry import Baseline, register
from jaxprune.sparsity import Group, Sparsity


def magnitude(
    w: Float[Array, "d_in d_out"], sparsity: Sparsity | Any, *, group: Group = "matrix"
) -> PrunedLinear:
    """Drop the weights of smallest absolute value.

    Args:
      w: weight.
      sparsity: ``Sparsity``, or what ``Sparsity.parse`` reads.
      group: entries that compete; the whole matrix by default, as in the original code of Wanda.

    Raises:
      InputError: a wrong sparsity, shape or a non-finite weight.

    Source: the baseline of locuslab/wanda. It thresholds with ``<=`` and so drops at least one
    entry too many; ours has the exact count.
    """
    sparsity = Sparsity.parse(sparsity)
    check_linear(None, w, sparsity)
    return prune_by_score(jnp.abs(w), w, sparsity, group)


register(
    Baseline(
        "magnitude",
        "magnitude",
        lambda x, w, sparsity: magnitude(w, sparsity),
        # Nothing of the inputs is needed.
        moment=lambda x: jnp.zeros(()),
        prune_from=lambda moment, w, sparsity: magnitude(w, sparsity),
    )
)
