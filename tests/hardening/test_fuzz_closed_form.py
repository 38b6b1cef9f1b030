"""Hostile input for the closed form and the budget: 430 cases of arrays, ratios, shapes, bounds.

Each ends in an ``InputError`` that names the argument, or in a result that is right: finite, as
many zeros as asked for, no worse than the old weights under the same mask. Shapes are few, so that
programs are compiled once.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hostile import cases, one_line
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxprune.allocation import allocate, saliency_counts
from jaxprune.attention import AttentionForm
from jaxprune.errors import InputError
from jaxprune.gauss_newton import (
    factorise,
    fused_moments,
    gauss_newton_moments,
    kronecker_admm,
    prune_query_key_on,
    query_key_moments,
    residuals,
)
from jaxprune.pipeline.budget import share_out
from jaxprune.pipeline.curvature import MapCurvature
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.sparsity import Sparsity

D_IN, BLOCKS, K = 12, 2, 4
D_OUT = BLOCKS * K
DAMPING = 0.01

pytestmark = pytest.mark.usefixtures("unchecked")


def moments(draw, size, kind):
    """Second moments of a kind, and whether they are those of any vectors."""
    x = draw.normal(size=(30, size)) * np.exp(2 * draw.normal(size=size))
    if kind in ("dead", "last dead"):
        x[:, size // 2 :] = 0
    if kind == "constant":
        x[:] = x[0, 0]
    if kind == "one token":
        x[1:] = 0
    if kind == "twins":
        x[:, 1::2] = x[:, ::2]
    if kind == "two tokens of opposite sign":
        x = np.stack([x[0], -x[0]])
    a = x.T @ x / len(x)
    if kind == "zero":
        a = 0 * a
    if kind == "identity":
        a = np.eye(size)
    if kind == "indefinite":
        a = a - 2 * np.ones_like(a)
    if kind == "negative":
        a = -a
    if kind == "no diagonal":
        a = a - np.diag(np.diag(a))
    if kind == "small diagonal":
        a = a - np.diag(np.diag(a)) + 1e-12 * np.eye(size)
    if kind == "asymmetric":
        a = a + np.triu(np.abs(a))
    if kind == "nan":
        a[-1, 0] = np.nan
    if kind == "infinite":
        a[0, 0] = np.inf
    return a


MOMENTS = [
    *("plain", "dead", "constant", "one token", "twins", "two tokens of opposite sign", "zero"),
    "identity",
]
WRONG_MOMENTS = ["indefinite", "negative", "no diagonal", "small diagonal", "asymmetric"]
BROKEN_MOMENTS = ["nan", "infinite"]
WEIGHTS = ["plain", "plain", "zero", "equal", "one", "nan", "infinite", "sparse", "spread"]
SCALES = st.sampled_from([1.0, 1.0, 1e20, 1e-20, 1e30, 1e-30, 1e-42])


def weight(draw, kind):
    w = draw.normal(size=(D_IN, D_OUT))
    if kind == "zero":
        w[:] = 0
    if kind == "equal":
        w[:] = -1
    if kind == "one":
        w[:] = 0
        w[3, 5] = 1
    if kind == "sparse":
        w[draw.random(size=w.shape) < 0.7] = 0
    if kind == "spread":
        w *= 10.0 ** draw.integers(-8, 9, size=w.shape)
    if kind in ("nan", "infinite"):
        w[-1, -1] = {"nan": np.nan, "infinite": -np.inf}[kind]
    return w


def loss(e, a, b):
    """``½ tr(A E B Eᵀ)`` of damped factors, in float64."""
    a, b = ((f + DAMPING * np.diag(np.diag(f))) / (1 + DAMPING) for f in (a, b))
    return 0.5 * np.sum((a @ e @ b) * e)


def full(b):
    """``B`` as a matrix, of blocks, a diagonal or nothing."""
    if b is None:
        return np.eye(D_OUT)
    if b.ndim == 1:
        return np.diag(b)
    return np.einsum("pq,pkl->pkql", np.eye(BLOCKS), b).reshape(D_OUT, D_OUT)


def single(array, scale=1.0):
    """In float32, where what is too large is infinite."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (array * scale).astype(np.float32)


