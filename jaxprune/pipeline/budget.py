"""One budget of zeros over the matrices of a block or a model."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Array, Float

from jaxprune.allocation import allocate, saliency_counts
from jaxprune.gauss_newton import saliency
from jaxprune.models.llama.modeling import Llama
from jaxprune.pipeline.curvature import Curvature, MapCurvature
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.sparsity import Sparsity


def share_out(
    model: Llama, curvature: Curvature, settings: PruneSettings
) -> list[dict[str, Sparsity]]:
    """Ratios by which the matrices together lose ``sparsity``, where predictions feel it least.

    Entries compete by the divergence of the predictions that dropping one costs, all others of its
    matrix adapting (``gauss_newton.saliency``): some matrices make up for nearly all of what they
    lose, others for little. Totals over a block, or over the model, are those of equal ratios.

    Args:
      model: the dense model.
      curvature: of its predictions.
      settings: what competes, the ratio, and the bounds of a matrix.
    """
    names, layers = settings.names, range(len(curvature))
    blocks = model.blocks.get_value()
    counts = {
        (layer, name): saliency_counts(
            np.asarray(_saliency(curvature[layer][name], getattr(blocks, name)[layer]))
        )
        for layer in layers
        for name in names
    }
    groups = [list(counts)]
    if settings.allocate == "block":
        groups = [[(layer, name) for name in names] for layer in layers]
    ratios: list[dict[str, Sparsity]] = [{} for _ in layers]
    for group in groups:
        sizes = [int(counts[place].sum()) for place in group]
        drop = sum(int(settings.sparsity.drop_count(size)) for size in sizes)
        dropped = allocate(
            [counts[place] for place in group],
            drop,
            lowest=settings.lowest,
            highest=settings.highest,
        )
        for (layer, name), size, count in zip(group, sizes, dropped, strict=True):
            sparsity = Sparsity(count / size)
            assert math.isclose(int(sparsity.drop_count(size)), count, abs_tol=0)
            ratios[layer][name] = sparsity
    return ratios


def _saliency(felt: MapCurvature, w: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
    assert felt.inputs is not None
    return saliency(w, felt.inputs, felt.outputs)
