"""A Llama in Flax NNX whose blocks are one compiled program, usable whole or block by block.

Related families differ by biases, by norms of queries and keys, by layers without positions: these
are optional weights of a block.

Axis names: ``b`` sequences, ``n`` tokens (queries), ``m`` tokens (keys), ``d`` width of the model,
``h`` query heads, ``g`` key-value heads, ``r = h/g`` query heads that share one, ``k`` width of a
head, ``f`` width of the MLP, ``v`` vocabulary, ``l`` blocks.

Weights are ``[d_in, d_out]``, ``y = x @ w``. Matrix products run at the highest precision of the
weights' type and accumulate in float32; norms, softmax and logits are float32, as in Hugging
Face's Llama. In bfloat16 the rotation is taken in float32 too and logits are not rounded, which
Hugging Face's code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxprune.attention import (
    BLOCK_ENTRIES,
    AttentionForm,
    attention_rows,
    causal_bias,
    contract,
    rms_norm,
)
from jaxprune.errors import InputError
from jaxprune.models.llama.config import (
    LlamaConfig,
    attention_factor,
    check_length,
    inverse_frequencies,
)

Tokens = Int[Array, "b n"] | Int[np.ndarray, "b n"]


class BlockWeights(NamedTuple):
    """Weights of one block, or of ``l`` blocks on a leading axis.

    The heads of ``wq``, ``wk``, ``wv`` lie one after the other on the output axis, those of
    ``wo`` on the input axis. What is ``None`` the architecture does not have.

    Attributes:
      attention_norm: scale of the norm before attention.
      wq: query projection.
      wk: key projection.
      wv: value projection.
      wo: output projection.
      mlp_norm: scale of the norm before the MLP.
      w_gate: gate of the MLP.
      w_up: what it gates.
      w_down: back to the width of the model.
      bq: bias of ``wq``; likewise ``bk``, ``bv``, ``bo``, ``b_gate``, ``b_up``, ``b_down``.
      query_norm: scale of the norm of every query head.
      key_norm: scale of the norm of every key head.
      rotary: 1 where queries and keys are turned, 0 where not; ``None`` where all blocks turn
        them. It follows from the settings and is in no file.
    """

    attention_norm: Float[Array, "*l d"]
    wq: Float[Array, "*l d h*k"]
    wk: Float[Array, "*l d g*k"]
    wv: Float[Array, "*l d g*k"]
    wo: Float[Array, "*l h*k d"]
    mlp_norm: Float[Array, "*l d"]
    w_gate: Float[Array, "*l d f"]
    w_up: Float[Array, "*l d f"]
    w_down: Float[Array, "*l f d"]
    bq: Float[Array, "*l h*k"] | None = None
    bk: Float[Array, "*l g*k"] | None = None
    bv: Float[Array, "*l g*k"] | None = None
    bo: Float[Array, "*l d"] | None = None
    b_gate: Float[Array, "*l f"] | None = None
    b_up: Float[Array, "*l f"] | None = None
    b_down: Float[Array, "*l d"] | None = None
    query_norm: Float[Array, "*l k"] | None = None
    key_norm: Float[Array, "*l k"] | None = None
    rotary: Float[Array, "*l"] | None = None


class LinearInputs(NamedTuple):
    """What the seven linear maps of a block are applied to; see ``INPUT_OF``."""

    attention: Float[Array, "b n d"]
    output: Float[Array, "b n h*k"]
    mlp: Float[Array, "b n d"]
    down: Float[Array, "b n f"]


# The field of ``LinearInputs`` that each linear map of a block reads.
INPUT_OF = {
    "wq": "attention",
    "wk": "attention",
    "wv": "attention",
    "wo": "output",
    "w_gate": "mlp",
    "w_up": "mlp",
    "w_down": "down",
}

_NORMS = {"attention_norm", "mlp_norm", "query_norm", "key_norm"}


def block_shapes(config: LlamaConfig) -> BlockWeights:
    """Shapes of one block's weights, ``None`` for those that it does not have."""
    d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * k, config.num_key_value_heads * k
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (d,),
        "wq": (d, queries),
        "wk": (d, keys),
        "wv": (d, keys),
        "wo": (queries, d),
        "mlp_norm": (d,),
        "w_gate": (d, f),
        "w_up": (d, f),
        "w_down": (f, d),
    }
    if config.attention_bias:
        shapes |= {"bq": (queries,), "bk": (keys,), "bv": (keys,)}
    if config.output_bias:
        shapes |= {"bo": (d,)}
    if config.mlp_bias:
        shapes |= {"b_gate": (f,), "b_up": (f,), "b_down": (d,)}
    if config.query_key_norm:
        shapes |= {"query_norm": (k,), "key_norm": (k,)}
    if config.layers_without_rope:
        shapes |= {"rotary": ()}
    return BlockWeights(**shapes)  # type: ignore[arg-type]