def check_pruned(found, w, sparsity, group="matrix"):
    """Finite, with zeros where they belong, as many as asked for."""
    kept, new = np.asarray(found.keep_mask), np.asarray(found.weight)
    assert np.isfinite(new).all()
    assert not new[~kept].any()
    pattern = Sparsity.parse(sparsity)
    if pattern.m is not None:
        counts = kept.reshape(D_IN // pattern.m, pattern.m, D_OUT).sum(axis=1)
        assert (counts == pattern.n).all()
    elif group == "output":
        assert ((~kept).sum(axis=0) == pattern.drop_count(D_IN)).all()
    else:
        assert (~kept).sum() == pattern.drop_count(w.size)
    return kept, new.astype(np.float64)


@pytest.mark.slow
@cases(150)
@given(
    seed=st.integers(0, 10**6),
    inputs=st.sampled_from([*MOMENTS, *MOMENTS, *WRONG_MOMENTS, *BROKEN_MOMENTS]),
    outputs=st.sampled_from([*MOMENTS, *MOMENTS, *WRONG_MOMENTS, *BROKEN_MOMENTS]),
    kind=st.sampled_from(WEIGHTS),
    scales=st.tuples(SCALES, SCALES, SCALES),
    how=st.sampled_from(
        [
            *[("blocks", ratio, "matrix") for ratio in (0.0, 1.0, 0.5, 1e-9, 1 - 1e-9, 0.95)],
            *(("blocks", "2:4", "matrix"), ("blocks", "0.4", "output")),
            *(("diagonal", 1 / 3, "matrix"), ("none", 0.7, "matrix")),
        ]
    ),
)
def test_any_factors_and_weights(seed, inputs, outputs, kind, scales, how):
    """Dead, constant, singular, indefinite, asymmetric, not finite; in any units."""
    draw, (form, sparsity, group) = np.random.default_rng(seed), how
    w = single(weight(draw, kind), scales[0])
    a = single(moments(draw, D_IN, inputs), scales[1])
    b = np.stack([moments(draw, K, outputs), moments(draw, K, "plain")])
    if form == "diagonal":
        b = np.diagonal(b, axis1=1, axis2=2).reshape(-1)
    b = None if form == "none" else single(b, scales[2])
    arrays = {"w": w, "a": a} | ({} if b is None else {"b": b})
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    try:
        found = kronecker_admm(jnp.asarray(w), jnp.asarray(a), b, sparsity, group=group)
    except InputError as error:
        message = one_line(error)
        assert broken
        assert message.startswith(f"{broken[0]} holds ")
        return
    assert not broken
    kept, new = check_pruned(found, w, sparsity, group)
    # Beyond float32 they are infinite.
    assert found.loss <= found.masked_loss
    if inputs in MOMENTS and (outputs in MOMENTS or form == "none"):
        wide_a, wide_b = a.astype(np.float64), full(None if b is None else b.astype(np.float64))
        # What XLA flushes to zero is not seen.
        wide_a, wide_b = (np.where(np.abs(f) < 1.2e-38, 0, f) for f in (wide_a, wide_b))
        old = np.where(np.abs(w) < 1.2e-38, 0, w.astype(np.float64))
        masked = loss(np.where(kept, old, 0) - old, wide_a, wide_b)
        slack = 1e-5 * loss(old, wide_a, wide_b)
        assert loss(new - old, wide_a, wide_b) <= masked * (1 + 1e-4) + slack


@cases(30)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["plain", "dead", "one token", "twins"]),
    powers=st.tuples(st.integers(-66, 66), st.integers(-40, 40), st.integers(-40, 40)),
)
def test_units_change_nothing(seed, kind, powers):
    """Powers of two rescale exactly, up to 1e20 of weights and 1e24 of their moments."""
    draw = np.random.default_rng(seed)
    w, a = single(weight(draw, "plain")), single(moments(draw, D_IN, kind))
    b = single(np.stack([moments(draw, K, kind), moments(draw, K, "plain")]))
    one = kronecker_admm(w, a, b, 0.5)
    factors = [2.0**power for power in (powers[0], 2 * powers[1], 2 * powers[2])]
    scaled = [single(m, f) for m, f in zip((w, a, b), factors, strict=True)]
    other = kronecker_admm(*scaled, 0.5)
    assert (other.keep_mask == one.keep_mask).all()
    np.testing.assert_array_equal(np.asarray(other.weight), single(one.weight, factors[0]))


