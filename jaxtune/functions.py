"""The user's own functions: finding them by name, calling them, and recording their files.

    mypackage.judges.same_sql      a function in an importable module
    judges/cron.py:cron_match      a function in a file

Naming a module or file is consent to run it.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxtune.disk import sha256
from jaxtune.errors import ConfigError, JaxtuneError


def find(table: Mapping[str, Callable], spec: str | Callable, what: str) -> tuple[str, Callable]:
    """The short name and function of `spec`: an entry of the table, the name of a user's function, or a function itself.

    `what` is its name in errors. Raises ConfigError if there is no such function.
    """
    if callable(spec):
        return getattr(spec, "__name__", what), spec
    if spec in table:
        return spec, table[spec]
    place, separator, name = spec.rpartition(":" if ".py:" in spec else ".")
    if not separator:
        known = "write " + (f"one of {', '.join(table)}, or " if table else "") + "your own module.function or path/file.py:function"
        raise ConfigError(f"{what} {spec} is not known; {known}")
    file = file_of(spec)
    if file is not None and not file.is_file():
        raise ConfigError(f"{what} {spec}: there is no file {place}; paths are taken from the current folder ({Path.cwd()})")
    try:
        module = _load(file) if file else importlib.import_module(place)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(
            f"{what} {spec} cannot be loaded: {type(error).__name__}: {error}. Write module.function of an installed module, or "
            "path/file.py:function"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{what} {spec}: {place} has no function {name}; define it there, or write the name of one it has")
    return name, function


def file_of(spec: str) -> Path | None:
    """The file that a name like `path/file.py:function` refers to; None for any other name."""
    return Path(spec.rpartition(":")[0]).expanduser() if ".py:" in spec else None


def hashes(specs: Iterable[str]) -> dict[str, str]:
    """sha256 of the files that these names refer to, by path as written."""
    return {spec.rpartition(":")[0]: sha256(file) for spec in specs if (file := file_of(spec))}


def _load(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"jaxtune_metric_{path.stem}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look up their module there
    found.loader.exec_module(module)
    return module


def call(what: str, function: Callable, *arguments: Any, **named: Any) -> Any:
    """Call a user's function; ConfigError, with the line in the user's file, for anything it raises."""
    try:
        return function(*arguments, **named)
    except JaxtuneError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"{what} failed: {failure(function, error)}; correct it there") from error


def failure(function: Callable, error: Exception) -> str:
    """What a user's function raised, and the deepest line in its own file."""
    code, frames = getattr(inspect.unwrap(function), "__code__", None), traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code and frame.filename == code.co_filename] or frames[1:2]  # the first frame is the caller
    where = f", at line {own[-1].lineno} of {own[-1].filename}" if own else ""
    return f"{type(error).__name__}: {error}{where}"
