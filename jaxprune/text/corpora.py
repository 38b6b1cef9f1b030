"""Texts to calibrate and evaluate on: embedded, from a file, or from the hub.

Corpora of the hub are read from their own files: C4 as the reference implementations use it, the
first shard of English train and validation, and the raw WikiText-2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jaxprune import hub
from jaxprune.errors import InputError
from jaxprune.models.zoo import ZOO

_PIECE = 2**20  # characters of a plain text read at once
_C4_EVALUATION_DOCUMENTS = 1100


# Corpora with parts of their own to calibrate and to evaluate on; a file is one running text.
NAMED = ("zoo", "c4", "wikitext2")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in documents.

    Attributes:
      name: as given: ``zoo``, ``c4``, ``wikitext2`` or the file.
      split: which part of it.
      joiner: what stands between documents in the running text.
      documents: reads them anew at every call, in order.
    """

    name: str
    split: str
    joiner: str
    documents: Callable[[], Iterator[str]]

    def text(self, characters: int | None = None) -> str:
        """The running text, or a beginning of it of at least so many characters.

        Raises:
          InputError: it cannot be read.
        """
        parts, length = [], 0
        for document in self.documents():
            parts.append(document)
            length += len(document) + len(self.joiner)
            if characters is not None and length >= characters + len(self.joiner):
                break
        return self.joiner.join(parts)


def calibration_corpus(source: str) -> Corpus:
    """A text to calibrate on; of corpora with splits, the train split.

    Raises:
      InputError: there is no such corpus or file.
    """
    if source == "zoo":
        return Corpus(source, "calibration", "", partial(_plain, ZOO / "calibration.txt"))
    if source == "c4":
        return Corpus(source, "train", " ", partial(_c4, "en/c4-train.00000-of-01024.json.gz"))
    if source == "wikitext2":
        return Corpus(source, "train", "\n\n", partial(_wikitext2, "train"))
    return _file(source)


def evaluation_corpus(source: str) -> Corpus:
    """A text to evaluate on; of corpora with splits, the one that perplexities are quoted on.

    Raises:
      InputError: there is no such corpus or file.
    """
    if source == "zoo":
        return Corpus(source, "evaluation", "", partial(_plain, ZOO / "evaluation.txt"))
    if source == "c4":
        documents = c4_validation().documents
        return Corpus(
            source,
            f"first {_C4_EVALUATION_DOCUMENTS} documents of validation",
            " ",
            lambda: itertools.islice(documents(), _C4_EVALUATION_DOCUMENTS),
        )
    if source == "wikitext2":
        return Corpus(source, "test", "\n\n", partial(_wikitext2, "test"))
    return _file(source)


def c4_validation() -> Corpus:
    """The whole first validation shard of C4."""
    name = "en/c4-validation.00000-of-00008.json.gz"
    return Corpus("c4", "validation", " ", partial(_c4, name))


def _c4(name: str) -> Iterator[str]:
    return _json_lines(hub.fetch_dataset_file("allenai/c4", name))


def _wikitext2(split: str) -> Iterator[str]:
    name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
    file = hub.fetch_dataset_file("Salesforce/wikitext", name)
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("wikitext2: reading it needs `pip install 'jaxprune[hub]'`") from None
    return iter(parquet.read_table(file, columns=["text"])["text"].to_pylist())


def _file(source: str) -> Corpus:
    file = Path(source)
    if not file.is_file():
        raise InputError(f"{source}: no such file; give zoo, c4, wikitext2 or a text file")
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    if suffixes[-1:] in ([".jsonl"], [".json"]):
        return Corpus(source, "all", "\n\n", partial(_json_lines, file))
    return Corpus(source, "all", "", partial(_plain, file))


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Errors of reading ``file`` as one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def _open(file: Path, encoding: str = "utf-8") -> io.TextIOWrapper:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding=encoding)
    return file.open(encoding=encoding)


def _plain(file: Path) -> Iterator[str]:
    """A plain text in pieces."""
    with _readable(file), _open(file) as stream:
        while piece := stream.read(_PIECE):
            if "\0" in piece:
                raise InputError(f"{file}: holds null characters, which no text does")
            yield piece


def _json_lines(file: Path) -> Iterator[str]:
    """The ``text`` of one JSON object a line; a byte-order mark before the first is no JSON."""
    with _readable(file), _open(file, "utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _document(file, number, line)


def _document(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise InputError(f'{file}: line {number} is not a JSON object with a string "text"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{file}: line {number} holds a lone surrogate, which is no character"
        ) from None
    return text
