"""Settings of a run as flat names and values: written to its folder, and compared when it goes on.

A configuration is a dataclass; fields that are a ``Group`` are not settings themselves, their own
fields are. Names are those of the flags, so a name is used once in a configuration.
"""

from __future__ import annotations

import dataclasses
import json
import os.path
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_type_hints

Config = TypeVar("Config")

# Where a run is, whether it goes on and how its work is spread: nothing that changes its numbers.
_NOT_SETTINGS = (
    *("out", "resume", "repeat", "mesh", "keep", "save"),
    *("coordinator", "coordinator_timeout", "processes", "process"),
)


class Group:
    """Base of dataclasses whose fields are settings of the configuration they are part of."""


def flat(config: Any) -> dict[str, Any]:
    """All values of a configuration by name, those of its groups included."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if isinstance(value, Group) else {field.name: value}
    return values


def defaults(config_type: type) -> dict[str, Any]:
    """Default values by name; what has none is left out."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if isinstance(value, Group):
            values |= flat(value)
        elif value is not dataclasses.MISSING:
            values[field.name] = value
        elif (group := _group_type(config_type, field.name)) is not None:
            values |= defaults(group)
    return values


def names(config_type: type) -> list[str]:
    """Names of all settings."""
    found: list[str] = []
    for field in dataclasses.fields(config_type):
        group = _group_type(config_type, field.name)
        found += [field.name] if group is None else names(group)
    return found


def _group_type(config_type: type, name: str) -> type | None:
    hint = get_type_hints(config_type)[name]
    return hint if isinstance(hint, type) and issubclass(hint, Group) else None


def replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values, by name."""
    new: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, Group):
            new[field.name] = replaced(value, changes)
        elif field.name in changes:
            new[field.name] = changes[field.name]
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


def configuration(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, without where it is and whether it goes on."""
    nested = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if isinstance(getattr(config, field.name), Group):
            nested |= nested.pop(field.name)
    return {name: _plain(value) for name, value in nested.items() if name not in _NOT_SETTINGS}


def differing(recorded: Mapping[str, Any], config: Any) -> str | None:
    """The first setting in which a recorded configuration is not this one, ``None`` without any.

    Numbers and paths count as equal however they are written. A setting that the record lacks, as
    it is older, is expected to be what it was then: the entry of ``config.earlier`` or the default.
    A class attribute ``free`` names settings in which they may differ, such as which of many parts,
    each the same whatever the others are, a run has.
    """
    here, recorded = configuration(config), _modernised(config, recorded)
    expected = {name: _plain(value) for name, value in defaults(type(config)).items()}
    expected |= {name: _plain(value) for name, value in _earlier(config).items()}
    for name in sorted((recorded.keys() | here.keys()) - set(getattr(config, "free", ()))):
        if name not in here or not _same(recorded.get(name, expected.get(name)), here[name]):
            return name
    return None


def as_recorded(config: Config, recorded: Mapping[str, Any]) -> Config:
    """The configuration for going on with a run of an earlier version.

    A class attribute ``earlier`` maps names to the values that they had by default in version 0.1,
    of new ones to the value that means what was done then. Where a setting stands at its present
    default, and the record lacks it or has the earlier one, the earlier one is taken.
    """
    standing, here = defaults(type(config)), flat(config)
    recorded = _modernised(config, recorded)
    changes = {
        name: value
        for name, value in _earlier(config).items()
        if name in here
        and _same(_plain(here[name]), _plain(standing.get(name)))
        and (name not in recorded or _same(recorded[name], _plain(value)))
    }
    return replaced(config, changes)


def completed(recorded: Mapping[str, Any], config_type: type) -> dict[str, Any]:
    """A recorded configuration with what it lacks, as it is older; see ``as_recorded``."""
    return {name: _plain(value) for name, value in _earlier(config_type).items()} | _modernised(
        config_type, recorded
    )


def _modernised(config: Any, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The record in the settings of this version, where ``config.modernised`` says how."""
    return cast(dict[str, Any], getattr(config, "modernised", dict)(recorded))


def _earlier(config: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], getattr(config, "earlier", {}))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _same(one: Any, other: Any) -> bool:
    """Whether two plain values mean the same: ``.5`` is ``0.5``, and ``model/`` is ``model``."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if not isinstance(one, str) or not isinstance(other, str) or one == other:
        return bool(one == other)
    try:
        return float(one) == float(other)
    except ValueError:
        return bool(one and other) and os.path.normpath(one) == os.path.normpath(other)
