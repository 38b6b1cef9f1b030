"""The objective of attention pruning: one kernel, the paper's loss, its closed-form gradient.

``softmax_error`` is the kernel everything rests on; a faster one for some backend replaces that
function and nothing else. ``mask_loss`` is the loss of Def. 1.2 and 3.2 on top of it, and
``closed_form_gradient`` the gradient as the paper writes it, kept as a formula to compare with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from jaxprune.attention import (
    accumulation_dtype,
    attention_matrix,
    attention_rows,
    causal_bias,
    check_fused,
    check_row_weights,
    contract,
)
from jaxprune.errors import InputError

# Causal rows are cut into at most this many groups; the rows of a group see keys up to its last
# row, so about (1 + 1/6) / 2 of the square is computed. More groups compile longer, hold more
# copies of the keys and save little.
_CAUSAL_GROUPS = 6
# Entries of a block of logits: on a CPU what the caches hold (measured: half or twice as many cost
# 5 to 20 % more), elsewhere enough to keep a large device busy through one kernel.
_BLOCK_ENTRIES = {"cpu": 2**19}
_BLOCK_ENTRIES_ELSEWHERE = 2**25
# Causal blocks are not taller than this part of the rows, unless they have few rows as it is:
# what lies above the diagonal inside a block is computed.
_CAUSAL_PART = 4
_FEW_ROWS = 64


def softmax_error(
    q: Float[Array, "... n e"],
    k: Float[Array, "... n e"],
    q0: Float[Array, "... n f"],
    k0: Float[Array, "... n f"],
    *,
    causal: bool = True,
    block_size: int | None = None,
    row_weights: Float[Array, "... n"] | None = None,
    values: Float[Array, "... n v"] | None = None,
) -> Float[Array, "..."]:
    """Half the squared distance of two attention matrices, ``½ Σ_i r_i ‖F̃_i − F_i‖²``.

    ``F̃ = softmax(q kᵀ)`` approximates ``F = softmax(q0 k0ᵀ)``, row softmaxes, causal where asked.
    Differentiable in all array arguments, once by reverse mode and then by any mode. With
    ``C = F̃ − F`` and ``P_i = r_i F̃_i ∘ (C_i − ⟨F̃_i, C_i⟩)``, the gradients are ``P k`` and
    ``Pᵀ q``; for the reference, ``−R k0`` and ``−Rᵀ q0`` where ``R`` is ``P`` with ``F`` for ``F̃``.
    Only those asked for are computed. With ``values`` ``V``, what the matrices do to them counts
    too: ``½ Σ_i r_i (‖C_i‖² + ‖C_i V‖²)``, and ``P`` has ``C + C V Vᵀ`` for ``C``.

    Works in row blocks: no ``n × n`` array outlives a block, and causal blocks skip most of what
    lies above the diagonal. Heads and sequences on leading axes are mapped over a few at a time,
    as memory allows; pass them as leading axes rather than through ``vmap``, which would hold
    them all at once.

    Args:
      q: queries of the approximation, any scale included. Leading axes broadcast.
      k: keys of the approximation.
      q0: queries of the reference; their width may differ from that of ``q``.
      k0: keys of the reference.
      causal: row ``i`` sees keys ``j ≤ i`` (Def. 3.1); else all (Def. 1.1).
      block_size: rows of a block; chosen from the shape when ``None``.
      row_weights: ``r``, one for every query; ones when ``None``. Zero leaves a row out.
      values: what attention averages, at the scale it is to count with. Constants: no gradient
        flows to them. As rows of ``C`` sum to zero, a vector added to all of them has no effect.

    Returns:
      One value for every leading index; float32, or float64 for float64 inputs.

    Raises:
      InputError: shapes do not match.

    Source: the error term of Liang et al. 2025, Def. 1.2 and 3.2, written on queries and keys.
    """
    _check_kernel(q, k, q0, k0, row_weights, values)
    n = q.shape[-2]
    if row_weights is None:
        row_weights = jnp.ones(n, accumulation_dtype(q, k, q0, k0))
    if values is None:
        values = jnp.zeros((n, 0), q.dtype)
    operands = [(q, 2), (k, 2), (q0, 2), (k0, 2), (row_weights, 1), (values, 2)]
    lead = jnp.broadcast_shapes(*(a.shape[:-trailing] for a, trailing in operands))
    flat = [
        jnp.broadcast_to(a, (*lead, *a.shape[-trailing:])).reshape(
            math.prod(lead), *a.shape[-trailing:]
        )
        for a, trailing in operands
    ]
    if block_size is None:
        block_size = _rows_of_a_block(n, causal)
    return _softmax_error(causal, min(block_size, n), *flat).reshape(lead)


def _block_entries() -> int:
    return _BLOCK_ENTRIES.get(jax.default_backend(), _BLOCK_ENTRIES_ELSEWHERE)


def _rows_of_a_block(n: int, causal: bool) -> int:
    rows = max(16, _block_entries() // n)
    return min(rows, max(_FEW_ROWS, n // _CAUSAL_PART)) if causal else rows


def _check_kernel(
    q: Array, k: Array, q0: Array, k0: Array, row_weights: Array | None, values: Array | None
) -> None:
    shapes = ", ".join(
        f"{name} {a.shape}" for name, a in (("q", q), ("k", k), ("q0", q0), ("k0", k0))
    )
    lengths = {a.shape[-2] for a in (q, k, q0, k0) if a.ndim >= 2}
    if (
        min(a.ndim for a in (q, k, q0, k0)) < 2
        or len(lengths) != 1
        or q.shape[-1] != k.shape[-1]
        or q0.shape[-1] != k0.shape[-1]
    ):
        raise InputError(
            f"shapes do not match: {shapes}; expected [..., n, e] for q and k "
            "and [..., n, f] for q0 and k0"
        )
    if row_weights is not None and row_weights.shape[-1:] != q.shape[-2:-1]:
        raise InputError(f"row_weights {row_weights.shape} and q {q.shape} do not match")
    if values is not None and (values.ndim < 2 or values.shape[-2] != q.shape[-2]):
        raise InputError(f"values {values.shape} and q {q.shape} do not match")


class _Gradients(NamedTuple):
    """Gradients of the summed error; ``None`` where not asked for."""

    q: Any
    k: Any
    q0: Any
    k0: Any
    row_weights: Array
    values: None = None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax_error(
    causal: bool,
    block_size: int,
    q: Array,
    k: Array,
    q0: Array,
    k0: Array,
    weights: Array,
    values: Array,
) -> Array:
    """``softmax_error`` on one flat leading axis."""
    operands = (q, k, q0, k0, weights, values)
    return _values_and_gradients(causal, block_size, operands, (False,) * 4)[0]


def _forward(
    causal: bool, block_size: int, *arguments: CustomVJPPrimal
) -> tuple[Array, _Gradients]:
    wanted = tuple(bool(a.perturbed) for a in arguments[:4])
    operands = tuple(a.value for a in arguments)
    return _values_and_gradients(causal, block_size, operands, wanted)


def _backward(
    causal: bool, block_size: int, gradients: _Gradients, cotangent: Array | SymbolicZero
) -> tuple[Array | None, ...]:
    del causal, block_size
    if isinstance(cotangent, SymbolicZero):
        return (None,) * len(gradients)
    return tuple(
        None if g is None else (g * cotangent.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype))
        for g in gradients
    )


_softmax_error.defvjp(_forward, _backward, symbolic_zeros=True)


# Compiled on its own, so that calls outside ``jit`` compile once and not every time.
@partial(jax.jit, static_argnums=(0, 1, 3))
def _values_and_gradients(
    causal: bool, block_size: int, operands: tuple[Array, ...], wanted: tuple[bool, ...]
) -> tuple[Array, _Gradients]:
    """Map ``_one_head`` over the leading axis, as many heads at once as a block's budget holds."""
    n = operands[0].shape[1]
    together = max(1, _block_entries() // (block_size * n))
    one = partial(_one_head, causal, block_size, wanted)
    # An axis of size one costs up to half as much again on CPU: XLA splits element-wise work among
    # threads along it, and does not fuse softmax and products across it.
    if operands[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], one(*(a[0] for a in operands)))
    if operands[0].shape[0] <= together:
        return jax.vmap(one)(*operands)
    if together == 1:
        return lax.map(lambda each: one(*each), operands)
    return lax.map(lambda each: one(*each), operands, batch_size=together)


