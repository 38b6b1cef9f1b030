"""Random heads to experiment on: activations of a given covariance, Gaussian projections."""

from __future__ import annotations

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


@partial(jax.jit, static_argnames="head")
def random_head(keys: HeadKeys, head: RandomHead) -> FusedProblem:
    """Draw activations and projections, the same for the same keys.

    Args:
      keys: one for every part.
      head: shapes and distribution.
    """
    d = head.d
    wq, wk = (jax.random.normal(key, (d, head.k)) for key in (keys.wq, keys.wk))
    x = jax.random.normal(keys.x, (head.sequences, head.n, d))
    heldout = jnp.zeros((0, head.n, d))
    if keys.heldout is not None:
        heldout = jax.random.normal(keys.heldout, (head.heldout, head.n, d))
    wq_seen, wk_seen = wq, wk
    if keys.rotation is not None:
        eigenvalues = jnp.arange(1, d + 1.0) ** -head.exponent
        deviations = jnp.sqrt(d * eigenvalues / eigenvalues.sum())[:, None]
        rotation, _ = qr(jax.random.normal(keys.rotation, (d, d)))
        coloured = deviations * rotation.T
        x, heldout = x @ coloured, heldout @ coloured
        wq_seen, wk_seen = (deviations * (rotation.T @ w) for w in (wq, wk))
    if head.logits_std is not None:
        # Variance of the logit of two independent tokens: ‖C^½ W_Q W_Kᵀ C^½‖_F².
        wq = wq * (head.logits_std / jnp.linalg.norm(wq_seen @ wk_seen.T))
    return FusedProblem(x=x, x_heldout=heldout, wq=wq, wk=wk)
