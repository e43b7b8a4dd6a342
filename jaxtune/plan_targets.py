"""Machines to plan for, present or not: TPU topologies (through libtpu) and GPUs (through a target description).

XLA's own compiler gives the exact memory of a step for a chip that is not present; nothing runs on one.
"""

import contextlib
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

from jaxtune.errors import ConfigError
from jaxtune.gpu import GRANTED

GB = 10**9


class Chip(NamedTuple):
    """Figures of one accelerator: memory available to a program, its bandwidth (bytes/s), dense bfloat16 FLOP/s; None if unknown."""

    memory: int | None
    bandwidth: float | None = None
    flops: float | None = None


class Target(NamedTuple):
    """Devices to compile for, the figures of one of them and their source, and jax's name for a GPU that is not present."""

    name: str
    devices: list
    chip: Chip
    figures: str
    kind: str | None = None

    def lowering(self) -> contextlib.AbstractContextManager:
        """Inside this context, jax lowers kernels for the target: since 0.12 it takes the chip from the context, by default the local
        machine."""
        if self.kind is None:
            return contextlib.nullcontext()
        chip = jax.sharding.AbstractDevice(device_kind=self.kind, num_cores=None, platform="cuda")
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip))


# TPU: figures per chip (cloud.google.com/tpu/docs), memory as libtpu counts it; cores named per chip; dimensions and most chips of a slice
TPUS = {
    "v4": (Chip(int(31.25 * 2**30), 1228 * GB, 275e12), 2, 3, 4096),
    "v5e": (Chip(int(15.75 * 2**30), 819 * GB, 197e12), 1, 2, 256),
    "v5p": (Chip(int(95.0 * 2**30), 2765 * GB, 459e12), 2, 3, 4096),
    "v6e": (Chip(int(31.25 * 2**30), 1640 * GB, 918e12), 1, 2, 256),
    "7x": (Chip(int(94.74 * 2**30), 3690 * GB, 1153.5e12), 2, 3, 4096),  # a device is one of a chip's two cores, with half of its memory
}

# GPU: chip (all of its memory); compute capability; multiprocessors; L2 MiB; shared KiB per multiprocessor, per block at most; clock GHz
GPUS = {
    "rtx3090": (Chip(24 * 2**30, 936 * GB, 71e12), (8, 6), 82, 6, (100, 99), 1.70),
    "rtx4090": (Chip(24 * 2**30, 1008 * GB, 165e12), (8, 9), 128, 72, (100, 99), 2.52),
    "rtx5090": (Chip(32 * 2**30, 1792 * GB, 209e12), (12, 0), 170, 96, (100, 99), 2.41),
    "a10": (Chip(24 * 2**30, 600 * GB, 125e12), (8, 6), 72, 6, (100, 99), 1.70),
    "l4": (Chip(24 * 2**30, 300 * GB, 121e12), (8, 9), 58, 48, (100, 99), 2.04),
    "l40s": (Chip(48 * 2**30, 864 * GB, 362e12), (8, 9), 142, 96, (100, 99), 2.52),
    "a100-40": (Chip(40 * 2**30, 1555 * GB, 312e12), (8, 0), 108, 40, (164, 163), 1.41),
    "a100-80": (Chip(80 * 2**30, 2039 * GB, 312e12), (8, 0), 108, 40, (164, 163), 1.41),
    "h100": (Chip(84978434048, 3352 * GB, 989e12), (9, 0), 132, 50, (228, 227), 1.98),
    "h200": (Chip(141 * GB, 4800 * GB, 989e12), (9, 0), 132, 50, (228, 227), 1.98),
    "b200": (Chip(180 * GB, 8000 * GB, 2250e12), (10, 0), 148, 126, (228, 227), 1.96),
}
# compute capability -> a GPU that has it, by jax's name for it; only the capability is used
NAMES = {
    (8, 0): "NVIDIA A100", (8, 6): "NVIDIA A10", (8, 9): "NVIDIA L4", (9, 0): "NVIDIA H100", (10, 0): "NVIDIA B200",
    (12, 0): "NVIDIA RTX PRO 6000",
}  # fmt: skip


def find_target(name: str) -> Target:
    """The devices of a target: `here`, a TPU slice (`v5e-8`, `v5p-128`), or GPUs (`h100`, `8xh100`, `a100-80`).

    Slices have Google's names: v5e and v6e are counted in chips, v4, v5p and 7x in cores (two per chip).

    Raises ConfigError for an unknown name, and if the package that compiles for it is not installed.
    """
    text = name.lower().replace(" ", "").replace("nvidia-", "")
    if text == "here":
        return _here()
    if match := re.fullmatch(r"(?:tpu-?)?(?P<kind>v\d\w?|7x)-(?P<count>\d+)", text.replace("v7x", "7x")):
        if match["kind"] in TPUS:
            return _tpu(text, match["kind"], int(match["count"]))
    match = re.fullmatch(r"((?P<count>\d+)x)?(?P<kind>[a-z0-9-]+?)", text)
    kind = match["kind"] if match else ""
    kind = kind if kind in GPUS else f"rtx{kind}" if f"rtx{kind}" in GPUS else kind
    count = int(match["count"] or 1) if match else 0
    if kind not in GPUS or not count:
        raise ConfigError(f"target {name!r} is not known{_meant(text)}. There are: here (this machine); {', '.join(GPUS)}, several as "
                          f"8xh100; and TPU slices, {', '.join(f'{tpu}-8' for tpu in TPUS)}")  # fmt: skip
    return _gpu(text, kind, count)