def rotary_layers(config: LlamaConfig, dtype: DTypeLike) -> Float[Array, " l"] | None:
    """``BlockWeights.rotary`` of all blocks."""
    if not config.layers_without_rope:
        return None
    turned = [i not in config.layers_without_rope for i in range(config.num_hidden_layers)]
    return jnp.array(turned, dtype)


def parameter_count(config: LlamaConfig) -> int:
    """Parameters of a model with these settings, a tied embedding counted once."""
    shapes = block_shapes(config)._replace(rotary=None)
    block = sum(math.prod(shape) for shape in shapes if shape is not None)
    embeddings = 1 if config.tie_word_embeddings else 2
    width = config.hidden_size
    return config.num_hidden_layers * block + (embeddings * config.vocab_size + 1) * width


class Llama(nnx.Module):
    """A Llama: token ids to logits.

    Attributes:
      config: settings, static.
      embedding: ``[v, d]``.
      blocks: the ``BlockWeights`` of all blocks on a leading axis.
      final_norm: ``[d]``.
      lm_head: ``[d, v]``, or ``None`` where the head is the transposed embedding.

    Args:
      config: settings.
      key: for random weights, normal with standard deviation 0.02 (norms are ones, biases zeros).
      dtype: type of weights and activations, float32 or bfloat16.

    Source: Touvron et al. 2023; compared with ``transformers.LlamaForCausalLM``.
    """

    def __init__(
        self, config: LlamaConfig, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config

        def normal(name: int, shape: tuple[int, ...]) -> Array:
            return (0.02 * jax.random.normal(jax.random.fold_in(key, name), shape)).astype(dtype)

        def stack(number: int, name: str, shape: tuple[int, ...]) -> Array:
            shape = (config.num_hidden_layers, *shape)
            if name in _NORMS:
                return jnp.ones(shape, dtype)
            return jnp.zeros(shape, dtype) if len(shape) == 2 else normal(number, shape)

        d, shapes = config.hidden_size, block_shapes(config)._replace(rotary=None)
        weights = {
            name: stack(number, name, shape)
            for number, (name, shape) in enumerate(shapes._asdict().items())
            if shape is not None
        }
        names = BlockWeights._fields.index("bq")  # what all families have comes before
        self.embedding = nnx.Param(normal(names, (config.vocab_size, d)))
        self.blocks = nnx.Param(BlockWeights(**weights, rotary=rotary_layers(config, dtype)))
        self.final_norm = nnx.Param(jnp.ones(d, dtype))
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Param(normal(names + 1, (d, config.vocab_size)))
        )

    def __call__(self, tokens: Tokens) -> Float[Array, "b n v"]:
        """Logits of the next token at every position, float32."""
        return self.head(self.hidden_states(tokens))

    def embed(self, tokens: Tokens) -> Float[Array, "b n d"]:
        """Hidden states before the first block.

        Raises:
          InputError: the sequences are too long for the model, see ``config.check_length``.
        """
        check_length(self.config, tokens.shape[1])
        return self.embedding.get_value()[tokens]

    def hidden_states(self, tokens: Tokens) -> Float[Array, "b n d"]:
        """Hidden states after the last block, what ``head`` takes."""
        return run_blocks(self.blocks.get_value(), self.embed(tokens), self.config)[0]

    def head(self, hidden: Float[Array, "*b n d"]) -> Float[Array, "*b n v"]:
        """Logits, float32, from the hidden states after the last block."""
        x = rms_norm(hidden, self.final_norm.get_value(), self.config.rms_norm_eps)
        if self.lm_head is None:
            return contract("...nd,vd->...nv", x, self.embedding.get_value())
        return contract("...nd,dv->...nv", x, self.lm_head.get_value())

    def activations(
        self, tokens: Tokens, layers: Sequence[int] | None = None
    ) -> Float[Array, "l b n d"]:
        """What W_Q, W_K and W_V of the chosen blocks are applied to; nothing else is kept.

        Args:
          tokens: token ids.
          layers: which blocks, all by default.

        Raises:
          InputError: there is no such block.
        """
        blocks = self.config.num_hidden_layers
        layers = tuple(range(blocks)) if layers is None else tuple(layers)
        wrong = [layer for layer in layers if not 0 <= layer < blocks]
        if wrong:
            raise InputError(f"layers: there is no block {wrong[0]}, only 0 to {blocks - 1}")
        hidden = self.embed(tokens)
        return run_blocks(self.blocks.get_value(), hidden, self.config, capture=layers)[1]

    def block_weights(self, layer: int) -> BlockWeights:
        """Weights of one block, for ``block``."""
        return one_block(self.blocks.get_value(), layer)


