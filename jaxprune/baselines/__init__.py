"""Pruning of one linear layer ``y = x @ w``: a score, a comparison group, an optional update.

Weights are ``[d_in, d_out]``. All are pure, jitted functions of arrays: ``jax.vmap`` them over
heads, layers or, with a traced ratio, over sparsities. ``BASELINES`` lists them.
"""

from jaxprune.baselines.linear import PrunedLinear as PrunedLinear
from jaxprune.baselines.registry import BASELINES as BASELINES
from jaxprune.baselines.registry import Baseline as Baseline

# Each line makes a baseline known everywhere, in this order.
from jaxprune.baselines.magnitude import magnitude as magnitude  # isort: skip
from jaxprune.baselines.wanda import wanda as wanda  # isort: skip
from jaxprune.baselines.sparsegpt import sparsegpt as sparsegpt  # isort: skip
from jaxprune.baselines.admm import admm as admm  # isort: skip
