"""Convert YAML values to the annotated types, hashable, or raise an error that names key, value and expected type.

Inside a config everything is hashable: a list becomes a tuple, a table (`{q_proj: 8}`) a tuple of pairs in the given order. `thaw` is the
inverse.
"""

import dataclasses
import difflib
import enum
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union

import numpy as np

from jaxtune.errors import ConfigError

_LARGEST = 1 << 1023  # larger whole numbers are no float
SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string", types.NoneType: "null"}


class Mismatch(Exception):
    """The value has another type; another member of a union may still accept it."""


def plain(value: Any) -> Any:
    """Python values as YAML would give them: a path as text, a numpy number as a number, an enum member as its value."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return value.value
    return value.item() if isinstance(value, np.generic) else value


def freeze(value: Any) -> Any:
    """Nested lists and dicts as tuples and tuples of pairs."""
    if isinstance(value, Mapping):
        return tuple((str(key), freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def _is_table(kind: Any) -> bool:
    """`tuple[tuple[str, X], ...]`: a dict for the user."""
    args = typing.get_args(kind)
    return typing.get_origin(kind) is tuple and typing.get_origin(args[0]) is tuple and typing.get_args(args[0])[0] is str


def _choices(kind: Any) -> list[str]:
    """The type's alternatives in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return [word for arg in args for word in _choices(arg)]
    if origin is Literal:
        return [str(arg) for arg in args]
    if kind in SCALARS:
        return SCALARS[kind].split(" or ")
    if _is_table(kind):
        return ["a table {name: " + expected(typing.get_args(args[0])[1]) + "}"]
    if origin is tuple:
        return ["a list, each " + expected(args[0])]
    if dataclasses.is_dataclass(kind):
        return ["{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"]
    return ["anything"]


def expected(kind: Any) -> str:
    """The type in words, for an error message: `true, false or group`."""
    *most, last = _choices(kind)
    return f"{', '.join(most)} or {last}" if most else last


def _literal(value: Any, choices: tuple) -> Any:
    if value is False and "no" in choices:
        return "no"  # YAML 1.1 reads `eval_strategy: no` as a boolean
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise Mismatch


def coerce(value: Any, kind: Any) -> Any:
    """The value as `kind`, or Mismatch. Nothing is guessed: a string is not a number, 8.0 is the whole number 8."""
    origin, args, value = typing.get_origin(kind), typing.get_args(kind), plain(value)
    if kind is Any:
        return freeze(value)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return coerce(value, arg)
            except Mismatch:
                continue
        raise Mismatch
    if origin is Literal:
        return _literal(value, args)
    if origin is tuple:
        return _sequence(value, args[0], _is_table(kind))
    if dataclasses.is_dataclass(kind):
        return _group(value, kind)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    raise Mismatch


def _sequence(value: Any, item: Any, table: bool) -> tuple:
    if table:
        of = typing.get_args(item)[1]
        pairs = value.items() if isinstance(value, Mapping) else value
        if not isinstance(value, (Mapping, tuple)) or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
            raise Mismatch
        return tuple((str(key), coerce(entry, of)) for key, entry in pairs)
    if isinstance(value, (list, tuple)):
        return tuple(coerce(entry, item) for entry in value)
    if value is None:
        raise Mismatch
    return (coerce(value, item),)  # a single value stands for a list of one


def _group(value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and kind.shorthand:
        value = {kind.shorthand: value}
    if not isinstance(value, Mapping):
        raise Mismatch
    names = [field.name for field in dataclasses.fields(kind)]
    if kind.shorthand and not difflib.get_close_matches(kind.shorthand, map(str, value), 1, 0.5):
        raise ConfigError(f"{kind.group} {str(value)[:80]} has no {kind.shorthand}; {kind.without}")
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1, 0.5)
            raise ConfigError(
                f"{kind.group}.{key} is not a key; " + (f"did you mean {kind.group}.{near[0]}?" if near else f"it has {', '.join(names)}")
            )
    return kind(**value)


def thaw(value: Any, kind: Any) -> Any:
    """A coerced value as plain YAML or JSON data: tuples as lists, tables as dicts, groups as dicts."""
    if isinstance(value, Group):
        return value.to_plain()
    if not isinstance(value, tuple):
        return value
    options = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is tuple and (value or _is_table(option)):
            try:
                coerce(value, option)
            except Mismatch:
                continue
            item = typing.get_args(option)[0]
            if _is_table(option):
                return {key: thaw(entry, typing.get_args(item)[1]) for key, entry in value}
            return [thaw(entry, item) for entry in value]
    return [thaw(entry, Any) for entry in value]


@dataclasses.dataclass(frozen=True)
class Group:
    """A frozen, hashable set of keys whose values are checked against their annotations on construction.

    Raises:
        ConfigError: a value does not have its annotated type.
    """

    group: ClassVar[str] = ""  # the dotted prefix in error messages
    shorthand: ClassVar[str | None] = None  # the field that a bare string sets, which is required
    without: ClassVar[str] = ""  # what to write if it is missing

    def __post_init__(self):
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            default = self.__dataclass_fields__[name].default
            if value is None and default is None:
                continue
            try:
                object.__setattr__(self, name, coerce(value, kind))
            except Mismatch:
                if value is None and default is not dataclasses.MISSING:  # an empty key, for a field that cannot be null
                    object.__setattr__(self, name, default)
                    continue
                path = f"{self.group}.{name}" if self.group else name
                raise ConfigError(f"{path} is {value!r}, but has to be {expected(kind)}.{_nearest(value, kind)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, scalars) in field order; constructing the class from it gives an equal object."""
        return {name: thaw(getattr(self, name), kind) for name, kind in kinds(type(self)).items()}

    def to_plain(self) -> Any:
        """Its form inside another group: a dict, or with a `shorthand` only the keys that are set, as a bare value if that is all."""
        if not self.shorthand:
            return self.to_dict()
        plain = {field.name: self.to_dict()[field.name] for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        return plain[self.shorthand] if len(plain) == 1 else plain


def kinds(group: type) -> dict[str, Any]:
    """Field name -> annotation, in order."""
    hints = typing.get_type_hints(group)
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


def _nearest(value: Any, kind: Any) -> str:
    near = difflib.get_close_matches(str(value), [word for word in _choices(kind) if " " not in word], 1)
    return f" Did you mean {near[0]}?" if near else ""
