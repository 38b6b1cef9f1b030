"""Kronecker factors against formulas, Gauss-Newton products and each other."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune.attention import AttentionForm
from jaxprune.gauss_newton import (
    AttentionMatrices,
    Form,
    FusedAttention,
    fused_moments,
    gauss_newton_moments,
    query_key_moments,
    residuals,
)
from jaxprune.gauss_newton import moments as module
from jaxprune.gauss_newton.moments import random_signs

B, N, D, HEADS, GROUPS, K = 3, 6, 5, 4, 2, 4
ROPE = jnp.array([1.0, 0.1])


@pytest.fixture(autouse=True)
def one_group(monkeypatch):
    """Programs of one part compile faster."""
    monkeypatch.setattr(residuals, "_CAUSAL_GROUPS", 1)


@pytest.fixture
def layer(key, x64):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (B, N, D), jnp.float64)
    wq = jax.random.normal(keys[1], (D, HEADS, K), jnp.float64)
    wk = jax.random.normal(keys[2], (D, GROUPS, K), jnp.float64)
    return x, wq, wk


@pytest.fixture
def attention(layer):
    """Moments of the layer by the general function, its residual and its weights."""
    x, wq, wk = layer
    residual = AttentionMatrices(HEADS, GROUPS, 0.5)
    weights = {"q": wq.reshape(D, -1), "k": wk.reshape(D, -1)}
    forms = {"q": Form(HEADS), "k": Form(GROUPS)}

    def moments(draws, x=x, outputs=None, forms=forms, **options):
        shared = {"form": AttentionForm(ROPE), "outputs": outputs}
        inputs = {"q": x, "k": x}
        return gauss_newton_moments(
            residual,
            weights,
            inputs,
            {"x": x},
            shared,
            forms=forms,
            draws=draws,
            pilot=0,
            **options,
        )

    def of_outputs(y, x, outputs=None):
        return residual(y, {"x": x}, {"form": AttentionForm(ROPE), "outputs": outputs})

    return moments, of_outputs, weights


def form(moments, e):
    """``tr(A E B Eᵀ)`` for full, blocked or diagonal ``B``."""
    a, b = np.asarray(moments.inputs), np.asarray(moments.outputs)
    if b.ndim == 3:
        b = np.einsum("pq,pkl->pkql", np.eye(len(b)), b).reshape(e.shape[1], e.shape[1])
    b = np.diag(b) if b.ndim == 1 else b
    return np.trace(a @ e @ b @ e.T)


def squares(tree):
    return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))


def close(found, expected, rtol=1e-9):
    """Equal up to rounding of the largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        scale = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("causal", [True, False])
def test_every_unit_cotangent_gives_the_formula_of_the_fused_weight(key, x64, monkeypatch, causal):
    monkeypatch.setattr(residuals, "_CAUSAL_GROUPS", 3)
    keys = jax.random.split(key, 2)
    x = jax.random.normal(keys[0], (B, N, D), jnp.float64)
    w = 0.3 * jax.random.normal(keys[1], (D, D), jnp.float64)
    a, b, energy = np.zeros((D, D)), np.zeros((D, D)), 0.0
    for s in np.asarray(x):
        for row, f in zip(s, reference.attention(s, w, causal), strict=True):
            j = np.diag(f) - np.outer(f, f)
            curvature = s.T @ j @ j @ s
            b += curvature / B
            a += np.trace(curvature) * np.outer(row, row)
            energy += np.trace(curvature)
    call = partial(
        gauss_newton_moments, FusedAttention(causal), {"w": w}, {"w": x}, {"x": x}, pilot=0
    )
    exact = call(draws=None)["w"]
    close(exact, (a / energy, b))
    if not causal:
        return
    many = call(draws=2000)["w"]
    close(many, exact, rtol=0.03)
    one = fused_moments(x, w, causal=causal, pilot=0)
    assert np.linalg.norm(one.outputs - b) < np.linalg.norm(b)


