"""The worked example of CONTRIBUTING.md is a baseline like the others."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import Sparsity
from jaxprune.baselines import BASELINES

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
EXAMPLE, LINE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def prune():
    names = {}
    exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), names)
    yield names["relative_importance"]
    del BASELINES["relative_importance"]


def test_it_is_short():
    assert len(EXAMPLE.splitlines()) < 45


def test_it_keeps_the_highest_shares_exactly(prune, key):
    keys = jax.random.split(key)
    x, w = jax.random.normal(keys[0], (3, 20, 8)), jax.random.normal(keys[1], (8, 6))
    size, norms = np.abs(np.asarray(w, float)), np.linalg.norm(np.asarray(x, float), axis=1)
    scores = size / size.sum(0) + size / size.sum(1, keepdims=True)
    scores *= np.sqrt(np.mean(norms**2, axis=0))[:, None] ** 0.5
    kept = scores >= np.sort(scores.ravel())[24]
    np.testing.assert_array_equal(prune(x, w, 0.5).keep_mask, kept)
    assert (prune(x, w, "2:4").keep_mask.reshape(2, 4, 6).sum(axis=1) == 2).all()


def test_it_maps_over_heads_and_ratios(prune, key):
    x, w = jax.random.normal(key, (20, 8)), jax.random.normal(key, (3, 8, 6))
    ratios = jnp.array([0.25, 0.5, 0.75])
    masks = jax.vmap(lambda w, r: prune(x, w, Sparsity(r)).keep_mask)(w, ratios)
    np.testing.assert_array_equal(masks.sum(axis=(1, 2)), [36, 24, 12])


LISTS = """
import jaxprune.commands.heads, jaxprune.pipeline, jaxprune.runs.plotting
print(*jaxprune.pipeline.METHODS)
print(*jaxprune.commands.heads.SHOWN)
print(jaxprune.runs.plotting.style("relative_importance").label)
"""


@pytest.fixture
def followed(tmp_path):
    """A copy of the package in which the steps were followed to the letter."""
    package = tmp_path / "jaxprune"
    shutil.copytree(REPOSITORY / "jaxprune", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "baselines" / "relative_importance.py").write_text(EXAMPLE)
    with (package / "baselines" / "__init__.py").open("a") as file:
        file.write(textwrap.dedent(LINE))
    return tmp_path


@pytest.mark.slow
def test_followed_to_the_letter_it_is_everywhere(followed):
    environment = os.environ | {"PYTHONPATH": str(followed)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=followed, env=environment, capture_output=True
        )

    methods, shown, label = run("-c", LISTS).stdout.decode().splitlines()
    assert "relative_importance" in methods.split()
    assert "relative_importance" in shown.split()
    assert "relative importance" in label
    shutil.copytree(REPOSITORY / "tests", followed / "tests")
    suite = "tests/baselines/test_conformance.py"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "relative", suite)
    assert done.returncode == 0, done.stdout.decode()
    assert "passed" in done.stdout.decode()


TABLE = PAGE.partition("| to find")[2].partition("`experiments/`")[0]
NAMED = re.findall(r"`([\w/]+(?:\.py|/))`", TABLE)


def test_every_file_on_the_map_exists():
    assert len(NAMED) > 15
    for name in NAMED:
        assert (REPOSITORY / "jaxprune" / name).exists(), name


def test_every_module_is_on_the_map():
    left_out = {"__init__.py", "__main__.py", "errors.py"}
    package = REPOSITORY / "jaxprune"
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        on_map = name in NAMED or any(name.startswith(n) for n in NAMED if n.endswith("/"))
        assert path.name in left_out or on_map, name
