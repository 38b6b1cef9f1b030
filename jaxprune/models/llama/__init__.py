"""Llama: settings, model, checkpoints."""

from jaxprune.models.llama.checkpoint import load, load_config, save
from jaxprune.models.llama.config import Llama3Scaling, LlamaConfig, inverse_frequencies
from jaxprune.models.llama.files import locate
from jaxprune.models.llama.modeling import BlockWeights, LinearInputs, Llama, block, parameter_count

__all__ = [
    "BlockWeights",
    "LinearInputs",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "block",
    "inverse_frequencies",
    "load",
    "load_config",
    "locate",
    "parameter_count",
    "save",
]
