"""What tests of the pipeline watch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from jaxprune.models.llama.modeling import BlockWeights
from jaxprune.pipeline import model as pipeline
from jaxprune.pipeline.curvature import Curvature


class Taken(NamedTuple):
    """A curvature: of which weights, with which key, what it was."""

    blocks: BlockWeights
    key: Array
    curvature: Curvature


@pytest.fixture
def taken(monkeypatch):
    """Every curvature of the predictions that the pipeline takes."""

    def recorded(model, tokens, names, key, **named):
        blocks = jax.tree.map(jnp.copy, model.blocks.get_value())
        curvature = prediction_curvature(model, tokens, names, key, **named)
        found.append(Taken(blocks, key, curvature))
        return curvature

    prediction_curvature, found = pipeline.prediction_curvature, []
    monkeypatch.setattr(pipeline, "prediction_curvature", recorded)
    return found