def _one_head(
    causal: bool,
    block_size: int,
    wanted: tuple[bool, ...],
    q: Array,
    k: Array,
    q0: Array,
    k0: Array,
    weights: Array,
    values: Array,
) -> tuple[Array, _Gradients]:
    """Value and wanted gradients for one head, group of rows by group of rows."""
    n = q.shape[0]
    groups = []
    # What belongs to keys is added up as we go: one array, not one for each group. It is held as
    # [e, m]: XLA on CPU multiplies qᵀ p three times as fast as pᵀ q.
    dk, dk0 = (jnp.zeros(a.shape[::-1], weights.dtype) for a in (k, k0))
    for start, blocks, rows in _row_groups(n, block_size, causal):
        stop = start + blocks * rows
        keys = stop if causal else n
        each = tuple(
            a[start:stop].reshape(blocks, rows, *a.shape[1:])
            for a in (jnp.arange(n), q, q0, weights)
        )
        block = partial(_block, causal, wanted, k[:keys], k0[:keys], values[:keys])
        group = _row_group(block, each)
        dk = dk.at[:, :keys].add(group.k)
        dk0 = dk0.at[:, :keys].add(group.k0)
        groups.append(group)

    half_errors = jnp.concatenate([group.row_weights for group in groups])
    want_q, want_k, want_q0, want_k0 = wanted
    gradients = _Gradients(
        q=jnp.concatenate([group.q for group in groups]).astype(q.dtype) if want_q else None,
        k=dk.T.astype(k.dtype) if want_k else None,
        q0=jnp.concatenate([group.q0 for group in groups]).astype(q0.dtype) if want_q0 else None,
        k0=dk0.T.astype(k0.dtype) if want_k0 else None,
        row_weights=half_errors,
    )
    return jnp.sum(weights * half_errors), gradients


