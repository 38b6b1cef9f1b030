"""Llama checkpoints in GGUF, the format of llama.cpp, as Hugging Face folders.

A file is converted once, into the user's cache folder; everything else reads the folder made.
"""

from jaxprune.models.llama.gguf.folder import converted

__all__ = ["converted"]
