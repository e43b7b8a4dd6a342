"""What a killed process has left incomplete is removed, what a living one writes is not."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from jaxtune import errors
from jaxtune.convert.folders import new_folder
from jaxtune.disk import replacing
from jaxtune.errors import ModelError
from jaxtune.locks import lock, scratch_folder

HOLD = """
import sys, pathlib
from jaxtune.locks import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1]), "out") as folder:
    (folder / "part").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def aged(folder):
    os.utime(folder, (0, 0))
    return folder


def test_leftovers_of_killed_processes_alone_are_removed(tmp_path):
    living, dead, asked = (
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    )
    *folders, of_asked = [tmp_path / process.stdout.readline().strip() for process in (living, dead, asked)]
    dead.kill()
    dead.wait()
    asked.terminate()
    assert asked.wait() == -signal.SIGTERM and not of_asked.exists()
    with scratch_folder(tmp_path, "out"):
        assert all(folder.exists() for folder in folders)  # young: perhaps not locked yet
    for folder in folders:
        aged(folder)
    (tmp_path / ".other.1.partial").mkdir()
    aged(tmp_path / ".other.1.partial")
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("whole")
        assert folders[0].exists() and not folders[1].exists()
    assert (tmp_path / "out" / "file").read_text() == "whole" and (tmp_path / ".other.1.partial").exists()
    living.communicate("")
    assert living.returncode == 0 and not folders[0].exists()
    for process in (living, dead, asked):
        process.stdin.close()
        process.stdout.close()


def test_a_folder_that_cannot_be_made_and_a_file_that_was_not_finished(tmp_path):
    for place in ("/proc/nowhere/out", ""):
        with pytest.raises(ModelError, match="another folder|no name"), new_folder(place):
            pass
    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file.txt") as scratch:
        scratch.write_text("half")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.txt", "old")]


@pytest.mark.parametrize("args", [(errno.ENOSPC, "full", "a", None, "b"), ("2048 requested and 120 written",)])  # a copy's, numpy's
def test_a_full_disk_names_the_result(tmp_path, args):
    with pytest.raises(OSError) as caught, new_folder(tmp_path / "out") as folder, replacing(folder / "model"):
        raise OSError(*args)
    assert errors.explain(caught.value) == f"{tmp_path}/out: the disk is full; free some space, or write to another folder"
    assert not list(tmp_path.iterdir())


def test_a_result_folder_has_the_usual_rights_and_replaces_nothing(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    with pytest.raises(ModelError, match="nothing is overwritten"), new_folder(tmp_path / "late") as scratch:
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "of another").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "out", "plain"]


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    os.close(held)
    os.close(lock(tmp_path))
