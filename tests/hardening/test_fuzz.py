"""Broken inputs, some six hundred of them, through the scripts themselves.

Each ends in one line on standard error and status 2, without output, or in a finite result; what
was read is as it was. Shapes are few, so that nothing is compiled twice.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
import struct
import zipfile
from typing import get_type_hints

import numpy as np
import pytest
from hostile import JUNK, cases
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxprune import storage
from jaxprune.runs import plotting
from jaxprune.runs.configuration import Group

pytestmark = pytest.mark.slow
TEXT = b"the cat sat on the mat. " * 40


@pytest.fixture(scope="module")
def mains(script):
    return {name: script(name).main for name in ("perplexity", "prune", "llama_heads")}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing takes longer than everything else here together."""
    monkeypatch.setattr(plotting, "save", lambda figure, folder, name: plotting.plt.close(figure))


@pytest.fixture
def place(tmp_path, checkpoint):
    """Whole inputs, and a folder in which every case gets a copy of them to break."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("untied_gqa", "sharded"):
        checkpoint(name).rename(whole / name)
    (whole / "text.txt").write_bytes(TEXT)
    return tmp_path


def anew(place, *names):
    """Fresh copies of whole inputs, and no output."""
    for folder in (place / "broken", place / "out", place / ".out.work"):
        shutil.rmtree(folder, ignore_errors=True)
    (place / "broken").mkdir()
    for name in ("text.txt", *names):
        source = place / "whole" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / "broken" / name)
    return place / "broken"


def contents(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ends_well(main, argv, place):
    """Run and check; the status and standard output."""
    before, out, err = contents(place / "broken"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in argv])
    lines = [
        line for line in err.getvalue().replace("\r", "\n").splitlines() if ": error: " in line
    ]
    assert status in (0, 2), err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert len(lines) == (status == 2), err.getvalue()
    assert contents(place / "broken") == before
    return status, out.getvalue()


def perplexity(mains, place, model="untied_gqa", text="text.txt"):
    """Perplexity of a broken model or text."""
    argv = ["--model", place / "broken" / model, "--text", place / "broken" / text]
    argv += ["--seqlen", "16", "--windows", "2", "--batch", "2"]
    status, out = ends_well(mains["perplexity"], argv, place)
    if status == 0:
        assert math.isfinite(json.loads(out.splitlines()[-1])["perplexity"])
    else:
        assert out == ""
    return status


FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "model_type"),
    *("rope_scaling", "rope_parameters", "tie_word_embeddings", "architectures", "hidden_act"),
    *("bos_token_id", "quantization_config", "attention_bias", "torch_dtype"),
]


@cases(120)
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=2),
    drop=st.booleans(),
)
@example(changes={"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, drop=False)
def test_settings_of_a_model(mains, place, changes, drop):
    file = anew(place, "untied_gqa") / "untied_gqa" / "config.json"
    content = json.loads(file.read_text())
    for field, value in changes.items():
        content.pop(field, None)
        if not drop:
            content[field] = value
    file.write_text(json.dumps(content))
    perplexity(mains, place)


@cases(60)
@given(
    raw=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)),
    keep=st.floats(0, 1),
)
@example(raw=b"[" * 5000, keep=0.0)
@example(raw=b'{"model_type": NaN}', keep=0.0)
def test_settings_that_are_no_json(mains, place, raw, keep):
    file = anew(place, "untied_gqa") / "untied_gqa" / "config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))] + raw)
    perplexity(mains, place)


def weights_file(place):
    return anew(place, "untied_gqa") / "untied_gqa" / "model.safetensors"


@cases(80)
@given(keep=st.floats(0, 1), at=st.floats(0, 1), garbage=st.binary(max_size=12))
@example(keep=0.0, at=0.0, garbage=b"")
@example(keep=0.999, at=1.0, garbage=b"")
def test_bytes_of_the_weights(mains, place, keep, at, garbage):
    file = weights_file(place)
    whole = file.read_bytes()
    start = int(at * len(whole))
    file.write_bytes(
        (whole[:start] + garbage + whole[start + len(garbage) :])[: int(keep * len(whole))]
    )
    if perplexity(mains, place) == 0:
        assert file.stat().st_size == len(whole)


@cases(40)
@given(
    length=st.sampled_from([0, 1, 7, 2**20, 2**31, 2**32, 2**63, 2**64 - 1]),
    header=st.one_of(st.binary(max_size=60), JUNK.map(lambda v: json.dumps({"a": v}).encode())),
)
def test_headers_of_the_weights(mains, place, length, header):
    file = weights_file(place)
    file.write_bytes(struct.pack("<Q", length) + header)
    assert perplexity(mains, place) == 2


NAMES = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]


@cases(60)
@given(
    name=st.sampled_from(NAMES),
    damage=st.sampled_from(
        ["nan", "inf", "huge", "zero", "shape", "int", "missing", "other", "empty"]
    ),
)
def test_tensors(mains, place, name, damage):
    file = weights_file(place)
    tensors = load_file(file)
    tensor = tensors.pop(name)
    broken = {
        "nan": np.full_like(tensor, np.nan),
        "inf": np.full_like(tensor, np.inf),
        "huge": np.full_like(tensor, 3e38),
        "zero": np.zeros_like(tensor),
        "shape": tensor.reshape(-1),
        "int": tensor.astype(np.int32),
        "other": tensor.astype(np.float64),
        "empty": tensor[:0],
    }
    new_name = name if damage != "missing" else "model.layers.9.nothing"
    save_file(tensors | {new_name: broken.get(damage, tensor)}, file)
    status = perplexity(mains, place)
    same = damage == "shape" and tensor.ndim == 1
    assert status == (0 if damage == "zero" or same else 2) or damage == "huge"


@cases(60)
@given(
    entry=st.one_of(
        JUNK,
        st.sampled_from(
            ["../text.txt", "/etc/passwd", "..", ".", "config.json", "link.safetensors"]
        ),
        st.sampled_from(
            ["a/../../x.safetensors", "\\x.safetensors", "model-00001-of-00004.safetensors"]
        ),
    ),
    name=st.sampled_from([*NAMES, "nothing"]),
)
def test_entries_of_an_index(mains, place, entry, name):
    folder = anew(place, "sharded") / "sharded"
    (folder / "link.safetensors").symlink_to(place / "whole" / "untied_gqa" / "model.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][name] = entry
    file.write_text(json.dumps(index))
    perplexity(mains, place, model="sharded")


@cases(60)
@given(
    file=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    change=st.sampled_from(["field", "bytes", "beyond", "bos"]),
    value=JUNK,
    field=st.sampled_from(
        ["model", "post_processor", "add_bos_token", "bos_token", "added_tokens"]
    ),
)
@example(file="tokenizer.json", change="beyond", value=None, field="model")
def test_tokenizers(mains, place, file, change, value, field):
    folder = anew(place, "untied_gqa") / "untied_gqa"
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {"add_bos_token": True}
    if change == "bytes":
        path.write_bytes(json.dumps(content).encode()[: 20 + len(str(value))])
    else:
        if change == "beyond" and "model" in content:
            vocabulary = content["model"]["vocab"]
            content["model"]["vocab"] = {k: v + 10_000 * (k == "t") for k, v in vocabulary.items()}
        elif change == "bos":
            content |= {"bos_token": value, "add_bos_token": True}
        else:
            content[field] = value
        path.write_text(json.dumps(content))
    perplexity(mains, place)


@cases(60)
@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"", b" \n\t", b"a", b"\xff\xfe", b"\x00" * 200, b"\xef\xbb\xbf" + TEXT]),
        st.sampled_from([b'{"text": "\\ud800"}', b'{"text": 3}\n', b'{"text": "a"', b"[]", b"NaN"]),
    ),
    suffix=st.sampled_from([".txt", ".jsonl", ".json.gz", ".gz"]),
    after=st.booleans(),
)
def test_texts(mains, place, raw, suffix, after):
    name = f"words{suffix}"
    (anew(place, "untied_gqa") / name).write_bytes(raw + TEXT * after)
    perplexity(mains, place, text=name)


WORDS = {"type": "WordLevel", "vocab": {"the": 5}, "unk_token": "[UNK]"}
PIECES = {"type": "Unigram", "vocab": [["t", -1.0]], "unk_id": None}
CHARMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
TEMPLATE = [{"SpecialToken": {"id": "<q>", "type_id": 0}}]
TEMPLATE = {"type": "TemplateProcessing", "single": TEMPLATE, "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("changes", "settings", "status"),
    [
        pytest.param({"model": WORDS}, None, 2, id="no token for unknown words"),
        pytest.param({"model": PIECES}, None, 2, id="no token for unknown pieces"),
        pytest.param({"normalizer": CHARMAP}, None, 2, id="the library panics while it reads"),
        pytest.param({"post_processor": TEMPLATE}, None, 2, id="the library panics at work"),
        pytest.param({"vocab": {"t": 2**32 - 1}}, None, 2, id="an id beyond int32"),
        pytest.param({}, {"add_bos_token": True, "bos_token": "\ud800"}, 2, id="BOS no text"),
        pytest.param({}, {"add_bos_token": "false", "bos_token": "<s>"}, 2, id="not a boolean"),
        pytest.param({"dropout": 0.5}, None, 0, id="merges left to chance"),
    ],
)
def test_tokenizers_that_fail_at_work(mains, place, capfd, changes, settings, status):
    folder = anew(place, "untied_gqa") / "untied_gqa"
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"] | changes.pop("vocab", {})
    content["model"] |= {"vocab": vocabulary, "dropout": changes.pop("dropout", None)}
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert perplexity(mains, place) == status
    assert capfd.readouterr().err == ""  # what Rust prints goes past Python


LAYER = {"x": (4, 8, 6), "x_heldout": (2, 8, 6), "wq": (6, 2, 3), "wk": (6, 1, 3)}


def layer_arrays():
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in LAYER.items()}


def heads(mains, place, *more):
    argv = ["--input", place / "broken" / "layer.npz", "--out", place / "out", *more]
    argv += ["--methods", "wanda", "sparsegpt", "fused_magnitude", "--ratios", "0", "0.5", "1"]
    status, _ = ends_well(mains["llama_heads"], argv, place)
    if status == 0:
        import pandas as pd

        errors = pd.read_csv(place / "out" / "metrics.csv")
        assert np.isfinite(errors[["calibration_error", "heldout_error"]]).all(axis=None)
    return status


@cases(80)
@given(
    name=st.sampled_from(list(LAYER)),
    damage=st.sampled_from(
        [
            *("nan", "inf", "huge", "tiny", "zero", "constant", "dead", "rank one", "float16"),
            *("float64", "int", "complex", "text", "object", "missing", "flat", "empty", "longer"),
        ]
    ),
)
def test_layers(mains, place, name, damage):
    folder, arrays = anew(place), layer_arrays()
    array = arrays.pop(name)
    dead = array.copy()
    dead[..., 0] = 0
    broken = {
        "nan": np.where(array > 1, np.nan, array),
        "inf": np.where(array > 1, -np.inf, array),
        "huge": array.astype(np.float64) * 1e300,
        "tiny": array * np.float32(1e-40),
        "zero": np.zeros_like(array),
        "constant": np.ones_like(array),
        "dead": dead,
        "rank one": np.broadcast_to(array[..., :1], array.shape),
        "float16": array.astype(np.float16),
        "float64": array.astype(np.float64),
        "int": (10 * array).astype(np.int8),
        "complex": array + 1j,
        "text": array.astype(str),
        "object": array.astype(object),
        "flat": array.reshape(-1),
        "empty": array[:0],
        "longer": np.concatenate([array, array], axis=-1),
    }
    if damage != "missing":
        arrays[name] = broken[damage]
    np.savez(folder / "layer.npz", **arrays)
    status = heads(mains, place)
    fine = {"tiny", "zero", "constant", "dead", "rank one", "float16", "float64", "int"}
    without = damage == "missing" and name == "x_heldout"
    assert status == (0 if damage in fine or without else 2)
    assert (place / "out").exists() == (status == 0)


@cases(50)
@given(keep=st.floats(0, 1), at=st.floats(0, 1), garbage=st.binary(max_size=30))
def test_files_of_layers(mains, place, keep, at, garbage):
    folder = anew(place)
    np.savez(folder / "layer.npz", **layer_arrays())
    whole = (folder / "layer.npz").read_bytes()
    start = int(at * len(whole))
    damaged = whole[:start] + garbage + whole[start + len(garbage) :]
    (folder / "layer.npz").write_bytes(damaged[: int(keep * len(whole))])
    heads(mains, place)


def test_a_layer_that_unpacks_to_more_than_memory_holds(mains, place):
    """An array of 2^60 numbers in a file of a few bytes."""
    folder = anew(place)
    np.savez(folder / "layer.npz", **layer_arrays())
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(folder / "layer.npz", "a") as file:
        file.writestr("more.npy", npy)
    assert heads(mains, place) == 2


def npy(header):
    """A file of NumPy with a header and no numbers."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


