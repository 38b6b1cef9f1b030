"""Windows of token ids: what a model is calibrated on and what its perplexity is taken on.

``seqlen`` counts every token the model sees, a BOS included. Every set of windows carries the
protocol it was made by, because the corpus, the length and the BOS move every number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxprune.errors import InputError
from jaxprune.text import corpora
from jaxprune.text.corpora import Corpus
from jaxprune.text.tokenizer import Tokenizer

# Characters read for each token needed. Text has about four, so that the tokens used lie far
# from the place where the reading stopped and are those of the whole text.
_CHARACTERS = 64
# Documents drawn for one window before giving up; of C4 about one in fifty has 2048 tokens.
_DRAWS = 5000
# The reference implementations evaluate on at most so many windows of C4.
_C4_WINDOWS = 256


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published choice of corpora and sizes.

    Attributes:
      calibration: corpus to calibrate on.
      windows: of calibration.
      heldout: windows for errors on text that was not calibrated on.
      text: corpus for perplexity.
      seqlen: of all windows.
    """

    calibration: str
    windows: int
    heldout: int
    text: str
    seqlen: int


# `standard` is that of SparseGPT and Wanda. `paper` is that of Liang et al. 2025: 8 sentences of
# C4 train and 128 of C4 validation; we do not know their length, 256 is ours.
PRESETS = {
    "standard": Preset("c4", 128, 16, "wikitext2", 2048),
    "paper": Preset("c4", 8, 128, "c4", 256),
}
_DEFAULT = Preset("zoo", 128, 16, "zoo", 256)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of equal length.

    Attributes:
      tokens: ids, ``[w, n]``.
      protocol: ``corpus``, ``split``, ``seqlen``, ``windows``, ``bos`` (``one`` in all, ``each``
        window, each ``document`` before it is cropped, or ``none``), ready for a report.
    """

    tokens: Int[np.ndarray, "w n"]
    protocol: dict[str, Any]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the tokens, to tell whether two runs saw the same text."""
        content = np.ascontiguousarray(self.tokens, np.int32).tobytes()
        return {"windows": hashlib.sha256(content).hexdigest()}


def calibration_windows(
    source: str,
    tokenizer: Tokenizer,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    heldout: int | None = None,
    seed: int = 0,
) -> tuple[Windows, Windows]:
    """Windows to calibrate on, and held-out ones.

    A text (``zoo``, ``wikitext2``, a file) gives its first consecutive windows, each BOS and
    ``seqlen − 1`` tokens, then the held-out ones. ``c4`` follows SparseGPT and Wanda: documents
    of the train shard are drawn until one has more than ``seqlen`` tokens, a BOS included, and
    it is cropped at random; held-out windows are drawn likewise from the validation shard.

    Args:
      source: ``zoo``, ``c4``, ``wikitext2``, a file, or one of ``PRESETS``.
      tokenizer: of the model.
      windows: how many; by default the preset's, or 128.
      seqlen: their length; by default the preset's, or 256.
      heldout: how many held-out windows; by default the preset's, or 16.
      seed: of the drawing from C4.

    Raises:
      InputError: the source cannot be read or is too short.
    """
    preset = PRESETS.get(source, _DEFAULT)
    windows = preset.windows if windows is None else windows
    seqlen = preset.seqlen if seqlen is None else seqlen
    heldout = preset.heldout if heldout is None else heldout
    check_sizes(windows, seqlen)
    if heldout < 0:
        raise InputError(f"heldout must not be negative, not {heldout}")
    corpus = corpora.calibration_corpus(preset.calibration if source in PRESETS else source)
    if corpus.name == "c4":
        return (
            _drawn(corpus, tokenizer, windows, seqlen, seed),
            _drawn(corpora.c4_validation(), tokenizer, heldout, seqlen, seed),
        )
    tokens, bos = _consecutive(corpus, tokenizer, windows + heldout, seqlen, bos_per_window=True)
    return (
        _stamped(tokens[:windows], corpus, bos),
        _stamped(tokens[windows:], corpus, bos),
    )


def evaluation_windows(
    source: str,
    tokenizer: Tokenizer,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    bos_per_window: bool = False,
) -> Windows:
    """Windows to take a perplexity on: consecutive, not overlapping, the remainder dropped.

    The text is tokenised once, with one BOS at its start. WikiText-2 is the test split joined by
    blank lines; C4 the first 1100 validation documents joined by spaces, at most 256 windows.
    The preset ``paper`` draws its windows from C4 validation as calibration does.

    Args:
      source: ``zoo``, ``c4``, ``wikitext2``, a file, or one of ``PRESETS``.
      tokenizer: of the model.
      windows: how many; by default as many as there are.
      seqlen: their length; by default the preset's, or 256.
      bos_per_window: every window is a BOS and ``seqlen − 1`` tokens.

    Raises:
      InputError: the source cannot be read, is too short, or the model has no BOS to give.
    """
    preset = PRESETS.get(source, _DEFAULT)
    seqlen = preset.seqlen if seqlen is None else seqlen
    check_sizes(windows, seqlen)
    if bos_per_window and tokenizer.bos_id is None:
        raise InputError("bos_per_window: the tokenizer of this model has no BOS")
    if source == "paper":
        if bos_per_window:
            raise InputError("bos_per_window: not with the windows of `paper`; leave it out")
        count = preset.heldout if windows is None else windows
        return _drawn(corpora.c4_validation(), tokenizer, count, seqlen, seed=0)
    corpus = corpora.evaluation_corpus(preset.text if source in PRESETS else source)
    tokens, bos = _consecutive(corpus, tokenizer, windows, seqlen, bos_per_window=bos_per_window)
    if corpus.name == "c4" and windows is None:
        tokens = tokens[:_C4_WINDOWS]
    return _stamped(tokens, corpus, bos)


