"""The exception classes, and the one place where a command turns an exception into a message and an exit code."""

import _thread
import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jaxtune
from jaxtune.gpu import grant_memory


class JaxtuneError(Exception):
    """A mistake that the user can correct; the message says what was given, why it cannot work, and what to write instead."""


class ConfigError(JaxtuneError):
    """A config key, config value or command-line argument."""


class DataError(JaxtuneError):
    """A data file or row."""


class CheckpointError(JaxtuneError):
    """A training checkpoint or a run folder."""


class ModelError(JaxtuneError):
    """A model, tokenizer or adapter file, or a switch in its config that is not implemented."""


def check_argument(name: str, value: object, kind: type | tuple[type, ...], instead: str) -> None:
    """ModelError if an argument of a function has the wrong type; `instead` says what to pass."""
    if not isinstance(value, kind):
        raise ModelError(f"{name} is of type {type(value).__name__}; {instead}")


_SYSTEM = {
    errno.ENOSPC: "the disk is full; free some space, or write to another folder",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another folder",
    errno.EFBIG: "the file becomes larger than its file system or the limit of this user (ulimit -f) allows; write to another folder",
    errno.EIO: "the disk reports an error (dmesg may say more); try again, or choose another disk",
    errno.ESTALE: "the network file system has lost this file; mount it again, or choose another folder",
    errno.EROFS: "the folder is on a read-only file system; write to another folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder; name another",
    errno.EISDIR: "a folder stands where a file belongs; move it away",
    errno.ENAMETOOLONG: "the name is too long for this file system; write a shorter one",
    errno.EPERM: "the system does not permit it; choose another file or folder",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n 4096), or take fewer data files at a time",
    errno.ENFILE: "the system has too many files open; close other programs, or raise fs.file-max",
    errno.EACCES: "permission denied; choose a file or folder that this user may use",
}


NO_MEMORY = "out of memory"  # the beginning of the message
_LESS_MEMORY = (
    "take fewer rows at a time (per_device_train_batch_size, --batch-size), shorter ones (data.max_length), method: qlora, or "
    "gradient_checkpointing: full or offload. jaxtune plan CONFIG.yaml says what takes the memory, before a run"
)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything it was raised from, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _no_devices() -> str | None:
    """After a failure: a message if jax cannot start the devices that JAX_PLATFORMS names. A partly installed plugin raises an
    AssertionError from an arbitrary place."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked or "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()
    except (RuntimeError, AssertionError) as error:
        said = _first_line(error) or "none was found"
        return f"jax cannot start the devices that JAX_PLATFORMS={asked} asks for ({said}); unset it, or write JAX_PLATFORMS=cpu"
    return None


def explain(error: BaseException) -> str | None:
    """A message for an error that the user or the machine causes; None for a bug of ours.

    Libraries (Orbax, TensorStore) wrap operating-system errors, sometimes only as text, so the whole chain and its messages are searched.
    """
    for link in _chain(error):
        if isinstance(link, JaxtuneError):
            return str(link)
        for number, reason in _SYSTEM.items():
            if isinstance(link, OSError) and link.errno == number:
                name = link.filename2 or link.filename  # for a rename, the name that the user knows
                return f"{name}: {reason}" if name else reason
            if os.strerror(number) in str(link):
                return f"{reason} ({str(link).splitlines()[0][:160]})"
        if isinstance(link, MemoryError) or "RESOURCE_EXHAUSTED" in str(link):  # XLA's word; TensorStore also uses it, for the errors above
            said = _first_line(link)
            return f"{NO_MEMORY}{f' ({said})' if said else ''}; {_LESS_MEMORY}"
    return None


def _check_folder() -> None:
    """Raise ConfigError if the current folder has been deleted; libraries that ask for it would only report "no such file"."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the folder that this command is run in has been removed; cd to one that is there") from None


def _flush(*streams: Any) -> None:
    for stream in streams:
        if stream is not None:  # closed by the shell (>&-)
            stream.flush()


leave = os._exit  # ends an interrupted command; tests replace it
last_words: list[Callable[[int], None]] = []  # called with the exit code after a command has failed and reported why


@contextlib.contextmanager
def _interrupts_heard() -> Iterator[None]:
    """Repeat a Ctrl-C that Python has swallowed: a KeyboardInterrupt raised in a garbage-collector callback (JAX has one, and imports
    trigger the collector often) is printed and ignored."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            before(found)
        elif hasattr(signal, "pthread_kill"):
            threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        else:  # Windows
            threading.Timer(0.02, _thread.interrupt_main).start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # another hook may wrap it by now and must stay until the end (checkpoint.py)
            sys.unraisablehook = before


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: with 0, or for a user's mistake with 2 and `error: ...` on stderr, without a traceback.

    Ctrl-C exits with 130 and a closed pipe with 141 (what a shell reports for these signals), both silently. Anything else is a bug and
    keeps its traceback. After Ctrl-C no atexit functions run: if it hit a compilation, Python's normal exit is a segmentation fault.
    """
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a character must not end the command
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    grant_memory()
    if signal.getsignal(signal.SIGINT) is jaxtune._interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _check_folder()
        with _interrupts_heard():
            code = main() or 0
        _flush(sys.stdout)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader (`| head`) is gone; redirect stdout so that the interpreter's own flush does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except SystemExit as left:
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        code = 141  # rich noticed the closed pipe first and exits with 1
    except Exception as error:
        message = explain(error) or _no_devices()
        if message is None:
            raise
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's abandoned tasks report the same error
        print(f"error: {message}", file=sys.stderr)
        code = 2
    if code:
        for function in last_words:
            function(code)
    if code == 130:
        _flush(sys.stdout, sys.stderr)
        leave(code)
    # The work is done, so Ctrl-C may end the process; Python would print a traceback from whatever cleanup is running.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