def one_block(stacks: BlockWeights, layer: Array | int) -> BlockWeights:
    """Weights of one block of those of all, which are stacked.

    Its number is an argument of the program, of which one serves all blocks.
    """
    return jax.tree.map(
        lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), stacks
    )


@partial(jax.jit, static_argnames=("config", "capture"))
def run_blocks(
    weights: BlockWeights,
    hidden: Float[Array, "b n d"],
    config: LlamaConfig,
    *,
    capture: tuple[int, ...] = (),
) -> tuple[Float[Array, "b n d"], Float[Array, "c b n d"]]:
    """Scan ``block`` over stacked weights.

    Args:
      weights: of all blocks, on a leading axis.
      hidden: hidden states before the first.
      config: settings.
      capture: blocks whose attention input is returned, in this order.

    Returns:
      Hidden states after the last block, and the captured inputs.
    """
    # Row `position[i]` of the buffer takes block i; a row past the end drops it.
    blocks = weights.wq.shape[0]
    rows = [capture.index(i) if i in capture else len(capture) for i in range(blocks)]
    buffer = jnp.zeros((len(capture), *hidden.shape), hidden.dtype)

    def step(
        carry: tuple[Array, Array], each: tuple[BlockWeights, Array]
    ) -> tuple[tuple[Array, Array], None]:
        (hidden, buffer), (weights, row) = carry, each
        hidden, inputs = block(weights, hidden, config)
        if capture:
            buffer = buffer.at[row].set(inputs.attention, mode="drop")
        return (hidden, buffer), None

    carry, _ = lax.scan(step, (hidden, buffer), (weights, jnp.array(rows)))
    return carry


@partial(jax.jit, static_argnames="config")
def block(
    weights: BlockWeights, hidden: Float[Array, "b n d"], config: LlamaConfig
) -> tuple[Float[Array, "b n d"], LinearInputs]:
    """One block: ``x += wo·attention(norm(x))``, then ``x += w_down·(silu(gate)·up)(norm(x))``.

    Args:
      weights: of one block; replace some to see a pruned one (``weights._replace(wq=...)``).
      hidden: hidden states before the block.
      config: settings, static.

    Returns:
      Hidden states after the block, and what each linear map was applied to. Inside another
      compiled function those that are dropped are not computed.
    """
    check_length(config, hidden.shape[1])
    x = rms_norm(hidden, weights.attention_norm, config.rms_norm_eps)
    form = attention_form(weights, config)
    q = form.queries(linear(x, weights.wq), config.num_attention_heads)
    k = form.keys(linear(x, weights.wk), config.num_key_value_heads)
    v = split_heads(linear(x, weights.wv, weights.bv), config.head_dim)
    return after_attention(weights, hidden, x, attention_output(q, k, v), config)


def attention_form(weights: BlockWeights, config: LlamaConfig) -> AttentionForm:
    """What a block does to the outputs of its ``W_Q`` and ``W_K`` before the softmax.

    Args:
      weights: of one block.
      config: settings.
    """
    rope, factor = jnp.asarray(inverse_frequencies(config)), attention_factor(config)
    scaled: Array | None = None if factor == 1 else jnp.asarray(factor, rope.dtype)
    if weights.rotary is not None:
        turned = lax.stop_gradient(weights.rotary).astype(rope.dtype)
        rope = turned * rope
        scaled = None if scaled is None else jnp.where(turned > 0, scaled, 1)
    return AttentionForm(
        rope=rope,
        query_bias=weights.bq,
        key_bias=weights.bk,
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        norm_eps=config.rms_norm_eps,
        rope_factor=scaled,
    )


