"""Write a checkpoint with random weights of the exact shape of Llama-3.2-1B.

What runs on it runs on the real one; its time and memory can be measured without the weights. The
tokenizer is that of the embedded model, whose ids are all in the larger vocabulary.

    python tools/random_llama.py --out /tmp/random-1b
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxprune.models.llama import Llama
from jaxprune.models.llama.checkpoint import write_new
from jaxprune.models.llama.shapes import LLAMA_3_2_1B
from jaxprune.models.zoo import ZOO
from jaxprune.runs.script import run_script
from jaxprune.storage import check_new_folder, new_folder


@dataclass(frozen=True)
class Config:
    """Write a random checkpoint of the shape of Llama-3.2-1B, bfloat16, 2.5 GB.

    Example: python tools/random_llama.py --out /tmp/random-1b
    """

    out: Path
    """folder of the checkpoint; must not exist"""
    seed: int = 0
    """of the weights"""


def body(config: Config) -> None:
    """Draw and write."""
    check_new_folder(config.out)
    model = Llama(LLAMA_3_2_1B, key=jax.random.key(config.seed), dtype=jnp.bfloat16)
    with new_folder(config.out) as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(ZOO / name, folder / name)
        write_new(model, folder, jnp.bfloat16, bos_token_id=0, eos_token_id=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "random_llama.py")


if __name__ == "__main__":
    sys.exit(main())
