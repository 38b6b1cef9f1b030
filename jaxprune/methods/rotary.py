"""One head's fused weight under rotary positions, pruned by one mask, exactly.

With RoPE the fused weight depends on the distance ``δ = i − j`` of query and key:
``W_Q R(δ) W_Kᵀ = Σ_f cos(δθ_f) A_f + sin(δθ_f) B_f`` with ``d × d`` matrices that do not. A
mask ``M`` on every ``A_f`` and ``B_f`` is a mask on the fused weight of every distance, and by
``cos(a − b) = cos a cos b + sin a sin b`` and its like for the sine the logits
``x_i (M ∘ W_Q R(i−j) W_Kᵀ) x_jᵀ`` are inner products of queries and keys of width ``k·d``, which
is what ``jaxprune.objective.softmax_error`` takes. Their cost is ``d`` times that of the factored
logits: affordable for small models.

Everything is for one head; ``vmap`` or ``lax.map`` for more.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Key, PyTree

from jaxprune.attention import contract, rotary_embedding, row_errors
from jaxprune.descent.gradual import gradual_descent, split_sequences
from jaxprune.descent.loop import Descent, descend
from jaxprune.descent.relaxations import none
from jaxprune.importance import shrunk_norms
from jaxprune.methods.fused import round_and_judge
from jaxprune.objective import softmax_error
from jaxprune.sparsity import Sparsity


class RotaryHead(NamedTuple):
    """One head with positions.

    Attributes:
      wq: query projection, the scale ``1/√k`` included.
      wk: key projection.
      rope: inverse frequencies ``θ_f``, radians per position, or ``None`` for no positions.
    """

    wq: Float[Array, "*h d k"]
    wk: Float[Array, "*h d k"]
    rope: Float[Array, " f"] | None


def frequency_matrices(
    head: RotaryHead,
) -> tuple[Float[Array, "f d d"], Float[Array, "f d d"]]:
    """Matrices with ``W_Q R(δ) W_Kᵀ = Σ_f cos(δθ_f) A_f + sin(δθ_f) B_f``.

    Rotate-half layout, ``h = k/2``: ``A_f = q_f k_fᵀ + q_{f+h} k_{f+h}ᵀ`` and
    ``B_f = q_f k_{f+h}ᵀ − q_{f+h} k_fᵀ`` with the columns ``q``, ``k`` of the projections.
    """
    q1, q2 = jnp.split(head.wq, 2, axis=-1)
    k1, k2 = jnp.split(head.wk, 2, axis=-1)
    outer = partial(contract, "df,ef->fde")
    a = outer(q1, k1) + outer(q2, k2)
    b = outer(q1, k2) - outer(q2, k1)
    return a.astype(head.wq.dtype), b.astype(head.wq.dtype)


def _turns(n: int, rope: Array) -> tuple[Float[Array, "n f"], Float[Array, "n f"]]:
    angles = jnp.arange(n)[:, None].astype(rope.dtype) * rope
    return jnp.cos(angles), jnp.sin(angles)


def expanded_queries(
    x: Float[Array, "*b n d"], multiplier: Float[Array, "d d"], head: RotaryHead
) -> Float[Array, "*b n e"]:
    """Queries whose products with ``expanded_keys`` are ``x_i (M ∘ W_Q R(i−j) W_Kᵀ) x_jᵀ``.

    ``[c_i x_i Ã_f + s_i x_i B̃_f, s_i x_i Ã_f − c_i x_i B̃_f]`` for all ``f``, with
    ``Ã = M∘A``, ``c_i = cos(iθ_f)``, ``s_i = sin(iθ_f)``. Without positions ``x (M ∘ W_Q W_Kᵀ)``.

    Args:
      x: activations.
      multiplier: ``M``, a mask or any other factors of the entries.
      head: the head.

    Returns:
      Width ``e = k·d``, or ``d`` without positions.
    """
    if head.rope is None:
        w = contract("dk,ek->de", head.wq, head.wk)
        return contract("...nd,de->...ne", x, multiplier * w).astype(x.dtype)
    a, b = (multiplier * matrices for matrices in frequency_matrices(head))
    cos, sin = (turn[..., None] for turn in _turns(x.shape[-2], head.rope))
    xa, xb = (contract("...nd,fde->...nfe", x, m) for m in (a, b))
    queries = jnp.stack([cos * xa + sin * xb, sin * xa - cos * xb], axis=-2)
    return queries.reshape(*x.shape[:-1], -1).astype(x.dtype)


def expanded_keys(
    x: Float[Array, "*b n d"], rope: Float[Array, " f"] | None
) -> Float[Array, "*b n e"]:
    """Keys ``[c_j x_j, s_j x_j]`` for all ``f``, the same for all heads; see ``expanded_queries``.

    Args:
      x: activations.
      rope: inverse frequencies; without them the keys are ``x``.
    """
    if rope is None:
        return x
    turns = jnp.stack(_turns(x.shape[-2], rope), axis=-1)  # [n, f, 2]
    keys = turns[..., None] * x[..., :, None, None, :]
    return keys.reshape(*x.shape[:-1], -1).astype(x.dtype)


def typical_weight(head: RotaryHead) -> Float[Array, "d d"]:
    """Root mean square over all angles of the entries of ``W_Q R W_Kᵀ``: ``√(½ Σ_f A_f² + B_f²)``.

    Without positions the absolute values of the fused weight.
    """
    if head.rope is None:
        return jnp.abs(contract("dk,ek->de", head.wq, head.wk)).astype(head.wq.dtype)
    a, b = frequency_matrices(head)
    return jnp.sqrt(0.5 * jnp.sum(a**2 + b**2, axis=0))


def rotary_error(
    multiplier: Float[Array, "d d"], x: Float[Array, "b n d"], head: RotaryHead
) -> Float[Array, " b"]:
    """Half the squared error of the attention matrix with RoPE, for every sequence.

    The error term of Def. 3.2 of Liang et al. 2025 with the logits of the model.
    """
    # Blocks shorter than the sequence skip most of what lies above the diagonal.
    return softmax_error(*_logit_factors(multiplier, x, head), block_size=max(16, x.shape[-2] // 4))


def _logit_factors(multiplier: Array, x: Array, head: RotaryHead) -> tuple[Array, ...]:
    """Queries and keys of the masked and of the dense logits."""
    q0, k0 = (contract("...nd,dk->...nk", x, w).astype(x.dtype) for w in (head.wq, head.wk))
    if head.rope is not None:
        q0, k0 = rotary_embedding(q0, head.rope), rotary_embedding(k0, head.rope)
    return expanded_queries(x, multiplier, head), expanded_keys(x, head.rope), q0, k0


def rotary_algorithm1(
    x: Float[Array, "b n d"],
    head: RotaryHead,
    ratios: Float[Array, " r"],
    *,
    multiples: Float[Array, " p"],
    decays: Float[Array, " p"],
    steps: int,
    batch_size: int,
    judged: int = 4,
) -> Bool[Array, "r d d"]:
    """Algorithm 1 on the logits with RoPE: keep masks at several ratios.

    ``½‖D̃⁻¹Ã − D⁻¹A‖_F² + ½λ‖M‖_F²`` by gradient descent from ``M = 1``; λ is a multiple of the
    root mean square of the error's gradient at ``M = 0``, η is decay / λ. Of several pairs each
    ratio takes the one with the least error on some of the calibration sequences.

    Args:
      x: calibration activations.
      head: the head.
      ratios: fractions removed.
      multiples: λ to try, in units of the gradient.
      decays: decay of a mask entry in one step that the regulariser alone would cause, one for
        each λ.
      steps: updates.
      batch_size: sequences of a step.
      judged: sequences to choose on.
    """
    sample = x[:: -(-x.shape[0] // judged)]

    def objective(multiplier: Array, batch: PyTree) -> Array:
        return jnp.mean(rotary_error(multiplier, batch["x"], head))

    gradient = jax.grad(objective)(jnp.zeros((x.shape[-1],) * 2, x.dtype), {"x": sample})
    scale = jnp.sqrt(jnp.mean(gradient**2))
    lams = multiples * jnp.where(scale > 0, scale, 1)

    def learn(pair: tuple[Array, Array]) -> Array:
        lam, decay = pair
        descent = Descent(
            objective=objective,
            relaxation=none(),
            optimizer=optax.sgd(decay / lam),
            sparsity=Sparsity(0.5),
            steps=steps,
            batch_size=batch_size,
            penalty=lambda mask: 0.5 * lam * jnp.sum(mask**2),
        )
        ones = jnp.ones((x.shape[-1],) * 2, x.dtype)
        return descend(descent, ones, {"x": x}, key=jax.random.key(0)).state.variable

    masks = jax.lax.map(learn, (lams, decays))

    def at_ratio(ratio: Array) -> Array:
        ones = jnp.ones_like(masks[0])
        kept, errors = round_and_judge(lambda m: objective(m, {"x": sample}), ones, masks, ratio)
        return kept[jnp.argmin(errors)]

    return jax.lax.map(at_ratio, ratios)


def rotary_descent(
    x: Float[Array, "b n d"],
    head: RotaryHead,
    sparsity: Sparsity,
    *,
    steps: int,
    batch_size: int,
    learning_rate: ArrayLike = 0.1,
    anchor_weight: ArrayLike = 0.03,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "d d"], Bool[Array, "d d"]]:
    """Preset ``descent`` on the logits with RoPE: factors of the entries, zero where dropped.

    The variable is ``V = M ∘ T`` with ``T`` the typical weight of every entry, so that steps,
    ranking ``|V_ij| s_i s_j`` and penalty mean what they mean in ``jaxprune.prune_attention``; kept
    factors adapt, the same at every distance.

    Args:
      x: calibration activations; every eighth sequence validates.
      head: the head.
      sparsity: of the mask.
      steps: updates.
      batch_size: sequences of a step.
      learning_rate: Adam's step in units of the mean of ``T``.
      anchor_weight: of the distance to factors of one.
      key: randomness of the batches.

    Returns:
      The factors ``M`` and the keep mask.
    """
    typical = typical_weight(head)
    factor = 1 / jnp.where(typical > 0, typical, 1)
    fit, validation = split_sequences({"x": x})
    norms = shrunk_norms(fit["x"])

    def objective(variable: Array, batch: PyTree) -> Array:
        return jnp.mean(rotary_error(variable * factor, batch["x"], head))

    def errors_of_rows(variable: Array, batch: PyTree) -> Array:
        factors = _logit_factors(variable * factor, batch["x"], head)
        return 0.5 * row_errors(*factors)[0].reshape(-1)

    descent = gradual_descent(
        objective,
        typical,
        sparsity,
        rank=lambda v: jnp.abs(v) * norms[:, None] * norms,
        group="matrix",
        steps=steps,
        learning_rate=learning_rate,
        anchor_weight=anchor_weight,
        batch_size=batch_size,
        sample_errors=errors_of_rows,
    )
    key = jax.random.key(0) if key is None else key
    result = descend(descent, typical, fit, key=key, validation=validation)
    return result.weights * factor, result.keep_masks
