"""The embedded model: a tiny Llama, its tokenizer and its texts."""

from pathlib import Path

ZOO = Path(__file__).parent