SHAPED = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 5000,
        b'{"descr": """',
        b"{'descr': \\x 1",
        (SHAPED % 2**70).encode(),
        (SHAPED % f"0, {2**70}").encode(),
        (SHAPED % ("1," * 90)).encode(),
    ],
)
def test_headers_of_arrays(mains, place, header):
    np.savez(anew(place) / "layer.npz", **layer_arrays())
    with zipfile.ZipFile(place / "broken" / "layer.npz", "a") as file:
        file.writestr("more.npy", npy(header))
    assert heads(mains, place) == 2


def test_layers_in_damaged_and_in_locked_archives(mains, place):
    layer = anew(place) / "layer.npz"
    with zipfile.ZipFile(layer, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("x.npy", bytes(800))
    whole = bytearray(layer.read_bytes())
    whole[45:60] = b"\xff" * 15
    layer.write_bytes(whole)
    assert heads(mains, place) == 2
    np.savez(layer, **layer_arrays())
    whole = bytearray(layer.read_bytes())
    for sign, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = whole.find(sign)
        while at >= 0:
            whole[at + flags] |= 1  # encrypted
            at = whole.find(sign, at + 1)
    layer.write_bytes(whole)
    assert heads(mains, place) == 2


def test_a_layer_of_zeros_larger_than_the_machine(mains, place, monkeypatch):
    """It unpacks, bit by bit, until nothing is left: refused by the sizes that it names."""
    monkeypatch.setattr(storage, "_memory", lambda: 2**20)
    np.savez_compressed(anew(place) / "layer.npz", **layer_arrays(), more=np.zeros(2**18))
    assert heads(mains, place) == 2


@pytest.mark.parametrize("shape", [(), (6,)])
def test_activations_that_are_no_sequences(mains, place, shape):
    arrays = layer_arrays() | {"x": np.ones(shape, np.float32)}
    del arrays["x_heldout"]
    np.savez(anew(place) / "layer.npz", **arrays)
    assert heads(mains, place) == 2


def test_logits_beyond_float32(mains, place):
    arrays = layer_arrays()
    np.savez(anew(place) / "layer.npz", **(arrays | {"x": arrays["x"] * np.float32(1e19)}))
    assert heads(mains, place) == 2
    assert not (place / "out").exists()


@cases(40)
@given(
    name=st.sampled_from(["config.json", "inputs.json", "metrics.csv", "parts", "masks"]),
    raw=st.one_of(
        st.binary(max_size=30),
        st.sampled_from([b"", b"[]", b"{}", b"a,b\n1,2\n", b"[1]", b"[{}]", b"[" * 100_000]),
    ),
    redraw=st.booleans(),
)
def test_damaged_run_folders(mains, place, name, raw, redraw):
    np.savez(anew(place) / "layer.npz", **layer_arrays())
    if not (place / "finished").exists():
        assert heads(mains, place) == 0
        (place / "out").rename(place / "finished")
    shutil.rmtree(place / "out", ignore_errors=True)
    shutil.copytree(place / "finished", place / "out")
    pattern = {"parts": "parts/*.json", "masks": "parts/*.npz"}.get(name, name)
    next((place / "out").glob(pattern)).write_bytes(raw)
    heads(mains, place, "--redraw" if redraw else "--resume")


VALUES = st.sampled_from(
    [
        "",
        "-1",
        "0",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "abc",
        "9" * 30,
        "0.5:2",
        "4:2",
        "0:4",
        "2:4:8",
        "²",
        "0.5",
        "2:4",
    ]
)
FLAGS = {
    "perplexity": ["--seqlen", "--windows", "--batch", "--dtype", "--text", "--model"],
    "prune": [
        *("--sparsity", "--windows", "--seqlen", "--heldout", "--method", "--targets", "--steps"),
        *("--batch", "--seed", "--calibration", "--model", "--distill"),
    ],
    "llama_heads": ["--ratios", "--methods", "--head-batch", "--steps", "--batch-size", "--input"],
}


@cases(120)
@given(data=st.data(), value=VALUES)
def test_flags(mains, place, data, value):
    name = data.draw(st.sampled_from(list(FLAGS)))
    flag = data.draw(st.sampled_from(FLAGS[name]))
    folder = anew(place, "untied_gqa")
    np.savez(folder / "layer.npz", **layer_arrays())
    model = ["--model", folder / "untied_gqa"]
    argv = {
        "perplexity": [*model, "--text", folder / "text.txt", "--seqlen", "16", "--windows", "2"],
        "prune": [
            *model,
            *("--calibration", folder / "text.txt", "--seqlen", "16", "--windows", "2"),
            *("--heldout", "1", "--method", "magnitude", "--out", place / "out"),
        ],
        "llama_heads": [
            *("--input", folder / "layer.npz", "--out", place / "out"),
            *("--methods", "fused_magnitude", "--ratios", "0.5"),
        ],
    }[name]
    status, _ = ends_well(mains[name], [*argv, f"{flag}={value}"], place)
    if status == 2:
        assert not (place / "out").exists()
        assert not list(place.glob(".out*"))


@cases(30)
@given(
    name=st.sampled_from(NAMES),
    value=st.sampled_from([np.nan, np.inf, 3e38, 0.0, 1.0, 1e-40]),
    method=st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
)
def test_weights_to_prune(mains, place, name, value, method):
    file = weights_file(place)
    tensors = load_file(file)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, file)
    argv = [
        "--model",
        file.parent,
        "--calibration",
        place / "broken" / "text.txt",
        "--seqlen",
        "16",
    ]
    argv += ["--windows", "2", "--heldout", "1", "--method", method, "--out", place / "out"]
    status, _ = ends_well(mains["prune"], argv, place)
    assert (place / "out").exists() == (status == 0)
    if status == 0:
        pruned = load_file(place / "out" / "model.safetensors")
        assert all(np.isfinite(tensor).all() for tensor in pruned.values())
    else:
        assert not value < 1e38
    assert not (place / ".out.work").exists()


