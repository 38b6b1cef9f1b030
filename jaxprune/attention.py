"""Attention matrices and how far two of them are apart.

Axis names used throughout the package: ``b`` sequences, ``n`` tokens (queries), ``m`` tokens
(keys), ``d`` width of the model, ``h`` heads, ``k`` width of a head, ``e`` width of whatever
logits are inner products of.

Matrix products are taken at the highest precision of their inputs' type; softmax and sums are
at least float32, also for bfloat16 inputs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxprune.errors import InputError

# Row blocks are chosen so that one block of logits of one head has about this many entries.
BLOCK_ENTRIES = 2**18


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """Type of softmaxes and sums: float64 for float64 inputs, float32 for all others."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


# One matrix at a time: on a CPU, batches of two independent decompositions or solves share the
# threads of one pool and may wait for each other for ever (jaxlib 0.10). Nothing else in the
# package calls those of JAX.
@jax.custom_batching.sequential_vmap
def cholesky(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Lower triangular ``L`` with ``A = L Lᵀ``; not finite where there is none."""
    return jnp.linalg.cholesky(matrix)


@jax.custom_batching.sequential_vmap
def eigh(matrix: Float[Array, "d d"]) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=True)
    return values, vectors


@jax.custom_batching.sequential_vmap
def qr(matrix: Float[Array, "n d"]) -> tuple[Float[Array, "n r"], Float[Array, "r d"]]:
    """``Q`` with orthonormal columns and upper triangular ``R``, ``A = Q R``."""
    q, r = jnp.linalg.qr(matrix)
    return q, r


def triangular_solve(
    triangle: Float[Array, "d d"],
    b: Float[Array, "d s"],
    *,
    lower: bool,
    transpose: bool = False,
) -> Float[Array, "d s"]:
    """``T⁻¹ B``, or ``T⁻ᵀ B``, of a lower or an upper triangle."""

    @jax.custom_batching.sequential_vmap
    def solve(triangle: Array, b: Array) -> Array:
        return lax.linalg.triangular_solve(
            triangle, b, left_side=True, lower=lower, transpose_a=transpose
        )

    return solve(triangle, b)


def contract(equation: str, *arrays: Array) -> Array:
    """``jnp.einsum`` at the highest precision, accumulated (and returned) in float32 or wider."""
    return jnp.einsum(
        equation,
        *arrays,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(*arrays),
    )


def causal_bias(
    rows: Int[Array, " n"], keys: int, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "n m"]:
    """Additive mask of Def. 3.1: 0 where key ``j <= rows[i]``, else minus infinity."""
    return jnp.where(jnp.arange(keys) <= rows[:, None], 0.0, -jnp.inf).astype(dtype)


def attention_rows(
    q: Float[Array, "*r e"],
    k: Float[Array, "m e"],
    bias: Float[Array, "*r m"] | None = None,
) -> Float[Array, "*r m"]:
    """Rows ``softmax(q kᵀ + bias)`` of an attention matrix, the one softmax of the package."""
    logits = contract("...e,me->...m", q, k)
    if bias is not None:
        logits = logits + bias
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention_matrix(
    x: Float[Array, "... n d"], w: Float[Array, "... d d"], *, causal: bool = True
) -> Float[Array, "... n n"]:
    """Attention matrix ``D⁻¹A`` with ``A = exp(x w xᵀ)``, ``D = diag(A 1)``, a row softmax.

    Args:
      x: activations, one row a token; leading axes broadcast against those of ``w``.
      w: fused attention weight ``W_Q W_Kᵀ``, any scale ``1/√k`` included.
      causal: entries ``j > i`` are zero before the row sum (Def. 3.1); else Def. 1.1.

    Returns:
      Rows that sum to one; float32, or float64 for float64 inputs.

    Source: Liang et al. 2025, Def. 1.1 and 3.1.
    """
    check_fused(x, w)

    def one(x: Array, w: Array) -> Array:
        n = x.shape[0]
        queries = contract("nd,de->ne", x, w).astype(x.dtype)
        return attention_rows(queries, x, causal_bias(jnp.arange(n), n) if causal else None)

    return jnp.vectorize(one, signature="(n,d),(d,d)->(n,n)")(x, w)


def relative_error(
    x: Float[Array, "*b n d"],
    w: Float[Array, "d d"],
    pruned_w: Float[Array, "d d"],
    *,
    causal: bool = True,
    row_weights: Float[Array, "*b n"] | None = None,
) -> Float[Array, ""]:
    """Relative error ``‖F̃ − F‖_F² / ‖F‖_F²`` of a pruned attention matrix, the paper's measure.

    Numerator and denominator are pooled over the leading axes of ``x`` before the division.
    Computed in row blocks: no ``n × n`` array is held.

    Args:
      x: activations of one or several sequences.
      w: fused weight that defines the attention ``F``.
      pruned_w: fused weight that defines ``F̃``.
      causal: see ``attention_matrix``.
      row_weights: weight of every row's squared error and energy; zero leaves a row out.

    Returns:
      A scalar in ``[0, 2]``; 0 is exact.
    """
    check_fused(x, w)
    check_fused(x, pruned_w)
    check_row_weights(row_weights, x)
    queries = contract("...nd,de->...ne", x, pruned_w).astype(x.dtype)
    queries0 = contract("...nd,de->...ne", x, w).astype(x.dtype)
    error, energy = row_errors(queries, x, queries0, x, causal=causal)
    if row_weights is not None:
        error, energy = error * row_weights, energy * row_weights
    return error.sum() / energy.sum()


@partial(jax.jit, static_argnames="causal")
def row_errors(
    q: Float[Array, "... n e"],
    k: Float[Array, "... n e"],
    q0: Float[Array, "... n f"],
    k0: Float[Array, "... n f"],
    *,
    causal: bool = True,
) -> tuple[Float[Array, "... n"], Float[Array, "... n"]]:
    """Squared error ``‖F̃_i − F_i‖²`` and energy ``‖F_i‖²`` of every row, in row blocks.

    Args:
      q: queries of the approximation ``F̃ = softmax(q kᵀ)``, any scale included. Leading axes of
        all arguments broadcast.
      k: keys of the approximation.
      q0: queries of the reference ``F``.
      k0: keys of the reference.
      causal: see ``attention_matrix``.

    Returns:
      Both for every row; the quotient of their sums is the relative error.
    """
    n = q.shape[-2]
    lead = jnp.broadcast_shapes(*(a.shape[:-2] for a in (q, k, q0, k0)))
    flat = [
        jnp.broadcast_to(a, (*lead, *a.shape[-2:])).reshape(-1, *a.shape[-2:])
        for a in (q, k, q0, k0)
    ]

    def one_head(arrays: list[Array]) -> tuple[Array, Array]:
        q, k, q0, k0 = arrays

        def one_row(row: tuple[Array, ...]) -> tuple[Array, Array]:
            i, q, q0 = row
            bias = causal_bias(i[None], n)[0] if causal else None
            target = attention_rows(q0, k0, bias)
            difference = attention_rows(q, k, bias) - target
            return jnp.sum(difference**2), jnp.sum(target**2)

        return lax.map(one_row, (jnp.arange(n), q, q0), batch_size=min(n, 1 + BLOCK_ENTRIES // n))

    error, energy = lax.map(one_head, flat, batch_size=max(1, BLOCK_ENTRIES // n**2))
    return error.reshape(*lead, n), energy.reshape(*lead, n)


def rotary_embedding(
    x: Float[Array, "*h n k"],
    inverse_frequencies: Float[Array, " k/2"],
    positions: Int[Array, " n"] | None = None,
    factor: ArrayLike | None = None,
) -> Float[Array, "*h n k"]:
    """Rotary position embedding in the rotate-half layout of Llama.

    Component ``f`` and ``f + k/2`` of token ``i`` turn by the angle ``positions[i] · θ_f``:
    ``(a, b) → (a cos − b sin, b cos + a sin)``.

    Args:
      x: queries or keys, tokens on the last axis but one.
      inverse_frequencies: ``θ_f``, radians per position, any rope scaling applied.
      positions: of the tokens; ``0 … n−1`` by default.
      factor: cosines and sines are multiplied by it.

    Returns:
      Rotated ``x`` in its own type; angles and products are float32 or wider.

    Source: Su et al. 2021 (RoFormer); the pairing is that of Hugging Face's Llama.
    """
    if positions is None:
        positions = jnp.arange(x.shape[-2])
    dtype = accumulation_dtype(x)
    angles = positions[:, None].astype(dtype) * inverse_frequencies.astype(dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor is not None:
        cos, sin = (turn * jnp.asarray(factor, dtype) for turn in (cos, sin))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: ArrayLike
) -> Float[Array, "*b d"]:
    """``scale · x / √(mean(x²) + eps)``; the quotient is taken in float32 or wider."""
    upcast = x.astype(accumulation_dtype(x))
    mean_square = jnp.mean(upcast**2, axis=-1, keepdims=True)
    return scale * (upcast * lax.rsqrt(mean_square + eps)).astype(x.dtype)


class AttentionForm(NamedTuple):
    """What an architecture does to the outputs of ``W_Q`` and ``W_K`` before the softmax.

    In this order: a bias, an RMS norm of every head, rotary positions. What is ``None`` is left
    out. The model and the objective both go through ``queries`` and ``keys``, so that what is
    pruned on is what the model computes.

    Attributes:
      rope: inverse frequencies ``θ_f``, radians per position; zeros turn nothing.
      query_bias: added to the output of ``W_Q``, heads one after the other.
      key_bias: added to the output of ``W_K``.
      query_norm: scale of the RMS norm over the features of a query head.
      key_norm: scale of that of a key head.
      norm_eps: added to the mean square in these norms.
      rope_factor: queries and keys are multiplied by it as they are turned.
    """

    rope: Float[Array, " f"] | None = None
    query_bias: Float[Array, " h*k"] | None = None
    key_bias: Float[Array, " g*k"] | None = None
    query_norm: Float[Array, " k"] | None = None
    key_norm: Float[Array, " k"] | None = None
    norm_eps: ArrayLike = 1e-6
    rope_factor: ArrayLike | None = None

    def queries(
        self, y: Float[Array, "*b n e"], heads: int, positions: Int[Array, " n"] | None = None
    ) -> Float[Array, "*b h n k"]:
        """Query heads from the output ``y`` of ``W_Q``, without the scale of the logits."""
        return self._heads(y, heads, positions, self.query_bias, self.query_norm)

    def keys(
        self, y: Float[Array, "*b n e"], heads: int, positions: Int[Array, " n"] | None = None
    ) -> Float[Array, "*b g n k"]:
        """Key heads from the output ``y`` of ``W_K``."""
        return self._heads(y, heads, positions, self.key_bias, self.key_norm)

    def _heads(
        self,
        y: Array,
        heads: int,
        positions: Array | None,
        bias: Array | None,
        norm: Array | None,
    ) -> Array:
        if bias is not None:
            y = y + bias.astype(y.dtype)
        y = y.reshape(*y.shape[:-1], heads, -1)
        if norm is not None:
            y = rms_norm(y, norm.astype(y.dtype), self.norm_eps)
        y = jnp.moveaxis(y, -2, -3)
        if self.rope is None:
            return y
        return rotary_embedding(y, self.rope, positions, self.rope_factor)


def check_fused(x: Array, w: Array, name: str = "w") -> None:
    """Raise ``InputError`` unless ``x`` is ``[..., n, d]`` and ``w`` is ``[..., d, d]``."""
    if x.ndim < 2 or w.ndim < 2 or w.shape[-1] != w.shape[-2] or w.shape[-1] != x.shape[-1]:
        raise InputError(
            f"x of shape {x.shape} and {name} of shape {w.shape} do not match: "
            "expected [..., n, d] and [..., d, d]"
        )


def check_row_weights(row_weights: Array | None, x: Array) -> None:
    """Raise ``InputError`` unless every token of ``x`` has a weight, and some count."""
    if row_weights is not None and row_weights.shape != x.shape[:-1]:
        raise InputError(
            f"row_weights of shape {row_weights.shape} and x of shape {x.shape} do not match: "
            "expected one weight for every token"
        )
    if row_weights is None or isinstance(row_weights, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        usable = bool((row_weights >= 0).all() & (row_weights > 0).any())
    if not usable:
        raise InputError("row_weights: expected none below zero and at least one above")


def check_finite(**arrays: ArrayLike | None) -> None:
    """Raise ``InputError`` naming the first concrete array that holds NaN or infinity."""
    for name, array in arrays.items():
        if array is None or isinstance(array, jax.core.Tracer):
            continue
        # A concrete array closed over by a traced function is looked at now, not traced.
        with jax.ensure_compile_time_eval():
            bad = int(jnp.size(array) - jnp.isfinite(array).sum())
        if bad:
            raise InputError(f"{name} holds {bad} non-finite values; clean or drop them first")
