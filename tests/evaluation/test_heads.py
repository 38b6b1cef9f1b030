"""How many heads go together; the rest of the module is tested through experiments/llama_heads."""

import pytest

from jaxprune.evaluation import heads as layers


@pytest.mark.parametrize(("gigabytes", "expected"), [(1000, 32), (9, 2), (0.1, 1)])
def test_as_many_heads_go_together_as_half_of_the_memory_holds(monkeypatch, gigabytes, expected):
    """At width 2048 a head takes 1.75 GB: 100 matrices of 16.8 MB, queries of 4096 tokens twice."""
    monkeypatch.setattr(layers, "available_memory", lambda: int(gigabytes * 1e9))
    source = layers.Layers((0,), 32, 2048, 64, 128, 4096, iter, {})
    assert layers.fitting_heads(source, ratios=4) == expected


def test_the_machine_has_some_memory():
    assert 2**20 < layers.available_memory() < 2**50
