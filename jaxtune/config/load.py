"""Read a YAML file or dict and `key=value` overrides into a validated Config."""

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config import foreign
from jaxtune.config.aliases import ALIASES, BITSANDBYTES, DIFFERENT, LEFT_OUT, TRANSLATE, bitsandbytes
from jaxtune.config.checks import GROUPS_OF_METHODS
from jaxtune.config.coerce import Group, kinds, plain, thaw
from jaxtune.config.foreign import DEFAULT
from jaxtune.config.schema import Config
from jaxtune.errors import ConfigError

log = logging.getLogger("jaxtune")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.1 requires 2.0e-4), and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {key.value} is given twice; leave one.")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# As in YAML 1.2, 010 is ten and 1:30 a text; in YAML 1.1 they are eight and ninety.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":int")]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0x[0-9a-fA-F_]+|\d[\d_]*)$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _whole(node.value.replace("_", "")))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _whole(text: str) -> int:
    return int(text, 16) if "x" in text else int(text)


def _groups(kind: type = Config, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Prefix of each group -> its keys and their types; the top level has the prefix ''."""
    out = {prefix: kinds(kind)}
    for name, of in kinds(kind).items():
        if isinstance(of, type) and issubclass(of, Group):
            out |= _groups(of, f"{prefix}{name}.")
    return out


GROUPS = _groups()
ELSEWHERE = ("trl", "training", "logging")  # groups of Axolotl and Unsloth whose keys are flat here
PATHS = {prefix + name: kind for prefix, fields in GROUPS.items() for name, kind in fields.items() if f"{prefix}{name}." not in GROUPS}


_STAR = """a value that begins with * or & needs quotes: "*.jsonl" in a file, 'data.train="*.jsonl"' in a shell"""
HINTS = {
    "expected alphabetic or numeric character": _STAR,
    "found undefined alias": _STAR,
    "'\\t' that cannot start": "indent with spaces, not with tabs",
    "mapping values are not allowed": "here or in the line before, a colon needs a space after it, or a value with a colon needs quotes",
}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; ConfigError, naming its origin `where`, if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, context = error.problem_mark, error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        at += f"{error.context} that begins in line {context.line + 1}, " if context and mark and context.line < mark.line else ""
        hint = next((f"; {advice}" for words, advice in HINTS.items() if words in str(error.problem)), "")
        raise ConfigError(f"{where} is not YAML: {at}{error.problem}{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    except (RecursionError, ValueError) as error:  # deeply nested lists, or a number with thousands of digits
        raise ConfigError(f"{where} cannot be read: {error}") from None


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The keys of a YAML file. ConfigError if it is missing or holds anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path} is not a file; give the path of a YAML config.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8; give the path of a YAML config.") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds {'nothing' if raw is None else 'no keys'}; write lines such as `model: FOLDER`.")
    return dict(raw)


def _flatten(raw: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, down to the existing keys; a table below one of those stays whole."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        path, value = prefix + str(key), value.to_dict() if isinstance(value, Group) else value
        known = any(_plainly(path) in names for names in (PATHS, ALIASES, DIFFERENT, LEFT_OUT))
        if isinstance(value, Mapping) and not known and "_component_" not in value:
            flat |= _flatten(value, path + ".")
        elif f"{path}." in GROUPS:
            if value is not None:
                names = ", ".join(GROUPS[f"{path}."])
                raise ConfigError(f"{path} is {value!r}, but is a group of keys ({names}); write {path}: {{KEY: VALUE}}.")
        else:
            flat[path] = value
    return flat


def _plainly(path: str) -> str:
    """The key without another tool's group (Axolotl's `trl.beta`), or without ours for an alias (`lora.lora_r`)."""
    group, _, name = path.partition(".")
    if group in ELSEWHERE or (path not in PATHS and ALIASES.get(name, "").startswith(f"{group}.")):
        return name
    return path


def _override(text: str) -> tuple[str, Any]:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's replacement for bytes that are not text in its encoding
        raise ConfigError(
            f"{text!r} cannot be read: Python takes the command line for {sys.getfilesystemencoding()} here; set PYTHONUTF8=1 in the "
            "environment, and leave PYTHONUTF8=0 out of it"
        )
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not an override; write key=value, with dots for nested keys: lora.r=32")
    return key.strip(), None if value.strip() == "None" else parse_yaml(value, f"the value of {key.strip()}")


def _unknown(path: str) -> ConfigError:
    """An error that names the nearest key among keys and aliases: `lora.rank` is LLaMA-Factory's `lora_rank`, and hence lora.r."""
    group = path.partition(".")[0]
    others = GROUPS_OF_METHODS - {"lora", group}  # all these names are similar
    names = {known: known for known in PATHS if known.partition(".")[0] not in others} | ALIASES
    asked = _words(path)

    def likeness(name: str) -> float:
        words = _words(name)
        whole = difflib.SequenceMatcher(None, "_".join(asked), "_".join(words)).ratio()
        last = difflib.SequenceMatcher(None, asked[-1], words[-1]).ratio()
        return max(whole, 0.6 * last + 0.3 * whole)  # people often guess the group wrong, but seldom the last word

    best = max(names, key=likeness)
    return ConfigError(f"{path} is not a key" + (f"; did you mean {names[best]}?" if likeness(best) >= 0.6 else "."))


