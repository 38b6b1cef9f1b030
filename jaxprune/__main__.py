"""The command ``jaxprune``: prune a checkpoint, take its perplexity, look at its heads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

_COMMANDS = {
    "prune": "prune a Llama checkpoint and write one that transformers opens",
    "perplexity": "perplexity of a model on a text, with its protocol",
    "heads": "prune all heads of a model or layer by every method and compare the errors",
}
# What the commands need beyond the library, by the extra that brings it.
_NEEDED = (
    *("tyro", "tqdm", "pandas", "matplotlib", "tokenizers", "safetensors", "filelock"),
    "huggingface_hub",
)


def usage() -> str:
    """What ``jaxprune --help`` prints."""
    lines = [f"  {name:<12}{text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxprune COMMAND [FLAGS]",
            "",
            "Prune transformer attention by what attention computes.",
            "",
            *lines,
            "",
            "jaxprune COMMAND --help lists the flags of a command. For example:",
            "",
            "  jaxprune prune --model zoo --sparsity 0.5 --out pruned",
            "  jaxprune perplexity --model pruned --text zoo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command on its flags; returns its exit status."""
    name, *flags = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"jaxprune {version('jaxprune')}")
        return 0
    if name not in _COMMANDS:
        print(
            f"jaxprune: error: {name!r:.40}: expected one of {', '.join(_COMMANDS)} "
            "(see jaxprune --help)",
            file=sys.stderr,
        )
        return 2
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"jaxprune: error: {name} needs {missing[0]}; pip install 'jaxprune[cli]'",
            file=sys.stderr,
        )
        return 2
    # Imported here: `jaxprune --help` need not wait for JAX and matplotlib.
    command = importlib.import_module(f"jaxprune.commands.{name}")
    return int(command.main(flags, prog=f"jaxprune {name}"))


if __name__ == "__main__":
    sys.exit(main())
