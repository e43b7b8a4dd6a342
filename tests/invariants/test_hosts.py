"""Several processes, one run, with the real command: if one is lost or told to stop, all stop; resumed, they have the losses of one
process.

JAXTUNE_PROCESSES=4 pytest -s ... for four of them, two devices each.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
import yaml

WORDS = "one two three hello there fox dog quick".split()
# Parts of 64 columns: each process quantises its own blocks, and both exchange the scales.
SHAPE = tiny.LLAMA | {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"intermediate_size": 64}
PROCESSES = int(os.environ.get("JAXTUNE_PROCESSES", 2))
STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    tiny.write_chat_model(folder / "model", SHAPE)
    rows = [{"prompt": f"Say {a} {b}.", "completion": f" {a} {b}"} for a in WORDS for b in WORDS]
    tiny.write_rows(folder, rows)
    settings = {
        "model": str(folder / "model"), "method": "qlora",
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0.1, "max_length": 32, "cache_dir": str(folder / "cache")},
        "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
        "per_device_train_batch_size": 1, "max_steps": STEPS, "save_steps": 4, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": STEPS, "learning_rate": 0.001, "mesh": {"data": 1, "fsdp": -1}, "report_to": [],
        "compilation_cache": str(folder / "xla"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def start(config, processes, *words):
    """The processes of a run over twice as many devices as there are PROCESSES."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        joined = [f"distributed={{coordinator_address: '127.0.0.1:{port}', num_processes: {processes}, process_id: {number}}}"]
        argv = [sys.executable, "-m", "jaxtune.train", str(config), *words, *(joined if processes > 1 else [])]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(2 * PROCESSES // processes)}
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    return started


def wait_until(condition, processes):
    while not condition():
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.002)


def end(processes, code=0):
    said = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == code, out[-2000:] + err[-4000:]
    return said


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], name, row[name]) for row in rows for name in ("loss", "eval_loss", "num_tokens", "grad_norm") if name in row]


def test_processes_are_one_run(config, tmp_path):
    alone = tmp_path / "alone"
    end(start(config, 1, f"output_dir={alone}"))

    folder = tmp_path / "several"
    result = folder / "adapter" / "adapter_model.safetensors"
    lost = start(config, PROCESSES, f"output_dir={folder}")
    wait_until((folder / "checkpoints" / "4").exists, lost)
    lost[-1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = [process.communicate(timeout=60)[1] for process in lost]
    print(f"one killed: all stopped in {time.monotonic() - killed:.1f} s: {said[0].splitlines()[-1][:160]}")
    assert time.monotonic() - killed < 60 and lost[-1].returncode == -signal.SIGKILL
    assert all("another process" in text or "distributed service" in text for text in said[:-1]), said
    assert not result.exists()

    # Told to stop, one stops all: after the same step, with a checkpoint and exit code 0.
    asked = start(config, PROCESSES, f"output_dir={folder}", "resume=true")
    wait_until((folder / "checkpoints" / "8").exists, asked)
    asked[-1].send_signal(signal.SIGTERM)
    said = "".join(end(asked)[0])
    step = re.search(r"interrupted after step (\d+)", said)
    assert step and 8 <= int(step[1]) < STEPS, said[-3000:]
    assert (folder / "checkpoints" / step[1]).exists() and not result.exists()
    print(step[0])

    said = end(start(config, PROCESSES, f"output_dir={folder}", "resume=true"))
    assert result.exists() and all(f"step {STEPS}/{STEPS}" not in out for out, _ in said[1:])  # only process 0 writes the log
    one, several = losses(alone), losses(folder)
    assert [row[:2] for row in one] == [row[:2] for row in several] and len(one) == 3 * STEPS + 1
    apart = [abs(left[2] / right[2] - 1) for left, right in zip(one, several, strict=True)]
    assert max(apart) < 1e-4, apart  # a higher learning_rate amplifies rounding, step by step
    print(f"losses and gradient norms of one process and of {PROCESSES}, which were stopped twice: at most {max(apart):.1e} apart")
