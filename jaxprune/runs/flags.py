"""Flags of scripts: the groups that scripts share, and how a command line becomes a configuration.

A script's configuration is a frozen dataclass. Its own flags are fields; those that scripts share
are in fields of the groups below, with other defaults where a script passes another instance::

    @dataclass(frozen=True)
    class Config:
        \"\"\"What the script is for.\"\"\"

        steps: int = 300
        \"\"\"steps of the descent\"\"\"
        run: Annotated[flags.Run, flags.RUN] = flags.Run(out=Path("runs/mine"))

A group of a script's own choice of flags inherits from several of these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from jaxprune.errors import InputError
from jaxprune.runs.configuration import Group, flat
from jaxprune.storage import is_name

T = TypeVar("T")
Config = TypeVar("Config")

# A boolean flag without a `--no-` twin.
Flag = tyro.conf.FlagCreatePairsOff[bool]


def _stated(default: str) -> str:
    return "" if default in ("None", "") else f"(default: {default})"


# A flag that may be left out, and one of any number of values: their texts say what happens then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint=_stated)]
Several = Annotated[tuple[T, ...], tyro.conf.arg(help_behavior_hint=_stated)]

# Of a field that holds a group: its title in the help.
MODEL_AND_TEXT = tyro.conf.arg(name="model-and-text", help="")
DEVICES_AND_MEMORY = tyro.conf.arg(name="devices-and-memory", help="")
RUN = tyro.conf.arg(name="run", help="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Group):
    """Which model."""

    model: str = "zoo"
    """zoo, a Hugging Face folder, a .gguf file, or owner/name on the hub"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Group):
    """Which text to calibrate on."""

    calibration: str = "zoo"
    """zoo, a text file (.txt, .jsonl, .json.gz), c4, wikitext2, or a preset: standard, paper"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seqlen(Group):
    """How long windows are."""

    seqlen: Maybe[int] = None
    """tokens of a window, a BOS included; if left out, 256 or as the preset says"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationWindows(Seqlen, Calibration):
    """Windows of a text to calibrate on."""

    windows: Maybe[int] = None
    """windows to calibrate on; if left out, 128 or as the preset says"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutWindows(CalibrationWindows):
    """Windows to calibrate on, and to judge by."""

    heldout: Maybe[int] = None
    """windows after those, for held-out errors; if left out, 16 or as the preset says"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dtype(Group):
    """In which type a model computes."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the model's weights and activations; softmax, sums, masks and what moves are float32"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Group):
    """How much is computed at once."""

    batch: int = 8
    """windows at once in forward passes; lower it if memory runs out"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(Batch):
    """Devices and processes that share the work."""

    mesh: Maybe[str] = None
    """SxH, devices along sequences and heads; if left out, all there are, heads first"""
    coordinator: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="HOST:PORT",
            help_behavior_hint=_stated,
            help="of process 0 where several processes share the work, or auto on a cluster that "
            "JAX knows; --out must then be on a file system that they all see. If left out, this "
            "process works alone",
        ),
    ] = None
    coordinator_timeout: int = 300
    """seconds to wait for the other processes"""
    processes: Maybe[int] = None
    """how many processes there are, with --coordinator"""
    process: Maybe[int] = None
    """which one this is, from 0, with --coordinator; process 0 writes"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seed(Group):
    """What chance is drawn from."""

    seed: int = 0
    """of all that is drawn at random"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Group):
    """Where a run is."""

    out: Path = Path("runs")
    """folder of the run"""
    resume: Flag = False
    """go on with the interrupted run in --out, with the same settings"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Redraw(Group):
    """Only drawing."""

    redraw: Flag = False
    """only draw figures and tables again from the metrics in --out"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeat(Group):
    """A repetition."""

    repeat: Maybe[Path] = None
    """folder of a finished run to repeat in a new --out, with its settings, and to compare with"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Repeat, Redraw, Folder):
    """A run of an experiment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeededRun(Run, Seed):
    """A run of an experiment that draws at random."""


_REGISTRY = ConstructorRegistry()
_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(--[\w-]+)'\. Expected .*\((.*)\)")


@_REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Numbers in the digits 0 to 9, not those of other scripts."""
    if info.type not in (int, float):
        return None
    kind: type = info.type

    def read(words: list[str]) -> Any:
        try:
            return kind(words[0].encode("ascii"))
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"{words[0]!r:.40} is not {expected}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int if kind is int else int | float),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _maybe(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """What may be ``None`` is so only by being left out."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if get_origin(info.type) not in (Union, UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    is_instance, shown = spec.is_instance, spec.str_from_instance
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else shown(value),
    )


