"""The tokenizer in a GGUF file, as the files of a Hugging Face tokenizer.

GGUF stores tokens, merges and the name of a pre-tokenizer; what the name means is code, in
llama.cpp and here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxprune.errors import InputError

# Llama 3's way to cut a text into words before pairs are merged.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Words(NamedTuple):
    """What the name of a pre-tokenizer stands for.

    Attributes:
      steps: of cutting a text into words.
      whole_words: a word that is a token stays whole, whatever the merges say.
      adds_bos: whether a text starts with a BOS where the file does not say.
    """

    steps: tuple[Any, ...]
    whole_words: bool
    adds_bos: bool


_SMOLLM = _Words(
    (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ),
    whole_words=False,
    adds_bos=False,
)
_LLAMA3 = _Words(
    (
        pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    whole_words=True,
    adds_bos=True,
)
_WORDS = {"smollm": _SMOLLM, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}

# Types of tokens. Unused ones fill the vocabulary up to the embedding's rows.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_TYPES = (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)
# Tokens with a part to play: their name in Hugging Face's files, and in GGUF.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class TokenizerFiles(NamedTuple):
    """A tokenizer as a Hugging Face folder has it.

    Attributes:
      tokenizer: the content of tokenizer.json.
      settings: the content of tokenizer_config.json, chat template included.
      ids: what config.json says of it: ``bos_token_id`` and the like.
    """

    tokenizer: str
    settings: dict[str, Any]
    ids: dict[str, int]


def read_tokenizer(settings: Mapping[str, Any], rows: int, context: int) -> TokenizerFiles:
    """The tokenizer of a GGUF file.

    Args:
      settings: the metadata of the file.
      rows: of the embedding.
      context: most tokens the model was made for.

    Raises:
      InputError: it is of another kind, or does not hold together.
    """
    words = _words(settings)
    tokens = _texts(settings, "tokenizer.ggml.tokens")
    types = _types(settings, len(tokens))
    if len(tokens) > rows:
        raise InputError(
            f"tokenizer.ggml.tokens: {len(tokens)} tokens, but the embedding has {rows} rows"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise InputError("tokenizer.ggml.tokens: the same token twice")
    merges = _merges(settings, vocabulary)
    ids = _ids(settings, len(tokens))
    adds = {
        "bos": _flag(settings, "tokenizer.ggml.add_bos_token", words.adds_bos and "bos" in ids),
        "eos": _flag(settings, "tokenizer.ggml.add_eos_token", False),
    }
    for role in ("bos", "eos"):
        if adds[role] and role not in ids:
            raise InputError(f"tokenizer.ggml.add_{role}_token is set, but no {role}_token_id")
    named = {role: tokens[number] for role, number in ids.items()}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{f"{role}_token": token for role, token in named.items()},
        **_chat_templates(settings),
    }
    try:
        text = _build(words, vocabulary, merges, types, named, adds).to_str()
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001 - panics of the library are no Exception
        raise InputError(f"tokenizer.ggml: not a tokenizer ({error!r:.200})") from None
    return TokenizerFiles(text, content, {f"{role}_token_id": i for role, i in ids.items()})


def _build(
    words: _Words,
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    types: np.ndarray,
    named: Mapping[str, str],
    adds: Mapping[str, bool],
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=words.whole_words)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words.steps))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, special=types[i] != _USER_DEFINED, normalized=False)
            for token, i in vocabulary.items()
            if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    around = [named[role] for role in ("bos", "eos") if adds[role]]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[
                *([named["bos"]] if adds["bos"] else []),
                "$A",
                *([named["eos"]] if adds["eos"] else []),
            ],
            special_tokens=[(token, vocabulary[token]) for token in around],
        )
    return tokenizer


def _words(settings: Mapping[str, Any]) -> _Words:
    kind = settings.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "gpt2":
        raise InputError(
            f"tokenizer.ggml.model {kind!r:.40} is not supported, only 'gpt2' (byte-level BPE)"
        )
    name = settings.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _WORDS:
        raise InputError(
            f"tokenizer.ggml.pre {name!r:.40} is not supported, only {', '.join(_WORDS)}"
        )
    return _WORDS[name]


def _texts(settings: Mapping[str, Any], name: str) -> list[str]:
    texts = settings.get(name)
    if not isinstance(texts, list):
        raise InputError(f"{name} must be a list of texts, not {texts!r:.40}")
    return texts


def _types(settings: Mapping[str, Any], count: int) -> np.ndarray:
    name = "tokenizer.ggml.token_type"
    types = settings.get(name)
    if types is None:
        raise InputError(f"lacks {name}, which says what tokens are special")
    if not isinstance(types, np.ndarray) or types.shape != (count,):
        raise InputError(f"{name} must have a number for each of {count} tokens")
    unknown = types[~np.isin(types, _TYPES)]
    if unknown.size:
        raise InputError(f"{name} {unknown[0]} is not supported, only {_TYPES[0]} to {_TYPES[-1]}")
    return types


def _merges(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    name = "tokenizer.ggml.merges"
    merges = []
    for text in _texts(settings, name):
        # A token may start with a space, but holds none further on.
        first, _, second = text[1:].partition(" ")
        pair = text[:1] + first, second
        if not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise InputError(f"{name}: {text!r:.60} is not two tokens that make a third")
        merges.append(pair)
    return merges


def _ids(settings: Mapping[str, Any], count: int) -> dict[str, int]:
    """Numbers of the tokens with a part to play."""
    ids = {}
    for role, stored in _ROLES.items():
        name = f"tokenizer.ggml.{stored}_token_id"
        if name in settings:
            number = settings[name]
            if type(number) is not int or not 0 <= number < count:
                raise InputError(f"{name} {number!r:.40} is not one of {count} tokens")
            ids[role] = number
    return ids


def _flag(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {value!r:.40}")
    return value


def _chat_templates(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, or all of them by name if the file has several."""
    key = "tokenizer.chat_template"
    templates = {
        name.removeprefix(key).removeprefix(".") or "default": text
        for name, text in settings.items()
        if name == key or name.startswith(f"{key}.")
    }
    for name, text in templates.items():
        if not isinstance(text, str):
            raise InputError(f"{key} {name!r:.40} must be a text, not {text!r:.40}")
    if not templates:
        return {}
    if set(templates) == {"default"}:
        return {"chat_template": templates["default"]}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {"chat_template": listed}
