"""One descent for every method: the loop, what a variable means, and the gradual preset."""

from jaxprune.descent.loop import (
    Candidate,
    Descent,
    DescentResult,
    DescentState,
    Objective,
    StepView,
    Trace,
    descend,
)

__all__ = [
    "Candidate",
    "Descent",
    "DescentResult",
    "DescentState",
    "Objective",
    "StepView",
    "Trace",
    "descend",
]
