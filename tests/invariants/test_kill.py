"""Law 5 through the real command: a run killed at random moments and resumed ends with the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    tiny.write_chat_model(tmp_path / "model")
    rows = [{"prompt": f"Say {n}.", "completion": f" {n} {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")},
        "lora": {"r": 4, "lora_dropout": 0.1}, "per_device_train_batch_size": 1, "max_steps": 60, "save_steps": 3, "save_total_limit": 2,
        "compilation_cache": str(tmp_path / "xla"), "logging_steps": 1, "report_to": [],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_killed_and_resumed(config):
    argv = [sys.executable, str(ROOT / "tools" / "kill_campaign.py"), str(config), "--trials", "1", "--kills", "2", "--seed", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 trials bit-equal" in done.stdout
