"""SparseGPT: optimal-brain-surgeon pruning, one input at a time, errors passed on to the rest."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxprune.attention import accumulation_dtype, cholesky, contract, triangular_solve
from jaxprune.baselines.linear import PrunedLinear, check_linear
from jaxprune.baselines.registry import Baseline, register
from jaxprune.errors import InputError
from jaxprune.sparsity import Sparsity, keep_highest, keep_mask

# The damping is raised tenfold at most this many times before giving up.
_MAX_RAISES = 4


def sparsegpt(
    x: Float[Array, "*b n d_in"],
    w: Float[Array, "d_in d_out"],
    sparsity: Sparsity | Any,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> PrunedLinear:
    """Prune ``w`` so that ``x @ w`` is preserved, updating the weights that stay.

    With the Hessian ``H = mean over sequences of 2 xᵀx`` (plus damping) and ``U`` the upper
    Cholesky factor of ``H⁻¹``, the entries of lowest ``w_ij² / U_ii²`` are dropped, compared
    within blocks of ``block_size`` inputs; input by input, the error of what was dropped is
    passed on to later inputs along ``U``.

    Args:
      x: inputs of the layer, ``[n, d_in]`` or with leading sequence axes.
      w: weight.
      sparsity: ``Sparsity``, or what ``Sparsity.parse`` reads. N:M along the inputs is decided
        when the loop reaches a group, on the weights updated so far.
      damping: fraction of the mean diagonal of ``H`` added to it. Where ``H`` is not positive
        definite it is raised tenfold, which the result reports.
      block_size: inputs of a block; for N:M, rounded down to whole groups, one at least.

    Returns:
      The pruned layer, with the damping used.

    Raises:
      InputError: wrong sparsity, shapes, values, damping or block size; or ``H`` is not positive
        definite after the damping was raised several times (under tracing the weight is NaN
        instead).

    Source: Frantar & Alistarh 2023; IST-DASLab/sparsegpt. Deviations: exactly ``floor(size · s)``
    entries of a block are dropped, where the original drops one more; the same factor ``U`` comes
    from one Cholesky factorisation of the reversed ``H`` instead of two and an inversion.
    """
    sparsity = Sparsity.parse(sparsity)
    check_linear(x, w, sparsity)
    return sparsegpt_from_hessian(hessian(x), w, sparsity, damping=damping, block_size=block_size)


def sparsegpt_from_hessian(
    h: Float[Array, "d_in d_in"],
    w: Float[Array, "d_in d_out"],
    sparsity: Sparsity,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> PrunedLinear:
    """``sparsegpt`` where the Hessian is known, gathered batch by batch for instance."""
    if not isinstance(damping, jax.core.Tracer) and not 0 <= damping < float("inf"):
        raise InputError(f"damping {damping}: expected a fraction of the mean diagonal, 0 or more")
    d_in, d_out = w.shape
    if block_size < 1:
        raise InputError(f"block_size {block_size}: expected a number of inputs, 1 or more")
    block = min(block_size, d_in)
    if sparsity.m is not None:
        block = max(block // sparsity.m, 1) * sparsity.m
    rows = [min(block, d_in - start) for start in range(0, d_in, block)]
    drops = jnp.stack([jnp.asarray(sparsity.drop_count(r * d_out), jnp.int32) for r in rows])
    pattern = None if sparsity.m is None else sparsity
    result = _sparsegpt(h, w, drops, damping, pattern=pattern, block_size=block)
    if not isinstance(result.weight, jax.core.Tracer) and jnp.isnan(result.weight).any():
        raise InputError(
            f"x: its Hessian is not positive definite even with damping {float(result.damping):g}; "
            "calibrate on more tokens or raise damping"
        )
    return result


def hessian(x: Float[Array, "*b n d"]) -> Float[Array, "d d"]:
    """``H = mean over sequences of 2 xᵀx``, in float32 or wider."""
    upcast = x.reshape(-1, *x.shape[-2:]).astype(accumulation_dtype(x))
    return 2 * contract("bnd,bne->de", upcast, upcast) / upcast.shape[0]


class _Factor(NamedTuple):
    u: Float[Array, "d d"]
    damping: Float[Array, ""]
    raised: Int[Array, ""]


def _upper_factor_of_inverse(h: Float[Array, "d d"], damping: Float[Array, ""]) -> _Factor:
    """Upper triangular ``U`` with ``UᵀU = (H + damping · mean(diag H) I)⁻¹``.

    Reversing both axes turns the lower Cholesky factor into an upper ``R`` with ``H = R Rᵀ``,
    and ``U = R⁻¹``.
    """
    identity = jnp.eye(h.shape[0], dtype=h.dtype)
    mean_diagonal = jnp.mean(jnp.diag(h))

    def attempt(damping: Array) -> Array:
        damped = h + damping * mean_diagonal * identity
        r = cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return triangular_solve(r, identity, lower=False)

    def failed(state: _Factor) -> Array:
        return ~jnp.isfinite(state.u).all() & (state.raised < _MAX_RAISES)

    def again(state: _Factor) -> _Factor:
        raised = jnp.maximum(state.damping, 1e-3) * 10
        return _Factor(attempt(raised), raised, state.raised + 1)

    first = _Factor(attempt(damping), damping, jnp.zeros((), jnp.int32))
    return lax.while_loop(failed, again, first)


@partial(jax.jit, static_argnames=("pattern", "block_size"))
def _sparsegpt(
    h: Array,
    w: Array,
    drops: Int[Array, " blocks"],
    damping: ArrayLike,
    *,
    pattern: Sparsity | None,
    block_size: int,
) -> PrunedLinear:
    weight = w.astype(jnp.promote_types(h.dtype, w.dtype))
    dead = jnp.diag(h) == 0
    h = h + jnp.diag(dead.astype(h.dtype))
    weight = jnp.where(dead[:, None], 0, weight)
    factor = _upper_factor_of_inverse(h, jnp.asarray(damping, h.dtype))

    # Whole blocks only: padding inputs have no weight, no coupling and are always kept.
    d_in, blocks = w.shape[0], drops.shape[0]
    padding = blocks * block_size - d_in
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    u = jnp.pad(factor.u, ((0, padding), (0, padding)))
    u = u + jnp.diag((jnp.arange(d_in + padding) >= d_in).astype(u.dtype))

    def one_block(weight: Array, each: tuple[Array, Array]) -> tuple[Array, Array]:
        start, drop = each
        rows = lax.dynamic_slice_in_dim(weight, start, block_size)
        factor_rows = lax.dynamic_slice_in_dim(u, start, block_size)
        square = lax.dynamic_slice_in_dim(factor_rows, start, block_size, axis=1)
        padded = (start + jnp.arange(block_size) >= d_in)[:, None]
        kept, pruned, errors = _prune_block(rows, square, padded, drop, pattern)
        later = jnp.arange(u.shape[0]) >= start + block_size
        weight = weight - contract("bj,bo->jo", jnp.where(later, factor_rows, 0), errors)
        return lax.dynamic_update_slice_in_dim(weight, pruned, start, axis=0), kept

    starts = jnp.arange(blocks) * block_size
    weight, kept = lax.scan(one_block, weight, (starts, drops))
    kept = kept.reshape(-1, w.shape[1])[:d_in]
    return PrunedLinear(
        weight=weight[:d_in].astype(w.dtype),
        keep_mask=kept,
        damping=factor.damping,
        damping_raised=factor.raised,
    )


def _prune_block(
    rows: Float[Array, "block d_out"],
    u: Float[Array, "block block"],
    padded: Bool[Array, "block 1"],
    drop: Int[Array, ""],
    pattern: Sparsity | None,
) -> tuple[Array, Array, Array]:
    """Keep mask, pruned weights and scaled errors of one block, input by input."""
    diagonal = jnp.diag(u)[:, None]

    def scores(rows: Array, diagonal: Array) -> Array:
        return (rows / diagonal) ** 2

    def one_input(i: Int[Array, ""], state: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, kept, errors = state
        if pattern is not None and pattern.m is not None:
            kept = lax.cond(i % pattern.m == 0, decide_group, lambda _, __, k: k, i, rows, kept)
        value = rows[i]
        pruned = jnp.where(kept[i], value, 0)
        error = (value - pruned) / u[i, i]
        # Row i of U is zero before i. Input i itself is set, not updated: an exact zero.
        rows = (rows - u[i][:, None] * error).at[i].set(pruned)
        return rows, kept, errors.at[i].set(error)

    def decide_group(i: Int[Array, ""], rows: Array, kept: Array) -> Array:
        assert pattern is not None
        assert pattern.m is not None
        members = lax.dynamic_slice_in_dim(rows, i, pattern.m)
        scale = lax.dynamic_slice_in_dim(diagonal, i, pattern.m)
        chosen = keep_mask(scores(members, scale), pattern)
        return lax.dynamic_update_slice_in_dim(kept, chosen, i, axis=0)

    if pattern is None:
        ranked = jnp.where(padded, jnp.inf, scores(rows, diagonal))
        kept = keep_highest(ranked.reshape(-1), drop).reshape(rows.shape)
    else:
        kept = jnp.ones(rows.shape, bool)
    rows, kept, errors = lax.fori_loop(
        0, rows.shape[0], one_input, (rows, kept, jnp.zeros_like(rows))
    )
    return kept, rows, errors


register(
    Baseline(
        "sparsegpt",
        "SparseGPT",
        sparsegpt,
        group="block",
        updates=True,
        moment=hessian,
        prune_from=sparsegpt_from_hessian,
    )
)
