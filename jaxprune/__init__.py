"""Prune transformer attention by what attention computes.

What this page lists takes and returns arrays. Where everything is:

- **A head or a layer**: `jaxprune.methods.fused` (the fused weight), `jaxprune.methods.query_key`
  (`W_Q` and `W_K`, positions exact), `jaxprune.methods.rotary` (the fused weight with positions).
- **Any linear layer**: `jaxprune.baselines`, magnitude, Wanda, SparseGPT, ADMM.
- **A checkpoint or a model**: `jaxprune.pipeline.checkpoint` in one call, `jaxprune.pipeline.model`
  block by block.
- **How much goes**: `jaxprune.sparsity` (ratios, N:M, keep masks), `jaxprune.allocation` (one
  budget over many matrices).
- **What is minimised**: `jaxprune.attention`, `jaxprune.objective`.
- **Engines**: `jaxprune.gauss_newton` (the closed form), `jaxprune.descent`.
- **The convergence theorem**: `jaxprune.convergence`.
- **Models and texts**: `jaxprune.models.llama`, `jaxprune.text`.
- **Perplexity, comparisons on many heads**: `jaxprune.evaluation`.
- **Run folders, figures**: `jaxprune.runs`.
- **The command line**: `jaxprune.commands`.
"""

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
