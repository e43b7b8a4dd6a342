"""A conversion needs memory for one matrix, not for the model (tools/convert_memory.py shows this at 3 GB)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "convert_memory.py"
HF = {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("convert_memory", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("memory")
    assert tool.make_model(folder / "model", tool.HF | HF) > 450e6
    return folder


@pytest.mark.parametrize("kind", ["merge", "nf4", "nf4-dq"])
def test_peak_is_far_below_the_model(folder, kind):
    done = subprocess.run([sys.executable, str(TOOL), str(folder), "--measure", kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] - found["result"] < 240  # MB; the model has 460, its largest matrix 12