def test_blocks_of_queries_are_the_formula_of_each_head(layer, attention):
    x, wq, wk = layer
    moments, _, _ = attention
    exact = moments(None)["q"].outputs
    turned = np.exp(1j * np.arange(N)[:, None] * np.asarray(ROPE))

    def rotated(y, back=False):
        z = (y[:, : K // 2] + 1j * y[:, K // 2 :]) * (turned.conj() if back else turned)
        return np.concatenate([z.real, z.imag], axis=1)

    for h in range(HEADS):
        expected = np.zeros((K, K))
        for s in np.asarray(x):
            q, k = rotated(s @ wq[:, h]), rotated(s @ wk[:, h // 2])
            logits = np.where(np.tril(np.ones((N, N))) > 0, 0.5 * q @ k.T, -np.inf)
            f = np.exp(logits - logits.max(axis=1, keepdims=True))
            f /= f.sum(axis=1, keepdims=True)
            for i in range(N):
                j = np.diag(f[i]) - np.outer(f[i], f[i])
                # Keys seen from the query before its rotation.
                seen = 0.5 * np.stack([rotated(np.tile(r, (N, 1)), back=True)[i] for r in k])
                expected += seen.T @ j @ j @ seen / B
        np.testing.assert_allclose(exact[h], expected, rtol=1e-9)


def test_one_token_is_met_exactly(attention, layer):
    """With a weight of one token, ``tr(A E B Eᵀ) = ‖J δy‖²`` of that token."""
    x, _, _ = layer
    moments, of_outputs, weights = attention
    found = moments(None, row_weights=jnp.zeros((B, N)).at[0, 4].set(B))
    for name, w in weights.items():
        e = jax.random.normal(jax.random.key(3), w.shape, jnp.float64)
        y = {n: x[0] @ w for n, w in weights.items()}
        moved = {n: jnp.zeros_like(a) for n, a in y.items()}
        moved[name] = moved[name].at[4].set(x[0, 4] @ e)
        _, change = jax.jit(partial(jax.jvp, lambda y: of_outputs(y, x[0])))((y,), (moved,))
        # One head at a time: what couples blocks of keys is not in them.
        blocks = found[name].outputs.shape[0]
        assert blocks == (HEADS if name == "q" else GROUPS)
        np.testing.assert_allclose(form(found[name], np.asarray(e)), squares(change), rtol=1e-9)


def test_output_blocks_are_gauss_newton_products(attention, layer):
    """``B`` against ``Jᵀ J`` of the residual by its Jacobian, with attention's output beside."""
    x, _, _ = layer
    moments, of_outputs, weights = attention
    maps = jax.random.normal(jax.random.key(5), (D, HEADS, 3), jnp.float64)
    found = moments(None, outputs=maps)
    jacobian = jax.jit(
        jax.vmap(lambda y, x: jax.jacobian(partial(of_outputs, x=x, outputs=maps))(y))
    )
    rows = jax.tree.leaves(
        jacobian({n: x @ w for n, w in weights.items()}, x), is_leaf=lambda j: isinstance(j, dict)
    )
    for name, blocks in (("q", HEADS), ("k", GROUPS)):
        each = [np.asarray(j[name]).reshape(B, -1, N, blocks, K) for j in rows]
        expected = sum(np.einsum("brnpk,brnpl->pkl", j, j) for j in each) / B
        np.testing.assert_allclose(found[name].outputs, expected, rtol=1e-8, atol=1e-12)


def scaled(outputs, gains, shared):
    """A residual whose ``G_t`` are the squares of gains, on the diagonal."""
    return outputs["w"] * gains


@pytest.mark.parametrize("common", [True, False])
def test_leverage_of_a_pilot(key, x64, common):
    """Tokens count in ``B`` by ``xᵀ A⁻¹ x``; with multiples of one ``G_t``, ``B`` stays."""
    x = jax.random.normal(key, (B, N, D), jnp.float64) + 2
    w = jax.random.normal(jax.random.fold_in(key, 1), (D, 4), jnp.float64)
    gains = jnp.arange(1.0, 1 + B * N * 4).reshape(B, N, 4)
    if common:
        gains = gains[:, :, :1] * jnp.arange(1.0, 5)
    call = partial(gauss_newton_moments, scaled, {"w": w}, {"w": x}, gains, draws=None)
    plain, found = call(pilot=0)["w"], call(pilot=B)["w"]
    close(found.inputs, plain.inputs)
    if common:
        close(found.outputs, plain.outputs)
        return
    a = np.asarray(plain.inputs)
    damped = (a + 0.1 * np.diag(np.diag(a))) / 1.1
    leverage = np.einsum("bnd,de,bne->bn", x, np.linalg.inv(damped), x)
    leverage /= np.trace(np.linalg.solve(damped, a))
    expected = np.einsum("bn,bnk->k", leverage, gains**2) / B
    close(found.outputs, np.diag(expected))


def test_a_sketch_of_leverages_is_close(key):
    x = jax.random.normal(key, (400, 160)) @ jax.random.normal(jax.random.key(1), (160, 160))
    x = x.at[:, 3].set(0) * jnp.exp(jax.random.normal(jax.random.key(2), (400, 1)))
    a = x.T @ x
    sketch = module._leverage_map(a, key)
    assert sketch.shape == (160, 64)
    live = np.delete(np.arange(160), 3)
    a, rows = np.asarray(a, np.float64)[np.ix_(live, live)], np.asarray(x)[:, live]
    exact = np.einsum("nd,nd->n", rows, np.linalg.solve(a + 0.1 * np.diag(np.diag(a)), rows.T).T)
    found = np.sum((np.asarray(x) @ sketch) ** 2, axis=1)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-3)
    assert np.corrcoef(found, exact)[0, 1] > 0.8


def test_balanced_heads_have_relative_residuals(layer):
    x, wq, wk = layer
    y = {"q": x[0] @ wq.reshape(D, -1), "k": x[0] @ wk.reshape(D, -1)}
    shared = {"form": AttentionForm(ROPE), "outputs": None}

    def change(balance):
        residual = AttentionMatrices(HEADS, GROUPS, 0.5, balance=balance)
        return jax.jit(lambda y: jax.jvp(lambda y: residual(y, None, shared), (y,), (y,)))(y)

    value, absolute = change(0.0)
    energy = sum(jnp.sum(f**2, axis=(-2, -1), keepdims=True) for f in value)
    close(change(0.5)[1], [f * energy**-0.25 for f in absolute])


def test_projections_of_a_layer_share_a_pass(layer, attention):
    """The same cotangents give the same ``B``; the shared ``A`` lies between those of each."""
    x, wq, wk = layer
    moments, _, _ = attention
    each = moments(1)
    together = query_key_moments(
        x, wq, wk, form=AttentionForm(ROPE), scale=0.5, balance=0.0, pilot=0
    )
    close((together.q, together.k), (each["q"].outputs, each["k"].outputs))
    parts = [np.einsum("pkk->", each[name].outputs) for name in "qk"]
    mixed = (parts[0] * each["q"].inputs + parts[1] * each["k"].inputs) / sum(parts)
    close(together.inputs, mixed)


def test_any_residual_is_accepted(key, x64):
    """A bias and a norm of the outputs are part of the function; diagonal and full ``B`` agree."""
    x = jax.random.normal(key, (B, N, D), jnp.float64)
    w = jax.random.normal(jax.random.fold_in(key, 1), (D, 6), jnp.float64)

    def residual(outputs, sequence, shared):
        y = outputs["w"] + shared
        return y / jnp.linalg.norm(y, axis=-1, keepdims=True) * sequence[:, None]

    gains = jnp.arange(1.0, 1 + B * N).reshape(B, N)
    options = {"data": gains, "shared": jnp.ones(6), "draws": None, "pilot": 0}
    call = partial(gauss_newton_moments, residual, {"w": w}, {"w": x})
    full = call(**options, forms={"w": Form(weighted=False)})["w"]
    expected = np.zeros((6, 6))
    for s, g in zip(np.asarray(x), np.asarray(gains), strict=True):
        for row, gain in zip(s, g, strict=True):
            y = row @ np.asarray(w) + 1
            j = gain * (np.eye(6) - np.outer(y, y) / (y @ y)) / np.sqrt(y @ y)
            expected += j.T @ j / B
    np.testing.assert_allclose(full.outputs, expected, rtol=1e-9)
    mean = np.einsum("bnd,bne->de", x, x) / (B * N)
    np.testing.assert_allclose(full.inputs, mean, rtol=1e-9)
    diagonal = call(**options, forms={"w": Form(diagonal=True)})["w"]
    np.testing.assert_allclose(diagonal.outputs, np.diag(expected), rtol=1e-9)


def test_left_out_tokens_do_not_count(attention, layer):
    x, _, _ = layer
    moments, _, _ = attention
    rows = jnp.ones((B, N)).at[:, -1].set(0)
    spoiled = x.at[:, -1].set(7.0)  # no row before the last sees it
    found = moments(None, row_weights=rows)["q"]
    close(moments(None, x=spoiled, row_weights=rows)["q"], found)
    twice = moments(None, row_weights=2 * rows)["q"]
    close((twice.inputs, twice.outputs), (found.inputs, 2 * found.outputs))


def test_sequences_draw_signs_by_their_number(attention, layer):
    x, _, _ = layer
    moments, _, _ = attention
    same = jnp.broadcast_to(x[0], x.shape)
    parts = [
        moments(1, x=same, row_weights=jnp.zeros((B, N)).at[i].set(1))["q"].outputs
        for i in range(B)
    ]
    assert not np.allclose(parts[0], parts[1])
    together = moments(1, x=same, row_weights=jnp.ones((B, N)))["q"].outputs
    np.testing.assert_allclose(sum(parts), together, rtol=1e-9)


def test_random_signs_are_fair_signs(key):
    signs = np.asarray(random_signs(key, (67, 101), jnp.float32))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.abs(signs.mean(axis=0)).max() < 0.5
    assert np.abs(signs.mean()) < 0.04


def test_vmap_jit_and_a_second_call(layer, compiled):
    x, wq, wk = layer
    call = partial(query_key_moments, form=AttentionForm(ROPE), sequences=2)
    other = jnp.flip(x, axis=1)
    one = call(x, wq, wk)
    mapped = jax.jit(jax.vmap(call, in_axes=(0, None, None)))(jnp.stack([other, x]), wq, wk)
    close(jax.tree.map(lambda a: a[1], mapped), one, rtol=1e-6)
    compiled.clear()
    again = call(other, wq, wk)
    assert not compiled
    close(jax.tree.map(lambda a: a[0], mapped), again, rtol=1e-6)


EIGHT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jaxprune.attention import AttentionForm
from jaxprune.gauss_newton import query_key_moments
from jaxprune.sharding import split_windows, use_mesh, gather
keys = jax.random.split(jax.random.key(0), 3)
x = np.asarray(jax.random.normal(keys[0], (16, 9, 8)))
wq, wk = (np.asarray(jax.random.normal(k, (8, h, 4))) for k, h in zip(keys[1:], (8, 8)))
rope = jnp.array([1.0, 0.1])
def moments():
    found = query_key_moments(split_windows(jnp.asarray(x)), wq, wk, form=AttentionForm(rope))
    return [gather(a) for a in jax.tree.leaves(found)]
one = moments()
worst = []
for shape in ("2x4",):
    with use_mesh(shape, 8):
        many = moments()
    worst.append(max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, many)))
print(json.dumps(worst))
"""


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    repository = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", EIGHT],
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert max(json.loads(out.stdout)) < 1e-5


WRONG = [
    ({"x": jnp.ones((2, 9, 7))}, r"x \(2, 9, 7\), wq \(8, 4, 4\)"),
    ({"wk": jnp.ones((8, 3, 4))}, r"wk \(8, 3, 4\)"),
    ({"form": AttentionForm(jnp.ones(3))}, r"rope \(3,\)"),
    ({"outputs": jnp.ones((8, 3, 2))}, r"outputs \(8, 3, 2\)"),
    ({"sequences": 0}, "sequences 0"),
    ({"balance": 2.0}, "balance 2"),
    ({"pilot": -1}, "pilot -1"),
    ({"x": jnp.full((2, 9, 8), jnp.nan)}, "x holds 144 non-finite"),
    ({"row_weights": jnp.ones((2, 8))}, r"row_weights \(2, 8\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_layers_are_named(unchecked, change, message):
    right = {"x": jnp.ones((2, 9, 8)), "wq": jnp.ones((8, 4, 4)), "wk": jnp.ones((8, 2, 4))}
    with pytest.raises(ValueError, match=message):
        query_key_moments(**right | {"form": AttentionForm()} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"v": jnp.ones((2, 9, 8))}}, r"inputs of \['v'\]"),
        ({"inputs": {"w": jnp.ones((9, 8))}}, r"inputs\['w'\] \(9, 8\)"),
        ({"forms": {"w": Form(blocks=4)}}, "4 blocks do not divide 6 outputs"),
        ({"data": jnp.ones(3)}, "leading axis of 2 sequences"),
        ({"draws": 0}, "draws 0"),
    ],
)
def test_wrong_maps_are_named(unchecked, change, message):
    right = {"weights": {"w": jnp.ones((8, 6))}, "inputs": {"w": jnp.ones((2, 9, 8))}}
    with pytest.raises(ValueError, match=message):
        gauss_newton_moments(lambda y, *_: y, **right | change)
