"""Pruning of one linear layer ``y = x @ w``: a score, a comparison group, an optional update.

Weights are ``[d_in, d_out]``. All are pure, jitted functions of arrays: ``jax.vmap`` them over
heads, layers or, with a traced ratio, over sparsities.
"""

from jaxprune.baselines.linear import PrunedLinear
from jaxprune.baselines.magnitude import magnitude
from jaxprune.baselines.sparsegpt import sparsegpt
from jaxprune.baselines.wanda import wanda

__all__ = ["PrunedLinear", "magnitude", "sparsegpt", "wanda"]
