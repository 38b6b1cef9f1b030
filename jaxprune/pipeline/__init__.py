"""A model pruned block by block, and a checkpoint in one call."""

from jaxprune.pipeline.model import (
    METHODS,
    TARGETS,
    Progress,
    PrunedBlock,
    PruneSettings,
    distillation_steps,
    prune_model,
    units,
)

__all__ = [
    "METHODS",
    "TARGETS",
    "Progress",
    "PruneSettings",
    "PrunedBlock",
    "distillation_steps",
    "prune_model",
    "units",
]
