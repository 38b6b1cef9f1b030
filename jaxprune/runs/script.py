"""What every script shares: flags from a dataclass, one-line errors, exit statuses, repetition.

Exit statuses: 0 done; 1 a repetition differs from its original; 2 wrong input, or the machine does
not allow it (disk full, no permission, out of memory), one line on standard error;
130 interrupted.
"""

from __future__ import annotations

import _thread
import ast
import atexit
import contextlib
import dataclasses
import inspect
import io
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import jax
import tyro

from jaxprune.errors import InputError
from jaxprune.runs.folder import environment, recorded
from jaxprune.runs.repetition import differences

Config = TypeVar("Config")

# A boolean flag without a `--no-` twin.
Flag = tyro.conf.FlagCreatePairsOff[bool]

# Flags that scripts share, as `--help` groups them; a script's own come first.
_GROUPS = {
    "model and text": (
        *("model", "input", "dtype", "calibration", "text"),
        *("windows", "seqlen", "heldout", "bos_per_window", "layers", "heads"),
    ),
    "devices and memory": (
        *("batch", "head_batch", "mesh", "coordinator", "processes", "process"),
    ),
    "run": ("seed", "out", "resume", "redraw", "repeat"),
}


def parse_flags(config_type: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse ``argv`` into ``config_type``; a wrong flag is an ``InputError`` of one line."""
    _check_given(sys.argv[1:] if argv is None else argv)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            config = _parse_grouped(config_type, argv, prog)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise InputError(f"{_one_line(shown.getvalue())} (see {prog} --help)") from None
    _check_values(config)
    return config


def _parse_grouped(config_type: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse as ``tyro.cli(config_type)`` does, with flags in groups in the help."""
    hints, texts = get_type_hints(config_type, include_extras=True), _field_texts(config_type)
    annotated: Any = Annotated  # of types that are values here
    members: dict[str, list[Any]] = {"": [], **{title: [] for title in _GROUPS}}
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
        title = next((t for t, names in _GROUPS.items() if field.name in names), "")
        shown = annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name))]
        default = dataclasses.field(default=field.default)
        members[title].append((field.name, shown, default))
    groups = {
        title.replace(" ", "_"): dataclasses.make_dataclass(title, fields, kw_only=True)
        for title, fields in members.items()
        if title and fields
    }
    whole = dataclasses.make_dataclass(
        "Flags",
        [*members[""], *groups.items()],
        kw_only=True,
        namespace={"__doc__": config_type.__doc__},
    )
    parsed: Any = tyro.cli(whole, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    values = {name: getattr(parsed, name) for name, *_ in members[""]}
    for name in groups:
        values |= vars(getattr(parsed, name))
    return config_type(**values)


def _field_texts(config_type: type) -> dict[str, str]:
    """What stands in quotes under each field of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _check_given(argv: Sequence[str]) -> None:
    """Raise ``InputError`` for an empty value, such as a shell makes of a variable that is not set.

    As a path it would be the current folder. Null characters, of edited settings, are in no path.
    """
    flag = ""
    for argument in argv:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = value if equals else flag
        if not argument or "\0" in argument:
            what = "is empty" if not argument else "holds a null character"
            raise InputError(f"{flag or 'an argument'}: {what}, expected a value")


def _check_values(config: Any) -> None:
    """Raise ``InputError`` for values that no flag takes.

    Whole numbers that no array index or seed of JAX can be, and lists that name something twice:
    it would count twice in means, and names of parts show six digits.
    """
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        several = isinstance(value, tuple)
        for number in value if several else (value,):
            if isinstance(number, int) and abs(number) >= 2**31:
                raise InputError(f"{flag} {number:.4g}: expected a number below 2^31")
        if several and "..." in str(field.type):
            shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in value]
            twice = [v for i, v in enumerate(shown) if v in shown[:i]]
            if twice:
                raise InputError(f"{flag} {twice[0]}: is there twice; give it once")


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
    return " ".join(message) or box.strip()


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second run starts at once.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxprune" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def recorded_config(config: Config, prog: str) -> Config:
    """The configuration of the run that ``config.repeat`` names, with the ``out`` of ``config``.

    Raises:
      InputError: flags besides ``--repeat`` and ``--out``, or no run of this script there.
    """
    given: Any = config
    where, kept = given.repeat, {"out", "repeat"}
    for field in dataclasses.fields(given):
        if field.name not in kept and getattr(given, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise InputError(f"--{flag}: a repetition takes --repeat and --out alone")
    argv = []
    switches = {field.name for field in dataclasses.fields(given) if field.default is True}
    known = {field.name for field in dataclasses.fields(given)}
    for name, value in recorded(where).configuration.items():
        if name not in known:
            raise InputError(
                f"--repeat {where}: not a run of this version's {prog}: it has {name:.40}"
            )
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is True:
            argv.append(flag)
        elif value is False and name in switches:
            argv.append(f"--no-{flag[2:]}")
        elif value is not None and value is not False:
            argv.append(f"{flag}={value}")
    try:
        again = parse_flags(type(config), [*argv, f"--out={given.out}"], prog)
    except InputError as error:
        raise InputError(f"--repeat {where}: not a run of this version's {prog}: {error}") from None
    return dataclasses.replace(again, repeat=where)  # type: ignore[type-var]


def compare(original: Path, out: Path) -> int:
    """Say how a repetition compares with its original; the exit status."""
    equal, different = differences(original, out)
    for line in different:
        print(f"differs from {original}: {line}")
    if equal:
        print(f"identical to {original}: {', '.join(equal)}")
    if not different:
        return 0
    then, now = recorded(original).environment, environment()
    changed = [
        f"{key} {then.get(key)} then, {now[key]} now"
        for key in ("versions", "platform", "backend", "device")
        if then.get(key) != now[key]
    ]
    print("; ".join(changed) or "versions and device are those of the original")
    return 1


def _out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory left."""
    # Computations queued on a CPU report it as INTERNAL, with the reason in words; products of
    # matrices there, by X- or YNNPACK, which need room for a copy, do not even say the reason.
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and any(
            sign in str(error)
            for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "NNPACK operation failed")
        )
    )


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Interrupt again where an interrupt fell into a callback, whose exceptions Python drops.

    JAX has one in every garbage collection: without this, some Ctrl-C do nothing.
    """
    before, again = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again.append(threading.Timer(0.05, _thread.interrupt_main))
        again[-1].daemon = True
        again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in again:
            timer.cancel()


def run_script(
    config_type: type[Config],
    body: Callable[[Config], None],
    argv: Sequence[str] | None,
    prog: str,
) -> int:
    """Run a script's body on its parsed flags and return the exit status.

    Args:
      config_type: frozen dataclass of flags. A field ``repeat`` names a run folder to repeat; a
        class attribute ``memory_flags`` says which flags lower the memory needed.
      body: does the work; raises ``InputError`` for wrong input.
      argv: arguments without the program's name; ``None`` takes those of the process.
      prog: the script's name in messages.
    """
    config: Any = None
    try:
        config = parse_flags(config_type, argv, prog)
        original = getattr(config, "repeat", None)
        if original is not None:
            config = recorded_config(config, prog)
        use_compilation_cache()
        with _interrupts_kept():
            body(config)
        status = 0 if original is None else compare(original, config.out)
        sys.stdout.flush()  # a full disk shows here, not while Python exits
        return status
    except InputError as error:
        return _failed(prog, str(error))
    except OSError as error:
        # The disk, its permissions or limits: what was finished is kept, nothing is half-written.
        out = getattr(config, "out", None)
        where = f"{error.filename}: " if error.filename else f"--out {out}: " if out else ""
        return _failed(prog, f"{where}{error.strerror or error}{_continues(config_type, config)}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not _out_of_memory(error):
            raise
        flags = getattr(config_type, "memory_flags", "")
        return _failed(prog, "out of memory" + (f"; lower {flags}" if flags else ""))
    except KeyboardInterrupt:
        # What JAX cleans up at exit takes a while: a second Ctrl-C would end in a traceback there.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        print(f"{prog}: interrupted{_continues(config_type, config)}", file=sys.stderr)
        return 130


def _failed(prog: str, message: str) -> int:
    """Print one line and return the exit status."""
    # Names in hostile files may hold what moves a terminal's cursor.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"{prog}: error: {line}", file=sys.stderr)
    return 2


def _continues(config_type: type, config: Any) -> str:
    """How to go on after a stop, for scripts that can and were not only drawing."""
    resumes = any(field.name == "resume" for field in dataclasses.fields(config_type))
    resumes = resumes and not getattr(config, "redraw", False)
    return "; the same command with --resume continues" if resumes else ""
