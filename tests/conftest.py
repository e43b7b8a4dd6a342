"""Every test runs without a network, on eight fake CPU devices."""

import importlib.util
import mmap
import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub, which reads these once: an empty cache and no network.
_HOME = tempfile.mkdtemp(prefix="jaxtune-tests-")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    XDG_CACHE_HOME=_HOME,
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)


def _is_known(flag: str) -> bool:
    """Whether all parts of XLA that are installed know a flag: an unknown one ends the process. libtpu knows few of them, and one that was
    removed (this one, after jax 0.10) is still in the file, but not as a separate string."""
    library = Path(str(importlib.util.find_spec("jaxlib").origin)).parent / "libjax_common.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return whole.find(b"\0" + flag.encode() + b"\0") >= 0 and importlib.util.find_spec("libtpu") is None


# Collectives in one order on all fake devices: otherwise they deadlock if there are fewer cores (jaxtune/distributed.py).
_FLAGS = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
# Programs compiled here run once or twice: optimising them costs more than it saves (see `all_optimizations`), and XLA's older code
# generator for fusions takes a third of the time of the default one, with the same memory (JAXTUNE_TEST_PROGRAMS=users: the default
# everywhere).
if os.environ.get("JAXTUNE_TEST_PROGRAMS") != "users":
    if _is_known("xla_cpu_use_fusion_emitters"):
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a GPU test sets its own: JAX_PLATFORMS=cuda pytest ...

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure(config):
    shutil.rmtree(_HOME, ignore_errors=True)


MANY_MAPS = 15_000  # of the 65,530 that Linux allows a process: each compiled program takes a few, and exceeding the limit ends the process


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """After a module that leaves many compiled programs."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MANY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def all_optimizations():
    """For modules that check programs for other chips as compiled for users."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def steps_compiled(caplog):
    """Returns how many programs have been compiled for steps in this test: one per run, while its weights are read, if the predicted
    shapes are right."""
    with jax.log_compiles():
        yield lambda: sum("Finished XLA compilation of jit(step)" in record.message for record in caplog.records)
