"""Several processes, one run, by the real command: the losses of one process; one lost, the others stop; started again, the same end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
import yaml

WORDS = "one two three hello there fox dog quick".split()
# Parts of 64 columns: each process packs blocks of its own, and both exchange the scales.
SHAPE = tiny.LLAMA | {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"intermediate_size": 64}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    tiny.write_chat_model(folder / "model", SHAPE)
    rows = [{"prompt": f"Say {a} {b}.", "completion": f" {a} {b}"} for a in WORDS for b in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(folder / "model"), "method": "qlora",
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0.1, "max_length": 32, "cache_dir": str(folder / "cache")},
        "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj"]},
        "per_device_train_batch_size": 1, "max_steps": 6, "save_steps": 2, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 6, "learning_rate": 0.01, "mesh": {"data": 1, "fsdp": 4}, "report_to": [],
        "compilation_cache": str(folder / "xla"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def start(config, processes, *words):
    """The processes of a run over four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        joined = [f"distributed={{coordinator_address: '127.0.0.1:{port}', num_processes: {processes}, process_id: {number}}}"]
        argv = [sys.executable, "-m", "jaxtune.train", str(config), *words, *(joined if processes > 1 else [])]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // processes)}
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    return started


def end(processes, code=0):
    said = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == code, out[-2000:] + err[-4000:]
    return said


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], name, row[name]) for row in rows for name in ("loss", "eval_loss", "num_tokens", "grad_norm") if name in row]


def test_processes_are_one_run(config, tmp_path):
    folders = {count: tmp_path / f"run-{count}" for count in (1, 2)}
    for count, folder in folders.items():
        said = end(start(config, count, f"output_dir={folder}"))
        assert all("step 6/6" not in out for out, _ in said[1:])  # process 0 alone writes the log
    one, two = losses(folders[1]), losses(folders[2])
    assert [row[:2] for row in one] == [row[:2] for row in two] and len(one) == 19
    for left, right in zip(one, two, strict=True):
        assert left[2] == pytest.approx(right[2], rel=1e-4), (left, right)
    whole = (folders[2] / "adapter" / "adapter_model.safetensors").read_bytes()

    lost = start(config, 2, f"output_dir={tmp_path / 'lost'}", "logging_steps=1")
    while not (tmp_path / "lost" / "checkpoints" / "2").exists():
        assert lost[0].poll() is None and lost[1].poll() is None, [process.communicate() for process in lost]
        time.sleep(0.002)
    lost[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = lost[0].communicate(timeout=60)[1]
    assert lost[1].wait() == -signal.SIGKILL
    if lost[0].returncode != 0:  # else it was at its end already, and there is nothing to go on with
        assert "another process" in said or "distributed service" in said, said[-3000:]
        assert time.monotonic() - killed < 60
        assert not (tmp_path / "lost" / "adapter").exists()
    lost[1].communicate()
    end(start(config, 2, f"output_dir={tmp_path / 'lost'}", "resume=true"))
    assert (tmp_path / "lost" / "adapter" / "adapter_model.safetensors").read_bytes() == whole