@pytest.mark.parametrize("instead", ["folder", "link to nowhere", "link to itself"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_files_of_a_model_that_are_none(mains, place, name, instead):
    file = anew(place, "untied_gqa") / "untied_gqa" / name
    file.unlink(missing_ok=True)
    if instead == "folder":
        file.mkdir()
    else:
        file.symlink_to(name if instead == "link to itself" else "/nowhere")
    assert perplexity(mains, place) == 2


def test_no_script_prints_a_traceback_for_an_unreadable_input(mains, place):
    """Folders where files are expected, and files where folders are."""
    folder = anew(place, "untied_gqa")
    for argv in (
        ["--model", folder / "text.txt", "--text", folder / "text.txt"],
        ["--model", folder / "untied_gqa", "--text", folder / "untied_gqa"],
    ):
        assert ends_well(mains["perplexity"], argv, place)[0] == 2
    argv = ["--input", folder, "--out", place / "out"]
    assert ends_well(mains["llama_heads"], argv, place)[0] == 2


def kinds(config):
    """Types of all flags, as text, by name."""
    found = {}
    for name, kind in get_type_hints(config, include_extras=False).items():
        if isinstance(kind, type) and issubclass(kind, Group):
            found |= kinds(kind)
        else:
            found[name] = str(kind)
    return found


@pytest.mark.parametrize("name", ["synthetic", "convergence", "train_zoo", "prune", "llama_heads"])
def test_absurd_numbers_are_refused_by_every_flag_that_takes_one(script, place, capsys, name):
    module = script(name)
    config = next(v for v in vars(module).values() if hasattr(v, "memory_flags"))
    numbers = {
        name.replace("_", "-"): ["9" * 30] * (2 if "int, int" in kind else 1)
        for name, kind in kinds(config).items()
        if re.search(r"\bint\b", kind)
    }
    assert len(numbers) >= 3
    for flag, values in numbers.items():
        argv = [f"--{flag}", *values, "--out", str(place / "out")]
        assert module.main(argv) == 2
        error = capsys.readouterr().err
        assert f"--{flag} 1e+30: expected a number below 2^31" in error
        assert error.count("\n") == 1
    assert not (place / "out").exists()