def _words(path: str) -> list[str]:
    return re.split(r"[._-]", path)


def _translate(name: str, value: Any) -> Any:
    """Another tool's value as ours."""
    by = TRANSLATE.get(name)
    if by is None:
        return value
    if callable(by):
        return by(value)
    return by.get(value, value) if isinstance(value, Hashable) else value


def _canonical(flat: dict[str, Any]) -> dict[str, Any]:
    """Replace aliases by the keys they stand for.

    Raises: ConfigError: an unknown key, a torch tool's key that works differently here, or one key under two names; reports all of them at
    once.
    """
    out: dict[str, Any] = {}
    said: dict[str, str] = {}
    wrong: list[str] = []

    def put(path: str, value: Any, name: str) -> None:
        if value is DEFAULT:
            return
        value = _translate(path, value)
        if value is None and path in out:  # an empty key beside a set one
            return
        if path == "data.packing" and "group" in (value, out.get(path)) and False in (value, out.get(path)):
            value = out[path] = "group"  # rows that are grouped by length are not packed
        if out.get(path) is not None and out[path] != value:
            raise ConfigError(f"{said[path]} and {name} both set {path}, to {word(out[path])} and to {word(value)}; leave one.")
        out[path], said[path] = value, name

    def take(given: str, value: Any) -> None:
        name = _plainly(given)
        if isinstance(value, Mapping) and "_component_" in value:
            raise foreign.component(name)
        if name in PATHS:
            put(name, value, given)
            if name != given:
                log.warning("note: %s is read as %s", given, name)
        elif name in ALIASES:
            meant = _translate(name, value)
            put(ALIASES[name], meant, given)
            log.warning("note: %s is read as %s", given, ALIASES[name])
        elif name in LEFT_OUT:
            log.warning("note: %s is ignored: %s", given, LEFT_OUT[name])
        elif name in DIFFERENT:
            if value not in (None, False, "", "no", "none", [], {}) and _translate(name, value) is not DEFAULT:
                raise ConfigError(f"{given} is a key of torch tools that works differently here: {DIFFERENT[name]}.")
            log.warning("note: %s=%s has no effect here and is ignored", given, word(value))
        elif name not in BITSANDBYTES:
            _entry(out, name, value)

    for given, value in flat.items():
        try:
            take(given, value)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError(wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} keys cannot be read:", *wrong]))
    given = {name: value for name, value in flat.items() if name in BITSANDBYTES}
    quantization = bitsandbytes(given)
    if quantization:
        put("quantization", quantization, " and ".join(given))
        log.warning("note: %s is read as quantization=%s", ", ".join(given), quantization)
    return out


def _entry(out: dict[str, Any], path: str, value: Any) -> None:
    """`lora.rank_pattern.q_proj=8`: one entry of a table."""
    table, _, name = path.rpartition(".")
    if table not in PATHS or "tuple[tuple[str" not in str(PATHS[table]):
        raise _unknown(path)
    out.setdefault(table, {})[name] = value


def load_config(config: Config | str | os.PathLike | Mapping, overrides: Iterable[str] = ()) -> Config:
    """Read a config: the path of a YAML file, a dict or a `Config`, then `key=value` overrides (values are YAML), which take precedence.

    Raises:
        ConfigError: an unknown key (suggests the nearest one), a wrong type, or an invalid combination of keys.
    """
    overrides = list(overrides)
    if isinstance(config, Config):
        if not overrides:
            return config
        config = config.to_dict()
    if not isinstance(config, (str, os.PathLike, Mapping)):
        raise ConfigError(f"the config is {config!r}; give the path of a YAML file, or its keys as a dict.")
    raw = plain(config) if isinstance(config, Mapping) else read_yaml(config)
    flat = _canonical(_flatten(raw)) | _canonical(_flatten(dict(map(_override, overrides))))
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    made = Config(**nested)
    for path in (path for path, value in flat.items() if value is None):
        if (taken := functools.reduce(getattr, path.split("."), made)) not in (None, ()):
            log.warning("note: %s is empty, so its default is used: %s", path, word(thaw(taken, PATHS[path])))
    return made


def describe(config: Config) -> str:
    """The resolved values that have an effect, as `key=value` words that can be pasted back as overrides."""
    top, lines = [], []
    for key, value in config.to_dict().items():
        if key in GROUPS_OF_METHODS and key not in (config.method, config.method.removeprefix("q")):
            continue
        if f"{key}." in GROUPS:
            lines.append([f"{key}.{name}={word(item)}" for name, item in value.items() if item not in (None, [], {})])
        elif value not in (None, [], {}):
            top.append(f"{key}={word(value)}")
    return "\n".join(_fill(words) for words in [top, *lines] if words)


def _fill(words: list[str], width: int = 118) -> str:
    """Words separated by two spaces in lines of at most `width`; words with spaces are not broken."""
    lines = [""]
    for word in words:
        if lines[-1].strip() and len(lines[-1]) + 2 + len(word) > width:
            lines.append("")
        lines[-1] += f"  {word}" if lines[-1] or len(lines) > 1 else word
    return "\n".join(lines)


def word(value: Any) -> str:
    """A value as written in an override."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")
