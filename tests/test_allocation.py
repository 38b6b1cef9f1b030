"""One budget over many matrices: totals exact, bounds kept, the least goes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.allocation import allocate, saliency_counts
from jaxprune.errors import InputError
from jaxprune.sparsity import Sparsity


def by_sorting(saliencies, drop):
    """Drop counts by one sort of all entries."""
    owner = np.concatenate([np.full(s.size, i) for i, s in enumerate(saliencies)])
    order = np.argsort(np.concatenate([s.ravel() for s in saliencies]), kind="stable")
    return np.bincount(owner[order[:drop]], minlength=len(saliencies))


@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    ratio=st.floats(0, 1),
    bounds=st.tuples(st.floats(0, 0.4), st.floats(0.6, 1)),
)
@settings(max_examples=150, deadline=None)
def test_totals_are_exact_and_bounds_are_kept(seed, shapes, ratio, bounds):
    draw = np.random.default_rng(seed)
    saliencies = [draw.lognormal(draw.normal(), 3, shape) for shape in shapes]
    sizes = np.array([s.size for s in saliencies])
    drop = int(ratio * sizes.sum())
    counts = [saliency_counts(s) for s in saliencies]
    free = allocate(counts, drop)
    assert sum(free) == drop
    assert all(0 <= n <= size for n, size in zip(free, sizes, strict=True))
    lowest, highest = bounds
    try:
        bound = allocate(counts, drop, lowest=lowest, highest=highest)
    except InputError:
        least, most = (np.floor(sizes * bound + 1e-9) for bound in bounds)
        assert not (least.sum() <= drop <= most.sum() and (least <= most).all())
        return
    assert sum(bound) == drop
    for n, size in zip(bound, sizes, strict=True):
        assert lowest * size - 1 < n <= highest * size + 1e-6


def test_a_bound_may_be_the_ratio_of_all():
    counts = [saliency_counts(np.arange(1.0, size + 1)[None]) for size in (577, 91)]
    sizes = [int(count.sum()) for count in counts]
    drop = sum(int(Sparsity(0.7).drop_count(size)) for size in sizes)
    found = allocate(counts, drop, lowest=0.7, highest=0.95)
    assert found == [int(Sparsity(0.7).drop_count(size)) for size in sizes]


def test_it_is_one_threshold_to_the_width_of_a_bin():
    draw = np.random.default_rng(0)
    saliencies = [draw.lognormal(i, 2, (100, 60)) for i in range(4)]
    found = allocate([saliency_counts(s) for s in saliencies], 12_000)
    np.testing.assert_allclose(found, by_sorting(saliencies, 12_000), atol=30)
    assert found == sorted(found, reverse=True)


def test_ties_are_shared():
    counts = [saliency_counts(np.ones((4, 5))), saliency_counts(np.ones((4, 10)))]
    assert allocate(counts, 30) == [10, 20]
    assert allocate([saliency_counts(np.zeros((2, 2)))] * 3, 7) == [3, 2, 2]


def test_wrong_input_is_named():
    counts = [saliency_counts(np.ones((4, 5)))]
    with pytest.raises(InputError, match="drop 21 of 20"):
        allocate(counts, 21)
    with pytest.raises(InputError, match="drop 10 of 20: between 0 and 8"):
        allocate(counts, 10, highest=0.4)
    with pytest.raises(InputError, match=r"lowest 0\.9, highest 0\.1"):
        allocate(counts, 10, lowest=0.9, highest=0.1)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="saliency"):
            saliency_counts(np.full((2, 2), bad))
