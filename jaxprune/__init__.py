"""Prune transformer attention by what attention computes."""

from jaxprune.attention import attention_matrix, relative_error
from jaxprune.objective import closed_form_gradient, mask_loss, softmax_error

__all__ = [
    "attention_matrix",
    "closed_form_gradient",
    "mask_loss",
    "relative_error",
    "softmax_error",
]
