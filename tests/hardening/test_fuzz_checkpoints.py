"""Hostile checkpoints: GGUF files, 430 of them, and settings of the families, 280.

Each ends in an ``InputError`` of one line, with nothing left in the cache, or in a checkpoint that
can be read: finite tensors of the right shapes, a tokenizer that tokenises.
"""

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
from hostile import JUNK, cases, one_line
from hypothesis import example, given
from hypothesis import strategies as st

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.families import FAMILIES
from jaxprune.models.llama.files import TensorFiles
from jaxprune.models.llama.gguf import folder as conversion
from jaxprune.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# Wide enough for blocks of 32 quantised entries.
HIDDEN, HEADS, GROUPS, ROWS = 32, 4, 2, 24
TOKENS = ["<|end|>", "<|begin|>", *"abehint", "Ġ", "Ċ", "th", "the", "Ġthe"]
UINT32, FLOAT32, BOOL, TEXT, ARRAY, UINT64, FLOAT64 = 4, 6, 7, 8, 9, 10, 12
CODES = {UINT32: "<I", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q", FLOAT64: "<d"}

# Settings by name: the code of their type, and the value.
SETTINGS = {
    "general.architecture": (TEXT, "llama"),
    "general.alignment": (UINT32, 32),
    "llama.context_length": (UINT32, 64),
    "llama.embedding_length": (UINT32, HIDDEN),
    "llama.block_count": (UINT32, 1),
    "llama.feed_forward_length": (UINT32, HIDDEN),
    "llama.attention.head_count": (UINT32, HEADS),
    "llama.attention.head_count_kv": (UINT32, GROUPS),
    "llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
    "llama.rope.freq_base": (FLOAT32, 10000.0),
    "tokenizer.ggml.model": (TEXT, "gpt2"),
    "tokenizer.ggml.pre": (TEXT, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (TEXT, TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (UINT32, [3, 3, *[1] * (len(TOKENS) - 2)])),
    "tokenizer.ggml.merges": (ARRAY, (TEXT, ["t h", "th e", "Ġ the"])),
    "tokenizer.ggml.bos_token_id": (UINT32, 1),
    "tokenizer.ggml.eos_token_id": (UINT32, 0),
    "tokenizer.chat_template": (TEXT, "{{ messages }}"),
}
# Others that are looked at where they are there.
OPTIONAL = [
    *("general.type", "split.count", "llama.attention.key_length", "llama.rope.scaling.type"),
    *("llama.attention.value_length", "llama.rope.dimension_count", "llama.expert_count"),
    *("llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.attention.causal"),
    *("llama.rope.scaling.original_context_length", "llama.vocab_size", "llama.unheard_of"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.chat_template."),
    *("tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id", "", "é\n\x1b[2J"),
]


def shapes():
    """Shapes of the tensors by their names in the file, rows first."""
    config = llama.LlamaConfig(ROWS, HIDDEN, HIDDEN, 1, HEADS, GROUPS, HIDDEN // HEADS)
    return {part.source: part.shape for part in conversion._parts(config).values()}


def tensors():
    """Name, shape, code of the type, bytes of every tensor."""
    draw = np.random.default_rng(0)
    return [
        (name, shape, 0, draw.normal(size=shape).astype("<f4").tobytes())
        for name, shape in shapes().items()
    ]


def text(content):
    content = content.encode(errors="surrogatepass")
    return struct.pack("<Q", len(content)) + content


def value_of(kind, value):
    """A setting's value as pieces: what they are, and their bytes."""
    if kind == TEXT:
        raw = text(value)
        return [("length", raw[:8]), ("text", raw[8:])]
    if kind != ARRAY:
        return [("value", struct.pack(CODES[kind], value))]
    inner, values = value
    each = [value_of(inner, item) for item in values]
    return [
        ("type", struct.pack("<I", inner)),
        ("count", struct.pack("<Q", len(values))),
        *(piece for pieces in each for piece in pieces),
    ]


def pieces_of(settings, stored):
    """A file in pieces: what each is, and its bytes."""
    pieces = [("magic", b"GGUF"), ("version", struct.pack("<I", 3))]
    pieces += [("count", struct.pack("<Q", len(part))) for part in (stored, settings)]
    for name, (kind, value) in settings:
        raw = text(name)
        pieces += [("length", raw[:8]), ("text", raw[8:]), ("type", struct.pack("<I", kind))]
        pieces += value_of(kind, value)
    content, offset = b"", 0
    for name, shape, kind, data in stored:
        raw = text(name)
        pieces += [("length", raw[:8]), ("text", raw[8:])]
        pieces.append(("dimensions", struct.pack("<I", len(shape))))
        pieces += [("dimension", struct.pack("<Q", n)) for n in shape[::-1]]
        pieces += [("type", struct.pack("<I", kind)), ("offset", struct.pack("<Q", offset))]
        content += data + bytes(-len(data) % 32)
        offset = len(content)
    header = sum(len(raw) for _, raw in pieces)
    return [*pieces, ("padding", bytes(-header % 32)), ("data", content)]


def joined(pieces):
    return b"".join(raw for _, raw in pieces)


WHOLE = pieces_of(SETTINGS.items(), tensors())


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "model.gguf"


def converted(file, content):
    """Whether the content became a checkpoint, which is looked at; else one line, and no folder."""
    file.write_bytes(content)
    cache = file.parent / "cache" / "jaxprune" / "gguf"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        folder = llama.locate(file)
    except InputError as error:
        message, folder = one_line(error), None
    assert file.read_bytes() == content
    if folder is None:
        assert message.startswith(f"{file}: ")
        assert not [path for path in cache.glob("*") if path.is_dir()]
        return False
    config = llama.load_config(folder)
    stored = TensorFiles.open(folder)
    for name, part in conversion._parts(config).items():
        tensor = stored.read(name)
        assert tensor.shape == part.shape
        assert np.isfinite(tensor.astype(np.float32)).all()
    assert np.isfinite(llama.inverse_frequencies(config)).all()
    try:
        ids = Tokenizer(folder, config.vocab_size).encode("the hint")
        assert ids.size == 0 or ids.max() < config.vocab_size
    except InputError as error:
        one_line(error)
    return True


def test_the_file_that_is_damaged_below_is_a_whole_one(file):
    assert converted(file, joined(WHOLE))


@cases(130)
@given(
    keep=st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1)),
    at=st.one_of(st.floats(0, 0.1), st.floats(0, 1)),
    garbage=st.binary(max_size=12),
    extra=st.booleans(),
)
def test_bytes_of_a_file(file, keep, at, garbage, extra):
    """Cut short, overwritten, or with bytes too many."""
    content = joined(WHOLE)
    start = int(at * len(content))
    rest = content[start if extra else start + len(garbage) :]
    content = content[:start] + garbage + rest
    converted(file, content[: round(keep * len(content))])


HEADER = [i for i, (what, raw) in enumerate(WHOLE) if what not in ("data", "padding") and raw]
EXTREMES = [0, 1, 2, 3, 5, 7, 8, 9, 13, 31, 33, 255, 2**31 - 1, 2**31, 2**32 - 1]
EXTREMES += [2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


@cases(120)
@given(
    places=st.lists(st.sampled_from(HEADER), min_size=1, max_size=2),
    value=st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1),
)
def test_fields_of_the_header(file, places, value):
    """Counts, lengths, types, dimensions, offsets and values of settings."""
    pieces = list(WHOLE)
    for place in places:
        what, raw = pieces[place]
        size = min(len(raw), 8)
        pieces[place] = what, (value % 2 ** (8 * size)).to_bytes(size, "little") + raw[size:]
    converted(file, joined(pieces))


VALUES = st.one_of(
    st.tuples(st.just(UINT32), st.sampled_from([0, 1, 2, 3, 4, 5, 8, 33, 64, 2**31, 2**32 - 1])),
    st.tuples(st.just(UINT64), st.sampled_from([0, 1, 32, 2**40, 2**63, 2**64 - 1])),
    st.tuples(
        st.sampled_from([FLOAT32, FLOAT64]),
        st.sampled_from([0.0, -1.0, 1.0, 1e-38, 1e30, float("inf"), float("nan")]),
    ),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(
        st.just(TEXT), st.sampled_from(["", "llama", "gpt2", "llama-bpe", "qwen2", "none", "\x00"])
    ),
    st.tuples(st.just(TEXT), st.text(max_size=8)),
    st.tuples(st.just(ARRAY), st.tuples(st.just(TEXT), st.lists(st.text(max_size=3), max_size=4))),
    st.tuples(st.just(ARRAY), st.tuples(st.just(TEXT), st.permutations(TOKENS))),
    st.tuples(st.just(ARRAY), st.tuples(st.just(UINT32), st.lists(st.integers(0, 9), max_size=16))),
    st.tuples(
        st.just(ARRAY),
        st.tuples(st.just(FLOAT32), st.lists(st.sampled_from([1.0, float("nan")]), max_size=14)),
    ),
    st.tuples(st.just(ARRAY), st.tuples(st.just(BOOL), st.lists(st.booleans(), max_size=3))),
)


@cases(120)
@given(
    changes=st.dictionaries(
        st.sampled_from([*SETTINGS, *OPTIONAL]), st.none() | VALUES, min_size=1, max_size=2
    ),
    twice=st.sampled_from([False, False, False, True]),
)
def test_settings_of_a_file(file, changes, twice):
    """Missing, twice, of another type, absurd; pre-tokenizers that nobody knows."""
    settings = {**SETTINGS, **changes}
    settings = [(name, value) for name, value in settings.items() if value is not None]
    if twice:
        settings.append(settings[-1])
    assert not converted(file, joined(pieces_of(settings, tensors()))) or not twice


@cases(60)
@given(
    which=st.integers(0, len(shapes()) - 1),
    damage=st.sampled_from(
        ["shape", "missing", "twice", "other name", "rope_freqs.weight", "nan", "kind", "kind"]
    ),
    kind=st.sampled_from([*map(int, gguf.GGMLQuantizationType), 4, 5, 99, 2**31]),
    shape=st.lists(st.sampled_from([1, 2, 32, 33, 64]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_tensors_of_a_file(file, which, damage, kind, shape, seed):
    """Of another shape, missing, twice, unasked for, in any quantisation, of random bytes."""
    stored = tensors()
    name, right, code, data = stored[which]
    if damage == "kind":
        block, size = gguf.GGML_QUANT_SIZES.get(kind, (1, 4))
        data = np.random.default_rng(seed).bytes(-(-np.prod(right) // block) * size)
        stored[which] = name, right, kind, data
    elif damage == "nan":
        stored[which] = name, right, code, np.full(right, np.nan, "<f4").tobytes()
    elif damage == "shape":
        stored[which] = name, tuple(shape), code, np.ones(shape, "<f4").tobytes()
    else:
        stored[which : which + 1] = {
            "missing": [],
            "twice": [stored[which]] * 2,
            "other name": [("blk.7." + name, right, code, data)],
            "rope_freqs.weight": [stored[which], (damage, tuple(shape), 0, bytes(4096 * 64))],
        }[damage]
        assert not converted(file, joined(pieces_of(SETTINGS.items(), stored)))
        return
    found = converted(file, joined(pieces_of(SETTINGS.items(), stored)))
    assert not (found and damage == "nan")
    assert not (found and damage == "shape" and tuple(shape) != right)


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 7, 8, 64, 2**20, 2**31, 2**63, 10**40]),
    st.sampled_from([0.0, -0.0, 0.25, 1.0, 1e-29, 1e29, 1e-40, 1e308, float("nan"), float("inf")]),
)
VALUE = st.one_of(NUMBERS, NUMBERS, JUNK, st.lists(NUMBERS | st.booleans(), max_size=4))
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 32}
ROPE_FIELDS = [
    *(*ROPE, "rope_type", "type", "rope_theta", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "full_attention"),
]
SCALING = st.builds(
    lambda kind, changes: ROPE | {"rope_type": kind} | changes,
    st.sampled_from(
        ["default", "linear", "llama3", "yarn", "dynamic", "longrope", "llama3", "yarn"]
    ),
    st.dictionaries(st.sampled_from(ROPE_FIELDS), VALUE, max_size=2),
)
KINDS = st.lists(st.sampled_from(["full_attention", "sliding_attention", "", None]), max_size=3)
FIELDS = {
    **dict.fromkeys(
        [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta"),
            *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
            *("sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
            *("hidden_act", "partial_rotary_factor", "quantization_config", "architectures"),
            *("max_position_embeddings", "original_max_position_embeddings", "model_type"),
        ],
        VALUE,
    ),
    "rope_scaling": SCALING | VALUE,
    "rope_parameters": SCALING | VALUE,
    "layer_types": KINDS | VALUE,
    "no_rope_layers": st.lists(st.sampled_from([0, 1, True, 1.0, 2]), max_size=3) | VALUE,
}
CHANGE = st.sampled_from(list(FIELDS)).flatmap(
    lambda field: st.tuples(st.just(field), FIELDS[field])
)


def content_of(name):
    """A config.json of a family."""
    return {
        **{"model_type": name, "architectures": [FAMILIES[name].architecture]},
        **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"max_position_embeddings": 64, "sliding_window": None},
    }


@cases(240)
@given(
    name=st.sampled_from(list(FAMILIES)),
    changes=st.lists(CHANGE, min_size=1, max_size=3),
    scaling=st.none() | SCALING,
)
@example(
    name="llama",
    changes=[("rope_theta", 1e-29)],
    scaling={"rope_type": "linear", "factor": 1e-29},
)
def test_settings_of_a_family(name, changes, scaling):
    """What is accepted has finite frequencies, and is what a file written of it says."""
    content = content_of(name) | {"rope_scaling": scaling} | dict(changes)
    try:
        config = llama.LlamaConfig.from_json(json.loads(json.dumps(content)))
    except InputError as error:
        one_line(error)
        return
    assert llama.LlamaConfig.from_json(config.to_json()) == config
    frequencies = llama.inverse_frequencies(config)
    assert frequencies.shape == (config.head_dim // 2,)
    assert np.isfinite(frequencies).all()
    assert (frequencies >= 0).all()


@cases(40)
@given(
    name=st.sampled_from([*FAMILIES, "gemma2", "qwen2_moe", "phi3", "gpt2"]) | JUNK,
    architecture=st.sampled_from(
        [
            *("Qwen2MoeForCausalLM", "LlamaForSequenceClassification", "Gemma2ForCausalLM"),
            *("MixtralForCausalLM", "mistralforcausallm", "Qwen3ForCausalLM\n", "", None),
        ]
    ),
    several=st.booleans(),
)
def test_other_architectures_are_refused_by_name(name, architecture, several):
    known = name if isinstance(name, str) and name in FAMILIES else "llama"
    architectures = [architecture, FAMILIES[known].architecture][: 1 + several]
    content = content_of(known) | {"model_type": name, "architectures": architectures}
    with pytest.raises(InputError, match=r"architectures \[|model_type") as error:
        llama.LlamaConfig.from_json(json.loads(json.dumps(content)))
    one_line(error.value)
