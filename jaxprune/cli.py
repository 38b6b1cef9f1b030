"""What every script shares: flags from a dataclass, one-line errors, exit statuses.

Exit statuses: 0 done, 2 wrong input (one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from jaxprune.errors import InputError

Config = TypeVar("Config")

# A boolean flag without a `--no-` twin.
Flag = tyro.conf.FlagCreatePairsOff[bool]


def parse_flags(config_type: type[Config], argv: Sequence[str] | None, prog: str) -> Config:
    """Parse ``argv`` into ``config_type``; a wrong flag is an ``InputError`` of one line."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config_type, args=argv, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise InputError(f"{_one_line(shown.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws around an error."""
    message = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if not text.strip("─"):
            break
        message.append(text)
    return " ".join(message) or box.strip()


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second run starts at once.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxprune" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run_script(
    config_type: type[Config],
    body: Callable[[Config], None],
    argv: Sequence[str] | None,
    prog: str,
) -> int:
    """Run a script's body on its parsed flags and return the exit status.

    Args:
      config_type: frozen dataclass of flags.
      body: does the work; raises ``InputError`` for wrong input.
      argv: arguments without the program's name; ``None`` takes those of the process.
      prog: the script's name in messages.
    """
    try:
        config = parse_flags(config_type, argv, prog)
        use_compilation_cache()
        body(config)
    except InputError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0
