"""Residuals of attention, for ``gauss_newton_moments``: what a pruned attention should keep."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxprune.attention import attention_rows, causal_bias, contract

# Causal rows are cut into so many groups: above the diagonal, only what lies inside a group is
# computed. Twice as many gain nothing measurable.
_CAUSAL_GROUPS = 4


@dataclass(frozen=True)
class AttentionMatrices:
    """Attention matrices ``F = softmax(q kᵀ)`` of all heads of a layer, from queries and keys.

    Called with outputs ``q [n, h·k]`` and ``k [n, g·k]`` of the projections, as they are, and
    shared ``form``, an ``AttentionForm``, and ``outputs [d, h, v]`` or ``None``. With ``outputs``,
    maps from inputs to values, the residual is ``(F, F V)``, ``V = x · outputs`` of the sequence's
    ``x``: what the matrices do to values counts too, as in ``softmax_error``. A head's residual is
    divided by ``‖F_h‖^balance`` of the sequence, a constant.

    Attributes:
      heads: query heads.
      kv_heads: key heads; each serves ``heads / kv_heads`` consecutive query heads.
      scale: of the logits.
      causal: row ``i`` sees keys ``j ≤ i`` (Def. 3.1); else all (Def. 1.1).
      balance: 0 adds up squared errors of heads, 1 relative ones; between, heads of even attention,
        whose energy is small, are not given up for those of sharp attention.
    """

    heads: int
    kv_heads: int
    scale: float
    causal: bool = True
    balance: float = 0.0

    def __call__(self, outputs: dict[str, Array], sequence: PyTree, shared: PyTree) -> PyTree:
        """Groups of rows of all matrices, and their products with values."""
        form = shared["form"]
        q = form.queries(outputs["q"], self.heads) * self.scale
        q = q.reshape(self.kv_heads, self.heads // self.kv_heads, *q.shape[1:])
        k = form.keys(outputs["k"], self.kv_heads)
        matrices = _row_groups(q, k, self.causal)
        if self.balance:
            energy = sum(jnp.sum(f**2, axis=(-2, -1), keepdims=True) for f in matrices)
            weight = lax.stop_gradient(energy) ** (-0.5 * self.balance)
            matrices = [f * weight for f in matrices]
        if shared["outputs"] is None:
            return matrices
        values = contract("nd,dhv->hnv", sequence["x"], shared["outputs"]).astype(q.dtype)
        values = values.reshape(*q.shape[:2], *values.shape[1:])
        products = [contract("grnm,grmv->grnv", f, values[:, :, : f.shape[-1]]) for f in matrices]
        return matrices, products


@dataclass(frozen=True)
class FusedAttention:
    """Attention matrix ``softmax(y xᵀ)`` of one head, from ``y = x W``: the paper's problem.

    Called with output ``w [n, d]`` and the sequence's ``x [n, d]``. Its Gauss-Newton matrix in
    ``y_i`` is ``xᵀ J_i² x``, ``J_i = diag(F_i) − F_i F_iᵀ``.

    Attributes:
      causal: Def. 3.2 if true, else Def. 1.2.
    """

    causal: bool = True

    def __call__(self, outputs: dict[str, Array], sequence: PyTree, shared: PyTree) -> PyTree:
        """Groups of rows of the matrix."""
        del shared
        return _row_groups(outputs["w"][None, None], sequence["x"][None], self.causal)


def _row_groups(q: Array, k: Array, causal: bool) -> list[Array]:
    """Rows ``[g, r, rows, keys]`` of all heads; queries ``[g, r, n, k]``, keys ``[g, n, k]``."""
    rows = jax.vmap(jax.vmap(attention_rows, in_axes=(0, None, None)), in_axes=(0, 0, None))
    n = q.shape[-2]
    if not causal:
        return [rows(q, k, None)]
    parts = min(_CAUSAL_GROUPS, n)
    bounds = [n * part // parts for part in range(parts + 1)]
    return [
        rows(q[:, :, start:stop], k[:, :stop], causal_bias(jnp.arange(start, stop), stop))
        for start, stop in itertools.pairwise(bounds)
    ]