def after_attention(
    weights: BlockWeights,
    hidden: Float[Array, "b n d"],
    x: Float[Array, "b n d"],
    attended: Float[Array, "b h n k"],
    config: LlamaConfig,
) -> tuple[Float[Array, "b n d"], LinearInputs]:
    """The rest of ``block``, from what the heads of its attention give.

    Args:
      weights: of the block.
      hidden: hidden states before the block.
      x: their normalisation, what attention was computed from.
      attended: output of the heads.
      config: settings.
    """
    output = attended.swapaxes(1, 2).reshape(*hidden.shape[:2], -1)
    hidden = hidden + linear(output, weights.wo, weights.bo)
    y = rms_norm(hidden, weights.mlp_norm, config.rms_norm_eps)
    gate = linear(y, weights.w_gate, weights.b_gate)
    down = jax.nn.silu(gate) * linear(y, weights.w_up, weights.b_up)
    hidden = hidden + linear(down, weights.w_down, weights.b_down)
    return hidden, LinearInputs(attention=x, output=output, mlp=y, down=down)


# Segments of a sequence in attention, from so many tokens on: four leave out three eighths of the
# logits, more would compile longer for little.
_SEGMENTS = 4
_SEGMENTED = 256


class Tapped(NamedTuple):
    """A weight whose output is seen: a gradient in ``tap`` is one in the output of the map."""

    weight: Float[Array, "i o"]
    tap: Float[Array, "*b o"]


def linear(
    x: Float[Array, "*b i"],
    w: Float[Array, "i o"] | Tapped,
    bias: Float[Array, " o"] | None = None,
) -> Float[Array, "*b o"]:
    """``x @ w + bias`` in the type of ``x``, accumulated in float32."""
    if isinstance(w, Tapped):
        return linear(x, w.weight, bias) + w.tap
    y = contract("...i,io->...o", x, w.astype(x.dtype))
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def split_heads(x: Float[Array, "b n e"], head_dim: int) -> Float[Array, "b h n k"]:
    """Heads that lie one after the other on the last axis, on an axis of their own."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def attention_output(
    q: Float[Array, "b h n k"], k: Float[Array, "b g n k"], v: Float[Array, "b g n k"]
) -> Float[Array, "b h n k"]:
    """Causal attention ``softmax(q kᵀ/√k) v`` with grouped query heads.

    The query heads that share a key head are one unit of work: their queries are rows of one
    matrix. Long sequences go in segments, each of which sees the keys up to its end and none of
    the later ones. Units are taken as many at once, or else in blocks of as many rows, as keep
    the logits near ``BLOCK_ENTRIES``; no array holds them for all heads.
    """
    (b, h, n, width), g = q.shape, k.shape[1]
    shared = h // g
    units = (
        (q * width**-0.5).reshape(b * g, shared, n, width),
        k.reshape(b * g, n, width),
        v.reshape(b * g, n, width),
    )
    count = _SEGMENTS if n >= _SEGMENTED else 1
    edges = [n * i // count for i in range(count + 1)]

    def segment(q: Array, k: Array, v: Array, start: int) -> Array:
        """Attention of rows ``start`` to the last key's."""
        stop = k.shape[0]

        def row(each: tuple[Array, Array]) -> Array:
            position, q = each
            weights = attention_rows(q, k, causal_bias(position[None], stop)[0])
            return contract("m,mk->k", weights.astype(v.dtype), v).astype(v.dtype)

        positions = jnp.tile(jnp.arange(start, stop), shared)
        rows = q[:, start:stop].reshape(-1, width)
        at_once = min(rows.shape[0], max(1, BLOCK_ENTRIES // stop))
        result = lax.map(row, (positions, rows), batch_size=at_once)
        return result.reshape(shared, stop - start, width)

    def unit(arrays: tuple[Array, Array, Array]) -> Array:
        q, k, v = arrays
        parts = [segment(q, k[:stop], v[:stop], start) for start, stop in pairwise(edges)]
        return jnp.concatenate(parts, axis=1)

    together = max(1, BLOCK_ENTRIES // (shared * n * n))
    return lax.map(unit, units, batch_size=min(together, b * g)).reshape(q.shape)
