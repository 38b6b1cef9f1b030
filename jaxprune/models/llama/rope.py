"""Rotary frequencies and their scalings, as Hugging Face's files name and compute them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxprune.errors import InputError
from jaxprune.models.llama.checks import check_flag, check_positive, check_size

_CONTEXT = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by a factor (``rope_type: linear``).

    Attributes:
      factor: what positions are divided by.

    Source: Chen et al. 2023, position interpolation.
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive("rope_scaling.factor", self.factor)

    def frequencies(self, periods: Float[np.ndarray, " f"], base: float) -> Float[np.ndarray, " f"]:
        """Scaled frequencies from ``1/θ_f``."""
        del base
        return np.float32(1) / periods / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Scaling introduced with Llama 3.1 (``rope_type: llama3``).

    With wavelength ``λ_f = 2π/θ_f`` and context ``c`` of pre-training: ``θ_f`` stays where
    ``λ_f < c/high_freq_factor``, becomes ``θ_f/factor`` where ``λ_f > c/low_freq_factor``, and in
    between ``(1−s) θ_f/factor + s θ_f`` with ``s = (c/λ_f − low) / (high − low)``.

    Attributes:
      factor: what the lowest frequencies are divided by.
      low_freq_factor: says which these are.
      high_freq_factor: says which frequencies stay.
      original_max_position_embeddings: context length ``c`` of pre-training.

    Source: ``transformers``, ``_compute_llama3_parameters``.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rope_scaling.{field}", getattr(self, field))
        check_size(f"rope_scaling.{_CONTEXT}", self.original_max_position_embeddings, 2**31)
        if high <= low:
            raise InputError(
                f"rope_scaling.high_freq_factor {high} must be larger than low_freq_factor {low}"
            )

    def frequencies(self, periods: Float[np.ndarray, " f"], base: float) -> Float[np.ndarray, " f"]:
        """Scaled frequencies from ``1/θ_f``."""
        del base
        theta = np.float32(1) / periods
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        context = np.float32(self.original_max_position_embeddings)
        factor = np.float32(self.factor)
        wavelength = np.float32(2 * math.pi) / theta
        share = (context / wavelength - low) / (high - low)
        between = (np.float32(1) - share) * theta / factor + share * theta
        return np.where(
            wavelength > context / low,
            theta / factor,
            np.where(wavelength < context / high, theta, between),
        )


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (``rope_type: yarn``): low frequencies are interpolated, queries and keys lengthened.

    ``θ_f`` becomes ``s_f θ_f/factor + (1−s_f) θ_f``; ``s_f`` rises from 0 to 1, in steps of equal
    size, from the frequency that turns ``beta_fast`` times in the context of pre-training to the
    one that turns ``beta_slow`` times.

    Attributes:
      factor: what the lowest frequencies are divided by. It is taken as it stands, as newer
        versions of ``transformers`` do, also where it is not the ratio of the context lengths.
      original_max_position_embeddings: context length of pre-training.
      attention_factor: rotated queries and keys are multiplied by it, logits by its square.
      beta_fast: turns of the highest frequency that changes.
      beta_slow: turns of the first frequency that is wholly interpolated.
      truncate: the two frequencies are rounded outwards to whole ones.

    Source: Peng et al. 2023; ``transformers``, ``_compute_yarn_parameters``.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            check_positive(f"rope_scaling.{field}", getattr(self, field))
        check_size(f"rope_scaling.{_CONTEXT}", self.original_max_position_embeddings, 2**31)
        check_flag("rope_scaling.truncate", self.truncate)

    def frequencies(self, periods: Float[np.ndarray, " f"], base: float) -> Float[np.ndarray, " f"]:
        """Scaled frequencies from ``1/θ_f``."""
        width = 2 * periods.size

        def component(turns: float) -> float:
            ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(base))

        low, high = component(self.beta_fast), component(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        steps = np.arange(periods.size, dtype=np.float32) - np.float32(low)
        kept = np.float32(1) - np.clip(steps / np.float32(high - low), 0, 1)
        slower = np.float32(1) / (np.float32(self.factor) * periods)
        return slower * (np.float32(1) - kept) + np.float32(1) / periods * kept


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
SCALINGS: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None
) -> Float[np.ndarray, " half"]:
    """Rotary frequencies ``θ_f = base^(−2f/k)`` in radians per position, scaling applied.

    Returns:
      float32, computed in float32 in the order of Hugging Face's code: another rounding of
      ``θ_f`` would turn distant tokens by visibly other angles.

    Raises:
      InputError: float32 does not hold them.

    Source: Su et al. 2021.
    """
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    with np.errstate(all="ignore"):
        periods = np.power(np.float32(base), exponents)
        result = np.float32(1) / periods if scaling is None else scaling.frequencies(periods, base)
    if not np.isfinite(result).all():
        raise InputError(
            f"rope_theta {base:g} and rope_scaling give frequencies beyond float32; correct them"
        )
    return result


def read_rope(content: Mapping[str, Any], base: float) -> tuple[Any, RopeScaling | None]:
    """Base (unchecked) and scaling of the rotary embedding, from the content of a config.json.

    Where a file has both ``rope_scaling`` and ``rope_parameters`` the older one wins, as in
    ``transformers``.

    Args:
      content: of config.json.
      base: where the file names none.

    Raises:
      InputError: a field is missing, wrong, or asks for what this port does not compute.
    """
    field = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = content.get(field) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"config.json: {field} must be an object, not {rope!r:.60}")
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise InputError(
            f"config.json: {field}.{nested[0]:.40} is not supported; positions must be the same "
            "in all layers that have them"
        )
    theta = rope.get("rope_theta", content.get("rope_theta", base))
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise InputError(
            f"config.json: {field}.partial_rotary_factor {factor!r:.40} is not supported, only 1.0"
        )
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise InputError(
            f"config.json: {field}.rope_type {kind!r:.40} is not supported, "
            f"only 'default', {', '.join(map(repr, SCALINGS))}"
        )
    return theta, _read_scaling(kind, field, rope, content)


def _read_scaling(
    kind: str, field: str, rope: Mapping[str, Any], content: Mapping[str, Any]
) -> RopeScaling:
    names = [f.name for f in dataclasses.fields(SCALINGS[kind])]
    result = {name: rope[name] for name in names if name in rope}
    if _CONTEXT in names:
        result.setdefault(_CONTEXT, content.get("max_position_embeddings"))
        if content.get(_CONTEXT, result[_CONTEXT]) != result[_CONTEXT]:
            raise InputError(
                f"config.json: {_CONTEXT} {content[_CONTEXT]!r:.40} contradicts {field}.{_CONTEXT} "
                f"{result[_CONTEXT]!r:.40}; leave one of them out"
            )
    if kind == "yarn" and "factor" in result:
        result |= _yarn_defaults(rope)
    missing = [name for name in names if result.get(name) is None]
    if missing:
        raise InputError(f"config.json: {field} lacks {', '.join(missing)}")
    for name, value in result.items():
        if name == _CONTEXT:
            check_size(f"rope_scaling.{name}", value, 2**31)
        elif name == "truncate":
            check_flag(f"rope_scaling.{name}", value)
        else:
            result[name] = _number(name, value)
    return SCALINGS[kind](**result)


def _number(name: str, value: Any) -> float:
    check_positive(f"rope_scaling.{name}", value)
    return float(value)


def _yarn_defaults(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of yarn that a file may leave out; the paper's attention factor if it does."""
    attention = rope.get("attention_factor")
    if attention is None:
        growth = 0.1 * math.log(max(_number("factor", rope["factor"]), 1.0))
        attention = 1 + growth
        scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
        if all(scales):
            up, down = (_number("mscale", scale) for scale in scales)
            attention = (1 + up * growth) / (1 + down * growth)
    return {
        "attention_factor": attention,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "truncate": rope.get("truncate", True),
    }


def write_rope(scaling: RopeScaling) -> dict[str, Any]:
    """A scaling as ``rope_scaling`` of config.json has it."""
    (kind,) = [name for name, form in SCALINGS.items() if form is type(scaling)]
    return {"rope_type": kind, **dataclasses.asdict(scaling)}
