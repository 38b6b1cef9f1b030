import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxprune import Sparsity
from jaxprune.sparsity import keep_highest, keep_mask

# Few distinct values: ties everywhere. A fixed shape: one compilation.
tied_scores = arrays.arrays(np.float32, (6, 8), elements=st.sampled_from([-2.0, -0.0, 0.0, 1.0]))
any_scores = arrays.arrays(
    np.float32, (6, 8), elements=st.floats(allow_nan=False, width=32, allow_subnormal=False)
)
quick = settings(deadline=None, max_examples=40)
select = jax.jit(keep_highest)


@quick
@given(st.one_of(tied_scores, any_scores), st.integers(0, 8))
def test_selection_is_a_stable_sort(scores, drop):
    kept = np.asarray(select(jnp.asarray(scores), drop))
    assert (kept == [reference.keep(row, drop) for row in scores]).all()


def test_minus_zero_is_zero():
    assert select(jnp.array([0.0, -0.0, 1.0]), 1).tolist() == [False, True, True]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_exact_in_every_group(ratio, tied):
    draws = np.random.default_rng(0)
    scores = draws.integers(0, 3, (6, 8)) if tied else draws.normal(size=(6, 8))
    scores, sparsity = jnp.asarray(scores, jnp.float32), Sparsity(ratio)
    for group, axis, size in (("matrix", None, 48), ("input", 1, 8), ("output", 0, 6)):
        dropped = np.sum(~np.asarray(keep_mask(scores, sparsity, group=group)), axis=axis)
        assert (dropped == sparsity.drop_count(size)).all()
    blocks = ~np.asarray(keep_mask(scores, sparsity, group="block", block_size=4))
    assert blocks[:4].sum() == sparsity.drop_count(32)
    assert blocks[4:].sum() == sparsity.drop_count(16)


@pytest.mark.parametrize("pattern", ["1:2", "2:3", "1:6", "2:2", "6:6", "3:6"])
def test_n_of_m_keeps_the_largest_n_along_the_inputs(pattern):
    n, m = map(int, pattern.split(":"))
    scores = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    kept = np.asarray(keep_mask(jnp.asarray(scores), Sparsity.parse(pattern)))
    for start in range(0, 6, m):
        for column in range(5):
            group = slice(start, start + m)
            assert kept[group, column].sum() == n
            expected = reference.keep(scores[group, column], m - n)
            assert (kept[group, column] == expected).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_every_float_type_and_both_ends(dtype, ratio):
    scores = jnp.arange(10, dtype=dtype).reshape(2, 5)
    kept = keep_mask(scores, Sparsity(ratio))
    assert kept.dtype == bool
    assert (np.asarray(kept).ravel() == (np.arange(10) >= round(10 * ratio))).all()


def test_float64_scores_are_told_apart_beyond_float32(x64):
    scores = jnp.array([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0]])
    assert keep_mask(scores, Sparsity(0.5)).tolist() == [[False, True, False, True]]


def test_of_ties_the_first_goes_first():
    kept = keep_mask(jnp.ones((2, 3)), Sparsity(0.5))
    assert kept.tolist() == [[False, False, False], [True, True, True]]


def test_infinite_scores_are_kept_and_minus_infinite_dropped():
    kept = keep_highest(jnp.array([jnp.inf, 1.0, -jnp.inf, 0.0]), 2)
    assert kept.tolist() == [True, True, False, False]


def test_traced_ratios_equal_concrete_ones():
    scores = jax.random.normal(jax.random.key(0), (64, 64))
    ratios = [i / 50 for i in range(51)]
    mapped = jax.jit(jax.vmap(lambda r: keep_mask(scores, Sparsity(r))))(jnp.asarray(ratios))
    for ratio, kept in zip(ratios, mapped, strict=True):
        assert (kept == keep_mask(scores, Sparsity(ratio))).all()


def test_schedule_fraction_rises_to_the_exact_count():
    scores = jax.random.normal(jax.random.key(0), (9, 7))
    sparsity = Sparsity(0.5)
    counts = [
        int((~keep_mask(scores, sparsity, fraction=jnp.float32(f))).sum())
        for f in np.linspace(0, 1, 11)
    ]
    assert counts[0] == 0
    assert counts[-1] == 31
    assert counts == sorted(counts)


def test_a_pattern_is_approached_weight_by_weight():
    scores = jax.random.normal(jax.random.key(0), (8, 7))
    final = keep_mask(scores, Sparsity.parse("2:4"))
    for f, count in ((0.0, 0), (0.49, 13), (0.5, 14), (0.99, 27), (1.0, 28)):
        kept = keep_mask(scores, Sparsity.parse("2:4"), fraction=jnp.float32(f))
        assert int((~kept).sum()) == count
        assert not (final & ~kept).any()
        # Among what the pattern drops, the lowest go first.
        waiting = np.asarray(scores)[~np.asarray(final) & np.asarray(kept)]
        gone = np.asarray(scores)[~np.asarray(kept)]
        assert max(gone, default=-np.inf) <= min(waiting, default=np.inf)


def test_vmap_equals_a_loop_and_jit_equals_eager():
    scores = jax.random.normal(jax.random.key(1), (4, 6, 8))

    def one(s):
        return keep_mask(s, Sparsity(0.4), group="output")

    loop = jnp.stack([one(s) for s in scores])
    assert (jax.vmap(one)(scores) == loop).all()
    assert (jax.jit(jax.vmap(one))(scores) == loop).all()


def test_drop_count_is_floor_with_a_guard():
    assert Sparsity(0.29).drop_count(100) == 29  # the product is 28.999999999999996
    assert Sparsity(0.5).drop_count(7) == 3
    assert Sparsity(0.999).drop_count(100) == 99
    assert Sparsity(1.0).drop_count(13) == 13


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", Sparsity(0.5)), (" 2:4 ", Sparsity(n=2, m=4)), (0, Sparsity(0.0)), ("1", Sparsity(1))],
)
def test_parse(text, expected):
    assert Sparsity.parse(text) == expected
    assert Sparsity.parse(expected) is expected
    assert hash(Sparsity.parse(text)) == hash(expected)


def test_a_ratio_may_be_an_array_of_no_axes():
    found = Sparsity(jnp.float32(0.5))
    assert found == Sparsity(0.5)
    assert hash(found) == hash(Sparsity(0.5))


def test_text_form_reads_back():
    for text in ("0.5", "2:4", "0.125"):
        assert str(Sparsity.parse(text)) == text


@pytest.mark.parametrize(
    "wrong", ["2:0", "0:4", "5:4", "half", "", "1.5", "-0.1", "nan", "inf", "2:4:8", -1, 1.01, None]
)
def test_wrong_sparsity_is_one_line_that_names_it(wrong):
    with pytest.raises(ValueError, match="sparsity") as caught:
        Sparsity.parse(wrong)
    assert "\n" not in str(caught.value)


def test_n_of_m_must_divide_the_inputs():
    with pytest.raises(ValueError, match="groups of 4 do not divide the 6 inputs"):
        keep_mask(jnp.ones((6, 2)), Sparsity.parse("2:4"))


def test_unknown_group_is_named(unchecked):
    with pytest.raises(ValueError, match="group 'head': expected one of matrix, input"):
        keep_mask(jnp.ones((6, 2)), Sparsity(0.5), group="head")