SHAPES = st.lists(st.sampled_from([0, 1, 4, D_OUT, D_IN]), max_size=4).map(tuple)
VALUES = {
    "sparsity": ["", "0:4", "4:2", "2:5", "nan", -0.1, 1.1, math.inf, None, "٠.٥", "½", [0.5]],
    "iterations": [-1, -(2**31)],
    "refinements": [-1],
    "group": ["", "row", None, "Matrix", 3],
    "block_size": [0, -1],
    "damping": [-1e-9, math.nan, math.inf],
}


@cases(70)
@given(name=st.sampled_from(["w", "a", "b", "c", *VALUES]), shape=SHAPES, place=st.integers(0, 99))
def test_shapes_and_settings_that_do_not_fit(name, shape, place):
    right = {"w": (D_IN, D_OUT), "a": (D_IN, D_IN), "b": (D_OUT,), "c": (D_IN, D_IN)}
    given = {n: jnp.ones(s) for n, s in right.items()} | {"sparsity": 0.5}
    if name in VALUES:
        given[name] = VALUES[name][place % len(VALUES[name])]
    else:
        blocks = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == D_OUT
        assume(shape != right[name] and not (name == "b" and (shape == (D_OUT,) * 2 or blocks)))
        given[name] = jnp.ones(shape)
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        kronecker_admm(**given)


# As wide as the matrices above, whose programs prune them.
B, N = 2, 5
ROPE = jnp.array([1.0, 0.1])
ROWS = {
    "all": np.ones((B, N)),
    "none": np.zeros((B, N)),
    "one": np.eye(B, N),
    "large": np.full((B, N), 1e20),
    "negative": -np.ones((B, N)),
    "nan": np.full((B, N), np.nan),
}


@pytest.fixture
def one_group(monkeypatch):
    """Programs of one part compile faster."""
    monkeypatch.setattr(residuals, "_CAUSAL_GROUPS", 1)


def activations(draw, kind):
    x = draw.normal(size=(B, N, D_IN))
    if kind == "zero":
        x[:] = 0
    if kind == "constant":
        x[:] = 1
    if kind == "dead":
        x[..., ::2] = 0
    if kind == "one token":
        x[:, 1:] = 0
    if kind == "sink":
        x[:, 0] *= 1e4
    if kind in ("nan", "infinite"):
        x[0, 0, 0] = {"nan": np.nan, "infinite": np.inf}[kind]
    return x


