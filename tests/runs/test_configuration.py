"""Settings by name; what a record of an earlier version is compared with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jaxprune.errors import InputError
from jaxprune.runs import flags
from jaxprune.runs.configuration import (
    as_recorded,
    configuration,
    defaults,
    differing,
    flat,
    names,
    replaced,
)
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.script import run_script

# What version 0.1 left in a folder: no damping, and three steps by default.
RECORD = {"steps": 3, "sparsity": "0.5", "ratios": [0.3, 0.5], "model": "models/zoo"}


@dataclass(frozen=True, kw_only=True)
class Data(flags.Model):
    """A model."""

    ratios: tuple[float, ...] = (0.3, 0.5)
    """fractions"""


@dataclass(frozen=True)
class Config:
    """A later version: other steps by default, and two flags more."""

    steps: int = 5
    """how often"""
    sparsity: str = "0.5"
    """how much"""
    damping: float = 0.1
    """new"""
    extra: bool = False
    """new, and off as it was"""
    data: Data = field(default=Data(model="models/zoo"))
    run: flags.Folder = field(default=flags.Folder(out=Path("out")))

    earlier: ClassVar[Mapping[str, Any]] = {"steps": 3, "damping": 0.0}


def test_groups_are_flat():
    config = Config(steps=1)
    assert list(flat(config)) == names(Config)
    assert flat(config)["model"] == "models/zoo"
    assert configuration(config) == {
        **{"steps": 1, "sparsity": "0.5", "damping": 0.1, "extra": False},
        **{"model": "models/zoo", "ratios": [0.3, 0.5]},
    }
    assert defaults(Config) == flat(Config())
    changed = replaced(config, {"model": "other", "out": Path("there")})
    assert (changed.steps, changed.data.model, changed.run.out) == (1, "other", Path("there"))


def test_a_run_of_an_earlier_version_goes_on_as_it_was():
    config = as_recorded(Config(), RECORD)
    assert (config.steps, config.damping, config.extra) == (3, 0.0, False)
    assert differing(RECORD, config) is None
    # What was asked for is not replaced.
    assert differing(RECORD, as_recorded(Config(steps=7), RECORD)) == "steps"
    assert differing(RECORD, as_recorded(Config(damping=0.2), RECORD)) == "damping"
    assert differing(RECORD, as_recorded(Config(extra=True), RECORD)) == "extra"
    # A record of this version has it all.
    later = configuration(Config())
    assert as_recorded(Config(), later) == Config()
    assert differing(later | {"gone": 1}, Config()) == "gone"


@pytest.mark.parametrize(
    ("name", "value"),
    [("sparsity", ".5"), ("model", "models/zoo/"), ("model", "./models//zoo"), ("steps", 5.0)],
)
def test_the_same_value_written_otherwise_is_the_same(name, value):
    assert differing(configuration(Config()) | {name: value}, Config()) is None
    assert differing(configuration(Config()) | {name: "2:4"}, Config()) == name


def run(argv, steps):
    def body(config):
        steps.append((config.steps, config.damping))
        with RunFolder(config.run.out, config, resume=config.run.resume):
            pass

    return run_script(Config, body, argv, "tool.py")


def test_a_folder_of_an_earlier_version_is_resumed(tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(RECORD))
    seen = []
    assert run(["--out", str(tmp_path), "--resume"], seen) == 0
    assert seen == [(3, 0.0)]
    assert json.loads((tmp_path / "config.json").read_text()) == RECORD | {
        "damping": 0.0,
        "extra": False,
    }
    assert run(["--out", str(tmp_path), "--resume", "--steps", "4"], seen) == 2
    assert "holds a run with --steps 3, not 4; choose" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(RECORD | {"gone": [1, 2]}))
    assert run(["--out", str(tmp_path), "--resume"], seen) == 2
    assert "a run with gone 1 2, which this version does not have" in capsys.readouterr().err


@dataclass(frozen=True)
class Repeating(Config):
    """The same, and it repeats."""

    again: flags.Repeat = field(default=flags.Repeat())


def test_a_folder_of_an_earlier_version_is_repeated(tmp_path):
    for name in ("config", "inputs", "environment"):
        content = RECORD if name == "config" else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    seen = []

    def body(config):
        seen.append(configuration(config))

    argv = ["--repeat", str(tmp_path), "--out", str(tmp_path / "again")]
    assert run_script(Repeating, body, argv, "tool.py") == 0
    assert seen == [RECORD | {"damping": 0.0, "extra": False}]


def test_a_run_that_lacks_what_no_default_stands_for(tmp_path):
    record = {k: v for k, v in RECORD.items() if k != "model"}
    assert differing(record, as_recorded(Config(), record)) is None
    other = Config(data=Data(model="another"))
    assert differing(record, as_recorded(other, record)) == "model"
    (tmp_path / "parts").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="model=as it was before there was this choice"):
        RunFolder(tmp_path, as_recorded(other, record), resume=True).__enter__()


@dataclass(frozen=True)
class Table(Config):
    """A table of parts, of which a run may have more or fewer when it goes on."""

    rows: tuple[str, ...] = ()
    """parts"""

    free: ClassVar[tuple[str, ...]] = ("rows",)


def test_free_settings_may_differ():
    record = configuration(Table(rows=("a", "b")))
    assert record["rows"] == ["a", "b"]
    assert differing(record, Table(rows=("c",))) is None
    assert differing(record, Table(rows=("c",), steps=7)) == "steps"
