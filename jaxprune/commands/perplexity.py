"""Perplexity of a model on a text; the last line is one JSON object with the whole protocol.

jaxprune perplexity --model zoo --text zoo --seqlen 256
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.runs.script import Flag, run_script
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import evaluation_windows


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity of a model on a text, with its protocol.

    Example: jaxprune perplexity --model zoo --text zoo --seqlen 256
    """

    model: str = "zoo"
    """zoo, a Hugging Face folder, a .gguf file, or owner/name on the hub."""
    text: str = "zoo"
    """zoo, a text file (.txt, .jsonl, .json.gz), c4, wikitext2, or a preset: standard, paper."""
    seqlen: int | None = None
    """Tokens of a window, a BOS included; 256, or as the preset says."""
    windows: int | None = None
    """Windows, from the start of the text; as many as there are."""
    bos_per_window: Flag = False
    """Start every window with a BOS, instead of the text alone."""
    batch: int = 8
    """Windows at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; the cross-entropy is float32."""

    memory_flags: ClassVar[str] = "--batch or --seqlen"


def measure(config: PerplexityConfig) -> None:
    """Load, evaluate, print; the text is read first, as it is quicker to be wrong about."""
    folder = llama.locate(config.model)
    windows = evaluation_windows(
        config.text,
        Tokenizer(folder, llama.load_config(folder).vocab_size),
        windows=config.windows,
        seqlen=config.seqlen,
        bos_per_window=config.bos_per_window,
    )
    report = perplexity.evaluate(llama.load(folder, config.dtype), windows, batch=config.batch)
    print(json.dumps({"model": config.model, **report}))


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune perplexity") -> int:
    """Entry point; returns the exit status."""
    return run_script(PerplexityConfig, measure, argv, prog)
