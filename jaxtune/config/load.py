"""A YAML file or a dict, and `key=value` overrides -> a checked Config."""

import difflib
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxtune.config.aliases import ALIASES, BITSANDBYTES, DIFFERENT, VALUES, bitsandbytes
from jaxtune.config.coerce import Group, kinds
from jaxtune.config.schema import Config
from jaxtune.errors import ConfigError

log = logging.getLogger("jaxtune")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.1 wants 2.0e-4), and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {key.value} is given twice; leave one.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _groups(kind: type = Config, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Prefix of each group -> its keys and their kinds; the top level is the prefix ''."""
    out = {prefix: kinds(kind)}
    for name, of in kinds(kind).items():
        if isinstance(of, type) and issubclass(of, Group):
            out |= _groups(of, f"{prefix}{name}.")
    return out


GROUPS = _groups()
PATHS = {prefix + name: kind for prefix, fields in GROUPS.items() for name, kind in fields.items() if f"{prefix}{name}." not in GROUPS}


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None


def _read(path: str | os.PathLike) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{path} is not a file; give the path of a YAML config.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8; give the path of a YAML config.") from None
    raw = _parse(text, str(path))
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds {'nothing' if raw is None else 'no keys'}; write lines such as `model: FOLDER`.")
    return dict(raw)


def _flatten(raw: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, down to the keys that exist; a table under one of those stays whole."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        path = prefix + str(key)
        known = path in PATHS or path in ALIASES or path in DIFFERENT
        if isinstance(value, Mapping) and not known:
            flat |= _flatten(value, path + ".")
        elif f"{path}." in GROUPS:
            if value is not None:
                names = ", ".join(GROUPS[f"{path}."])
                raise ConfigError(f"{path} is {value!r}, but is a group of keys ({names}); write {path}: {{KEY: VALUE}}.")
        else:
            flat[path] = value
    return flat


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not an override; write key=value, with dots for nested keys: lora.r=32")
    return key.strip().lstrip("-"), _parse(value, f"the value of {key.strip()}")


def _unknown(path: str) -> ConfigError:
    """Names the nearest key: by full path, by last part, and by the aliases (`lora.rank` is LLaMA-Factory's `lora_rank`)."""
    names: dict[str, str] = {}
    for alias, convert in ALIASES.items():
        targets = convert("") if convert.__name__ == "<lambda>" else {}
        names |= dict.fromkeys([alias], next(iter(targets), alias))
    names |= {known.rpartition(".")[2]: known for known in PATHS} | {known.replace(".", "_"): known for known in PATHS}
    asked = path.replace(".", "_").replace("-", "_")
    near = difflib.get_close_matches(asked, names, 1, 0.6) or difflib.get_close_matches(path.rpartition(".")[2], names, 1, 0.6)
    return ConfigError(f"{path} is not a key" + (f"; did you mean {names[near[0]]}?" if near else "."))


def _canonical(flat: dict[str, Any]) -> dict[str, Any]:
    """Aliases as the keys they stand for.

    Raises:
        ConfigError: an unknown key, a torch tool's key that is done differently here, or one key under two names.
    """
    out: dict[str, Any] = {}
    said: dict[str, str] = {}

    def put(path: str, value: Any, name: str) -> None:
        value = VALUES.get(path, {}).get(value, value) if isinstance(value, (str, bool)) else value
        if path in out and out[path] != value:
            raise ConfigError(f"{said[path]} and {name} are the same key ({path}), but have the values {out[path]!r} and {value!r}; leave one.")
        out[path], said[path] = value, name

    for path, value in flat.items():
        if path in BITSANDBYTES:
            continue
        if path in PATHS:
            put(path, value, path)
        elif path in ALIASES:
            updates = ALIASES[path](value)
            for target, translated in updates.items():
                put(target, translated, path)
            log.warning("note: %s is read as %s", path, ", ".join(f"{k}={v}" for k, v in updates.items()) or "the default")
        elif path in DIFFERENT:
            if value not in (None, False, "", "no", "none", [], {}):
                raise ConfigError(f"{path} is a key of torch tools that works differently here: {DIFFERENT[path]}.")
            log.warning("note: %s=%s asks for nothing here and is left out", path, value)
        else:
            _entry(out, path, value)
    given = {path: value for path, value in flat.items() if path in BITSANDBYTES}
    for target, translated in bitsandbytes(given).items():
        put(target, translated, next(iter(given)))
        log.warning("note: %s is read as %s=%s", ", ".join(given), target, translated)
    return out


def _entry(out: dict[str, Any], path: str, value: Any) -> None:
    """`lora.rank_pattern.q_proj=8`: one entry of a table."""
    table, _, name = path.rpartition(".")
    if table not in PATHS or "tuple[tuple[str" not in str(PATHS[table]):
        raise _unknown(path)
    out.setdefault(table, {})[name] = value


def load_config(config: str | os.PathLike | Mapping, overrides: Iterable[str] = ()) -> Config:
    """Read a config: a YAML file's path or a dict, then `key=value` overrides (values are YAML), which win.

    Raises:
        ConfigError: an unknown key (names the nearest one), a wrong type, or keys that do not go together.
    """
    raw = dict(config) if isinstance(config, Mapping) else _read(config)
    flat = _canonical(_flatten(raw)) | _canonical(_flatten(dict(map(_override, overrides))))
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, name = path.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return Config(**nested)


def describe(config: Config) -> str:
    """The resolved values that have an effect, as `key=value` words that can be pasted back as overrides."""
    data = config.to_dict()
    skipped = {field for field, of in Config.__dataclass_fields__.items() if config.objective not in of.metadata.get("objectives", [config.objective])}
    if config.method not in ("lora", "qlora"):
        skipped.add("lora")
    lines, top = [], []
    for key, value in data.items():
        if key in skipped or value is None:
            continue
        if isinstance(value, dict) and f"{key}." in GROUPS:
            words = [f"{key}.{name}={_word(item)}" for name, item in value.items() if item not in (None, [], {})]
            lines.append(words)
        else:
            top.append(f"{key}={_word(value)}")
    return "\n".join(textwrap.fill("  ".join(words), 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False) for words in [top, *lines])


def _word(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")