@cases(60)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(
        ["plain", "zero", "constant", "dead", "one token", "sink", "nan", "infinite"]
    ),
    rows=st.sampled_from([*ROWS, "all", "all", "all"]),
    scale=st.sampled_from([1.0, 1.0, 1e20, 1e-20, 1e8, 1e-8, 1e38]),
    weights=st.sampled_from([1.0, 1.0, 0.0, 1e20, 1e-20]),
    sparsity=st.sampled_from([0.5, 0.0, 1.0, 0.99]),
)
def test_moments_of_any_activations(one_group, seed, kind, rows, scale, weights, sparsity):
    """Symmetric and not negative, and both projections are pruned on them; or named."""
    draw = np.random.default_rng(seed)
    x = jnp.asarray(single(activations(draw, kind), scale))
    wq = jnp.asarray(single(draw.normal(size=(D_IN, BLOCKS, K)), weights))
    wk = jnp.asarray(single(draw.normal(size=(D_IN, BLOCKS, K)), weights))
    try:
        found = query_key_moments(
            x, wq, wk, form=AttentionForm(ROPE), row_weights=jnp.asarray(single(ROWS[rows]))
        )
        pruned = prune_query_key_on(found, wq, wk, sparsity)
    except InputError as error:
        message = one_line(error)
        absurd = {scale, weights} & {1e20, 1e8, 1e38}
        assert kind in ("nan", "infinite", "sink") or rows in ("negative", "nan", "large") or absurd
        assert message.startswith(("x ", "row_weights", "inputs[", "wq ", "wk "))
        return
    assert kind not in ("nan", "infinite")
    assert rows not in ("negative", "nan")
    for factor in (found.inputs[None], found.q, found.k):
        factor = np.asarray(factor, np.float64)
        np.testing.assert_allclose(factor, factor.swapaxes(1, 2), rtol=1e-4, atol=1e-30)
        values = np.linalg.eigvalsh(factor)
        assert (values >= -1e-4 * np.abs(values).max(initial=1e-30)).all()
    for result, w in zip(pruned, (wq, wk), strict=True):
        kept, new = np.asarray(result.keep_mask), np.asarray(result.weight)
        assert (~kept).sum() == Sparsity(sparsity).drop_count(w.size)
        assert np.isfinite(new).all()
        assert not new[~kept].any()
        assert result.loss <= result.masked_loss


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, w: gauss_newton_moments(lambda y, *_: y, {}, {}), "weights"),
        (lambda x, w: gauss_newton_moments(lambda y, *_: y, {"w": w}, {"w": x[:0]}), "inputs"),
        (lambda x, w: gauss_newton_moments(lambda y, *_: y, {"w": w}, {"w": x[:, :0]}), "inputs"),
        (
            lambda x, w: gauss_newton_moments(
                lambda y, *_: y, {"w": w}, {"w": x}, forms={"v": None}
            ),
            "forms",
        ),
        (lambda x, w: fused_moments(x, w), "w "),
        (lambda x, w: fused_moments(x[0], w), "x "),
        (lambda x, w: factorise(jnp.full((3, 3), jnp.nan)), "f holds 9"),
    ],
)
def test_moments_of_nothing_and_of_strangers(call, named):
    with pytest.raises(InputError, match=named):
        call(jnp.ones((B, N, D_IN)), jnp.ones((D_IN, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "heads", "groups", "width"),
    [((1, 1, 1), 1, 1, 2), ((1, 4, 1), 2, 1, 2), ((3, 1, 5), 1, 1, 2), ((1, 2, 3), 3, 3, 2)],
)
def test_one_token_one_head_one_input(key, shape, heads, groups, width):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], shape)
    wq = jax.random.normal(keys[1], (shape[2], heads, width))
    wk = jax.random.normal(keys[2], (shape[2], groups, width))
    found = query_key_moments(x, wq, wk, form=AttentionForm())
    for sparsity in (0.0, 0.5, 1.0):
        for result, w in zip(prune_query_key_on(found, wq, wk, sparsity), (wq, wk), strict=True):
            assert np.isfinite(result.weight).all()
            assert (~result.keep_mask).sum() == Sparsity(sparsity).drop_count(w.size)
    fused = fused_moments(x, jnp.ones((shape[2], shape[2])))
    assert all(np.isfinite(factor).all() for factor in fused)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0, "1:2", "1:1"])
def test_one_row_one_column(shape, sparsity):
    draw = np.random.default_rng(0)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    a = jnp.asarray(moments(draw, shape[0], "one token"), jnp.float32)
    pattern = Sparsity.parse(sparsity)
    if pattern.m is not None and shape[0] % pattern.m:
        with pytest.raises(InputError, match="groups of 2 do not divide the 1 inputs"):
            kronecker_admm(w, a, None, sparsity)
        return
    found = kronecker_admm(w, a, jnp.eye(shape[1]), sparsity)
    drop = pattern.drop_count(shape[0]) * shape[1] if pattern.m else pattern.drop_count(w.size)
    assert (~found.keep_mask).sum() == drop
    assert np.isfinite(found.weight).all()


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-38, 1e38, 3e38])
BAD = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -1e-45, 1e39, 1e300])
MATRIX = st.tuples(st.integers(1, 6), st.integers(1, 6), NUMBERS | st.none())