def _meant(text: str) -> str:
    """A suggestion for a misspelt name."""
    if text in ("cpu", "gpu", "cuda", "tpu", "local", "localhost"):
        return "; for the local machine write here"
    turned = re.fullmatch(r"(?P<kind>[a-z0-9-]+?)[x*](?P<count>\d+)", text)
    if turned and turned["kind"] in GPUS:
        return f"; write {turned['count']}x{turned['kind']}"
    near = [known for known in GPUS if len(text) > 2 and (known.startswith(text) or text.startswith(f"{known}-"))]
    return f"; write {' or '.join(near)}" if near else ""


PUBLISHED = "memory and rates of the chip are the published ones"


def _here() -> Target:
    """The local machine: its memory as it reports it, its published rates if the tables contain the chip."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        memory = _host_memory()
        share = memory // len(jax.local_devices()) if memory else None
        return Target("here", devices, Chip(share), "memory is the machine's, whatever else is running; the rates of a CPU are not known")
    known = _known(kind)
    rates = "; rates are the published ones" if known.flops else "; rates are not known"
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return Target("here", devices, known._replace(memory=limit), f"{kind}: memory is what the device reports{rates}")
    instead = ", so it is the published one" if known.memory else ""
    return Target("here", devices, known, f"{kind} does not report its memory{instead}{rates}")


def _known(kind: str) -> Chip:
    """The row of the tables for a device's own name ("NVIDIA A100-SXM4-80GB", "TPU v5 lite")."""
    words = {"tpu v5": "v5p"}.get(kind.lower(), kind.lower()).replace(" lite", "e").replace("rtx ", "rtx").replace("tpu7x", "7x")
    tables = {name: row[0] for name, row in TPUS.items()} | {name: _granted(row[0]) for name, row in GPUS.items()}
    found = [name for name in tables if all(re.search(rf"(?<![a-z\d]){part}(?!\d)", words) for part in name.split("-"))]
    return tables[found[0]] if len(found) == 1 and "laptop" not in words else Chip(None)


def _granted(gpu: Chip) -> Chip:
    return gpu._replace(memory=int(GRANTED * gpu.memory)) if gpu.memory else gpu


def _host_memory() -> int | None:
    """Bytes of memory of this machine, or of the container this runs in."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            sizes.append(int(Path(file).read_text()))
    return min(sizes, default=None)


def _tpu(name: str, kind: str, count: int) -> Target:
    chip, cores, dimensions, most = TPUS[kind]
    if count % cores:
        raise ConfigError(f"target {name}: {kind} slices are named by cores, {cores} a chip; write {kind}-{count + 1}")
    chips = count // cores
    if not 0 < chips <= most or chips & (chips - 1):
        near = sorted({min(max(1 << n, 1), most) for n in (chips.bit_length() - 1, chips.bit_length()) if n >= 0})
        choices = " or ".join(f"{kind}-{n * cores}" for n in near)
        raise ConfigError(f"target {name}: slices of {kind} have 1, 2, 4, ... {most} chips; write {choices}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # without a TPU there is no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # of the local machine; it has none, and libtpu complains about that
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # it cannot determine them
    sides = _sides(chips, dimensions)
    extra = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if chips == 1 else {}
    kind = f"tpu{kind}" if kind == "7x" else kind
    topology = _topology("tpu", f"{kind}:{'x'.join(map(str, sides))}", "libtpu", "jaxtune[tpu]", extra)
    return Target(name, list(topology.devices), chip, PUBLISHED)


def _sides(chips: int, dimensions: int) -> list[int]:
    """The most cube-like slice of that many chips, smallest side first for 2 dimensions, last for 3 (`2x4`, `2x2x1`)."""
    sides = [1] * dimensions
    for _ in range(int(math.log2(chips))):
        sides[sides.index(min(sides))] *= 2
    return sorted(sides) if dimensions == 2 else sorted(sides, reverse=min(sides) == 1)


def _gpu(name: str, kind: str, count: int) -> Target:
    chip, (major, minor), processors, l2, (shared, optin), clock = GPUS[kind]
    threads = 1536 if minor or major == 12 else 2048
    units = 64 if (major, minor) == (8, 0) else 128
    text = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {optin * 1024}
      threads_per_core_limit: {threads} core_count: {processors} fpus_per_core: {units}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {l2 * 2**20} clock_rate_ghz: {clock}
      device_memory_size: {chip.memory}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{NAMES[major, minor]}"
    """
    hosts = next(n for n in range(math.ceil(count / 8), count + 1) if count % n == 0)
    extra = {"target_config": text, "topology": f"1x{hosts}x{count // hosts}"}
    both = f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} --no-deps"  # otherwise pip installs two versions
    topology = _topology("cuda", kind, "jax_cuda13_plugin", both, extra)
    figures = f"{PUBLISHED}; programs may use {GRANTED:.0%} of a GPU's memory"
    return Target(name, list(topology.devices), _granted(chip), figures, NAMES[major, minor])


def _topology(platform: str, name: str, module: str, package: str, extra: dict):
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(name, platform, **extra)
    except Exception as error:  # each backend raises its own errors for "not installed" and "no such topology"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"target {name} cannot be compiled for here: {reason}. It needs {module} (pip install {package})") from error


def errors_bytes(message: str) -> int | None:
    """The bytes that a RESOURCE_EXHAUSTED message says a program needs, or None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    words = r"(?:Used|needs?|requires?|allocating|allocate)\s+|memory required for [\w ]+\("
    match = re.search(rf"(?:{words})([\d.]+)\s*([KMGT]?)i?(?:B|b)?", message)
    if match is None:
        return None
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
