"""Flags in groups; arguments of the library as flags."""

import ast
import io
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from jaxprune.errors import InputError
from jaxprune.runs import flags
from jaxprune.runs.flags import in_flags, parse_flags

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Data(flags.Dtype, flags.HeldoutWindows, flags.Model):
    """What is read."""

    layers: flags.Several[int] = ()
    """layers; if left out, all"""
    example: flags.Maybe[tuple[int, int]] = None
    """layer and head; if left out, the first"""


@dataclass(frozen=True)
class Config:
    """What the script is for: λ."""

    lam: float = 0.1
    """the penalty λ"""
    method: Literal["magnitude", "wanda"] = "wanda"
    """how"""
    refit: bool = True
    """move weights"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data(windows=64)
    devices: Annotated[flags.Devices, flags.DEVICES_AND_MEMORY] = field(default=flags.Devices())
    run: Annotated[flags.SeededRun, flags.RUN] = field(
        default=flags.SeededRun(out=Path("runs/x"), seed=3)
    )


def parsed(*argv):
    return parse_flags(Config, argv, "tool.py")


def test_shared_flags_have_the_script_own_defaults():
    assert parsed() == Config()
    config = parsed("--windows", "3", "--layers", "1", "2", "--example", "4", "4", "--no-refit")
    assert (config.data.windows, config.data.layers, config.data.example) == (3, (1, 2), (4, 4))
    assert (config.refit, config.run.seed, config.data.seqlen) == (False, 3, None)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--method", "best"], "--method best: expected one of magnitude, wanda (see tool.py"),
        (["--dtype", "float16"], "--dtype float16: expected one of float32, bfloat16"),
        (["--windows", "٣"], "--windows: '٣' is not a whole number"),
        (["--seed", "３"], "--seed: '３' is not a whole number"),
        (["--lam", "٠.٥"], "--lam: '٠.٥' is not a number"),
        (["--windows", "None"], "--windows: 'None' is not a whole number"),
        (["--layers", "1", "1"], "--layers 1: is there twice"),
        (["--example", "3"], "--example"),
        (["--heldout", "9" * 30], "--heldout 1e+30: expected a number below 2^31"),
    ],
)
def test_wrong_values_name_the_flag(argv, named):
    with pytest.raises(InputError) as error:
        parsed(*argv)
    assert named in str(error.value)


def test_help_shows_plain_values(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "None" not in shown
    assert "(default: )" not in shown
    for text in ("--windows INT", "(default: 64)", "--example INT INT", "--coordinator HOST:PORT"):
        assert text in shown
    titles = ["model-and-text options", "devices-and-memory options", "run options"]
    places = [shown.index(title) for title in titles]
    assert places == sorted(places)


def test_help_in_an_ascii_locale(monkeypatch):
    from jaxprune.runs.script import run_script

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit):
        run_script(Config, print, ["--help"], "tool.py")
    assert b"the penalty ?" in raw.getvalue()


SOURCES = [
    *(Path(flags.__file__), *sorted((REPOSITORY / "jaxprune" / "commands").glob("*.py"))),
    *(f for folder in ("experiments", "tools") for f in sorted((REPOSITORY / folder).glob("*.py"))),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: file.name)
def test_texts_of_flags_are_of_one_line(source):
    """The help keeps the line breaks of a docstring where they are not those of the page."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ClassDef):
            for field, text in itertools.pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert "\n" not in ast.literal_eval(text.value), ast.unparse(field)


NAMES = ["seqlen", "out", "resume", "refit", "head_batch", "steps", "method", "batch", "model"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("seqlen must be at least 2, not 1", "--seqlen must be at least 2, not 1"),
        ("head_batch: expected 1 or more", "--head-batch: expected 1 or more"),
        ("out a/b c: cannot write there", "--out a/b c: cannot write there"),
        ("out x: has resume=True in it", "--out x: has --resume in it"),
        ("out method=x: is full; resume=True goes on", "--out method=x: is full; --resume goes on"),
        ("refit=False: only with method=descent.", "--no-refit: only with --method descent."),
        ("out x holds a run with steps=None, not 4", "--out x holds a run with no --steps, not 4"),
        (
            "c4: choose a smaller `seqlen`",
            "c4: choose a smaller --seqlen",
        ),
        ("the model has none", "the model has none"),
        ("modeling is hard", "modeling is hard"),
        ("runs/steps=3/x.json: damaged", "runs/steps=3/x.json: damaged"),
        ("take seqlen=16 or less", "take --seqlen 16 or less"),
        ("needs `pip install x`", "needs `pip install x`"),
    ],
)
def test_arguments_become_flags(message, shown):
    assert in_flags(message, NAMES) == shown
    assert in_flags(message, []) == message
