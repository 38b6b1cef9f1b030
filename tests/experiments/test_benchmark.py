"""experiments/benchmark.py: a small run to its table; PyTorch forms against ours."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxprune import softmax_error
from jaxprune.baselines import sparsegpt, wanda
from jaxprune.methods.fused import algorithm1
from jaxprune.methods.query_key import query_key_context, query_key_data, query_key_refit
from jaxprune.pipeline import METHODS
from jaxprune.sparsity import Sparsity

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def benchmark(script, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    # As many devices as this process has: JAX has started already.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    module = script("benchmark")
    # A process of its own could not import a script under the name that it has here.
    monkeypatch.setattr(module, "in_child", lambda function, *a: function(*a, lambda where: None))
    yield module
    sys.modules.pop("torch_forms", None)


def run(benchmark, out, *more):
    return benchmark.main(["--quick", "--steps", "3", "--out", str(out), *more])


@pytest.mark.slow
def test_a_quick_run_fills_the_table(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.torch_forms, "available", lambda *others: False)
    out = tmp_path / "run"
    parts = ("kernel", "devices", "loss", "algorithm1", "baselines", "memory")
    parts += ("layer", "step", "forward", "prune", "all_maps")
    assert run(benchmark, out, "--parts", *parts) == 0
    metrics = pd.read_csv(out / "metrics.csv")
    assert set(metrics["part"]) == set(parts)
    timed = metrics[metrics["seconds"].notna()]
    assert (timed["seconds"] > 0).all()
    timed = timed[timed["part"] != "all_maps"]
    assert (timed["low"] <= timed["high"]).all()
    kernel = metrics[metrics["part"] == "kernel"]
    ours = kernel[kernel["contender"] == "one device"]
    assert (ours["ours_over_it"] == 1).all()
    assert (ours["compile_seconds"] > 0).all()
    split = metrics[metrics["part"] == "devices"]
    assert set(split["method"]) == {"kernel", "algorithm1"}
    assert "one device" in set(split["contender"])
    # Four products take a third longer than three of the same shape.
    floor = kernel.pivot_table(index=["n", "d", "heads"], columns="contender", values="seconds")
    np.testing.assert_allclose(floor["4 products"] / floor["3 products"], 4 / 3, rtol=1e-6)
    # Every method is timed, and the first run of each as compiling.
    whole = metrics[metrics["part"] == "prune"]
    assert set(whole["contender"]) == set(METHODS)
    assert (whole["compile_seconds"] > whole["seconds"]).all()
    # Of a model of two layers, what is said of all is what was measured.
    shape = metrics[metrics["part"] == "all_maps"].set_index("contender")
    assert shape.loc["2 layers, from these", "peak_gib"] == shape.loc["second block", "peak_gib"]
    measured = shape.loc[["curvature, 2 layers", "first block", "second block"], "seconds"]
    assert shape.loc["2 layers, from these", "seconds"] >= measured.sum() * 0.999
    assert "PyTorch is not installed" in capsys.readouterr().out
    assert benchmark.main(["--redraw", "--out", str(out)]) == 0
    assert "## kernel" in (out / "tables.md").read_text()


def test_exponents_are_those_of_powers(benchmark):
    sizes = np.array([1.0, 2.0, 4.0, 8.0])
    frame = pd.DataFrame({"part": "growth", "axis": "n", "n": sizes, "seconds": 3 * sizes**1.5})
    assert benchmark.exponents(frame)["exponent"].item() == pytest.approx(1.5)


@pytest.mark.parametrize("flags", [("--parts", "x"), ("--repeats", "0"), ("--seconds", "0")])
def test_wrong_flags_are_refused(benchmark, tmp_path, capsys, flags):
    assert benchmark.main([*flags, "--out", str(tmp_path / "run")]) == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_torch_forms_compute_what_we_do(benchmark, key):
    pytest.importorskip("torch")
    forms = benchmark.torch_forms
    keys = jax.random.split(key, 4)
    arrays = [jax.random.normal(k, (3, 20, 6)) for k in keys]
    found = forms.softmax_error_gradients(*forms.tensors(arrays, "cpu"))
    gradients = jax.grad(lambda *a: softmax_error(*a).sum(), (0, 1))(*arrays)
    for expected, value in zip((softmax_error(*arrays).sum(), *gradients), found, strict=True):
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-5)
    x, w = arrays[0], jax.random.normal(keys[3], (6, 6))
    weight, tokens = forms.tensors((w, x), "cpu")
    for ours, form in ((wanda, forms.wanda), (sparsegpt, forms.sparsegpt)):
        np.testing.assert_allclose(
            form(tokens, weight, 0.5).numpy(), ours(x, w, "0.5").weight, rtol=1e-3, atol=1e-4
        )
    settings = {"lam": 0.1, "sparsity": Sparsity(0.5), "steps": 5, "learning_rate": 0.1}
    mask = algorithm1(x[:1], w, **settings).state.variable
    theirs = forms.algorithm1(tokens[:1], weight[None], lam=0.1, rate=0.1, steps=5)
    np.testing.assert_allclose(theirs[0].numpy(), mask, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(mask).all()


def test_the_step_in_torch_is_ours(benchmark):
    pytest.importorskip("torch")
    forms = benchmark.torch_forms
    layer = benchmark.layer_of(benchmark.Config(quick=True), 2)
    context = query_key_context(
        layer.weights, layer.x, layer.form, layer.settings, layer.wv, layer.wo
    )
    batch = query_key_data(layer.x, layer.x, context, layer.settings)
    context = context._replace(keep_masks=tuple(jnp.ones_like(w, bool) for w in layer.weights))
    pruned = tuple(0.9 * w for w in layer.weights)
    objective = query_key_refit(pruned, context, layer.settings).objective
    expected, gradients = jax.value_and_grad(objective)(pruned, batch)
    found = forms.query_key_step(
        *forms.tensors((layer.x, *pruned), "cpu"),
        *forms.tensors((forms.attention_of(batch["q0"], batch["k0"]), batch["values"]), "cpu"),
        grouped=(layer.settings.heads, layer.settings.kv_heads),
        scale=layer.settings.scale,
        rotary=layer.form.rope,
    )
    for ours, theirs in zip((expected, *gradients), found, strict=True):
        size = float(jnp.abs(ours).max())
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-3, atol=1e-4 * size)
