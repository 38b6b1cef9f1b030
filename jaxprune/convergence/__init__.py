"""Convergence: what the theorem assumes, where it held on a run, and what it promises.

For example::

  run = descend(Descent(..., monitor=per_step), w, data, key=key)
  print(report(run.trace).describe())
"""

from jaxprune.convergence.curvature import (
    Curvature,
    certified_lipschitz,
    curvature,
    hessian_product,
)
from jaxprune.convergence.report import Report, report
from jaxprune.convergence.step_sizes import (
    StepRule,
    backtracking,
    gradient_descent,
    record_curvature,
    scale_by_curvature,
)
from jaxprune.convergence.theorem import (
    StepRecord,
    StepSeries,
    iteration_bound,
    iterations_used,
    per_step,
    pl_envelope,
    step_series,
)

__all__ = [
    "Curvature",
    "Report",
    "StepRecord",
    "StepRule",
    "StepSeries",
    "backtracking",
    "certified_lipschitz",
    "curvature",
    "gradient_descent",
    "hessian_product",
    "iteration_bound",
    "iterations_used",
    "per_step",
    "pl_envelope",
    "record_curvature",
    "report",
    "scale_by_curvature",
    "step_series",
]
