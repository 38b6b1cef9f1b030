"""What to prune and how: the settings of a run, and the names that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxprune.baselines import BASELINES
from jaxprune.errors import InputError, shown
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import INPUT_OF
from jaxprune.sparsity import Sparsity

METHODS = (*BASELINES, "gauss-newton", "descent")
TARGETS = {"qk": ("wq", "wk"), "all": tuple(INPUT_OF)}
STARTS = ("gauss-newton", "dense")
METRICS = ("attention", "predictions")
ALLOCATIONS = ("matrix", "block", "model")


class CurvatureSettings(NamedTuple):
    """How the curvature of the predictions is taken.

    On four blocks of SmolLM2-135M at half the weights 48 windows of 512 tokens gave 9 % less
    divergence than 16, in three times the time. Blocks of 512 outputs were as good as blocks of
    768; decompositions of whole factors of 1536 would take most of the time.

    Attributes:
      windows: of calibration that it is taken from, at most.
      outputs: greatest width of a block of its factor ``B``: wider maps have several on the
        diagonal, with 1 it is a diagonal.
    """

    windows: int = 32
    outputs: int = 768


@dataclass(frozen=True)
class PruneSettings:
    """What to prune and how.

    Attributes:
      method: one of ``METHODS``.
      targets: ``qk`` for ``W_Q`` and ``W_K``, ``all`` for the seven linear maps of every block.
      sparsity: of every pruned matrix.
      refit: kept weights adapt on the error of the block; if ``None``, with ``descent`` alone.
        ``descent`` without it keeps their values (``qk``).
      start: what ``descent`` goes on from: the closed form of ``gauss-newton``, whose masks it
        keeps, or the ``dense`` weights under a mask that tightens.
      metric: whose curvature the closed form is on: that of ``attention`` matrices, for ``qk``
        alone, or of the model's ``predictions``; if ``None``, the first with ``qk``.
      allocate: matrices lose ``sparsity`` each (``matrix``), or all of a block together
        (``block``), or all of the model (``model``), where they are felt least.
      lowest: least ratio of a matrix under ``allocate``.
      highest: greatest ratio of a matrix.
      rounds: of the closed form on predictions: each but the last prunes the dense model so that
        their curvature is taken of what it leaves too.
      propagate: calibrate on the model as pruned so far; else, for ``qk`` alone, every block on
        the dense model's activations.
      steps: of a descent; the preset's if ``None``.
      distill: steps of the distillation at the end, of all kept weights; if ``None``, the
        preset's after ``descent`` in models of up to 100 million parameters, else none.
      generated: windows to calibrate on that the dense model writes, besides those given. Where
        there are at least as many, kept weights adapt on windows that no mask was found on.
      curvature: of the predictions, where it is needed.
      correction: share of the residual stream's error so far that ``all`` takes back in every
        block: in the closed form by ``W_O`` and ``W_down``, in a refit by all maps.
      batch: windows at once in forward passes.
      seed: of random batches, random cotangents and generated windows.
      tuning: further changes to the settings of a descent.
    """

    method: str
    targets: str
    sparsity: Sparsity
    refit: bool | None = None
    start: str = "gauss-newton"
    metric: str | None = None
    allocate: str = "matrix"
    lowest: float = 0.0
    highest: float = 0.95
    rounds: int = 1
    propagate: bool = True
    steps: int | None = None
    distill: int | None = None
    generated: int = 0
    curvature: CurvatureSettings = field(default=CurvatureSettings())
    correction: float = 0.6
    batch: int = 8
    seed: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The pruned matrices of a block, fields of ``BlockWeights``."""
        return TARGETS[self.targets]

    @property
    def refits(self) -> bool:
        """Whether kept weights adapt block by block."""
        return self.method == "descent" if self.refit is None else self.refit

    @property
    def gradual(self) -> bool:
        """Whether a descent finds the mask itself, from the dense weights."""
        return self.method == "descent" and self.start == "dense"

    @property
    def needs_curvature(self) -> bool:
        """Whether the curvature of the predictions is taken before anything is pruned."""
        return self.on_predictions or self.allocate != "matrix"

    @property
    def needs_dense_stream(self) -> bool:
        """Whether what is done to a block depends on the dense model's activations there."""
        corrects = self.on_predictions and self.targets == "all" and self.correction > 0
        return self.refits or self.gradual or not self.propagate or corrects

    @property
    def closed_form(self) -> bool:
        """Whether the closed form finds the masks."""
        return self.first == "gauss-newton" and not self.gradual

    @property
    def on_predictions(self) -> bool:
        """Whether it does on the curvature of the predictions."""
        return self.closed_form and (self.targets == "all" or self.metric == "predictions")

    @property
    def first(self) -> str:
        """What finds the masks before kept weights adapt."""
        return "gauss-newton" if self.method == "descent" else self.method

    def check_names(self) -> None:
        """Raise ``InputError``, naming the setting, for choices that work with no model."""
        if self.method not in METHODS:
            raise InputError(f"method {shown(self.method)}: expected one of {', '.join(METHODS)}")
        if self.targets not in TARGETS:
            raise InputError(f"targets {shown(self.targets)}: expected one of {', '.join(TARGETS)}")
        if self.start not in STARTS:
            raise InputError(f"start {shown(self.start)}: expected one of {', '.join(STARTS)}")
        if not 0 <= self.lowest <= self.highest <= 1:
            raise InputError(
                f"lowest {self.lowest:g}, highest {self.highest:g}: expected "
                "0 <= lowest <= highest <= 1"
            )
        if not self.propagate and self.targets != "qk":
            raise InputError("propagate=False: only with targets=qk")
        self._check_metric()
        self._check_allocation()
        if self.rounds < 1:
            raise InputError(f"rounds {self.rounds}: expected 1 or more")
        if self.rounds > 1 and not self.on_predictions:
            raise InputError(
                f"rounds {self.rounds}: only with targets=all or metric=predictions, and "
                "method=gauss-newton or descent that starts from it; use 1"
            )
        if self.refit is False and (self.method, self.targets) != ("descent", "qk"):
            raise InputError("refit=False: only with method=descent and targets=qk")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps {self.steps}: expected 1 or more")
        if self.distill is not None and self.distill < 0:
            raise InputError(f"distill {self.distill}: expected 0 or more steps")
        if self.generated < 0:
            raise InputError(f"generated {self.generated}: expected 0 or more windows")
        if self.distill and self.refit is False:
            raise InputError("distill: not with refit=False, which keeps the weights' values")
        if min(self.curvature) < 1:
            raise InputError(f"curvature {tuple(self.curvature)}: expected 1 or more of both")
        if not 0 <= self.correction <= 1:
            raise InputError(f"correction {self.correction:g}: expected a share between 0 and 1")
        if self.batch < 1:
            raise InputError(f"batch {self.batch}: expected 1 or more")

    def check(self, config: LlamaConfig) -> None:
        """``check_names``, and that N:M groups divide the matrices of a model."""
        self.check_names()
        widths = {config.hidden_size}
        if self.targets == "all":
            widths |= {config.num_attention_heads * config.head_dim, config.intermediate_size}
        for width in sorted(widths):
            self.sparsity.check_divides(width)

    def _check_metric(self) -> None:
        if self.metric is None:
            return
        if self.metric not in METRICS:
            raise InputError(f"metric {shown(self.metric)}: expected {' or '.join(METRICS)}")
        if not self.closed_form:
            raise InputError(
                f"metric {self.metric}: only with method=gauss-newton, or descent that starts "
                "from it; leave it out"
            )
        if self.metric == "attention" and self.targets != "qk":
            raise InputError("metric attention: only with targets=qk; leave it out")

    def _check_allocation(self) -> None:
        if self.allocate not in ALLOCATIONS:
            raise InputError(
                f"allocate {shown(self.allocate)}: expected one of {', '.join(ALLOCATIONS)}"
            )
        if self.allocate == "matrix":
            return
        if self.sparsity.m is not None:
            raise InputError(
                f"allocate {self.allocate}: sparsity {self.sparsity} leaves every matrix the same; "
                "use matrix"
            )
        if self.gradual:
            raise InputError(f"allocate {self.allocate}: not with start dense; use gauss-newton")
        if not self.lowest <= float(self.sparsity.ratio) <= self.highest:
            raise InputError(
                f"lowest {self.lowest:g}, highest {self.highest:g}: expected 0 <= lowest <= "
                f"sparsity {self.sparsity} <= highest <= 1"
            )
