"""What a number in config.json may be; errors name the field."""

from __future__ import annotations

from typing import Any

from jaxprune.errors import InputError


def check_size(field: str, value: Any, largest: int) -> None:
    """Raise ``InputError`` unless ``value`` is a whole number from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(f"{field} must be a whole number from 1 to {largest}, not {value!r:.40}")


def check_positive(field: str, value: Any) -> None:
    """Raise ``InputError`` unless ``value`` is a positive number that float32 holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1e-30 < value < 1e30:
        raise InputError(f"{field} must be a positive number, not {value!r:.40}")


def check_flag(field: str, value: Any) -> None:
    """Raise ``InputError`` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{field} must be true or false, not {value!r:.40}")