def parse_flags(config_type: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse ``argv`` into ``config_type``; a wrong flag is an ``InputError`` of one line."""
    _check_given(sys.argv[1:] if argv is None else argv)
    shown = io.StringIO()
    cli: Callable[..., Config] = tyro.cli
    try:
        with contextlib.redirect_stderr(shown):
            config = cli(
                config_type,
                args=argv,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_REGISTRY,
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise InputError(f"{_one_line(shown.getvalue())} (see {prog} --help)") from None
    _check_values(config)
    return config


def flag_of(name: str) -> str:
    """The flag of a field: ``--head-batch`` of ``head_batch``."""
    return f"--{name.replace('_', '-')}"


def in_flags(message: str, names: Sequence[str]) -> str:
    """A message that names arguments, in the flags of a script that has them.

    An argument is named at the beginning (``seqlen must be ...``, ``out PATH: ...``), in backticks,
    or with a value after ``=``, where ``True``, ``False`` and ``None`` become ``--resume``,
    ``--no-refit`` and ``no --steps``.

    Args:
      message: of an ``InputError``.
      names: of the script's flags, as arguments.
    """
    if not names:
        return message
    any_name = "|".join(sorted(names, key=len, reverse=True))
    # A path that the message begins with may look like anything.
    begin = re.match(rf"({any_name})(?=[ :,]|$)( [^:]*:)?", message)
    head = begin.group() if begin else ""
    rest = message[len(head) :]
    if begin:
        head = flag_of(begin.group(1)) + (begin.group(2) or "")

    def given(match: re.Match[str]) -> str:
        flag, value = flag_of(match["name"]), match["value"]
        known = {"True": flag, "False": f"--no-{flag[2:]}", "None": f"no {flag}"}
        return known.get(value, f"{flag} {value}")

    rest = re.sub(rf"`(?P<name>{any_name})`", lambda match: flag_of(match["name"]), rest)
    return head + re.sub(
        rf"(?<![^\s(])(?P<name>{any_name})=(?P<value>[^\s,;)]*[^\s,;:.)])", given, rest
    )


def _check_given(argv: Sequence[str]) -> None:
    """Raise ``InputError`` for an empty value, such as a shell makes of a variable that is not set.

    As a path it would be the current folder. Null characters, of edited settings, are in no path,
    and bytes that are not UTF-8 can be written into no record of a run.
    """
    flag = ""
    for argument in argv:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = value if equals else flag
        if not argument or not is_name(argument):
            what = "is empty" if not argument else "holds bytes that are not UTF-8"
            if "\0" in argument:
                what = "holds a null character"
            raise InputError(f"{flag or 'an argument'}: {what}, expected a value")


def _check_values(config: Any) -> None:
    """Raise ``InputError`` for values that no flag takes.

    Whole numbers that no array index or seed of JAX can be, and lists that name something twice:
    it would count twice in means, and names of parts show six digits.
    """
    pairs = _pairs(config)
    for name, value in flat(config).items():
        flag, several = flag_of(name), isinstance(value, tuple)
        for number in value if several else (value,):
            if isinstance(number, int) and abs(number) >= 2**31:
                raise InputError(f"{flag} {number:.4g}: expected a number below 2^31")
        if several and name not in pairs:
            shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in value]
            twice = [v for i, v in enumerate(shown) if v in shown[:i]]
            if twice:
                raise InputError(f"{flag} {twice[0]}: is there twice; give it once")


def _pairs(config: Any) -> set[str]:
    """Names of fields of a fixed number of values, which may be equal."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Group):
            names |= _pairs(value)
        elif isinstance(value, tuple) and not re.search(r"\.\.\.|Several", str(field.type)):
            names.add(field.name)
    return names


def check_positive(flag: str, value: float) -> None:
    """Raise ``InputError`` unless ``value`` is a positive number whose square float32 can hold."""
    if not 1e-18 < value < 1e18:
        raise InputError(f"{flag} {value:g}: expected a positive number between 1e-18 and 1e18")


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws around an error."""
    message = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if text.strip("─-"):
            message.append(text)
        elif message:  # without Unicode there is a rule above the message too
            break
    line = " ".join(message) or box.strip()
    choice = _CHOICE.search(line)
    if choice:
        return f"{choice[2]} {choice[1]}: expected one of {choice[3].replace(chr(39), '')}"
    return line
