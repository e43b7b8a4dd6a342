"""A run's folder: who may write into it, and how the result was made."""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxtune.config import Config, load_config, read_yaml
from jaxtune.disk import make_folder, sha256, write_text
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.locks import lock

log = logging.getLogger("jaxtune")
LOCK = ".lock"
NO_CONFIG = "has files but no config.yaml, which says which run they are of; put it back (the run printed its keys at its start)"
INITIAL, BASE = "initial", "base"  # the initial adapter, and the base it starts from, if the config alone does not determine them
_held: dict[Path, int] = {}  # folders of this process's runs -> their open lock files

# Keys that may differ between a run and its resumption: they change what is saved and logged, not what is computed.
FREE = {
    "output_dir", "resume", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to", "run_name",
    "compilation_cache", "evaluate", "eval_steps", "eval_strategy", "eval_on_start", "per_device_eval_batch_size", "mesh",
    "distributed", "zero_stage", "resume_allow_drift", "loss_spike_sigma", "data.cache_dir", "log_completions",
}  # fmt: skip
PACKAGES = ("jaxtune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.output_dir).expanduser()


def default_folder(config: Config, kind: str) -> str:
    """The folder for results if the config names none."""
    return f"runs/{Path(config.model.partition('#')[0]).stem}-{kind}"


def base_of(folder: Path, config: Config) -> str:
    """The model that the run in this folder trains over: the config's, or one that was made for it."""
    whole = (folder / INITIAL / "adapter_config.json").is_file()  # written last
    return str(folder / BASE) if whole and (folder / BASE / "config.json").is_file() else config.model


def check_free(config: Config) -> None:
    """Raise what `open_run` would raise, without creating anything."""
    folder = folder_of(config)
    if config.resume or os.path.lexists(folder):
        open_run(config)
        return
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "may not be written to" if parent.is_dir() else "is a file"
        raise CheckpointError(f"output_dir {folder} cannot be created, because {parent} {why}; name a folder elsewhere")


def is_used(folder: Path) -> bool:
    """Whether the folder holds anything except hidden files, which a kill during start-up leaves."""
    return folder.exists() and not all(path.name.startswith(".") for path in folder.iterdir())


def _came_to_nothing(folder: Path) -> bool:
    """Whether the folder is left from a run that logged and saved nothing, for example one that ran out of memory."""
    names, own = {path.name for path in folder.iterdir() if not path.name.startswith(".")}, {"config.yaml", "checkpoints"}
    if not own <= names <= own | {"run.json", "metrics.jsonl"} or any((folder / "checkpoints").iterdir()):
        return False
    return "metrics.jsonl" not in names or (folder / "metrics.jsonl").stat().st_size == 0


def open_run(config: Config) -> Path:
    """The run's folder, created if needed, and reserved for this process until `let_go`.

    Raises CheckpointError if the folder is not empty and `resume` is not set (a run that saved nothing may be replaced), if `resume` is set
    and there is nothing to resume, and if another process is writing into it.
    """
    folder = folder_of(config)
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"output_dir {folder} is {'a file' if folder.exists() else 'a dangling link'}; name a folder")
    if "\\" in str(folder.absolute()) and os.sep != "\\":
        raise CheckpointError(f"output_dir {folder}: checkpoints cannot be written under a name with a backslash; name another folder")
    if not config.resume:
        if is_used(folder) and not _came_to_nothing(folder):
            raise CheckpointError(f"output_dir {folder} is not empty, and nothing is overwritten; write resume=true, or another folder")
        make_folder(folder, "output_dir", CheckpointError)
    elif not (folder / "config.yaml").is_file():
        if is_used(folder):
            raise CheckpointError(f"resume=true, but {folder} {NO_CONFIG}, or start again in another folder")
        raise CheckpointError(f"resume=true, but {folder} holds no run (no config.yaml); leave resume out to start one there")
    _claim(folder)
    return folder


def _claim(folder: Path) -> None:
    """Lock the folder until `let_go`."""
    if folder in _held:
        return
    try:
        (folder / LOCK).touch()
        _held[folder] = lock(folder / LOCK)
    except BlockingIOError:
        raise CheckpointError(f"another run is writing into {folder}; wait for its end, stop it, or name another folder") from None
    except OSError as error:
        log.warning("%s cannot be locked (%s), so a second run in it would not be noticed", folder, error.strerror)


def check_room(folder: Path, needed: int) -> None:
    """Warn if the disk has less free space than the run will need at least."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        log.warning(
            "%s: the disk has %.3f GB free, and the run will write %.3f GB at least; free some space, or its result may be lost",
            folder, free / 1e9, needed / 1e9,
        )  # fmt: skip


def let_go(config: Config) -> None:
    """Unlock the run's folder."""
    if (file := _held.pop(folder_of(config), None)) is not None:
        os.close(file)


def differences(config: Config, folder: Path) -> list[str]:
    """`key: then -> now` for each key that changes what is computed. CheckpointError if the folder's config cannot be read."""
    try:
        then = leaves(read_yaml(folder / "config.yaml"))
    except ConfigError as error:
        raise CheckpointError(f"{error} It says which run this is: put it back as it was, or start again in another folder") from error
    now = leaves(json.loads(json.dumps(config.to_dict())))
    keys = [key for key in sorted(now.keys() | then.keys()) if key not in FREE and key.partition(".")[0] not in FREE]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if then.get(key) != now.get(key)]


def check_same(config: Config) -> None:
    """CheckpointError if the config's folder holds another run."""
    folder = folder_of(config)
    if different := differences(config, folder):
        raise CheckpointError(f"{folder} holds another run: {'; '.join(different)}. Use the same values, or another folder")


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def read_config(folder: Path) -> Config:
    """The config of the run in this folder. CheckpointError if it cannot be read."""
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as error:
        raise CheckpointError(f"{error} It says which run {folder} is of: put it back as it was") from error


def read_entry(file: Path, key: str) -> Any:
    """One entry of a JSON file that records a run's state."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}), and says what of this run is done; put it back as it was, or start "
            "again in another folder"
        ) from error


def measured(folder: Path, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a run: `eval_*` from one evaluation, and `tuned_*` from its evaluation.json, if it exists."""
    found = {name: value for name, value in evaluation.items() if name.startswith("eval_") and value is not None}
    answers = folder / "evaluation.json"
    if answers.exists():
        found |= {f"tuned_{name}": value for name, value in read_entry(answers, "tuned").items()}
    return found


def write_config(folder: Path, config: Config) -> None:
    """`config.yaml`, resolved."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", text)


def provenance(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, device and mesh, for run.json."""
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
        "python": platform.python_version(),
        "command": sys.argv,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "processes": jax.process_count()},
        "mesh": dict(mesh.shape),
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of a model file, or of the files of a model folder that define the model."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return {file.name: sha256(file) for file in files}
