"""Prune transformer attention by what attention computes."""

from jaxprune import baselines
from jaxprune.attention import attention_matrix, relative_error
from jaxprune.baselines import PrunedLinear
from jaxprune.errors import InputError
from jaxprune.methods.fused import PrunedAttention, prune_attention
from jaxprune.methods.query_key import PrunedQueryKey, prune_query_key
from jaxprune.objective import closed_form_gradient, mask_loss, softmax_error
from jaxprune.sparsity import Sparsity

__all__ = [
    "InputError",
    "PrunedAttention",
    "PrunedLinear",
    "PrunedQueryKey",
    "Sparsity",
    "attention_matrix",
    "baselines",
    "closed_form_gradient",
    "mask_loss",
    "prune_attention",
    "prune_query_key",
    "relative_error",
    "softmax_error",
]
