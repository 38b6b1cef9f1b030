"""Which of the windows that a model writes find masks, and which adapt kept weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.models.llama.modeling import Llama
from jaxprune.pipeline import PruneSettings, prune_model, query_key
from jaxprune.pipeline import model as pipeline
from jaxprune.runs.folder import RunFolder
from jaxprune.sparsity import Sparsity

READ = np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, CONFIG.vocab_size))


@pytest.fixture
def pruned(tmp_path):
    """Keep masks of every block by a method, and the data that its steps had."""

    def run(method, generated, targets="all"):
        seen = []

        def recorded(problem, *arguments):
            seen.append(problem.data)
            return solve(problem, *arguments)

        model, solve = Llama(CONFIG, key=jax.random.key(0)), pipeline.solve
        settings = PruneSettings(
            method, targets, Sparsity(0.5), generated=generated, distill=0, steps=2
        )
        with (
            pytest.MonkeyPatch.context() as patch,
            RunFolder(tmp_path / f"{method}-{generated}-{targets}", settings) as folder,
        ):
            patch.setattr(pipeline, "solve", recorded)
            blocks = list(prune_model(model, READ, READ, settings, folder, lambda where: None))
        return {layer: masks for layer, masks, _ in blocks}, seen

    return run


@pytest.mark.parametrize("targets", ["all", "qk"])
@pytest.mark.parametrize(
    ("generated", "for_masks", "for_steps"), [(16, 4, 12), (6, 2, 4), (4, 0, 4), (3, 3, 7)]
)
def test_steps_have_as_many_as_were_read_before_masks_have_any(
    pruned, targets, generated, for_masks, for_steps
):
    with_steps, seen = pruned("descent", generated, targets)
    without, _ = pruned("gauss-newton", for_masks, targets)
    for name, mask in with_steps[0].items():
        np.testing.assert_array_equal(mask, without[0][name])
    assert {len(jax.tree.leaves(data)[0]) for data in seen} == {for_steps}


def test_more_windows_than_moments_are_usually_taken_from_change_the_masks(pruned, monkeypatch):
    usual = query_key.query_key_settings
    monkeypatch.setattr(
        query_key, "query_key_settings", lambda *a: usual(*a)._replace(moment_sequences=4)
    )
    read, written = (pruned("gauss-newton", generated, "qk")[0][0] for generated in (0, 8))
    assert any((read[name] != written[name]).any() for name in read)


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
