"""Several processes, one run: JAX's multi-controller runtime, started from config keys or from the cluster's environment.

Every process runs the same program. Each has its own devices, reads its own rows and its own parts of the weights, and writes its own parts
of a checkpoint; only process 0 writes the log and the result.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune import errors
from jaxtune.config import DistributedConfig
from jaxtune.errors import ConfigError, JaxtuneError

log = logging.getLogger("jaxtune")
T = TypeVar("T")

HEARTBEAT = 30  # seconds of silence after which a process counts as lost
# On CPUs, independent collectives may run in different orders on different processes, and then deadlock.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
KEYS = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


class LostProcess(JaxtuneError):
    """Another process of the run has stopped."""


def start(config: DistributedConfig) -> None:
    """Join the other processes, if there are any; once per process, before the first device is used.

    Raises ConfigError for incomplete keys, and if the other processes cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    keys = _keys(config)
    if keys is None:
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", jax.config.jax_cpu_collectives_implementation or "gloo")
        os.environ["XLA_FLAGS"] = f"{IN_ORDER} {os.environ.get('XLA_FLAGS', '')}"
    try:
        jax.distributed.initialize(
            **keys, initialization_timeout=config.initialization_timeout, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=60
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of the run did not find each other ({str(error).splitlines()[0]}); start all of them with one "
            "distributed.coordinator_address (HOST:PORT of process 0), num_processes and process_id, or under srun or mpirun"
        ) from error
    if jax.process_count() > 1:
        errors.last_words.append(_leave)
        if not is_first():
            log.setLevel(logging.WARNING)
        log.info("process %d of %d, %d devices in all", jax.process_index(), jax.process_count(), jax.device_count())


def _keys(config: DistributedConfig) -> dict[str, Any] | None:
    """Arguments for initialisation: the three keys, {} to let jax ask the cluster, or None for a run of one process."""
    given: dict[str, Any] = {}
    for key, variable in KEYS.items():
        value = getattr(config, key)
        if value is None and variable in os.environ:
            value = os.environ[variable] if key == "coordinator_address" else _whole(variable)
        if value is not None:
            given[key] = value
    if given and config.initialize is not False:
        if missing := [key for key in KEYS if key not in given]:
            if _cluster() is None:
                names = " and ".join(f"distributed.{key} (or {KEYS[key]})" for key in missing)
                raise ConfigError(f"distributed has {', '.join(given)}, but no {names}; give all three, on each process")
            return given
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ConfigError(f"distributed.process_id is {given['process_id']}, but counts from 0 to {given['num_processes'] - 1}")
        return given | {"cluster_detection_method": "deactivate"}
    wanted = _cluster() is not None if config.initialize == "auto" else config.initialize
    return {} if wanted else None


def _whole(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(f"the environment says {variable}={os.environ[variable]!r}, which is not a whole number") from None


def _cluster() -> str | None:
    """Which launcher started this process as one of several, according to the environment; None if there is none."""
    sizes = {"Slurm": "SLURM_STEP_NUM_TASKS", "MPI": "OMPI_COMM_WORLD_SIZE"}
    for name, variable in sizes.items():
        if os.environ.get(variable, "1") not in ("", "1"):
            return name
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return "TPU" if len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ else None


def check_joined(config: DistributedConfig, answers: bool = False) -> None:
    """Raise ConfigError for a process that should have joined others but was started alone: a TPU slice whose hosts were not named.

    `answers`: whether the run generates answers at the end, which requires a single process.
    """
    if jax.process_count() > 1 and answers:
        raise ConfigError(
            f"evaluate.metric generates answers, which this run of {jax.process_count()} processes cannot; leave it out, and run "
            "python -m jaxtune.evaluate on the result"
        )
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is process {jax.process_index()} of {jax.process_count()}, but distributed.initialize is {config.initialize} and the "
            "environment names no cluster; write distributed.initialize=true, and jax asks the TPU's metadata server"
        )


def is_first() -> bool:
    """Whether this process writes the log and the result."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> None:
    """`function()` on process 0 alone. The others wait for it and raise the same JaxtuneError if it fails."""
    if jax.process_count() == 1:
        function()
        return
    message, error = np.zeros(2000, np.uint8), None
    if is_first():
        try:
            function()
        except JaxtuneError as raised:
            error = raised
            text = f"{type(raised).__name__} {raised}".encode()[: message.size]
            message[: len(text)] = np.frombuffer(text, np.uint8)
    text = multihost_utils.broadcast_one_to_all(message).tobytes().rstrip(b"\0").decode(errors="replace")
    if error is not None:
        raise error
    if text:
        kind, _, message = text.partition(" ")
        raise getattr(errors, kind, JaxtuneError)(message)


def lost(error: Exception, step: int) -> LostProcess:
    """The likely explanation when a program of several processes fails: another process has died."""
    reason = str(error).splitlines()[0][:200]
    return LostProcess(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on after step {step}: another process has probably stopped, "
        f"see what it said ({reason}). Start all of them again with resume=true"
    )


def _leave(code: int) -> None:
    """Exit immediately: a normal exit would wait for the other processes, which wait for this one, until they time out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
