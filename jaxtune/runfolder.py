"""The folder of a run: who may write into it, and what it says about how the result came to be."""

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxtune.config import Config
from jaxtune.errors import CheckpointError

# Keys that may differ between a run and its resumption: they change what is kept and said, not what is computed.
FREE = {
    "output_dir", "resume", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to", "run_name",
    "compilation_cache", "evaluate", "eval_steps", "eval_strategy", "eval_on_start", "per_device_eval_batch_size", "mesh",
    "distributed", "zero_stage", "resume_allow_drift", "loss_spike_sigma",
}  # fmt: skip
PACKAGES = ("jaxtune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


def write_text(path: Path, text: str) -> None:
    """A file that appears whole: written beside and renamed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.output_dir).expanduser()


def check_free(config: Config) -> None:
    """Raise what `open_run` would, without making anything."""
    if config.resume or folder_of(config).exists():
        open_run(config)


def open_run(config: Config) -> Path:
    """The run's folder, made if need be.

    Raises CheckpointError when the folder holds something and `resume` is not set, or when `resume` is set and there is nothing
    to resume, or the run that is there was another one (naming the keys that differ).
    """
    folder = folder_of(config)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"output_dir {folder} is a file; name a folder")
    if not config.resume:
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"output_dir {folder} is not empty, and nothing is overwritten; write resume=true, or another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"resume=true, but {folder} holds no run (no config.yaml); leave resume out to start one there")
    return folder


def differences(config: Config, folder: Path) -> list[str]:
    """`key: then -> now` for each key that changes what is computed."""
    then = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(config.to_dict()))
    then = json.loads(json.dumps(then))
    keys = [key for key in sorted(now.keys() | then.keys()) if key not in FREE]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if then.get(key) != now.get(key)]


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
    """sha256 of a model file, or of the files of a model folder that decide what the model is."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return {file.name: _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
