"""Meshes and processes: the same numbers, each device its part, one writer."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import sharding

REPOSITORY = Path(__file__).parents[1]


def run(code_or_file, *flags, devices=1):
    """A Python process of its own with so many CPU devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    return subprocess.Popen(
        [sys.executable, *code_or_file, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def output(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


EIGHT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jaxprune.attention import AttentionForm
from jaxprune.methods import query_key as factored
from jaxprune.pipeline.work import advance, movable, start
from jaxprune.sharding import gather, split_windows, use_mesh
from jaxprune.sparsity import Sparsity

d, heads, groups, k, n, b = 32, 16, 8, 4, 12, 16
keys = jax.random.split(jax.random.key(0), 3)
x = np.asarray(jax.random.normal(keys[0], (b, n, d)) * jnp.arange(1, d + 1.0) ** -0.5)
wq = np.asarray(jax.random.normal(keys[1], (d, heads * k)))
wk = np.asarray(jax.random.normal(keys[2], (d, groups * k)))
settings = factored.QueryKeySettings(heads, groups, k**-0.5, Sparsity(0.5), steps=50)
form = AttentionForm(10000.0 ** -np.linspace(0, 1, k // 2, dtype=np.float32))


def local_part(leaf):
    return leaf.addressable_shards[0].data.size / leaf.size


def everything():
    weights = movable((jnp.asarray(wq), jnp.asarray(wk)))
    windows = split_windows(jnp.asarray(x))
    context = factored.query_key_context(weights, windows, form, settings)
    data = factored.query_key_data(windows, windows, context, settings)
    context = factored.query_key_importance(context, data, settings)
    descent = factored.query_key_descent(weights, context, settings)
    half = jax.tree.map(lambda w: 0.5 * w, weights)
    value, gradient = jax.jit(jax.value_and_grad(descent.objective))(half, data)
    errors = factored.head_errors(x, half, x, weights, form, settings)
    make = factored.query_key_descent
    state = start(make, settings, weights, data, context)
    parts = [[local_part(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 2]]
    state, _ = advance(
        make, settings, state, weights, data, data, context, jax.random.key(0)
    )
    parts.append([local_part(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 2])
    numbers = [gather(a) for a in (value, *gradient, *errors)]
    kept = [int(gather(mask).sum()) for mask in state.best.keep_masks]
    return numbers, parts, kept, float(state.best.error)


one = everything()
report = {"one": one[1:], "many": {}, "difference": {}}
for shape in ("1x8", "8x1", "2x4"):
    with use_mesh(shape, groups):
        many = everything()
    report["many"][shape] = many[1:]
    report["difference"][shape] = max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one[0], many[0])
    )
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report():
    return json.loads(output(run(("-c", EIGHT), devices=8)).splitlines()[-1])


@pytest.mark.slow
def test_value_and_gradient_do_not_depend_on_the_devices(report):
    for shape, difference in report["difference"].items():
        assert difference < 1e-5, shape


@pytest.mark.slow
def test_each_device_holds_its_part_of_masks_and_optimiser_state(report):
    for shape, part in (("1x8", 1 / 8), ("2x4", 1 / 4), ("8x1", 1.0)):
        for moment in report["many"][shape][0]:
            # Variables, two moments of Adam, best weights and best masks, of two matrices each.
            assert moment == [part] * 10, shape


@pytest.mark.slow
def test_counts_over_a_split_matrix_are_exact(report):
    for _, kept, _ in report["many"].values():
        assert kept == [32 * 64 // 2, 32 * 32 // 2]


@pytest.mark.slow
def test_two_processes_write_what_one_of_two_devices_writes(tmp_path, checkpoint):
    words = np.random.default_rng(0).choice(["the cat", "sat", "on a mat", "and ran.\n"], 900)
    text, model = tmp_path / "text.txt", checkpoint("untied_gqa")
    text.write_text(" ".join(words))
    short = ["--windows", "8", "--seqlen", "16", "--heldout", "2", "--steps", "50"]
    short += ["--distill", "10"]
    named = ("--model", str(model), "--calibration", str(text))
    script = ("experiments/prune.py", *named, *short)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [
        run(
            script,
            *("--out", str(tmp_path / "two"), "--coordinator", address),
            *("--processes", "2", "--process", str(i)),
        )
        for i in range(2)
    ]
    outputs = [output(process) for process in both]
    output(run(script, "--out", str(tmp_path / "one"), devices=2))
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    masks = [np.load(tmp_path / name / "keep_masks.npz") for name in ("one", "two")]
    assert all((masks[0][name] == masks[1][name]).all() for name in masks[0].files)
    assert "relative attention error" in outputs[0]
    assert "relative attention error" not in outputs[1]
    assert not list(tmp_path.glob(".*"))


def test_without_a_mesh_nothing_changes():
    with sharding.use_mesh(None, 2):
        tree = {"a": jnp.ones((4, 4)), "b": jnp.ones(3)}
        assert sharding.split_columns(tree) is tree
        assert sharding.over_mesh(jnp.sin, *sharding.AXES)(tree["a"]).shape == (4, 4)
    assert sharding.is_writer()
    assert sharding.broadcast_flag(True)
    assert not sharding.broadcast_flag(False)


@pytest.mark.parametrize("shape", ["2x4", "1", "0x1", "x", "-1x-1"])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"mesh {shape}")):
        sharding.use_mesh(shape, 8)


@pytest.mark.parametrize(
    ("coordinator", "processes", "process"),
    [(None, 2, 0), (None, None, 1), ("a:1", None, None), ("a:1", 2, None), ("a:1", 2, 2)],
)
def test_incomplete_descriptions_of_processes_are_refused(coordinator, processes, process):
    with pytest.raises(ValueError, match="process"):
        sharding.connect(coordinator, processes, process)


def test_an_error_of_the_writer_is_the_error():
    def fail():
        raise sharding.InputError("no room")

    with pytest.raises(ValueError, match="no room"):
        sharding.on_process_zero(fail)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nonsense", 2, 0), "coordinator 'nonsense': expected HOST:PORT with a port"),
        (("host:0", 2, 0), "coordinator 'host:0': expected HOST:PORT"),
        (("host:99999", 2, 0), "from 1 to 65535"),
        (("host:１２", 2, 0), "from 1 to 65535"),
        (("a b:12", 2, 0), "expected HOST:PORT"),
        (("auto", 2, 0), "are the cluster's with coordinator=auto"),
        (("host:12", 0, 0), "needs processes=N"),
        (("host:12", 2, -1), "needs processes=N"),
        (("host:12", 2, 0, 0), "coordinator_timeout 0: expected 1 or more"),
    ],
)
def test_coordinators_that_cannot_be_are_refused(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        sharding.check_processes(*arguments)


def test_coordinators_that_can_be_are_not():
    for arguments in (("localhost:1", 2, 1), ("[::1]:65535", 1, 0), ("auto", None, None)):
        sharding.check_processes(*arguments)


MEET = """
import sys
from jaxprune.errors import InputError
from jaxprune.sharding import meet
try:
    meet(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
except InputError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def ends(address, *each):
    """What processes end with that were started as ``(processes, process, timeout)``."""
    started = [run(("-c", MEET), address, *map(str, arguments)) for arguments in each]
    return [
        (process.returncode, err)
        for process in started
        for _, err in [process.communicate(timeout=120)]
    ]


@pytest.mark.slow
def test_processes_meet_and_say_who_they_wait_for(address):
    first, *others = ends(address, (3, 0, 60), (3, 1, 60), (3, 2, 60))
    assert (first[0], [status for status, _ in others]) == (0, [0, 0])
    assert f"waiting up to 60 s for process 1, 2 at {address}" in first[1]
    assert f"waiting up to 60 s for process 0 at {address}" in others[0][1]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(address):
    first, second = ends(address, (3, 0, 8), (3, 1, 60))
    assert first[0] == second[0] == 1
    assert "process 2 of 3 did not come within 8 s; start it, or raise" in first[1]
    assert "not all processes came in time; see process 0" in second[1]


@pytest.mark.slow
def test_without_process_0_the_others_give_up(address):
    ((status, shown),) = ends(address, (2, 1, 2))
    assert (status, shown.count("\n")) == (1, 2)
    assert "process 0 did not come within 2 s; start it, check the address" in shown


@pytest.mark.slow
def test_processes_that_disagree_are_told(address):
    first, second = ends(address, (2, 0, 60), (3, 1, 60))
    for status, shown in (first, second):
        assert status == 1
        assert "process 1 has processes=3, process 0 has 2" in shown


@pytest.mark.slow
def test_no_cluster_is_one_line():
    process = run(("-c", "from jaxprune.sharding import connect; connect('auto', None, None)"))
    _, err = process.communicate(timeout=120)
    assert "JAX finds no cluster here; give HOST:PORT, `processes`" in err.splitlines()[-1]
