import errno
import gc
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from jaxtune import errors
from jaxtune.gpu import GRANTED


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    monkeypatch.setattr(errors, "leave", sys.exit)


def exit_of(main, capsys):
    with pytest.raises(SystemExit) as caught:
        errors.run(main)
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.DataError, errors.CheckpointError, errors.ModelError])
def test_a_users_mistake_is_one_line_and_exit_code_2(kind, capsys):
    code, err = exit_of(raising(kind("lora.rank is not a key; did you mean lora.r?")), capsys)
    assert (code, err) == (2, "error: lora.rank is not a key; did you mean lora.r?\n")


@pytest.mark.parametrize("own", [None, "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_commands_are_granted_most_of_a_gpu(capsys, monkeypatch, own):
    """As the planner counts; the environment takes precedence. (jax refuses both names at the same time.)"""
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "0.5") if name == own else monkeypatch.delenv(name, raising=False)
    exit_of(lambda: None, capsys)
    assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == (GRANTED if own is None else 0.5)


def test_success_exits_0_and_a_returned_code_is_kept(capsys):
    assert exit_of(lambda: None, capsys) == (0, "")
    assert exit_of(lambda: 3, capsys) == (3, "")


def test_a_closed_stdout_and_a_removed_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as caught:
        errors.run(lambda: None)
    assert caught.value.code == 0
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    code, err = exit_of(lambda: None, capsys)
    assert code == 2 and "has been removed; cd to one that is there" in err


def test_interrupt_exits_130(capsys):
    assert exit_of(raising(KeyboardInterrupt()), capsys) == (130, "interrupted\n")


def test_an_interrupted_command_ends_without_pythons_own_end():
    """A normal exit is a segmentation fault if a compilation was interrupted."""
    program = """if True:
    import atexit, sys
    from jaxtune import errors
    def main():
        print("said")
        raise KeyboardInterrupt
    atexit.register(print, "late")
    errors.run(main)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said\n", "interrupted\n")


@pytest.mark.parametrize("command", [("-m", "jaxtune.train"), ("-m", "jaxtune"), ("bin/jaxtune",)])
def test_ctrl_c_while_modules_are_imported(command, tmp_path, monkeypatch):
    for name in ("jax.py", "rich.py"):
        (tmp_path / name).write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); import nothing")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/jaxtune").write_text("from jaxtune.cli import main; main()")  # as pip writes it
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # an xdist worker's processes ignore it
    program = f"{heard}; os.execv(sys.executable, [sys.executable, *{command}, 'train'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_users_package_keeps_its_ctrl_c(tmp_path):
    """`python -m mine`, whose `__init__` imports jaxtune."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import jaxtune, signal; print(signal.getsignal(signal.SIGINT) is jaxtune._interrupted)")
    (tmp_path / "mine/__main__.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, '-m', 'mine'])"
    done = subprocess.run([sys.executable, "-c", heard], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_ctrl_c_while_python_ends_is_quiet():
    program = "import atexit, os, signal; from jaxtune import errors; atexit.register(os.kill, os.getpid(), signal.SIGINT); errors.run(int)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "the disk reports an error"),
        (errno.ENOTDIR, "is a file"),
        (errno.EMFILE, "ulimit -n"),
    ],  # fmt: skip
)
def test_the_machines_errors_become_a_sentence(number, says, capsys):
    code, err = exit_of(raising(OSError(number, os.strerror(number), "runs/first")), capsys)
    assert code == 2 and says in err and "runs/first" in err and "Traceback" not in err


def test_what_the_terminal_cannot_show_is_a_question_mark():
    program = "from jaxtune import errors; errors.run(lambda: print('caf\\u00e9'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"caf?\n"), done.stderr


def test_a_rename_that_failed_names_the_file_that_is_known(capsys):
    _, err = exit_of(raising(OSError(errno.EISDIR, "Is a directory", ".run.1.json", None, "run.json")), capsys)
    assert err.startswith("error: run.json: a folder stands")


def test_a_wrapped_or_textual_disk_error_is_found(capsys):
    def wrapped():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "checkpoints/3")
        except OSError as error:
            raise RuntimeError("async save failed") from error

    assert "checkpoints/3: the disk is full" in exit_of(wrapped, capsys)[1]
    text = ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left on device]")
    code, err = exit_of(raising(text), capsys)
    assert code == 2 and "disk is full" in err


def test_lack_of_memory_says_what_to_do(capsys):
    code, said = exit_of(lambda: jnp.zeros(2**45).block_until_ready(), capsys)
    assert code == 2 and said.startswith("error: out of memory (RESOURCE_EXHAUSTED") and "per_device_train_batch_size" in said
    code, said = exit_of(raising(MemoryError()), capsys)
    assert code == 2 and said.startswith("error: out of memory; take fewer rows")


def test_devices_that_cannot_be_started_are_told(capsys, monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.devices", devices)
    code, err = exit_of(raising(AssertionError()), capsys)
    assert code == 2 and "JAX_PLATFORMS=cuda asks for (none was found); unset it" in err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        errors.run(raising(FileNotFoundError(errno.ENOENT, "No such file", "x")))


def test_an_interrupt_that_python_ignores_comes_again(capsys):
    """In a garbage-collector callback it is swallowed. One that arrives between Python's last check and the wait is noticed at the end of
    the wait, so the waits are short."""

    def callback(phase, info):
        if phase == "stop":
            gc.callbacks.remove(callback)
            raise KeyboardInterrupt

    def main():
        gc.callbacks.append(callback)
        gc.collect()
        while time.monotonic() - started < 30:
            time.sleep(0.05)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # an xdist worker receives none
    started = time.monotonic()
    try:
        code, _ = exit_of(main, capsys)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and time.monotonic() - started < 20


@pytest.mark.parametrize("show", ["print", "rich.console.Console().print"])
def test_a_closed_pipe_is_quiet(show):
    program = f"import rich.console\nfrom jaxtune import errors\nerrors.run(lambda: [{show}('x' * 100) for _ in range(10000)] and None)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), err) == (141, b"")
