"""Sparsity patterns, and rounding scores to keep masks with exact counts.

A ``keep_mask`` is boolean and True keeps. Rounding drops the entries of lowest score within each
comparison group, exactly as many as asked; of equal scores the first by index goes first, which
is what a stable ascending sort does. N:M is the same rule on groups of M consecutive inputs.

Selection is by bisection on the bits of the scores rather than by sorting: 32 counting passes,
which stay cheap inside a compiled loop (XLA on CPU sorts about thirty times slower) and allow the
number of dropped entries to be a traced value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxprune.attention import accumulation_dtype
from jaxprune.errors import InputError

Group = Literal["matrix", "input", "output", "block"]
"""Entries that compete with each other: the whole matrix, the weights of one input (a row of
``[d_in, d_out]``), of one output (a column), or of ``block_size`` consecutive inputs."""


@dataclass(frozen=True)
class Sparsity:
    """What to remove from a weight ``[d_in, d_out]``: a ratio of it, or all but N of every M.

    Hashable, so that it can be a static argument; a ratio may also be a traced scalar, so that
    ratios can be vmapped (``jax.vmap(lambda r: wanda(x, w, Sparsity(r)))(ratios)``).

    Attributes:
      ratio: fraction removed, in ``[0, 1]``.
      n: weights kept of every ``m`` consecutive inputs, or ``None`` for a plain ratio.
      m: size of an N:M group.

    Raises:
      InputError: a ratio outside ``[0, 1]``, or N:M other than ``1 <= N <= M``.
    """

    ratio: float | int | Array = 0.0
    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if (self.n is None) != (self.m is None):
            raise InputError("sparsity: N:M needs both N and M")
        if self.n is not None and self.m is not None:
            if not 1 <= self.n <= self.m:
                raise InputError(
                    f"sparsity {self.n}:{self.m}: expected 1 <= N <= M (2:4 keeps 2 of every 4)"
                )
            object.__setattr__(self, "ratio", 1 - self.n / self.m)
        elif not isinstance(self.ratio, jax.core.Tracer):
            object.__setattr__(self, "ratio", float(self.ratio))
            if not 0 <= self.ratio <= 1:
                raise InputError(
                    f"sparsity {self.ratio:g}: expected a removed fraction between 0 and 1, or N:M"
                )

    @classmethod
    def parse(cls, value: Any) -> Sparsity:
        """Read ``"0.5"``, ``"2:4"``, a number, a traced scalar or a ``Sparsity``.

        Raises:
          InputError: anything else.
        """
        if isinstance(value, Sparsity):
            return value
        if isinstance(value, str):
            text = value.strip()
            if match := re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text):
                return cls(n=int(match[1]), m=int(match[2]))
            try:
                return cls(float(text.encode("ascii")))
            except InputError:
                raise
            except ValueError:
                raise InputError(
                    f"sparsity {value!r}: expected a removed fraction, 0.5, or N:M, 2:4"
                ) from None
        if isinstance(value, jax.core.Tracer):
            return cls(value)
        try:
            return cls(float(value))
        except TypeError:
            raise InputError(f"sparsity {value!r}: expected a number, text or Sparsity") from None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.n is not None else f"{self.ratio:g}"

    def drop_count(self, size: int) -> int | Array:
        """Entries to drop from a comparison group, ``floor(size · ratio)``.

        Wanda's rule with a guard: 0.29 of 100 is 29 although the floating-point product is
        28.999…. A traced ratio is float32, whose guard is wider: exact for ratios of up to three
        decimals in groups of up to 4096, in larger ones up to ``5e-7 · size`` entries too many.
        """
        if self.n is not None and self.m is not None:
            return size // self.m * (self.m - self.n)
        if isinstance(self.ratio, jax.core.Tracer):
            return jnp.floor(size * self.ratio + 5e-7 * size).astype(jnp.int32)
        return math.floor(size * float(self.ratio) + 1e-9 * size)

    def check_divides(self, d_in: int) -> None:
        """Raise ``InputError`` where N:M groups do not fill ``d_in`` inputs."""
        if self.m is not None and d_in % self.m:
            raise InputError(
                f"sparsity {self}: groups of {self.m} do not divide the {d_in} inputs of the weight"
            )


def keep_mask(
    scores: Float[Array, "d_in d_out"],
    sparsity: Sparsity,
    *,
    group: Group = "matrix",
    block_size: int = 128,
    fraction: ArrayLike = 1.0,
) -> Bool[Array, "d_in d_out"]:
    """Round scores to a keep mask: the lowest of every comparison group are dropped.

    Args:
      scores: larger is more important; no NaN.
      sparsity: how many to drop. N:M has groups of its own and ignores ``group``.
      group: which entries compete.
      block_size: inputs of a group ``"block"``; the last block may be smaller.
      fraction: of the final drop count, in ``[0, 1]``, for schedules; may be traced. One is
        exact; below it counts are rounded down. With N:M, what the pattern would drop goes in
        the order of scores over the whole matrix, so that groups do not all lose one at once.

    Returns:
      True for kept entries; exactly ``drop_count`` of every group are False at fraction one.

    Raises:
      InputError: unknown group, or N:M that does not divide ``d_in``.
    """
    d_in, d_out = scores.shape
    sparsity.check_divides(d_in)
    if sparsity.m is not None:
        groups = scores.reshape(d_in // sparsity.m, sparsity.m, d_out).transpose(0, 2, 1)
        kept = keep_highest(groups, sparsity.drop_count(sparsity.m))
        kept = kept.transpose(0, 2, 1).reshape(d_in, d_out)
        if _is_one(fraction):
            return kept
        safe = jnp.where(kept, jnp.inf, scores).reshape(-1)
        return keep_highest(safe, _drop(sparsity, scores.size, fraction)).reshape(d_in, d_out)
    if group == "block":
        blocks = [scores[i : i + block_size] for i in range(0, d_in, block_size)]
        return jnp.concatenate([keep_mask(b, sparsity, fraction=fraction) for b in blocks])
    if group == "matrix":
        kept = keep_highest(scores.reshape(-1), _drop(sparsity, scores.size, fraction))
        return kept.reshape(d_in, d_out)
    if group == "input":
        return keep_highest(scores, _drop(sparsity, d_out, fraction))
    if group == "output":
        return keep_highest(scores.T, _drop(sparsity, d_in, fraction)).T
    raise InputError(f"group {group!r}: expected one of {', '.join(get_args(Group))}")


def _is_one(fraction: ArrayLike) -> bool:
    return isinstance(fraction, float) and fraction == 1.0


def _drop(sparsity: Sparsity, size: int, fraction: ArrayLike) -> int | Array:
    count = sparsity.drop_count(size)
    if _is_one(fraction):
        return count
    return jnp.floor(count * jnp.asarray(fraction, jnp.float32) + 1e-3).astype(jnp.int32)


@jax.jit
def keep_highest(
    scores: Float[Array, "*groups size"], drop: int | Int[Array, "..."]
) -> Bool[Array, "*groups size"]:
    """Keep all but the ``drop`` lowest scores of every group, ties by index (first goes first).

    Finds the largest bit pattern ``t`` with ``#{key < t} <= drop`` one bit at a time, where
    ``key`` maps floats to unsigned integers of the same order. All below ``t`` are dropped, and
    of those equal to it the first few that are still missing.

    Args:
      scores: no NaN; minus zero equals zero.
      drop: entries to drop in each group, ``0 … size``; may be traced.
    """
    keys = _ordered_bits(scores)
    drop = jnp.broadcast_to(jnp.asarray(drop, jnp.int32), keys.shape[:-1])[..., None]
    one = jnp.ones((), keys.dtype)

    def refine(i: Int[Array, ""], threshold: Array) -> Array:
        shift = (jnp.iinfo(keys.dtype).bits - 1 - i).astype(keys.dtype)
        candidate = threshold | (one << shift)
        below = jnp.sum(keys < candidate, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(below <= drop, candidate, threshold)

    start = jnp.zeros((*keys.shape[:-1], 1), keys.dtype)
    threshold = lax.fori_loop(0, jnp.iinfo(keys.dtype).bits, refine, start)
    below, tied = keys < threshold, keys == threshold
    missing = drop - jnp.sum(below, axis=-1, keepdims=True, dtype=jnp.int32)
    first_tied = tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= missing)
    return ~(below | first_tied)


def _ordered_bits(scores: Array) -> Array:
    """Unsigned integers that compare as the floats do (after adding minus zero to zero)."""
    upcast = scores.astype(accumulation_dtype(scores))
    upcast = jnp.where(upcast == 0, jnp.zeros_like(upcast), upcast)
    unsigned = jnp.uint64 if upcast.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(lax.stop_gradient(upcast), unsigned)
    sign = jnp.ones((), unsigned) << (jnp.iinfo(unsigned).bits - 1)
    return jnp.where(bits & sign, ~bits, bits | sign)
