"""A disk that fills up while a checkpoint is written: one clear error, no traceback, and the last complete checkpoint stays."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import yaml


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_full(tmp_path, small_disk):
    tiny.write_chat_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": f" {n}"}) + "\n" for n in range(40)))
    settings = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")},
        "lora": {"r": 64}, "max_steps": 8, "save_steps": 2, "output_dir": str(small_disk / "run"), "compilation_cache": False,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run([sys.executable, "-m", "jaxtune.train", str(tmp_path / "run.yaml")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "error: the disk is full" in done.stderr.splitlines()[-1], done.stderr
    assert not (small_disk / "run" / "adapter").exists()


def test_read_only_folder(tmp_path, small_disk):
    tiny.write_chat_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Say.", "completion": " 1"}) + "\n")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    words = [f"model={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}", f"output_dir={small_disk / 'run'}"]
    (tmp_path / "run.yaml").write_text("max_steps: 2\n")
    done = subprocess.run([sys.executable, "-m", "jaxtune.train", str(tmp_path / "run.yaml"), *words], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and str(small_disk / "run") in last and "may not be written to; name a folder elsewhere" in last