@cases(90)
@given(
    seed=st.integers(0, 10**6),
    matrices=st.lists(MATRIX, max_size=5),
    bad=st.none() | st.none() | BAD,
    bounds=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, -0.1, 1.1, math.nan])] * 2)
    | st.just((0.0, 1.0)),
    ratio=st.floats(0, 1) | st.sampled_from([-0.1, 1.1, None]),
)
def test_budgets(seed, matrices, bad, bounds, ratio):
    """Zeros, ties, one matrix or none, any bounds: the total is exact and bounds are kept."""
    draw = np.random.default_rng(seed)
    saliencies = [
        draw.lognormal(0, 9, (rows, columns)) if value is None else np.full((rows, columns), value)
        for rows, columns, value in matrices
    ]
    if bad is not None and saliencies:
        saliencies[-1][0, -1] = bad
        with pytest.raises(InputError, match="saliency: expected finite numbers, 0 or more"):
            saliency_counts(saliencies[-1])
        return
    counts = [saliency_counts(s) for s in saliencies]
    sizes = np.array([s.size for s in saliencies], int)
    (lowest, highest), total = bounds, int(sizes.sum())
    drop = 2.5 if ratio is None else round(ratio * total)
    try:
        found = allocate(counts, drop, lowest=lowest, highest=highest)
    except InputError as error:
        message = one_line(error)
        if counts and drop != 2.5 and 0 <= lowest <= highest <= 1:
            least, most = np.ceil(sizes * lowest - 1e-9), np.floor(sizes * highest + 1e-9)
            assert not (least.sum() <= drop <= most.sum() and (least <= most).all())
        assert message.startswith(("counts: ", "drop ", "lowest "))
        return
    assert sum(found) == drop
    for number, size in zip(found, sizes, strict=True):
        assert math.ceil(lowest * size - 1e-6) <= number <= highest * size + 1e-6


@pytest.mark.slow
@cases(30)
@given(
    seed=st.integers(0, 10**6),
    allocation=st.sampled_from(["block", "model"]),
    ratio=st.floats(0.0, 0.95),
    dead=st.sampled_from(["nothing", "inputs", "outputs", "weights", "everything"]),
    bad=st.sampled_from([None, None, math.nan, math.inf, 1e38]),
)
def test_budgets_of_a_model(seed, allocation, ratio, dead, bad):
    """Zeros of a block, or of the model, are as many as equal ratios would give."""
    draw, sizes = np.random.default_rng(seed), {"wq": (6, 8), "wk": (6, 4)}
    blocks = {n: jnp.asarray(draw.normal(size=(3, *shape))) for n, shape in sizes.items()}
    if dead in ("weights", "everything"):
        blocks["wq"] = 0 * blocks["wq"]
    curvature = [
        {
            name: MapCurvature(
                jnp.asarray([np.eye(k) * (dead not in ("outputs", "everything"))] * (width // k)),
                jnp.asarray(draw.random(rows) * (dead not in ("inputs", "everything"))),
            )
            for name, (rows, width) in sizes.items()
            for k in (4,)
        }
        for _ in range(3)
    ]
    if bad is not None:
        blocks["wk"] = blocks["wk"].at[1, 0, 0].set(bad)
        curvature[1]["wk"] = MapCurvature(jnp.full((1, 4, 4), 10.0), jnp.full(6, 10.0))
    model = SimpleNamespace(blocks=SimpleNamespace(get_value=lambda: SimpleNamespace(**blocks)))
    settings = PruneSettings("wanda", "qk", Sparsity(ratio), allocate=allocation)
    if bad is not None:
        with pytest.raises(InputError, match="saliency"):
            share_out(model, curvature, settings)
        return
    found = share_out(model, curvature, settings)
    dropped = np.array(
        [[each[name].drop_count(math.prod(sizes[name])) for name in sizes] for each in found]
    )
    even = [Sparsity(ratio).drop_count(math.prod(shape)) for shape in sizes.values()]
    if allocation == "block":
        assert (dropped.sum(axis=1) == sum(even)).all()
    assert dropped.sum() == 3 * sum(even)
    assert (dropped <= 0.95 * np.array([48, 24]) + 1e-6).all()
