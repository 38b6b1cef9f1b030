"""Prune a Llama checkpoint and write one that ``transformers`` opens.

``descent`` (the default) keeps what the attention matrices of every layer compute, positions and
grouped heads included; magnitude, Wanda and SparseGPT go through the same pipeline. ``--targets
qk`` prunes W_Q and W_K, ``all`` the seven linear maps of every block, on the block's output.

For example::

  jaxprune prune --model zoo --sparsity 0.7 --out pruned
  jaxprune prune --model DIR --calibration text.txt --method wanda --out pruned
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from jaxprune.pipeline import Progress, prune_checkpoint
from jaxprune.runs.script import Flag, run_script
from jaxprune.sharding import connect, is_writer


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune a Llama checkpoint and write one that transformers opens.

    Example: jaxprune prune --model zoo --sparsity 0.7 --out pruned
    """

    out: Path
    """folder of the new checkpoint; must not exist"""
    model: str = "zoo"
    """zoo, a Hugging Face folder, a .gguf file, or owner/name on the hub"""
    calibration: str = "zoo"
    """zoo, a text file (.txt, .jsonl, .json.gz), c4, wikitext2, or a preset: standard, paper"""
    windows: int | None = None
    """windows to calibrate on; 128, or as the preset says"""
    seqlen: int | None = None
    """tokens of a window, a BOS included; 256, or as the preset says"""
    heldout: int | None = None
    """windows after those, for held-out attention errors; 16, or as the preset says"""
    method: str = "descent"
    """magnitude, wanda, sparsegpt, gauss-newton (closed form), or descent, which goes on from it"""
    targets: str = "qk"
    """qk (W_Q and W_K) or all (the seven linear maps of a block)"""
    sparsity: str = "0.5"
    """fraction removed, or N:M along the inputs: 2:4 keeps 2 of every 4"""
    refit: bool | None = None
    """let kept weights adapt block by block; if left out, with descent alone. Descent without it
    leaves them as they were under its mask"""
    start: str = "gauss-newton"
    """what descent goes on from: the closed form (gauss-newton), or dense weights, from which it
    finds the mask itself in many more steps (dense)"""
    propagate: bool = True
    """calibrate on the model pruned so far; else every layer on the dense one"""
    steps: int | None = None
    """steps of the descent in every block; the preset's if left out"""
    distill: int | None = None
    """steps of distillation from the dense model at the end, of all kept weights together; if left
    out, 300 after descent in models of up to 100 million parameters, else none"""
    batch: int = 8
    """windows at once in forward passes; lower it if memory runs out"""
    seed: int = 0
    """of the descent's batches and of windows drawn from C4"""
    resume: Flag = False
    """go on with an interrupted run with the same --out"""
    repeat: Path | None = None
    """folder of a pruned checkpoint to make again in --out, with its settings, and to compare"""

    dtype: str = "float32"
    """of the model's weights and activations, float32 or bfloat16; softmax, sums, masks and the
    weights that a descent moves are float32"""
    mesh: str | None = None
    """SxH, devices along sequences and heads; if left out, all there are, heads first"""
    coordinator: str | None = None
    """host:port of process 0 where several processes share the work, or auto on a cluster that
    JAX knows; --out must then be on a file system they all see"""
    processes: int | None = None
    """how many"""
    process: int | None = None
    """which one this is, from 0; process 0 writes"""

    memory_flags: ClassVar[str] = "--batch, --windows or --seqlen"


def body(config: Config) -> None:
    """Connect to the other processes, prune, say what came of it."""
    connect(config.coordinator, config.processes, config.process)
    with tqdm(unit="chunk", disable=not is_writer()) as bar:

        def progress(where: Progress) -> None:
            bar.total = where.total
            bar.set_postfix_str(where.doing)
            bar.update(where.done - bar.n)

        named = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        for name in ("coordinator", "processes", "process"):
            del named[name]
        report = prune_checkpoint(**named, announce=bar.write, progress=progress)
    print(f"{report.out}: finished already" if report.seconds is None else report)


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune prune") -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, prog)
