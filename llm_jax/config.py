"""Frozen dataclasses as configs: to and from plain JSON values, with types checked and near misses named."""

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be built: an unknown field or a value of the wrong type.

    Attributes:
      exit_code: exit status of a binary that ends with this error; 2 says that the same command will fail again, so no
        launcher repeats it.
    """

    exit_code = 2


def to_dict(config: Any) -> Any:
    """Nested dataclasses to nested dicts of JSON values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(x) for x in config]
    if isinstance(config, dict):
        return {k: to_dict(v) for k, v in config.items()}
    return config


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Builds `cls` from a dict; missing fields take their defaults.

    Raises:
      ConfigError: on an unknown field (the message lists near misses), a wrong type, or a value that the class
        refuses.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__} takes a dictionary of fields, not {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names) or names
            raise ConfigError(f"unknown field {_join(where, name)}; did you mean {', '.join(near)}?")
    fields = {name: _coerce(hints[name], value, _join(where, name)) for name, value in values.items()}
    try:
        return cls(**fields)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{where or cls.__name__}: {e}") from e


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        errors = []
        for option in rest:
            try:
                return _coerce(option, value, where)
            except ConfigError as e:
                errors.append(e)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} takes a sequence, not {value!r}")
        return tuple(_coerce(args[0], v, where) for v in value)
    if origin is dict or hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ConfigError(f"{where} takes {hint.__name__}, not {value!r} ({type(value).__name__})")
    return value
