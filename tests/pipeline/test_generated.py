"""Which of the windows that a model writes find masks, and which adapt kept weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.models.llama.modeling import Llama
from jaxprune.pipeline import PruneSettings, prune_model
from jaxprune.pipeline import model as pipeline
from jaxprune.runs.folder import RunFolder
from jaxprune.sparsity import Sparsity

READ = np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, CONFIG.vocab_size))


@pytest.fixture
def pruned(tmp_path):
    """Keep masks and the first block's weights by a method, and windows that its steps had."""

    def run(method, generated, **settings):
        seen = []

        def recorded(problem, *arguments):
            seen.append(problem.data)
            return solve(problem, *arguments)

        model, solve = Llama(CONFIG, key=jax.random.key(0)), pipeline.solve
        settings = PruneSettings(
            method, "all", Sparsity(0.5), generated=generated, distill=0, steps=2, **settings
        )
        with (
            pytest.MonkeyPatch.context() as patch,
            RunFolder(tmp_path / f"{method}-{generated}", settings) as folder,
        ):
            patch.setattr(pipeline, "solve", recorded)
            blocks = list(prune_model(model, READ, READ, settings, folder, lambda where: None))
        return {layer: masks for layer, masks, _ in blocks}, seen

    return run


@pytest.mark.parametrize(("generated", "masked"), [(16, 4), (6, 3), (1, 0)])
def test_masks_are_of_windows_read_and_half_of_those_generated_at_most(pruned, generated, masked):
    with_steps, seen = pruned("descent", generated)
    without, _ = pruned("gauss-newton", masked)
    for name, mask in with_steps[0].items():
        np.testing.assert_array_equal(mask, without[0][name])
    assert {len(data["hidden"]) for data in seen} == {generated - masked}


def test_steps_have_none_of_the_windows_that_masks_were_found_on(pruned, monkeypatch):
    """The first block's steps read embeddings: they tell which windows there are."""
    written = []

    def recorded(*arguments):
        written.append(continuations(*arguments))
        return written[-1]

    continuations = pipeline.continuations
    monkeypatch.setattr(pipeline, "continuations", recorded)
    _, seen = pruned("descent", 16)
    embedded = Llama(CONFIG, key=jax.random.key(0)).embed(written[0][4:])
    np.testing.assert_array_equal(seen[0]["hidden"], embedded)


def test_without_generated_windows_steps_have_all(pruned):
    _, seen = pruned("descent", 0)
    assert {len(data["hidden"]) for data in seen} == {len(READ)}
