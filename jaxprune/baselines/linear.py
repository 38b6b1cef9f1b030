"""What the baselines share: their result, their checks, and pruning by a score."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune.attention import check_finite
from jaxprune.errors import InputError
from jaxprune.sparsity import Group, Sparsity, keep_mask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrunedLinear:
    """A pruned linear layer.

    Attributes:
      weight: exact zeros where dropped, in the type of the dense weight.
      keep_mask: True where kept.
      damping: fraction of the Hessian's diagonal, of its mean by SparseGPT, of every entry by ADMM,
        that was added to it; ``None`` where there is none.
      damping_raised: times the damping had to be raised tenfold; only of SparseGPT.
    """

    weight: Float[Array, "*b d_in d_out"]
    keep_mask: Bool[Array, "*b d_in d_out"]
    damping: Float[Array, "*b"] | None = None
    damping_raised: Int[Array, "*b"] | None = None


def check_linear(x: Array | None, w: Array, sparsity: Sparsity) -> None:
    """Raise ``InputError`` for shapes that do not match, non-finite values, N:M that do not fit."""
    if w.ndim != 2:
        raise InputError(f"w of shape {w.shape}: expected [d_in, d_out]")
    if x is not None and (x.ndim < 2 or x.shape[-1] != w.shape[0]):
        raise InputError(
            f"x of shape {x.shape} and w of shape {w.shape} do not match: "
            "expected [..., n, d_in] and [d_in, d_out]"
        )
    sparsity.check_divides(w.shape[0])
    check_finite(x=x, w=w)


def prune_by_score(
    scores: Float[Array, "d_in d_out"],
    w: Float[Array, "d_in d_out"],
    sparsity: Sparsity,
    group: Group,
) -> PrunedLinear:
    """Drop the entries of lowest score within each group; the others keep their weight."""
    kept = keep_mask(scores, sparsity, group=group)
    return PrunedLinear(jnp.where(kept, w, jnp.zeros_like(w)), kept)
