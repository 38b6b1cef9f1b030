"""Text to token ids with the tokenizer of a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from jaxprune.errors import InputError
from jaxprune.storage import read_json


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """What the library raises as one line; its panics are no ``Exception``, and print more."""
    shown = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    except (KeyboardInterrupt, MemoryError, InputError):
        raise
    except BaseException as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InputError(f"{what} ({error})") from None
    finally:
        os.dup2(shown, 2)
        for handle in (shown, nowhere):
            os.close(handle)


class Tokenizer:
    """The tokenizer of a checkpoint folder, and what it says about BOS.

    Whether a text starts with a BOS is decided by ``add_bos_token`` of tokenizer_config.json or,
    where that is absent, by the template in tokenizer.json. ``bos_token`` of tokenizer_config.json
    says which token it is or, where that is absent, ``bos_token_id`` of config.json.

    Attributes:
      bos_id: id of the BOS that a text starts with; ``None`` where the model has none.

    Args:
      folder: with tokenizer.json.
      vocab_size: rows of the model's embedding.

    Raises:
      InputError: a file is missing or broken, or the tokenizer is not of this model.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{folder}: holds no tokenizer.json, the one kind of tokenizer read")
        with _one_line_errors(f"{file}: not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):  # other tokens at every reading
            self._tokenizer.model.dropout = None
        self.bos_id = self._bos()
        if self.bos_id is not None:
            self._check(np.array([self.bos_id]))

    def _bos(self) -> int | None:
        folder = self._folder
        settings = folder / "tokenizer_config.json"
        settings_there: dict[str, Any] = read_json(settings) if os.path.lexists(settings) else {}
        adds = settings_there.get("add_bos_token")
        if not isinstance(adds, bool | None):
            raise InputError(f"{settings}: add_bos_token must be true or false, not {adds!r:.40}")
        named = settings_there.get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        if named is not None:
            with _one_line_errors(f"{settings}: bos_token is no text"):
                bos = self._tokenizer.token_to_id(str(named))
            if bos is None and adds is not False:
                raise InputError(
                    f"{settings}: bos_token {named!r:.40} is not in the vocabulary; correct it, or "
                    "set add_bos_token to false"
                )
        else:
            bos = read_json(folder / "config.json").get("bos_token_id")
        if adds is None:
            with _one_line_errors(f"{folder / 'tokenizer.json'}: does not tokenise"):
                adds = bos is not None and self._tokenizer.encode("").ids[:1] == [bos]
        if not adds:
            return None
        if isinstance(bos, bool) or not isinstance(bos, int):
            raise InputError(f"{folder}: add_bos_token is set, but no bos_token is named")
        return bos

    def encode(self, text: str) -> Int[np.ndarray, " t"]:
        """Token ids of a text, without BOS or other additions.

        Raises:
          InputError: the text is no valid Unicode, or an id is beyond the embedding.
        """
        with _one_line_errors(f"{self._folder / 'tokenizer.json'}: does not tokenise the text"):
            try:
                ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            except (TypeError, UnicodeError):
                raise InputError(
                    "the text holds lone surrogates, which are not characters"
                ) from None
        return self._check(np.array(ids, np.int64)).astype(np.int32)

    def _check(self, ids: np.ndarray) -> np.ndarray:
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise InputError(
                f"{self._folder}: the tokenizer gives id {ids.max()}, but the embedding has "
                f"{self._vocab_size} rows; it is not the tokenizer of this model"
            )
        return ids
