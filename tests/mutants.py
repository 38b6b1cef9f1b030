"""Mutation testing: each of these changes to the source must make a fast test fail.

Run by ``make mutants``. Every mutant is one textual change to a copy of the package; the tests of
the changed file run against the copy. A mutant that survives names something no test looks at.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

REPOSITORY = Path(__file__).parent.parent
TESTS = {
    "objective.py": ["tests/test_objective.py"],
    "attention.py": [
        *("tests/test_attention.py", "tests/test_objective.py"),
        "tests/test_decompositions.py",
    ],
    "sparsity.py": ["tests/test_sparsity.py"],
    "importance.py": ["tests/test_importance.py", "tests/baselines"],
    "allocation.py": ["tests/test_allocation.py"],
    "gauss_newton/moments.py": ["tests/gauss_newton/test_moments.py"],
    "gauss_newton/residuals.py": ["tests/gauss_newton/test_moments.py"],
    "gauss_newton/admm.py": ["tests/gauss_newton/test_kronecker_admm.py"],
    "descent/gradual.py": ["tests/descent/test_gradual.py"],
    "pipeline/block.py": ["tests/pipeline/test_block.py"],
    "pipeline/closed_form.py": [
        *("tests/pipeline/test_closed_form.py", "tests/pipeline/test_metric.py"),
    ],
    "pipeline/model.py": [
        *("tests/pipeline/test_generated.py", "tests/pipeline/test_rounds.py"),
        "tests/pipeline/test_metric.py",
    ],
    "pipeline/distillation.py": ["tests/pipeline/test_distillation.py"],
    "pipeline/query_key.py": ["tests/pipeline/test_generated.py"],
    "pipeline/checkpoint.py": ["tests/commands/test_prune.py"],
    "commands/heads.py": ["tests/commands/test_heads_command.py"],
    "text/windows.py": ["tests/text/test_text.py"],
    "runs/folder.py": ["tests/runs/test_runs.py"],
    "models/llama/sampling.py": ["tests/models/test_sampling.py"],
    "baselines/magnitude.py": ["tests/baselines/test_magnitude.py", "tests/baselines"],
    "baselines/wanda.py": ["tests/baselines/test_wanda.py", "tests/baselines"],
    "baselines/sparsegpt.py": ["tests/baselines/test_sparsegpt.py", "tests/baselines"],
    "evaluation/comparison.py": ["tests/evaluation/test_comparison.py"],
    "evaluation/synthetic.py": ["tests/evaluation/test_random_heads.py"],
    "methods/fused.py": ["tests/evaluation/test_comparison.py", "tests/methods/test_fused.py"],
    "runs/background.py": ["tests/runs/test_background.py"],
}


class Mutant(NamedTuple):
    """One change: file below ``jaxprune``, what is there (once), what is there instead."""

    file: str
    old: str
    new: str


MUTANTS = [
    # The objective and its gradients.
    Mutant(
        "objective.py", "half_errors = 0.5 * jnp.sum(difference", "half_errors = jnp.sum(difference"
    ),
    Mutant("objective.py", "f * (c - jnp.sum(f * c,", "f * (c + jnp.sum(f * c,"),
    Mutant("objective.py", "f * (c - jnp.sum(f * c, axis=-1, keepdims=True))", "f * c"),
    Mutant(
        "objective.py", "error + 0.5 * lam * jnp.sum(mask**2)", "error + lam * jnp.sum(mask**2)"
    ),
    Mutant("objective.py", "0.5 * lam * jnp.sum(mask**2)", "0.5 * lam * jnp.sum(jnp.abs(mask))"),
    Mutant("objective.py", "axis=0) + lam * mask", "axis=0)"),
    Mutant("objective.py", "return jnp.mean(errors)", "return jnp.sum(errors)"),
    Mutant("objective.py", "dq0 = -rated * contract", "dq0 = rated * contract"),
    Mutant("objective.py", "(-rated * q0)", "(rated * q0)"),
    Mutant("objective.py", "dq = rated * contract", "dq = contract"),
    Mutant("objective.py", "(rated * q).astype", "q.astype"),
    Mutant("objective.py", "keys = stop if causal else n", "keys = stop"),
    Mutant(
        "objective.py", "causal_bias(rows, k.shape[0], weights.dtype) if causal", "None if causal"
    ),
    Mutant(
        "objective.py", "dk = dk.at[:, :keys].add(group.k)", "dk = dk.at[:, :keys].set(group.k)"
    ),
    Mutant("objective.py", "return jnp.sum(weights * half_errors)", "return jnp.sum(half_errors)"),
    Mutant("objective.py", "(g * cotangent.reshape", "(g * 1 + 0 * cotangent.reshape"),
    Mutant(
        "objective.py",
        "fused_error(mask * w, x, queries0, causal=causal,",
        "fused_error(mask * w, x, queries0, causal=True,",
    ),
    Mutant(
        "objective.py",
        "attention_matrix(x, mask * w, causal=causal)",
        "attention_matrix(x, mask * w)",
    ),
    Mutant("objective.py", "difference += contract(", "difference -= contract("),
    Mutant("attention.py", "jnp.arange(keys) <= rows", "jnp.arange(keys) < rows + 2"),
    Mutant(
        "attention.py", "return weights / weights.sum(axis=-1, keepdims=True)", "return weights"
    ),
    Mutant("attention.py", "lower=lower, transpose_a=transpose", "lower=lower"),
    Mutant("attention.py", "return error.sum() / energy.sum()", "return (error / energy).mean()"),
    # Rounding.
    Mutant("sparsity.py", "keys < candidate", "keys <= candidate"),
    Mutant("sparsity.py", "dtype=jnp.int32) <= missing", "dtype=jnp.int32) < missing"),
    Mutant("sparsity.py", "float(self.ratio) + 1e-9 * size", "float(self.ratio)"),
    Mutant("sparsity.py", "return math.floor(", "return math.ceil("),
    Mutant("sparsity.py", "* (self.m - self.n)", "* self.n"),
    Mutant("sparsity.py", "jnp.where(bits & sign, ~bits, bits | sign)", "bits | sign"),
    Mutant("sparsity.py", "jnp.where(upcast == 0, jnp.zeros_like(upcast), upcast)", "upcast"),
    Mutant(
        "sparsity.py",
        "(scores.T, _drop(sparsity, d_in, fraction)).T",
        "(scores, _drop(sparsity, d_out, fraction))",
    ),
    # Scores and updates of the baselines.
    Mutant("baselines/magnitude.py", "prune_by_score(jnp.abs(w),", "prune_by_score(w,"),
    Mutant("baselines/magnitude.py", 'group: Group = "matrix"', 'group: Group = "output"'),
    Mutant("baselines/wanda.py", "* norms[:, None]", "* norms[:, None] ** 2"),
    Mutant(
        "baselines/wanda.py",
        "jnp.abs(w.astype(accumulation_dtype(w)))",
        "w.astype(accumulation_dtype(w))",
    ),
    Mutant("importance.py", "per_sequence.mean(axis=0)", "per_sequence.max(axis=0)"),
    Mutant("baselines/sparsegpt.py", "(rows / diagonal) ** 2", "(rows * diagonal) ** 2"),
    Mutant("baselines/sparsegpt.py", "(value - pruned) / u[i, i]", "(value - pruned)"),
    Mutant(
        "baselines/sparsegpt.py", "rows - u[i][:, None] * error", "rows + u[i][:, None] * error"
    ),
    Mutant(
        "baselines/sparsegpt.py", 'weight - contract("bj,bo->jo"', 'weight + contract("bj,bo->jo"'
    ),
    Mutant("baselines/sparsegpt.py", "/ upcast.shape[0]", "/ 1"),
    Mutant("baselines/sparsegpt.py", "jnp.maximum(state.damping, 1e-3) * 10", "state.damping"),
    Mutant("baselines/sparsegpt.py", "jnp.where(dead[:, None], 0, weight)", "weight"),
    # Curvature, its solver, the budget.
    Mutant(
        "gauss_newton/moments.py", "if form.weighted else rows", "if not form.weighted else rows"
    ),
    Mutant("gauss_newton/moments.py", "omega[:, None] * x, x)", "x, x)"),
    Mutant("gauss_newton/moments.py", "rows[:, None, None] * blocks, blocks)", "blocks, blocks)"),
    Mutant("gauss_newton/moments.py", "sums.outputs / count", "sums.outputs"),
    Mutant("gauss_newton/moments.py", "(1 - 2 * bits", "(2 - 2 * bits"),
    Mutant("gauss_newton/moments.py", "jax.random.fold_in(key, index)", "key"),
    Mutant("gauss_newton/residuals.py", "** (-0.5 * self.balance)", "** (0.5 * self.balance)"),
    Mutant("gauss_newton/residuals.py", "self.heads) * self.scale", "self.heads)"),
    Mutant(
        "gauss_newton/admm.py", "state.dual + rho * (x - sparse)", "state.dual - rho * (x - sparse)"
    ),
    Mutant("gauss_newton/admm.py", "/ (eigenvalues + rho)", "/ (eigenvalues + 1)"),
    Mutant("gauss_newton/admm.py", "candidate = x + state.dual / rho", "candidate = x"),
    Mutant(
        "gauss_newton/admm.py", "return 0.5 * jnp.sum((x - target)", "return jnp.sum((x - target)"
    ),
    Mutant("gauss_newton/admm.py", "refined / jnp.where(seen, scale, 1)", "refined"),
    Mutant("gauss_newton/admm.py", "jnp.where(live, w.astype(kind), 0)", "w.astype(kind)"),
    Mutant(
        "gauss_newton/admm.py",
        "adapted = refined_loss < masked_loss",
        "adapted = refined_loss > masked_loss",
    ),
    Mutant(
        "gauss_newton/admm.py",
        "residual = jnp.where(kept, product(target - first), 0)",
        "residual = product(target - first)",
    ),
    Mutant("gauss_newton/admm.py", "loss * unit * unit", "loss"),
    Mutant("gauss_newton/admm.py", "rescaled, weight) * weight_unit", "rescaled, weight)"),
    Mutant(
        "gauss_newton/residuals.py",
        "jnp.arange(start, stop), stop)",
        "jnp.arange(stop - start), stop)",
    ),
    Mutant("allocation.py", "missing = drop - int(here.sum())", "missing = 0"),
    Mutant("allocation.py", "np.clip(below, least[:, None], most[:, None])", "below"),
    # What the maps that write to the stream take back.
    Mutant("gauss_newton/admm.py", "inverse * cross.astype", "cross.astype"),
    Mutant("gauss_newton/admm.py", ") / (1 + a.damping)\n\n\ndef kron", ")\n\n\ndef kron"),
    Mutant("pipeline/closed_form.py", "error = target[1] - after", "error = after - target[1]"),
    Mutant("pipeline/closed_form.py", "target[0] - hidden + contract(", "contract("),
    Mutant("pipeline/closed_form.py", "settings.correction * ridge", "ridge"),
    Mutant("pipeline/closed_form.py", "redamped(factor, ridge)", "factor"),
    # What validates a descent.
    Mutant("descent/gradual.py", "if b >= _SEQUENCES", "if b > _SEQUENCES"),
    Mutant("descent/gradual.py", "errors[..., i::pieces]", "errors[..., 0::pieces]"),
    Mutant("descent/gradual.py", "else pieces * jnp.stack", "else jnp.stack"),
    Mutant("descent/gradual.py", "% every == every - 1", "% every == 0"),
    Mutant("pipeline/distillation.py", "_VALIDATING = 8", "_VALIDATING = 1"),
    Mutant("pipeline/distillation.py", "jax.random.fold_in(key, i)", "key"),
    Mutant("pipeline/block.py", "(1 - share) * own", "share * own"),
    Mutant("pipeline/closed_form.py", "return share * mean", "return mean"),
    Mutant("pipeline/closed_form.py", '"qk": 40}', '"qk": 15}'),
    # Text that a model writes.
    Mutant("pipeline/model.py", "min(read, settings.generated - read)", "settings.generated"),
    Mutant("pipeline/model.py", "or settings.generated < read", "or False"),
    Mutant("pipeline/model.py", "for_masks if for_masks < windows else 0", "0"),
    Mutant("pipeline/model.py", "streams.part(found_on)", "streams"),
    Mutant("pipeline/model.py", "streams._replace(pruned=streams.dense)", "streams"),
    Mutant("pipeline/model.py", "min(for_masks, settings.curv", "min(99, settings.curv"),
    Mutant("pipeline/model.py", "mean + (value - mean) / count", "value"),
    Mutant("pipeline/model.py", "jax.random.fold_in(key, number - 1)", "key"),
    Mutant("pipeline/model.py", "        model.blocks.set_value(dense)\n", ""),
    Mutant("pipeline/query_key.py", "moment_sequences=len(x)", "moment_sequences=2"),
    Mutant("models/llama/sampling.py", "<= position, logits", "< position + 9, logits"),
    Mutant("models/llama/sampling.py", "(layer, 0, 0, position, 0)", "(layer, 0, 0, 0, 0)"),
    Mutant("models/llama/sampling.py", "position[None]", "0 * position[None]"),
    Mutant("models/llama/sampling.py", "position + 1 < given", "position < given"),
    Mutant("models/llama/sampling.py", "partial(at, stop)", "partial(at, stop - 1)"),
    Mutant("models/llama/sampling.py", "% len(prompts)", "% 2"),
    # What a run keeps, counts and reads.
    Mutant("runs/folder.py", 'and not any(self._parts.glob("*.json"))', ""),
    Mutant("runs/folder.py", "if difference is not None:", "if False:"),
    Mutant(
        "pipeline/checkpoint.py",
        "sizes = {name: math.prod(getattr(shapes, name)) for name in achieved}",
        "sizes = dict.fromkeys(achieved, 1)",
    ),
    Mutant(
        "commands/heads.py",
        'return int(first.stem.rpartition("-")[2])',
        "break",
    ),
    Mutant("text/windows.py", "Path(source).samefile(calibration)", "source == calibration"),
    Mutant("pipeline/model.py", "streams._replace(pruned=streams.dense)", "streams"),
    Mutant("baselines/sparsegpt.py", "max(block // sparsity.m, 1) * sparsity.m", "block"),
    Mutant("allocation.py", "for bound in (lowest, highest)", "for bound in (0.0, highest)"),
    # The comparison of methods on heads: what is chosen, judged on what, compiled how often.
    Mutant("evaluation/comparison.py", "errors[i], rates[i]", "errors[i], rates[0]"),
    Mutant("evaluation/comparison.py", "i = jnp.argmin(errors)", "i = jnp.argmax(errors)"),
    Mutant(
        "evaluation/comparison.py", "tuple(a[:, i] for a in found)", "tuple(a[:, 0] for a in found)"
    ),
    Mutant("evaluation/comparison.py", "_errors(problems.x_heldout,", "_errors(problems.x,"),
    Mutant("evaluation/comparison.py", "if baseline.moment is None or", "if True or"),
    Mutant(
        "evaluation/synthetic.py", "numbers[: math.prod(shape)]", "numbers[-math.prod(shape) :]"
    ),
    Mutant("methods/fused.py", "jnp.where(jnp.isfinite(damping), s[0], r)", "s[0]"),
    Mutant(
        "methods/fused.py",
        "damping, errors = found.damping, found.errors",
        "damping, errors = 0.01 + 0 * found.damping, found.errors",
    ),
    Mutant("runs/background.py", "cancel_futures=True", "cancel_futures=False"),
]


def outcome(mutant: Mutant | None, tests: list[str]) -> int:
    """Exit status of pytest on a copy of the package with the change, if any."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("jaxprune", "experiments", "tools", "tests"):
            shutil.copytree(
                REPOSITORY / part, copy / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(REPOSITORY / "pyproject.toml", copy)
        if mutant is not None:
            file = copy / "jaxprune" / mutant.file
            source = file.read_text()
            assert source.count(mutant.old) == 1, mutant
            file.write_text(source.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
        ]
        return subprocess.run(
            [*command, "-n", "0", *dict.fromkeys(tests)],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode


def main() -> int:
    """Run all mutants; 1 if any survived or could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at once")
    parser.add_argument("--only", default="", help="files whose name holds this")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.file]
    with ThreadPoolExecutor(options.jobs) as pool:
        files = sorted({mutant.file for mutant in chosen})
        clean = list(pool.map(partial(outcome, None), [TESTS[file] for file in files]))
        if any(clean):
            print(f"tests fail without any mutant: {files[clean.index(max(clean))]}")
            return 1
        tests = [TESTS[mutant.file] for mutant in chosen]
        found = list(tqdm(pool.map(outcome, chosen, tests), total=len(chosen), unit="mutant"))
    # 1: a test failed. Anything else is no verdict: 2 and above, pytest itself could not run.
    missed = [(mutant, status) for mutant, status in zip(chosen, found, strict=True) if status != 1]
    for mutant, status in missed:
        print(f"{'survived' if status == 0 else f'status {status}'}: {mutant}")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
