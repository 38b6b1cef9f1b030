"""Hostile flags of ``jaxprune``, 500 of them, and 180 arguments of ``prune_checkpoint``.

Nothing here prunes: where the model would be looked for, a case ends. What flags or arguments
alone can tell must be refused before, in one line that names the flag or argument, with status 2.
"""

import contextlib
import io
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from hostile import JUNK, cases, one_line
from hypothesis import example, given
from hypothesis import strategies as st

from jaxprune.__main__ import main
from jaxprune.commands import heads, perplexity, prune
from jaxprune.errors import InputError
from jaxprune.evaluation.summary import summary_figure
from jaxprune.models import llama
from jaxprune.pipeline import METHODS, prune_checkpoint
from jaxprune.pipeline.checkpoint import PruneRequest
from jaxprune.runs import plotting
from jaxprune.runs.configuration import names
from jaxprune.runs.flags import flag_of
from jaxprune.sparsity import Sparsity

REACHED = "the model is looked for"


@pytest.fixture(autouse=True)
def reached(tmp_path, monkeypatch):
    """How often work would have begun, and what the hub was asked."""
    seen = []

    def locate(model):
        seen.append("model")
        raise InputError(REACHED)

    class Hub:
        def whoami(self):
            seen.append("hub")
            return {}

        def repo_info(self, name):
            error = huggingface_hub.errors.RepositoryNotFoundError
            raise error.__new__(error)

    monkeypatch.setattr(llama, "locate", locate)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.chdir(tmp_path)
    yield seen
    assert not list(tmp_path.iterdir())


