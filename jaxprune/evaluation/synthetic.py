"""Random heads to experiment on: activations of a given covariance, Gaussian projections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune.attention import qr
from jaxprune.evaluation.comparison import FusedProblem


class HeadKeys(NamedTuple):
    """What each part of a random head is drawn from.

    Attributes:
      wq: query projection.
      wk: key projection.
      x: calibration activations.
      heldout: activations to judge by; ``None`` for none.
      rotation: eigenvectors of the covariance; ``None`` leaves it diagonal.
    """

    wq: Key[Array, ""]
    wk: Key[Array, ""]
    x: Key[Array, ""]
    heldout: Key[Array, ""] | None = None
    rotation: Key[Array, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class RandomHead:
    """How a head is drawn.

    Attributes:
      d: width of the activations.
      k: width of the head.
      n: tokens of a sequence.
      sequences: to calibrate on.
      heldout: sequences to judge by.
      exponent: eigenvalues of the covariance are ``i^-exponent``, ``d`` in sum; 0 is isotropic.
      logits_std: standard deviation of the logit of two independent tokens, by the scale of
        ``W_Q``; ``None`` leaves entries of unit variance.
    """

    d: int
    k: int
    n: int
    sequences: int = 1
    heldout: int = 0
    exponent: float = 0.0
    logits_std: float | None = None


class _Draws(NamedTuple):
    """Standard normal numbers that a head is made of."""

    wq: Array
    wk: Array
    x: Array
    heldout: Array
    rotation: Array | None


# A generator takes longer to compile than all the rest of a head. Up to this many numbers, shapes
# share the programs of powers of eight.
_LARGE = 2**18


def _normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """``jax.random.normal(key, shape)``, whose numbers are the first ones of any larger draw."""
    size = math.prod(shape)
    shared = 8 ** -(-(size - 1).bit_length() // 3)
    return _first(_flat_normal(key, size if size > _LARGE else shared), shape)


@partial(jax.jit, static_argnames="size")
def _flat_normal(key: Key[Array, ""], size: int) -> Array:
    return jax.random.normal(key, (size,))


@partial(jax.jit, static_argnames="shape")
def _first(numbers: Array, shape: tuple[int, ...]) -> Array:
    return numbers[: math.prod(shape)].reshape(shape)


def random_head(keys: HeadKeys, head: RandomHead) -> FusedProblem:
    """Draw activations and projections, the same for the same keys.

    Args:
      keys: one for every part.
      head: shapes and distribution.
    """
    d, tokens = head.d, (head.n, head.d)
    draws = _Draws(
        _normal(keys.wq, (d, head.k)),
        _normal(keys.wk, (d, head.k)),
        _normal(keys.x, (head.sequences, *tokens)),
        jnp.zeros((0, *tokens))
        if keys.heldout is None
        else _normal(keys.heldout, (head.heldout, *tokens)),
        None if keys.rotation is None else _normal(keys.rotation, (d, d)),
    )
    return _shaped(draws, head)


@partial(jax.jit, static_argnames="head")
def _shaped(draws: _Draws, head: RandomHead) -> FusedProblem:
    """Covariance and logits as ``head`` has them."""
    wq, wk, x, heldout, rotation = draws
    wq_seen, wk_seen = wq, wk
    if rotation is not None:
        eigenvalues = jnp.arange(1, head.d + 1.0) ** -head.exponent
        deviations = jnp.sqrt(head.d * eigenvalues / eigenvalues.sum())[:, None]
        rotation, _ = qr(rotation)
        coloured = deviations * rotation.T
        x, heldout = x @ coloured, heldout @ coloured
        wq_seen, wk_seen = (deviations * (rotation.T @ w) for w in (wq, wk))
    if head.logits_std is not None:
        # Variance of the logit of two independent tokens: ‖C^½ W_Q W_Kᵀ C^½‖_F².
        wq = wq * (head.logits_std / jnp.linalg.norm(wq_seen @ wk_seen.T))
    return FusedProblem(x=x, x_heldout=heldout, wq=wq, wk=wk)
