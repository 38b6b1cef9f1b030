"""Llama and related families: settings, model, checkpoints."""

from jaxprune.models.llama.checkpoint import load, load_config, save
from jaxprune.models.llama.config import (
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    YarnScaling,
    check_length,
    inverse_frequencies,
)
from jaxprune.models.llama.modeling import BlockWeights, LinearInputs, Llama, block, parameter_count
from jaxprune.models.llama.sources import locate

__all__ = [
    "BlockWeights",
    "LinearInputs",
    "LinearScaling",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "YarnScaling",
    "block",
    "check_length",
    "inverse_frequencies",
    "load",
    "load_config",
    "locate",
    "parameter_count",
    "save",
]
