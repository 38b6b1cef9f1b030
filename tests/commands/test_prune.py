"""jaxprune prune: every method to a checkpoint, resume, what it refuses."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from jaxprune.pipeline.settings import METHODS

REPOSITORY = Path(__file__).parents[2]
# Query heads share key heads in this golden model.
MODEL = "untied_gqa"
TARGETS = {
    "qk": ("q_proj", "k_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def prune(script):
    return script("prune").main


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["the cat", "sat", "on a mat", "and ran.\n"], 900)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    return file


def flags(model, text, out, *more, distill=0):
    fixed = ["--windows", "8", "--seqlen", "32", "--heldout", "2", "--distill", distill]
    descends = "--method" not in more or "descent" in more or "--refit" in more
    if descends and "--no-refit" not in more:
        fixed += ["--steps", "60"]
    named = ["--model", model, "--calibration", text, "--out", out]
    return [str(a) for a in (*named, *fixed, *more)]


# The others differ in what they prune a matrix by, which tests of the pipeline look at.
QUICK = {("sparsegpt", "2:4", "all")}
CASES = [
    pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
    for each in itertools.product(METHODS, ("0.5", "2:4"), TARGETS)
]


@pytest.mark.parametrize(("method", "sparsity", "targets"), CASES)
def test_zeros_are_exact_and_everything_else_is_untouched(
    prune, checkpoint, text, tmp_path, method, sparsity, targets
):
    check_pruned(prune, checkpoint(MODEL), text, tmp_path, method, sparsity, targets)


def check_pruned(prune, model, text, tmp_path, method, sparsity, targets):
    """The new checkpoint has the zeros that were asked for, and else is that of ``model``."""
    out = tmp_path / "out"
    more = ("--method", method, "--sparsity", sparsity, "--targets", targets)
    assert prune(flags(model, text, out, *more, distill=10 * (method == "descent"))) == 0
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, dense in before.items():
        if not any(f"{target}.weight" in name for target in TARGETS[targets]):
            assert dense.tobytes() == after[name].tobytes(), name
            continue
        zero = after[name] == 0
        assert dense.dtype == after[name].dtype
        if sparsity == "2:4":
            assert (zero.reshape(zero.shape[0], -1, 4).sum(-1) == 2).all(), name
        else:
            assert zero.sum() == dense.size // 2, name
        if method in ("magnitude", "wanda"):
            assert (after[name][~zero] == dense[~zero]).all()
    report = json.loads((out / "pruning.json").read_text())
    assert all(v == 0.5 for row in report["achieved_sparsity"].values() for v in row)
    assert {"calibration_error", "heldout_error", "layer", "head"} <= report["attention_error"][
        0
    ].keys()
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    masks = np.load(out / "keep_masks.npz")
    first = masks["0.wq"].T
    assert (after["model.layers.0.self_attn.q_proj.weight"][~first] == 0).all()
    for name in ("tokenizer.json", "summary.png", "summary.svg", "metrics.csv"):
        assert (out / name).stat().st_size > 0
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert f"`{method}`: " in card.text
    assert "achieved: 0.5000\n" in card.text
    assert [p.name for p in tmp_path.glob(".out*")] == []


@pytest.mark.parametrize(
    ("method", "allocate", "targets"),
    [
        ("gauss-newton", "model", "all"),
        ("wanda", "block", "all"),
        pytest.param("gauss-newton", "model", "qk", marks=pytest.mark.slow),
    ],
)
def test_a_shared_budget_is_kept_to_the_entry(
    prune, checkpoint, text, tmp_path, capsys, method, allocate, targets
):
    model, out = checkpoint(MODEL), tmp_path / "out"
    more = ("--method", method, "--allocate", allocate, "--targets", targets, "--highest", "0.9")
    assert prune(flags(model, text, out, *more)) == 0
    masks = np.load(out / "keep_masks.npz")
    groups = {name.split(".")[0] if allocate == "block" else "" for name in masks.files}
    for group in groups:
        kept = [masks[name] for name in masks.files if not group or name.startswith(f"{group}.")]
        drops = sum(int(mask.size * 0.5 + 1e-9) for mask in kept)
        assert sum(int((~mask).sum()) for mask in kept) == drops
    ratios = [float((~masks[name]).mean()) for name in masks.files]
    assert max(ratios) > min(ratios)
    assert max(ratios) <= 0.9
    assert (out / "ratios.png").exists()
    # Of all entries, whatever the sizes of the matrices.
    assert "0.5000 of the pruned matrices is zero" in capsys.readouterr().out
    assert "achieved: 0.5000, from" in (out / "README.md").read_text()


def test_a_baseline_may_be_retrained_like_descent(prune, checkpoint, text, tmp_path):
    model = checkpoint(MODEL)
    for name, more in (("plain", ()), ("retrained", ("--refit",))):
        arguments = flags(model, text, tmp_path / name, "--method", "wanda", *more)
        assert prune(arguments) == 0
        assert not (tmp_path / name / "ratios.png").exists()  # all the same
    masks = [np.load(tmp_path / name / "keep_masks.npz") for name in ("plain", "retrained")]
    # Later blocks see what earlier ones became: masks of the first are the same.
    for name in ("0.wq", "0.wk"):
        np.testing.assert_array_equal(masks[0][name], masks[1][name])
    errors = [
        np.mean([row["calibration_error"] for row in report["attention_error"][:4]])
        for report in (
            json.loads((tmp_path / name / "pruning.json").read_text())
            for name in ("plain", "retrained")
        )
    ]
    assert errors[1] < errors[0]


def test_a_mask_alone_leaves_kept_weights_as_they_were(prune, checkpoint, text, tmp_path):
    model, out = checkpoint(MODEL), tmp_path / "out"
    assert prune(flags(model, text, out, "--no-refit")) == 0
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = after[name] != 0
    assert kept.sum() == kept.size // 2
    assert (after[name][kept] == before[name][kept]).all()


def test_windows_that_the_model_writes_are_calibrated_on_and_kept_for_a_resumed_run(
    prune, checkpoint, text, tmp_path, monkeypatch
):
    from jaxprune.pipeline import model as pipeline

    source, more = checkpoint(MODEL), ("--method", "sparsegpt")
    assert prune(flags(source, text, tmp_path / "read", *more)) == 0
    written, seen = pipeline.continuations, []

    def recorded(model, prompts, length, key):
        seen.append(written(model, prompts, length, key))
        return seen[-1]

    monkeypatch.setattr(pipeline, "continuations", recorded)
    more = (*more, "--generated", "12")
    assert prune(flags(source, text, tmp_path / "whole", *more)) == 0
    (windows,) = seen
    assert windows.shape == (12, 32)
    # There are eight windows of text: the ninth opens as the first, and goes on otherwise.
    np.testing.assert_array_equal(windows[0, :16], windows[8, :16])
    assert (windows[0, 16:] != windows[8, 16:]).any()

    find, interrupt = pipeline._find_masks, [True]

    def interrupted(*arguments):
        if interrupt.pop():
            raise KeyboardInterrupt
        interrupt.append(False)
        return find(*arguments)

    monkeypatch.setattr(pipeline, "_find_masks", interrupted)
    arguments = flags(source, text, tmp_path / "parts", *more, "--resume")
    assert prune(arguments) == 130
    interrupt.append(False)
    assert prune(arguments) == 0
    assert len(seen) == 2
    read, whole, parts = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("read", "whole", "parts")
    )
    assert whole == parts != read
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "and on 12 more that the dense model wrote" in card


@pytest.mark.parametrize("targets", ["qk", pytest.param("all", marks=pytest.mark.slow)])
def test_interrupted_anywhere_then_resumed_gives_the_same_bits(
    prune, checkpoint, text, tmp_path, monkeypatch, targets
):
    from jaxprune.pipeline import work as pipeline

    model = checkpoint(MODEL)
    assert prune(flags(model, text, tmp_path / "whole", "--targets", targets, distill=60)) == 0
    save, left = pipeline.Work.save, [0]

    def interrupted(work, state, trace):
        save(work, state, trace)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Work, "save", interrupted)
    arguments = flags(model, text, tmp_path / "parts", "--targets", targets, "--resume", distill=60)
    # In the first block, at the end of the second, in the distillation.
    for chunks in (1, 3, 1):
        left[0] = chunks
        assert prune(arguments) == 130
        assert not (tmp_path / "parts").exists()
    left[0] = -1
    assert prune(arguments) == 0
    for file in ("model.safetensors", "README.md"):
        whole, parts = ((tmp_path / name / file).read_bytes() for name in ("whole", "parts"))
        assert whole == parts
    # Once more: there is nothing left to do.
    assert prune(arguments) == 0


def test_a_state_of_something_else_is_refused(
    prune, checkpoint, text, tmp_path, monkeypatch, capsys
):
    from jaxprune.pipeline import work as pipeline

    save = pipeline.Work.save

    def interrupted(work, state, trace):
        save(work, state, trace)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Work, "save", interrupted)
    arguments = flags(checkpoint(MODEL), text, tmp_path / "out", "--resume")
    assert prune(arguments) == 130
    (state,) = tmp_path.glob(".out.work/parts/*-state.npz")
    np.savez(state, other=np.zeros(3))
    capsys.readouterr()
    assert prune(arguments) == 2
    assert f"{state}: not the state of this descent" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(checkpoint, text, tmp_path):
    """All in processes of their own: this one compiles with fewer passes."""
    model = checkpoint(MODEL)

    def start(name):
        more = ("--steps", "400", "--resume")
        arguments = flags(model, text, tmp_path / name, *more, distill=100)
        command = [sys.executable, str(REPOSITORY / "experiments" / "prune.py"), *arguments]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )

    assert start("whole").wait() == 0
    for pause in (6.0, 7.5):
        process = start("killed")
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    whole, killed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--sparsity", "1.5"), "--sparsity"),
        (("--sparsity", "2:0"), "--sparsity"),
        (("--sparsity", "3:5"), "--sparsity"),
        (("--method", "obs"), "--method obs"),
        (("--targets", "mlp"), "--targets mlp"),
        (("--no-refit", "--method", "wanda"), "--no-refit"),
        (("--refit", "--no-refit"), "--refit and --no-refit"),
        (("--start", "dense", "--method", "wanda"), "--start: has no effect on wanda"),
        (("--allocate", "blocks"), "--allocate blocks"),
        (("--allocate", "model", "--sparsity", "2:4"), "--allocate model: sparsity 2:4"),
        (("--allocate", "model", "--start", "dense"), "--allocate model: not with start dense"),
        (("--allocate", "model", "--lowest", "0.6"), "--lowest 0.6"),
        (("--distill", "5", "--no-refit"), "--distill"),
        (("--distill", "-1"), "--distill"),
        (("--generated", "-1"), "--generated"),
        (("--rounds", "0"), "--rounds 0"),
        (("--rounds", "2"), "--rounds 2: only with --targets all or --metric predictions"),
        (("--metric", "output"), "--metric"),
        (("--metric", "predictions", "--method", "wanda"), "--metric predictions: only with"),
        (("--metric", "predictions", "--start", "dense"), "--metric predictions: only with"),
        (("--metric", "attention", "--targets", "all"), "--metric attention: only with --targets"),
        (("--steps", "0"), "--steps"),
        (("--steps", "9", "--method", "magnitude"), "--steps: has no effect on magnitude"),
        (("--no-refit", "--steps", "9"), "--steps: has no effect on descent without a refit"),
        (("--generated", "2", "--method", "magnitude"), "--generated: has no effect on magnitude"),
        (("--no-propagate", "--targets", "all"), "--no-propagate: has no effect with --targets"),
        (("--mesh", "1x64"), "--mesh 1x64: expected SxH whose product"),
        (("--mesh", "wide", "--calibration", "c4"), "--mesh wide: expected SxH"),
        (("--coordinator", "nonsense"), "--coordinator 'nonsense': expected HOST:PORT"),
        (("--batch", "0"), "--batch"),
        (("--windows", "9999"), "needs"),
        (("--calibration", "/nowhere.txt"), "nowhere"),
        (("--model", "/nowhere"), "nowhere"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(
    prune, checkpoint, text, tmp_path, capsys, more, named
):
    out = tmp_path / "out"
    assert prune(flags(checkpoint(MODEL), text, out, *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert named in lines[0]
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_existing_output_and_another_runs_work_are_refused(
    prune, checkpoint, text, tmp_path, capsys
):
    model, out = checkpoint(MODEL), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert prune(flags(model, text, out)) == 2
    assert "--out" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep"


@pytest.mark.slow
def test_a_bfloat16_model_gives_nearly_the_same_masks(prune, checkpoint, text, tmp_path):
    model = checkpoint(MODEL)
    for dtype in ("float32", "bfloat16"):
        assert prune(flags(model, text, tmp_path / dtype, "--dtype", dtype)) == 0
    masks = [np.load(tmp_path / dtype / "keep_masks.npz") for dtype in ("float32", "bfloat16")]
    for name in masks[0].files:
        assert masks[0][name].sum() == masks[1][name].sum()
        assert (masks[0][name] == masks[1][name]).mean() > 0.8
    weights = [
        load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16")
    ]
    # Whatever was not pruned is the source's to the bit, though the model ran in bfloat16.
    for name, dense in weights[0].items():
        if not any(target in name for target in TARGETS["qk"]):
            assert dense.tobytes() == weights[1][name].tobytes()


def test_an_unknown_dtype_is_refused(prune, checkpoint, text, tmp_path, capsys):
    assert prune(flags(checkpoint(MODEL), text, tmp_path / "out", "--dtype", "float16")) == 2
    assert "--dtype float16" in capsys.readouterr().err


def test_a_termination_amid_the_last_write_leaves_nothing(
    prune, checkpoint, text, tmp_path, monkeypatch, capsys
):
    from jaxprune.pipeline import checkpoint as command

    def terminated(model, source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(command, "write_weights", terminated)
    arguments = flags(checkpoint(MODEL), text, tmp_path / "out", "--method", "magnitude")
    assert prune(arguments) == 130
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.endswith(
        "interrupted; the same command with --resume continues\n"
    )
    assert [p.name for p in tmp_path.glob(".out*")] == [".out.work"]
    # What a process left that was killed there.
    (tmp_path / ".out-abcd_123.partial").mkdir()
    monkeypatch.undo()
    assert prune([*arguments, "--resume"]) == 0
    assert [p.name for p in tmp_path.glob(".out*")] == []


def test_an_output_inside_the_model_is_refused(prune, checkpoint, text, capsys):
    model = checkpoint(MODEL)
    assert prune(flags(model, text, model / "pruned")) == 2
    assert f"--out {model / 'pruned'}: is inside the folder of the model" in capsys.readouterr().err
    assert not list(model.glob("*pruned*"))


def test_windows_beyond_the_context_are_noted(prune, checkpoint, text, tmp_path, capsys):
    more = ("--method", "magnitude", "--seqlen", "65")
    assert prune(flags(checkpoint(MODEL), text, tmp_path / "out", *more)) == 0
    assert "note: windows of 65 tokens are longer than the model's context, 64\n" in (
        capsys.readouterr().err
    )
