"""A model pruned block by block, and a checkpoint in one call."""

from jaxprune.pipeline.checkpoint import PruneReport, prune_checkpoint
from jaxprune.pipeline.model import (
    Progress,
    PrunedBlock,
    distillation_steps,
    prune_model,
    units,
)
from jaxprune.pipeline.settings import METHODS, TARGETS, CurvatureSettings, PruneSettings

__all__ = [
    "METHODS",
    "TARGETS",
    "CurvatureSettings",
    "Progress",
    "PruneReport",
    "PruneSettings",
    "PrunedBlock",
    "distillation_steps",
    "prune_checkpoint",
    "prune_model",
    "units",
]
