"""Pruning in closed form: quadratic forms of objectives, and a solver for them.

``moments`` finds Kronecker factors of the Gauss-Newton matrix of any differentiable residual,
``residuals`` has those of attention, ``admm`` prunes a matrix on such a form, and ``query_key``
puts them together for the projections of attention. Arrays in, arrays out.
"""

from jaxprune.gauss_newton.admm import (
    Factor,
    PrunedKronecker,
    factorise,
    kronecker_admm,
    redamped,
    ridge_solution,
)
from jaxprune.gauss_newton.moments import Form, Moments, gauss_newton_moments
from jaxprune.gauss_newton.query_key import (
    QueryKeyMoments,
    fused_moments,
    prune_query_key_on,
    query_key_moments,
)
from jaxprune.gauss_newton.residuals import AttentionMatrices, FusedAttention

__all__ = [
    "AttentionMatrices",
    "Factor",
    "Form",
    "FusedAttention",
    "Moments",
    "PrunedKronecker",
    "QueryKeyMoments",
    "factorise",
    "fused_moments",
    "gauss_newton_moments",
    "kronecker_admm",
    "prune_query_key_on",
    "query_key_moments",
    "redamped",
    "ridge_solution",
]