def _row_group(block: Callable[..., _Gradients], each: tuple[Array, ...]) -> _Gradients:
    """Run ``block`` over stacked blocks of rows, adding up what belongs to keys."""
    if each[0].shape[0] == 1:
        return block(*(a[0] for a in each))

    def step(sums: tuple[Any, ...], rows: tuple[Array, ...]) -> tuple[tuple[Any, ...], Any]:
        out = block(*rows)
        return (sums[0] + out.k, sums[1] + out.k0), (out.q, out.q0, out.row_weights)

    shapes = jax.eval_shape(block, *(a[0] for a in each))
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in (shapes.k, shapes.k0))
    (dk, dk0), stacked = lax.scan(step, zeros, each)
    # An unwanted gradient is a scalar zero for every block and stays a vector of zeros.
    dq, dq0, half_errors = (a.reshape(-1, *a.shape[2:]) for a in stacked)
    return _Gradients(dq, dk, dq0, dk0, half_errors)


def _row_groups(n: int, block_size: int, causal: bool) -> list[tuple[int, int, int]]:
    """Cut ``n`` rows into groups ``(first row, number of blocks, rows of a block)``.

    All groups but the last have blocks of ``block_size`` rows; the last takes the remainder.
    """
    blocks, rest = divmod(n, block_size)
    parts = min(blocks, _CAUSAL_GROUPS) if causal else 1
    bounds = [blocks * g // parts for g in range(parts + 1)]
    groups = [
        (low * block_size, high - low, block_size) for low, high in itertools.pairwise(bounds)
    ]
    return groups + ([(n - rest, 1, rest)] if rest else [])


def _block(
    causal: bool,
    wanted: tuple[bool, ...],
    k: Array,
    k0: Array,
    values: Array,
    rows: Array,
    q: Array,
    q0: Array,
    weights: Array,
) -> _Gradients:
    """Half errors of a block of rows and its share of every wanted gradient (0 if unwanted).

    Gradients in keys are transposed, ``[e, m]``.
    """
    want_q, want_k, want_q0, want_k0 = wanted
    nothing = jnp.zeros((), weights.dtype)
    dq = dk = dq0 = dk0 = nothing
    bias = causal_bias(rows, k.shape[0], weights.dtype) if causal else None
    approximation = attention_rows(q, k, bias)
    target = attention_rows(q0, k0, bias)
    difference = approximation - target
    half_errors = 0.5 * jnp.sum(difference**2, axis=-1)
    if values.shape[-1]:
        output = contract("nm,mv->nv", difference.astype(values.dtype), values)
        half_errors += 0.5 * jnp.sum(output**2, axis=-1)
        difference += contract("nv,mv->nm", output.astype(values.dtype), values)
    # Row weights go on the narrow side of the products, n × e and not n × m.
    rated = weights[:, None]
    if want_q or want_k:
        p = _through_softmax(approximation, difference)
        dq = rated * contract("nm,me->ne", p.astype(k.dtype), k) if want_q else nothing
        if want_k:
            dk = contract("ne,nm->em", (rated * q).astype(q.dtype), p.astype(q.dtype))
    if want_q0 or want_k0:
        r = _through_softmax(target, difference)
        dq0 = -rated * contract("nm,me->ne", r.astype(k0.dtype), k0) if want_q0 else nothing
        if want_k0:
            dk0 = contract("ne,nm->em", (-rated * q0).astype(q0.dtype), r.astype(q0.dtype))
    return _Gradients(dq, dk, dq0, dk0, half_errors)


def _through_softmax(f: Float[Array, "n m"], c: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Rows ``(diag(f) − f fᵀ) c = f ∘ (c − ⟨f, c⟩)``: a cotangent pulled through a row softmax."""
    return f * (c - jnp.sum(f * c, axis=-1, keepdims=True))


def mask_loss(
    mask: Float[Array, "d d"],
    x: Float[Array, "*b n d"],
    w: Float[Array, "d d"],
    *,
    lam: Float[Array, ""] | float,
    causal: bool = True,
    row_weights: Float[Array, "*b n"] | None = None,
) -> Float[Array, ""]:
    """Loss of attention weights pruning, ``L(M) = ½‖D̃⁻¹Ã − D⁻¹A‖_F² + ½λ‖M‖_F²``.

    ``A = exp(x w xᵀ)`` and ``Ã = exp(x (M∘w) xᵀ)``, causal where asked. With several sequences
    the error term is their mean, so that λ and step sizes keep their meaning and minibatches are
    unbiased; one sequence is the paper's loss exactly. ``jax.grad`` of it is
    ``closed_form_gradient``.

    Args:
      mask: ``M``; the relaxed problem has entries in ``[0, 1]``, but any are allowed.
      x: activations of one sequence or several.
      w: fused weight ``W_Q W_Kᵀ``, any scale included.
      lam: λ ≥ 0, may be traced.
      causal: Def. 3.2 if true, else Def. 1.2.
      row_weights: weight of every row's error; zero leaves a row out.

    Raises:
      InputError: shapes do not match.

    Source: Liang et al. 2025, Def. 1.2 and 3.2; the mean over sequences is ours.
    """
    check_fused(x, w)
    check_fused(x, mask, "mask")
    check_row_weights(row_weights, x)
    queries0 = contract("...nd,de->...ne", x, w).astype(x.dtype)
    error = fused_error(mask * w, x, queries0, causal=causal, row_weights=row_weights)
    return error + 0.5 * lam * jnp.sum(mask**2)


def fused_error(
    w: Float[Array, "d d"],
    x: Float[Array, "*b n d"],
    queries0: Float[Array, "*b n d"],
    *,
    causal: bool = True,
    row_weights: Float[Array, "*b n"] | None = None,
) -> Float[Array, ""]:
    """Error term of the loss for an effective fused weight, mean over sequences.

    Args:
      w: effective weight, for instance ``M∘w``.
      x: activations, also the keys of both attention matrices.
      queries0: ``x`` times the dense weight, computed once by the caller.
      causal: see ``mask_loss``.
      row_weights: see ``mask_loss``.
    """
    queries = contract("...nd,de->...ne", x, w).astype(x.dtype)
    errors = softmax_error(queries, x, queries0, x, causal=causal, row_weights=row_weights)
    return jnp.mean(errors)


def closed_form_gradient(
    mask: Float[Array, "d d"],
    x: Float[Array, "*b n d"],
    w: Float[Array, "d d"],
    *,
    lam: Float[Array, ""] | float,
    causal: bool = True,
) -> Float[Array, "d d"]:
    """Gradient of ``mask_loss`` in the mask, ``∇L(M) = w ∘ (xᵀ P x) + λM``.

    ``P_i = (diag(F̃_i) − F̃_i F̃_iᵀ) C_i`` with ``F̃ = D̃⁻¹Ã`` and ``C = F̃ − D⁻¹A``. Written out as
    in the paper, with whole ``n × n`` matrices; descent itself differentiates ``mask_loss``.

    Args:
      mask: ``M``.
      x: activations of one sequence or several (the mean over them, as in ``mask_loss``).
      w: fused weight.
      lam: λ ≥ 0.
      causal: Def. 3.2 if true, else Def. 1.2.

    Source: Liang et al. 2025, the closed-form gradient of Def. 1.2 and 3.2.
    """
    check_fused(x, w)
    check_fused(x, mask, "mask")

    def one(x: Array) -> Array:
        f = attention_matrix(x, mask * w, causal=causal)
        c = f - attention_matrix(x, w, causal=causal)
        return w * contract("nd,nm,me->de", x, _through_softmax(f, c), x)

    return jnp.mean(jax.vmap(one)(x.reshape(-1, *x.shape[-2:])), axis=0) + lam * mask
