"""Checkpoints in and out: bytes that stay, errors of one line."""

import contextlib
import json
import pickle
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note, write_new
from jaxprune.models.llama.files import TensorFiles, check_outside
from jaxprune.storage import check_new_folder

CASES = ["tied_mha", "untied_gqa", "rope_parameters", "sharded", "bfloat16", "float16"]
FAMILIES = ["llama_biases", "mistral", "qwen2", "qwen3_biases", "smollm3_yarn"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def tensors(folder):
    files = TensorFiles.open(folder)
    return {name: files.read(name) for name in files.tensors}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES + FAMILIES)
def test_what_is_not_changed_is_written_back_bit_for_bit(checkpoint, tmp_path, case, dtype):
    source = checkpoint(case)
    model = llama.load(source, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(dtype)}
    llama.save(model, source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("case", CASES)
def test_a_changed_weight_changes_its_own_entries_alone(checkpoint, tmp_path, case):
    source = checkpoint(case)
    model = llama.load(source, jnp.bfloat16)
    blocks = model.blocks.get_value()
    model.blocks.set_value(blocks._replace(wk=blocks.wk.at[1, 2, 3].set(0)))
    llama.save(model, source, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = before["model.layers.1.self_attn.k_proj.weight"].copy()
    changed[3, 2] = 0
    before["model.layers.1.self_attn.k_proj.weight"] = changed
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize("case", ["untied_gqa", "qwen3_biases", "smollm3_yarn"])
def test_every_tensor_is_written_where_it_was_read_from(checkpoint, tmp_path, case):
    source = checkpoint(case)
    model = llama.load(source)
    doubled = jax.tree.map(lambda a: 2 * a, model)
    llama.save(doubled, source, tmp_path / "out")
    after = tensors(tmp_path / "out")
    for name, value in tensors(source).items():
        np.testing.assert_array_equal(after[name], 2 * value)


@pytest.mark.parametrize(
    "changes", [{}, {"query_key_norm": True, "attention_bias": True, "output_bias": True}]
)
def test_a_new_checkpoint_is_read_back(tmp_path, changes):
    config = llama.LlamaConfig(30, 8, 12, 2, 2, 1, 4, tie_word_embeddings=True, **changes)
    model = llama.Llama(config, key=jax.random.key(0))
    write_new(model, tmp_path, jnp.float32, bos_token_id=7)
    again = llama.load(tmp_path)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, model, again)
    assert json.loads((tmp_path / "config.json").read_text())["bos_token_id"] == 7


def test_a_folder_that_holds_something_is_not_written_to(checkpoint, tmp_path):
    source = checkpoint()
    model = llama.load(source)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    for out in (full, file, source):
        with pytest.raises(InputError, match="exists and is not empty"):
            llama.save(model, source, out)
        with pytest.raises(InputError, match="exists and is not empty"):
            check_new_folder(out)
    assert contents(full) == {"mine": b"mine"}
    with pytest.raises(InputError, match="cannot write there"):
        llama.save(model, source, file / "out")
    (tmp_path / "empty").mkdir()
    llama.save(model, source, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(source)


def test_an_interrupted_save_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    source = checkpoint()
    model = llama.load(source)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llama.save(model, source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_model_of_another_shape_is_not_saved(checkpoint, tmp_path):
    model = llama.load(checkpoint("head_dim"))
    with pytest.raises(InputError, match="not those of the model"):
        llama.save(model, checkpoint("untied_gqa"), tmp_path / "out")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file)


def test_all_that_does_not_fit_is_reported_together(checkpoint):
    folder = checkpoint()

    def change(content):
        del content["model.norm.weight"]
        del content["model.layers.1.mlp.up_proj.weight"]
        content["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        content["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        content["lm_head.weight"] = np.zeros((16, 40), np.float32)
        content["model.layers.0.mlp.up_proj.weight"] = np.zeros((24, 16), np.int8)

    rewrite(folder, change)
    with pytest.raises(InputError) as error:
        llama.load_config(folder)
    message = str(error.value)
    missing, unexpected, misshapen, other = message.split("; ", 1)[1].split("; ")
    assert missing == "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight"
    assert set(unexpected.removeprefix("unexpected: ").split(", ")) == {
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
    }
    assert misshapen == "misshapen: lm_head.weight [16, 40] instead of [40, 16]"
    assert other == "of an unsupported type: model.layers.0.mlp.up_proj.weight I8"


def test_harmless_tensors_are_ignored_and_kept(checkpoint, tmp_path):
    folder = checkpoint("tied_mha")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def change(content):
        content[name] = np.ones(2, np.float32)
        content["lm_head.weight"] = content["model.embed_tokens.weight"]

    rewrite(folder, change)
    model = llama.load(folder)
    model.embedding.set_value(2 * model.embedding.get_value())
    llama.save(model, folder, tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert name in after
    np.testing.assert_array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    rewrite(folder, lambda content: content.update({"lm_head.weight": np.ones((40, 16), "f4")}))
    with pytest.raises(InputError, match="tie_word_embeddings"):
        llama.load(folder)


def test_the_embedding_says_how_many_tokens_there_are(checkpoint, tmp_path):
    folder = checkpoint()
    edit(folder / "config.json", vocab_size=39)
    assert llama.load(folder).config.vocab_size == 40
    llama.save(llama.load(folder), folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((folder / "config.json").read_text()) | {"vocab_size": 40}


@pytest.mark.parametrize("value", [0, -1, "64", 1.5, True])
def test_a_context_that_cannot_be_is_refused(checkpoint, value):
    folder = checkpoint()
    edit(folder / "config.json", max_position_embeddings=value)
    with pytest.raises(InputError, match="max_position_embeddings must be a whole number"):
        llama.load_config(folder)


def test_windows_beyond_the_context_are_noted(checkpoint):
    folder = checkpoint()
    assert context_note(folder, 64) is None
    assert context_note(folder, 65) == (
        "windows of 65 tokens are longer than the model's context, 64"
    )
    content = json.loads((folder / "config.json").read_text())
    del content["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(content))
    assert context_note(folder, 10**6) is None


def test_a_tensor_that_is_there_twice_is_refused(checkpoint):
    file = checkpoint() / "model.safetensors"
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + size]
    name, entry = next(item for item in json.loads(header).items() if "q_proj" in item[0])
    header = f'{{"{name}":{json.dumps(entry)},'.encode() + header[1:]
    file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
    with pytest.raises(InputError, match=r"model\.safetensors: holds 'model.*q_proj.*' twice"):
        llama.load_config(file.parent)


def test_a_tensor_in_two_shards_is_refused(checkpoint):
    folder = checkpoint("sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    name = next(n for n, f in index["weight_map"].items() if f == files[0].name)
    rewritten = load_file(files[1]) | {name: load_file(files[0])[name]}
    save_file(rewritten, files[1])
    with pytest.raises(InputError, match=f"holds '{name}' twice, in {files[1].name}"):
        llama.load_config(folder)


def test_a_folder_in_the_place_of_the_weights_is_called_one(checkpoint):
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors: is a folder, expected"):
        llama.load_config(folder)


def test_a_new_checkpoint_is_not_inside_its_source(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for out in ("model/new", "link/a/b", "model"):
        with pytest.raises(InputError, match="is inside the folder of the model"):
            check_outside(tmp_path / out, tmp_path / "model")
    check_outside(tmp_path / "model-new", tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder, name="model.safetensors", keep=-8):
    file = folder / name
    file.write_bytes(file.read_bytes()[:keep])


def break_index(folder, entry):
    index = json.loads((folder / llama.files.INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = entry
    edit(folder / llama.files.INDEX_FILE, **index)


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": 1}))


def link_outside(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model-00001-of-00004.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    break_index(folder, "link.safetensors")


SHARD = "model-00002-of-00004.safetensors"
BROKEN = {
    "truncated": ("untied_gqa", truncate, "model.safetensors: not a whole safetensors file"),
    "header only": ("untied_gqa", lambda f: truncate(f, keep=50), "not a whole safetensors file"),
    "empty": ("untied_gqa", lambda f: truncate(f, keep=0), "not a whole safetensors file"),
    "truncated shard": ("sharded", lambda f: truncate(f, SHARD), f"{SHARD}: not a whole"),
    "missing shard": ("sharded", lambda f: (f / SHARD).unlink(), f"{SHARD}: no such file"),
    "shard above": ("sharded", lambda f: break_index(f, "../x.safetensors"), "weight_map"),
    "absolute shard": ("sharded", lambda f: break_index(f, "/x.safetensors"), "weight_map"),
    "shard of no name": ("sharded", lambda f: break_index(f, ""), "weight_map"),
    "shard is a number": ("sharded", lambda f: break_index(f, 3), "weight_map"),
    "shard is a pickle": ("sharded", lambda f: break_index(f, "x.bin"), "only safetensors"),
    "link outside": ("sharded", link_outside, "a link to outside"),
    "wrong shard": ("sharded", lambda f: break_index(f, SHARD), "lacks model.norm.weight"),
    "no weight_map": ("sharded", lambda f: edit(f / llama.files.INDEX_FILE, weight_map=1), "lacks"),
    "pickle": ("untied_gqa", only_a_pickle, "pytorch_model.bin are not read"),
    "no weights": ("untied_gqa", lambda f: (f / "model.safetensors").unlink(), "holds no model"),
    "no config": ("untied_gqa", lambda f: (f / "config.json").unlink(), "config.json: no such"),
    "bad config": ("untied_gqa", lambda f: truncate(f, "config.json"), "not valid JSON"),
    "config is a list": (
        "untied_gqa",
        lambda f: (f / "config.json").write_text("[]"),
        "expected a JSON object",
    ),
    "binary config": (
        "untied_gqa",
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"),
        "begins with a byte-order mark",
    ),
    "bias": (
        "untied_gqa",
        lambda f: edit(f / "config.json", mlp_bias=True),
        "missing: model.layers.0.mlp.gate_proj.bias",
    ),
    "no bias": (
        "llama_biases",
        lambda f: edit(f / "config.json", attention_bias=False),
        "unexpected: .*model.layers.0.self_attn.k_proj.bias",
    ),
    "another family": (
        "qwen3",
        lambda f: edit(f / "config.json", model_type="qwen2", architectures=None),
        "missing: .*q_proj.bias.*unexpected: .*q_norm.weight",
    ),
    "wrong shape": ("untied_gqa", lambda f: edit(f / "config.json", hidden_size=24), "misshapen"),
    "more layers": (
        "untied_gqa",
        lambda f: edit(f / "config.json", num_hidden_layers=50),
        "missing: .* and 412 more",
    ),
    "fewer layers": (
        "untied_gqa",
        lambda f: edit(f / "config.json", num_hidden_layers=1),
        "unexpected",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_one_clear_line(checkpoint, kind):
    case, damage, message = BROKEN[kind]
    folder = checkpoint(case)
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        llama.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(keep=st.floats(0, 0.999), garbage=st.binary(max_size=9), at=st.integers(0, 200))
def test_damaged_bytes_are_found_or_harmless(checkpoint, tmp_path, keep, garbage, at):
    folder = tmp_path / "untied_gqa"
    if not folder.exists():
        checkpoint()
        shutil.copy(folder / "model.safetensors", tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(InputError):
        llama.load_config(folder)
    damaged = whole[:at] + garbage + whole[at + len(garbage) :]
    (folder / "model.safetensors").write_bytes(damaged)
    with contextlib.suppress(InputError):
        llama.load_config(folder)


def test_names_that_are_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a file"):
        llama.locate(tmp_path / "file")
    with pytest.raises(InputError, match="no such folder"):
        llama.locate(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no such folder"):
        llama.locate("nothing")
    with pytest.raises(InputError, match="check the name and the network"):
        llama.locate("nobody/nothing")
    assert llama.locate("zoo").name == "zoo"
    assert llama.locate(str(tmp_path)) == tmp_path


def test_without_the_hub_client_a_hub_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'jaxprune\[cli\]'"):
        llama.locate("nobody/nothing")


def test_links_into_the_cache_of_the_hub_are_inside(checkpoint, tmp_path):
    plain = checkpoint("sharded")
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(plain.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    model = llama.load(snapshot)
    llama.save(model, snapshot, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(plain)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


PEAK = """
import re, sys
from pathlib import Path
from jaxprune.models import llama
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
llama.load(Path(sys.argv[1]))  # imports and compiled programs are paid for
before = peak()
model = llama.load(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux has it")
def test_loading_holds_the_weights_once(tmp_path):
    for name, layers in (("small", 1), ("large", 24)):
        config = llama.LlamaConfig(64, 512, 2048, layers, 8, 8, 64, tie_word_embeddings=True)
        (tmp_path / name).mkdir()
        write_new(llama.Llama(config, key=jax.random.key(0)), tmp_path / name, jnp.float32)
    command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 0.8 * size < grown < 1.2 * size
