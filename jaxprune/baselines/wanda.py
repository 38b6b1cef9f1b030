"""Wanda: weights times activation norms, compared within each output."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.attention import accumulation_dtype
from jaxprune.baselines.linear import PrunedLinear, check_linear, prune_by_score
from jaxprune.baselines.registry import Baseline, register
from jaxprune.importance import feature_norms
from jaxprune.sparsity import Group, Sparsity


def wanda(
    x: Float[Array, "*b n d_in"],
    w: Float[Array, "d_in d_out"],
    sparsity: Sparsity | Any,
    *,
    group: Group = "output",
) -> PrunedLinear:
    """Drop the weights of lowest score ``|w_ij| · ‖x_i‖``; the others keep their value.

    Args:
      x: inputs of the layer, ``[n, d_in]`` or with leading sequence axes.
      w: weight.
      sparsity: ``Sparsity``, or what ``Sparsity.parse`` reads; N:M along the inputs.
      group: entries that compete; each output by default.

    Raises:
      InputError: a wrong sparsity, shapes that do not match, or non-finite values.

    Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models",
    Eq. 1; locuslab/wanda. Same masks as the original, except that 0.29 of 100 is 29, not 28.
    """
    sparsity = Sparsity.parse(sparsity)
    check_linear(x, w, sparsity)
    return wanda_from_norms(feature_norms(x), w, sparsity, group=group)


def wanda_from_norms(
    norms: Float[Array, " d_in"],
    w: Float[Array, "d_in d_out"],
    sparsity: Sparsity,
    *,
    group: Group = "output",
) -> PrunedLinear:
    """``wanda`` where the norms of the inputs are known, gathered batch by batch for instance."""
    scores = jnp.abs(w.astype(accumulation_dtype(w))) * norms[:, None]
    return prune_by_score(scores, w, sparsity, group)


register(
    Baseline(
        "wanda",
        "Wanda",
        wanda,
        group="output",
        moment=lambda x: feature_norms(x) ** 2,
        prune_from=lambda squares, w, sparsity: wanda_from_norms(jnp.sqrt(squares), w, sparsity),
    )
)
