"""Perplexity of a model on a text; the last line is one JSON object with the whole protocol.

jaxprune perplexity --model zoo --text zoo --seqlen 256
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, ClassVar

from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note
from jaxprune.runs import flags
from jaxprune.runs.script import notice, run_script
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import check_sizes, evaluation_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(flags.Dtype, flags.Seqlen, flags.Model):
    """The model, and windows of the text."""

    text: str = "zoo"
    """zoo, a text file (.txt, .jsonl, .json.gz), c4, wikitext2, or a preset: standard, paper"""
    windows: flags.Maybe[int] = None
    """windows, from the start of the text; if left out, as many as there are"""
    bos_per_window: flags.Flag = False
    """start every window with a BOS, instead of the text alone"""


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity of a model on a text, with its protocol.

    Example: jaxprune perplexity --model zoo --text zoo --seqlen 256
    """

    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    devices: Annotated[flags.Batch, flags.DEVICES_AND_MEMORY] = dataclasses.field(
        default=flags.Batch()
    )

    memory_flags: ClassVar[str] = "--batch or --seqlen"


def measure(config: PerplexityConfig) -> None:
    """Load, evaluate, print; the text is read first, as it is quicker to be wrong about."""
    data, batch = config.data, config.devices.batch
    perplexity.check_batch(batch)
    check_sizes(data.windows, data.seqlen)
    folder = llama.locate(data.model)
    windows = evaluation_windows(
        data.text,
        Tokenizer(folder, llama.load_config(folder).vocab_size),
        windows=data.windows,
        seqlen=data.seqlen,
        bos_per_window=data.bos_per_window,
    )
    notice(context_note(folder, windows.tokens.shape[1]))
    report = perplexity.evaluate(llama.load(folder, data.dtype), windows, batch=batch)
    print(json.dumps({"model": data.model, **report}))


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune perplexity") -> int:
    """Entry point; returns the exit status."""
    return run_script(PerplexityConfig, measure, argv, prog)
