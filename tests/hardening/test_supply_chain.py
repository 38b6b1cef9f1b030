"""What the project depends on and what it never does."""

import ast
import re
import socket
import tomllib
from pathlib import Path

import mutants
import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = [
    f
    for folder in ("jaxprune", "experiments", "tools")
    for f in (REPOSITORY / folder).rglob("*.py")
]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def calls(source):
    """Names of called functions with their keywords, as ``np.load``."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.name)
def test_nothing_is_unpickled_or_evaluated(source):
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }
    assert not imported & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for name, keywords in calls(source):
        assert name not in {"eval", "exec", "compile", "__import__", "torch.load"}
        if name in {"np.load", "jnp.load"}:
            assert keywords.get("allow_pickle") == "False"


def required(text):
    return re.match(r"[A-Za-z0-9._-]+", text)[0].lower().replace("_", "-")


def test_every_dependency_has_a_lower_bound_and_an_exact_version():
    project = PROJECT["project"]
    # What the Makefile installs; other extras are for comparisons with other software.
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], extras["hub"], extras["gguf"]]
    groups += PROJECT["dependency-groups"].values()
    wanted = [text for group in groups for text in group if not text.startswith("jaxprune")]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {required(line) for line in lines if re.search(r"==\d", line)}
    for text in wanted:
        assert ">=" in text, text
        assert required(text) in pinned, text


def test_the_tests_install_the_exact_versions():
    assert "-c constraints.txt" in (REPOSITORY / "Makefile").read_text()


def test_tests_have_no_network():
    with pytest.raises(OSError, match="no network in tests"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    with pytest.raises(OSError, match="no network in tests"):
        socket.getaddrinfo("localhost", 80)


def test_every_mutant_still_finds_its_place():
    """What ``make mutants`` changes is there exactly once."""
    assert len(mutants.MUTANTS) >= 30
    for mutant in mutants.MUTANTS:
        source = (REPOSITORY / "jaxprune" / mutant.file).read_text()
        assert source.count(mutant.old) == 1, mutant
        assert mutant.old != mutant.new
