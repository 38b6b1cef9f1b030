"""One version everywhere, and what the package says of itself."""

import re
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    cited = (REPOSITORY / "CITATION.cff").read_text()
    logged = re.search(
        r"^## (\S+) \((\S+)\)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert logged is not None
    assert logged[1] == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in cited
    assert f"\ndate-released: {logged[2]}\n" in cited


def test_versions_of_python_are_those_that_are_tested():
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    tested = re.findall(r"\d\.\d+", re.search(r"python: \[(.*)\]", workflow)[1])
    said = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert PROJECT["requires-python"] == f">={said[0]}"
    assert (tested[0], tested[-1]) == (said[0], said[-1])


def test_a_commit_is_held_to_what_make_lint_runs():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", hooks) == ["make lint"]
