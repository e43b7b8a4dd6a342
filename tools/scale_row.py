"""One row of the table in docs/scale.md: compile a training step for machines that are not here, and print bytes and collectives.

    python tools/scale_row.py docs/scale/llama-3.1-8b v5e-8 qlora mesh.data=1 mesh.fsdp=-1

A folder with a config.json will do for the model; weights are not needed. TPU targets take the package libtpu, GPU targets
jax-cuda13-plugin and jax-cuda13-pjrt (no card, no driver).
"""

import argparse
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hlo_proto  # noqa: E402
import jax  # noqa: E402
from hlo_proto import Instruction  # noqa: E402

from jaxtune import costs, parallel  # noqa: E402
from jaxtune.config import load_config  # noqa: E402
from jaxtune.convert.load import open_config  # noqa: E402
from jaxtune.plan_targets import errors_bytes, find_target  # noqa: E402
from jaxtune.shapes import abstract_step  # noqa: E402

KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def from_text(text: str) -> Iterator[Instruction]:
    """The collectives of a printed program; what is not in the entry computation itself counts as in a loop."""
    entry = False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        if match := re.match(rf"\s+(?:ROOT )?\S+ = (.*?) ((?:{KINDS})(?:-start)?)\(", line):
            shapes = [(kind, sizes) for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if kind in BYTES]
            sizes = [BYTES[kind] * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in shapes]
            yield Instruction(match[2], sizes, not entry)


def collectives(found: Iterable[Instruction]) -> dict[str, list[int]]:
    """Kind -> [number and bytes of results outside of loops, number and bytes within, each loop's body once]."""
    rows: dict[str, list[int]] = {}
    for one in found:
        kind = one.opcode.removesuffix("-start")
        if not re.fullmatch(KINDS, kind):
            continue
        sizes = one.sizes[len(one.sizes) // 2 :] if one.opcode.endswith("-start") else one.sizes  # operands and results
        row, place = rows.setdefault(kind, [0, 0, 0, 0]), 2 * one.in_loop
        row[place], row[place + 1] = row[place] + 1, row[place + 1] + sum(sizes)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("target")
    parser.add_argument("method")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--text", help="a file to write the compiled program to")
    given = parser.parse_intermixed_args()
    settings = {"model": given.model, "method": given.method, "data": {"train": "none", "max_length": 2048}, "max_steps": 100}
    settings |= {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    config = load_config(settings, given.overrides)
    where = find_target(given.target)
    mesh = parallel.make_mesh(config.mesh, where.devices)
    step, (state, base, batch), _ = abstract_step(config, open_config(config.model), mesh)
    held = costs.per_device((state, base))
    started, sizes = time.process_time(), " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    name = given.model.rstrip("/").rpartition("/")[2]
    settings = "".join(f", {text}" for text in given.overrides if not text.startswith("mesh."))
    head = f"| {name} {given.method}{settings} | {given.target}: {sizes} | {config.data.max_length} x {config.per_device_train_batch_size}"
    chip = f"{where.chip.memory / 2**30:.1f}" if where.chip.memory else "?"
    try:
        with where.lowering():
            compiled = step.lower(state, base, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = errors_bytes(str(error))
        if needed is None:
            raise
        print(f"{head} | {held / 2**30:.2f} | **{needed / 2**30:.2f}** of {chip}: does not fit | |", flush=True)
        return
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # of a v5p XLA cannot read its own asynchronous collectives (jax 0.10.2)
        found, text = hlo_proto.instructions(compiled.runtime_executable().serialize(), "jit_step"), None
    else:
        found = from_text(text)
    if given.text and text:
        Path(given.text).write_text(text)
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    said = []
    for kind, (n, size, inner, inner_size) in sorted(collectives(found).items()):
        parts = [f"{inner} of {inner_size / 2**20:.0f} MiB in loops"] if inner else []
        parts += [f"{n} of {size / 2**20:.0f} MiB outside"] if n else []
        said.append(f"{kind}: {', '.join(parts)}")
    fits = "" if where.chip.memory and peak <= where.chip.memory else ": does not fit"
    print(f"{head} | {held / 2**30:.2f} | {peak / 2**30:.2f} of {chip}{fits} | {'; '.join(said)} |", flush=True)
    print(f"compiled in {time.process_time() - started:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