def unseen_windows(
    source: str | None,
    tokenizer: Tokenizer,
    *,
    calibration: str,
    seen: int,
    seqlen: int,
    windows: int | None = None,
) -> Windows:
    """Windows to evaluate on, of a running text beyond what it gave to calibrate on.

    Corpora with a part of their own to evaluate on give windows of that part.

    Args:
      source: ``zoo``, ``c4``, ``wikitext2``, a file, or one of ``PRESETS``; if ``None``, that of
        ``calibration``.
      tokenizer: of the model.
      calibration: source of the windows to calibrate on.
      seen: tokens at the beginning of that file that are not to be used.
      seqlen: of the windows.
      windows: how many, or as many as there are, if fewer; all if ``None``.

    Raises:
      InputError: as ``evaluation_windows``; or no window is left.
    """
    source = calibration if source is None else source
    text = evaluation_windows(source, tokenizer, seqlen=seqlen)
    files = {source, calibration}.isdisjoint((*corpora.NAMED, *PRESETS))
    skip = -(-seen // seqlen) if files and Path(source).samefile(calibration) else 0
    tokens = text.tokens[skip:][:windows]
    if not len(tokens):
        raise InputError(f"{source}: nothing is left after {skip} windows; use another `text`")
    protocol = text.protocol | {"windows": len(tokens)} | ({"after": skip} if skip else {})
    return Windows(tokens, protocol)


def check_sizes(windows: int | None, seqlen: int | None) -> None:
    """Raise ``InputError`` for sizes that no text can give, before any is read."""
    if windows is not None and windows < 1:
        raise InputError(f"windows must be at least 1, not {windows}")
    if seqlen is not None and seqlen < 2:
        raise InputError(f"seqlen must be at least 2, not {seqlen}")


def _stamped(tokens: np.ndarray, corpus: Corpus, bos: str) -> Windows:
    count, seqlen = tokens.shape
    protocol = {
        "corpus": corpus.name,
        "split": corpus.split,
        "seqlen": seqlen,
        "windows": count,
        "bos": bos,
    }
    return Windows(tokens, protocol)


def _consecutive(
    corpus: Corpus,
    tokenizer: Tokenizer,
    windows: int | None,
    seqlen: int,
    *,
    bos_per_window: bool,
) -> tuple[np.ndarray, str]:
    """Consecutive windows of a running text, all when ``windows`` is ``None``; BOS policy."""
    bos = tokenizer.bos_id
    each = bos_per_window and bos is not None
    new = seqlen - 1 if each else seqlen
    before = [] if each or bos is None else [bos]
    need = (1 if windows is None else windows) * new - len(before)
    ids = _first_ids(corpus, tokenizer, None if windows is None else need)
    if len(ids) < need:
        request = f"{'one window' if windows is None else f'{windows} windows'} of {seqlen}"
        raise InputError(f"{corpus.name}: has {len(ids)} tokens, but {request} needs {need}")
    ids = np.concatenate([np.array(before, np.int32), ids])
    count = len(ids) // new if windows is None else windows
    tokens = ids[: count * new].reshape(count, new)
    if each:
        tokens = np.concatenate([np.full((count, 1), bos, np.int32), tokens], axis=1)
    return tokens, "none" if bos is None else "each" if each else "one"


def _first_ids(corpus: Corpus, tokenizer: Tokenizer, need: int | None) -> np.ndarray:
    """Token ids of a running text, or of a beginning that has at least ``need`` if any has."""
    characters = None if need is None else _CHARACTERS * (need + 1)
    while True:
        text = corpus.text(characters)
        if not text.strip():
            raise InputError(f"{corpus.name}: has no text")
        ids = tokenizer.encode(text)
        if characters is None or need is None or len(text) < characters or len(ids) >= need:
            return ids
        characters *= 4


def _drawn(corpus: Corpus, tokenizer: Tokenizer, count: int, seqlen: int, seed: int) -> Windows:
    """Random crops of random documents with more than ``seqlen`` tokens, a BOS included.

    The numbers drawn are those of the reference implementations for the same seed.
    """
    draw = random.Random(seed)
    documents = list(corpus.documents()) if count else []
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = np.zeros((count, seqlen), np.int32)
    for row in tokens:
        for _ in range(_DRAWS):
            document = documents[draw.randint(0, len(documents) - 1)]
            ids = np.concatenate([np.array(bos, np.int32), tokenizer.encode(document)])
            if len(ids) > seqlen:
                break
        else:
            raise InputError(
                f"{corpus.name}: none of {_DRAWS} documents drawn has more than {seqlen} tokens; "
                "choose a smaller `seqlen`"
            )
        start = draw.randint(0, len(ids) - seqlen - 1)
        row[:] = ids[start : start + seqlen]
    drawn = _stamped(tokens, corpus, "document" if bos else "none")
    drawn.protocol["seed"] = seed
    return drawn