def refused(argv):
    """The one line of a command that ends with status 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(argv) == 2
    shown = err.getvalue()
    assert out.getvalue() == ""
    assert shown.endswith("\n")
    assert shown[:-1].isprintable(), shown
    assert ": error: " in shown
    return shown


WORDS = st.one_of(
    st.sampled_from(
        [
            *("", " ", "\0", "a\0b", "\udcff", "a\nb", "\x1b[2J", "é" * 300, "x" * 300, "../x"),
            *("٣", "½", "²", "１６", "0٫5", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000),
            *("-1", "0", "-0.5", "1.5", "2:4", "0:4", "4:2", "2:4:8", "true", "None", "null", "-"),
        ]
    ),
    st.text(max_size=6),
)


@cases(60)
@given(name=WORDS, more=st.lists(WORDS, max_size=2))
@example(name="Prune", more=[])
@example(name="prune ", more=["--help"])
@example(name="--sparsity", more=["0.5"])
def test_unknown_commands(reached, name, more):
    line = refused([name, *more])
    assert line.startswith("jaxprune: error: ")
    assert line.endswith(": expected one of prune, perplexity, heads (see jaxprune --help)\n")
    assert not reached


COMMANDS = {
    "prune": (prune.Config, ["--out=new"]),
    "perplexity": (perplexity.PerplexityConfig, []),
    "heads": (heads.Config, ["--out=new"]),
}
FLAGS = [
    (command, flag_of(name)) for command, (config, _) in COMMANDS.items() for name in names(config)
]
# Flags that stand alone; --layers without any is all of them.
SWITCHES = {"refit", "no-refit", "resume", "public", "redraw", "bos-per-window", "propagate"}
SWITCHES |= {"layers"}


def check_flag(reached, which, value, how):
    """Missing, empty, null, numerals of other scripts, absurd; flags that are none."""
    command, flag = which
    argv = {
        "equals": [f"{flag}={value}"],
        "apart": [flag, value],
        "no value": [flag],
        "misspelt": [f"{flag}s{value}"],
        "value alone": [value],
    }[how]
    reached.clear()
    line = refused([command, *COMMANDS[command][1], *argv])
    assert line.startswith(f"jaxprune {command}: error: ")
    if not reached:
        # Files of a run to repeat, to go on with or to draw again are named themselves.
        recorded = flag in ("--repeat", "--resume", "--redraw")
        assert recorded or "--" in line or "argument" in line
    if how == "no value" and flag[2:] not in SWITCHES:
        assert not reached
        assert flag in line
    if "\0" in value and how in ("equals", "apart"):
        assert not reached
        assert f"{flag}: holds a null character" in line


FLAG_AND_VALUE = given(
    which=st.sampled_from(FLAGS),
    value=WORDS,
    how=st.sampled_from(["equals", "equals", "apart", "no value", "misspelt", "value alone"]),
)


@cases(40)
@FLAG_AND_VALUE
@example(which=("prune", "--out"), value="\udcff", how="equals")
@example(which=("perplexity", "--text"), value="\udcff", how="apart")
def test_values_of_flags(reached, which, value, how):
    check_flag(reached, which, value, how)


@pytest.mark.slow
@cases(160)
@FLAG_AND_VALUE
def test_more_values_of_flags(reached, which, value, how):
    check_flag(reached, which, value, how)


CHOICES = {
    "method": [*METHODS, "wanda", "descent", "obs", "GAUSS-NEWTON", "gauss_newton"],
    "targets": ["qk", "all", "mlp", "wq"],
    "sparsity": ["0.5", "2:4", "0", "1", "0.99", "1.5", "-0.1", "4:2", "0:4", "½", "nan", "half"],
    "start": ["dense", "gauss-newton", "sparse"],
    "metric": ["attention", "predictions", "both"],
    "allocate": ["matrix", "block", "model", "layer"],
    "lowest": ["0", "0.4", "0.6", "-0.1", "nan"],
    "highest": ["0.95", "0.4", "1", "1.1", "inf"],
    "rounds": ["1", "2", "0"],
    "steps": ["0", "9", "-1", "many"],
    "distill": ["0", "5", "-1", "None"],
    "generated": ["0", "9", "-1"],
    "heldout": ["1", "0", "-1"],
    "windows": ["1", "0"],
    "seqlen": ["2", "1"],
    "batch": ["1", "0"],
    "dtype": ["float32", "bfloat16", "float16"],
    "mesh": ["1x1", "0x1", "２x1", "wide"],
    "push": ["me/small", "small", "a/b/c", "me/..", "mé/x", "me/x.git"],
}
USUAL = ["method", "targets", "sparsity", "allocate", "distill", "push", "start", "steps", "lowest"]
USUAL += ["rounds", "metric"]
SWITCH = st.sampled_from([False, False, True])


def wrong(given, switches):
    """Whether a combination of flags cannot be meant, said once more."""
    get = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    if any(given[name] not in GOOD.get(name, given[name]) for name in given):
        return True
    pattern, ratio = ":" in get["sparsity"], Sparsity.parse(get["sparsity"]).ratio
    descends, shared = get["method"] == "descent", get["allocate"] != "matrix"
    adapts = descends and (get["start"] == "dense" or "no-refit" not in switches)
    reads = get["method"] != "magnitude" or "refit" in switches or get["distill"] not in ("", "0")
    low, high = float(get["lowest"]), float(get["highest"])
    from_closed_form = get["method"] == "gauss-newton" or (
        descends and get["start"] == "gauss-newton"
    )
    on_predictions = from_closed_form and "predictions" in (
        get["metric"] or {"qk": "attention", "all": "predictions"}[get["targets"]]
    )
    return any(
        [
            {"refit", "no-refit"} <= switches,
            "no-refit" in switches and not (descends and get["targets"] == "qk"),
            "no-refit" in switches and get["distill"] == "5",
            "public" in switches and "push" not in given,
            "steps" in given and not (adapts or "refit" in switches),
            get["start"] == "dense" and not descends,
            get["generated"] != "0" and not (reads or shared),
            "no-propagate" in switches and get["targets"] == "all",
            shared and (pattern or get["start"] == "dense"),
            low > high,
            shared and not low <= ratio <= high,
            not shared and (low, high) != (0, 0.95),
            get["rounds"] == "2" and not on_predictions,
            get["metric"] and not from_closed_form,
            get["metric"] == "attention" and get["targets"] == "all",
        ]
    )


DEFAULTS = {
    **{"method": "descent", "targets": "qk", "sparsity": "0.5", "start": "gauss-newton"},
    **{"metric": "", "allocate": "matrix", "lowest": "0", "highest": "0.95", "distill": ""},
    "rounds": "1",
    "generated": "0",
}
GOOD = {
    "method": METHODS,
    "targets": ("qk", "all"),
    "sparsity": ("0.5", "2:4", "0", "1", "0.99"),
    "start": ("dense", "gauss-newton"),
    "metric": ("attention", "predictions"),
    "allocate": ("matrix", "block", "model"),
    "lowest": ("0", "0.4", "0.6"),
    "highest": ("0.95", "0.4", "1"),
    "rounds": ("1", "2"),
    "steps": ("9",),
    "distill": ("0", "5"),
    "generated": ("0", "9"),
    "heldout": ("1",),
    "windows": ("1",),
    "seqlen": ("2",),
    "batch": ("1",),
    "dtype": ("float32", "bfloat16"),
    "mesh": ("1x1",),
    "push": ("me/small",),
}
# Mostly values that a flag takes: what is wrong is then the combination.
VALUE = {
    name: st.sampled_from([*[v for v in GOOD[name] for _ in range(3)], *values])
    for name, values in CHOICES.items()
}
FLAG = st.sampled_from([*USUAL, *USUAL, *CHOICES]).flatmap(
    lambda name: st.tuples(st.just(name), VALUE[name])
)


def check_combination(reached, flags, switches):
    """Refused before the hub is asked and the model is looked for, wherever flags can tell."""
    argv = [f"--{name}={value}" for name, value in flags.items()]
    reached.clear()
    line = refused(["prune", "--out=new", *argv, *[f"--{name}" for name in sorted(switches)]])
    if wrong(flags, switches):
        assert "model" not in reached, line
        assert flags.get("push") in (None, "me/small") or "hub" not in reached
        assert any(name in line for name in [*flags, *switches]), line
        assert "--" in line
        # The form of the name is looked at on the way to the hub.
        if all(flags[name] in GOOD[name] for name in flags if name == "push"):
            assert "hub" not in reached
    else:
        assert line == f"jaxprune prune: error: {REACHED}\n"
        assert reached == ["hub"] * ("push" in flags) + ["model"]


FLAGS_AND_SWITCHES = given(
    flags=st.lists(FLAG, min_size=1, max_size=5).map(dict),
    switches=st.sets(st.sampled_from(["refit", "no-refit", "public", "no-propagate"]), max_size=2),
)


@pytest.mark.slow
@cases(40)
@FLAGS_AND_SWITCHES
@example(flags={"push": "me/small", "method": "obs"}, switches=set())
@example(flags={"rounds": "2"}, switches=set())
@example(flags={"rounds": "2", "targets": "all"}, switches=set())
def test_combinations_of_flags(reached, flags, switches):
    check_combination(reached, flags, switches)


@pytest.mark.slow
@cases(200)
@FLAGS_AND_SWITCHES
def test_more_combinations_of_flags(reached, flags, switches):
    check_combination(reached, flags, switches)


def whole(least):
    return lambda v: isinstance(v, int | np.integer) and least <= v < 2**31


def number(least, most):
    return lambda v: isinstance(v, int | float | np.floating | np.integer) and least <= v <= most


def text(v):
    """That can be the name of something."""
    if not isinstance(v, str | Path):
        return False
    return str(v) != "" and "\0" not in str(v) and "\udcff" not in str(v)


def fraction(v):
    if not isinstance(v, str | int | float | np.floating | np.integer | Sparsity):
        return False
    with contextlib.suppress(ValueError):
        return Sparsity.parse(v) is not None
    return False


# What an argument may be, besides None where it is in OPTIONAL.
ARGUMENTS = {
    "model": text,
    "out": lambda v: text(v) and len(str(v).encode()) < 256,
    "calibration": lambda v: isinstance(v, str) and text(v),
    "windows": whole(1),
    "seqlen": whole(2),
    "heldout": whole(1),
    "method": lambda v: v in METHODS,
    "targets": lambda v: v in ("qk", "all"),
    "sparsity": fraction,
    "refit": lambda v: isinstance(v, bool),
    "start": lambda v: v in ("gauss-newton", "dense"),
    "metric": lambda v: v in ("attention", "predictions"),
    "allocate": lambda v: v in ("matrix", "block", "model"),
    "lowest": number(0, 0.95),
    "highest": number(0, 1),
    "rounds": lambda v: whole(1)(v) and v == 1,  # of the default, qk, there are no more
    "propagate": lambda v: isinstance(v, bool),
    "steps": whole(1),
    "distill": whole(0),
    "generated": whole(0),
    "batch": whole(1),
    "seed": whole(-(2**31) + 1),
    "dtype": lambda v: v in ("float32", "bfloat16"),
    "mesh": lambda v: v == "1x1",
    "resume": lambda v: isinstance(v, bool),
    "repeat": lambda v: isinstance(v, Path) and text(v),
    "announce": callable,
    "warn": callable,
    "progress": callable,
}
OPTIONAL = {"windows", "seqlen", "heldout", "refit", "steps", "distill", "mesh", "repeat"}
OPTIONAL |= {"metric", "announce", "warn", "progress"}
NO_NUMBERS = {*ARGUMENTS} - {"refit", "propagate", "resume"}
OBJECTS = st.sampled_from(
    [
        *(np.int64(3), np.float32(0.5), np.ones(2), b"qk", object(), print, int, {"qk"}, ("wq",)),
        *(Path("x"), Path("a\0b"), "\udcff", "1x1", "２x1", "qk", "all", "dense", "wanda", "model"),
        *(0.5, -0.0, -1, 2**31 - 1, math.inf, Sparsity(1 / 3), Sparsity(n=2, m=4), "2:4", "a\nb"),
    ]
)


@cases(180)
@given(name=st.sampled_from(list(ARGUMENTS)), value=JUNK | OBJECTS | OBJECTS)
@example(name="targets", value=["qk"])
@example(name="refit", value="yes")
@example(name="seed", value=2**70)
@example(name="method", value="a\nb")
@example(name="mesh", value="a\nb")
def test_arguments_of_prune_checkpoint(unchecked, reached, name, value):
    """Wrong types and values are named before the model is looked for."""
    fine = (value is None and name in OPTIONAL) or (
        not (isinstance(value, bool) and name in NO_NUMBERS)
        and type(value) not in (set, np.ndarray)
        and bool(ARGUMENTS[name](value))
    )
    reached.clear()
    with pytest.raises(InputError) as error:
        prune_checkpoint(**{"model": "nowhere", "out": "new"} | {name: value})
    message = one_line(error.value)
    if fine:
        assert message == REACHED
    else:
        assert name in message.split(": expected")[0]
        assert not reached


@pytest.mark.parametrize("name", [r"m$\frac$x", "a_$b$", "$" * 3])
def test_the_name_of_a_model_is_no_mathematics_in_a_figure(tmp_path_factory, name):
    columns = ("layer", "head", "calibration_error", "heldout_error")
    metrics = pd.DataFrame([dict(zip(columns, (0, 0, 0.1, 0.2), strict=True))])
    folder = tmp_path_factory.mktemp("figures")
    plotting.save(summary_figure(metrics, f"{name}: wanda"), folder, "summary")
    assert (folder / "summary.png").stat().st_size


def test_a_ratio_keeps_its_digits(reached):
    """Recorded as it was given, not as it is shown."""
    requests = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruneRequest, "check", lambda request: requests.append(request.settings()))
        for ratio in (Sparsity(1 / 3), 1 / 3, str(1 / 3)):
            with pytest.raises(InputError, match=REACHED):
                prune_checkpoint("nowhere", "new", sparsity=ratio)
    assert [settings.sparsity for settings in requests] == [Sparsity(1 / 3)] * 3
