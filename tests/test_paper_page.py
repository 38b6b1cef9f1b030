"""docs/paper.md and the front page of the API reference name what exists."""

import importlib
import re
from pathlib import Path

import pytest

import jaxprune

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
NAMES = sorted(set(re.findall(r"`(jaxprune(?:\.\w+)+)`", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def test_the_page_names_functions_and_tests():
    assert len(NAMES) >= 15
    assert len(TESTS) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_function_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


FRONT = set(re.findall(r"`(jaxprune(?:\.\w+)+)`", jaxprune.__doc__))


def test_the_front_page_of_the_reference_leads_everywhere():
    for name in FRONT:
        assert importlib.import_module(name).__doc__, name
    below = {".".join(name.split(".")[:2]) for name in FRONT}
    rooms = {f"jaxprune.{p.parent.name}" for p in REPOSITORY.glob("jaxprune/*/__init__.py")}
    assert rooms <= below


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_test_exists(file, name):
    assert re.search(rf"^ *def {name}\(", (REPOSITORY / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "item",
    [
        *("Def. 1.1", "Def. 1.2", "3.1", "3.2", "Thm. 1.3", "4.1", "Def. 5.1", "Thm. 5.2"),
        *("Algorithm 1", "Figure 1", "Figure 2", "Figure 3"),
    ],
)
def test_every_numbered_item_has_a_row(item):
    assert re.search(rf"^\| [^|]*{re.escape(item)}", PAGE, re.MULTILINE)
