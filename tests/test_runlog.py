import json
import math
import os
import pty
import subprocess
import sys
import tty

import pytest

from jaxtune.errors import CheckpointError
from jaxtune.runlog import RunLog, duration, read_metrics


def train_steps(log, steps):
    for step in steps:
        log.advance(step, 1 / step, 100)
        log.write(step, {"loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": step / 10, "num_tokens": 100 * step})
        if step % 5 == 0:
            log.write(step, {"eval_loss": 2 / step, "eval_mean_token_accuracy": 0.5})
    log.close()


def test_metrics_are_written_line_by_line(tmp_path):
    log = RunLog(tmp_path, 10)
    log.write(1, {"loss": 2.5, "grad_norm": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "grad_norm": null}\n'  # before close: a kill loses nothing
    log.close()


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path):
    train_steps(RunLog(tmp_path, 20), range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 5, 6, 7]
    log = RunLog(tmp_path, 20, start=5)
    assert [row["step"] for row in log.history] == [1, 2, 3, 4, 5, 5]
    train_steps(log, range(6, 21))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    whole = tmp_path / "whole"
    whole.mkdir()
    train_steps(RunLog(whole, 20), range(1, 21))
    assert rows == read_metrics(whole / "metrics.jsonl")  # as if nothing had happened


def test_a_log_that_starts_over_forgets_all(tmp_path):
    train_steps(RunLog(tmp_path, 20), range(1, 4))
    log = RunLog(tmp_path, 20, start=0)
    log.close()
    assert log.history == [] and (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 of .*metrics.jsonl is not a line of metrics"):
        RunLog(tmp_path, 20, start=3)


def test_tensorboard_holds_the_metrics_by_group(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    train_steps(RunLog(tmp_path, 10), range(1, 6))
    tags = {}
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                tags[value.tag, event.step] = value.simple_value
    assert tags["train/loss", 4] == pytest.approx(0.25) and tags["eval/loss", 5] == pytest.approx(0.4)
    assert ("train/grad_norm", 1) in tags and ("eval/mean_token_accuracy", 5) in tags


def test_a_disk_that_tensorboards_file_fills_ends_the_run_with_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))
    log = RunLog(tmp_path, 10)
    for call in (lambda: log.write(1, {"loss": 1.0}), log.close):
        with pytest.raises(OSError, match="No space left") as raised:
            call()
        assert raised.value.filename == str(tmp_path)


def test_without_tensorboard_there_is_no_folder(tmp_path):
    train_steps(RunLog(tmp_path, 10, report_to=()), range(1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    log = RunLog(tmp_path, 10)
    train_steps(log, range(1, 6))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/10  loss 1  grad_norm 0.5  learning_rate 0.0001"
    assert lines[1].startswith("step 2/10  loss 0.5") and "tokens/s" in lines[1] and lines[1].endswith(" left")
    assert lines[-1] == "step 5/10  eval_loss 0.4  eval_mean_token_accuracy 0.5"


def test_a_bar_on_a_terminal_and_the_log_above_it(tmp_path):
    """In a child process whose stdout rich takes for a terminal."""
    program = f"""
import logging, pathlib
logging.basicConfig(level=logging.INFO, format="%(message)s")
from jaxtune.runlog import RunLog
log = RunLog(pathlib.Path({str(tmp_path)!r}), 4)
for step in (1, 2, 3, 4):
    log.advance(step, 0.5, 10)
    log.write(step, {{"loss": 0.5}})
logging.info("a line of the log")
log.write(4, {{"eval_loss": 0.25}})
log.close()
logging.info("after")
"""
    env = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100", "PATH": "", "TTY_INTERACTIVE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert "loss 0.5000" in done.stdout and "4/4" in done.stdout and "tokens/s" in done.stdout
    assert "step 4/4  eval_loss 0.25" in done.stdout and "step 2/4" not in done.stdout
    assert "a line of the log" in done.stdout and done.stderr == "after\n"


def test_a_terminal_that_has_gone_ends_no_run(tmp_path):
    program = f"""if True:
    import os, pathlib, sys
    from jaxtune.runlog import RunLog
    log = RunLog(pathlib.Path({str(tmp_path)!r}), 2, report_to=())
    print("ready", flush=True)
    os.read(int(sys.argv[1]), 1)
    log.write(1, {{"loss": 0.5, "eval_loss": 0.5}})
    log.close()
    """
    ours, theirs = pty.openpty()
    waits, ready = os.pipe()
    tty.setraw(theirs)  # otherwise the child blocks on output that nobody reads
    arguments = dict(stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[waits])
    child = subprocess.Popen([sys.executable, "-c", program, str(waits)], **arguments)
    os.close(theirs)
    while b"ready" not in os.read(ours, 1000):
        pass
    os.close(ours)
    os.write(ready, b"x")
    assert child.wait(60) == 0 and len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.6, 123, 3723)] == ["0:00", "1:00", "2:03", "1:02:03"]
