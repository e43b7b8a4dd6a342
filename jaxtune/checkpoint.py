"""Training checkpoints (Orbax): the state after a step, the run's notes, and a checksum of every array.

Checkpoints are written asynchronously into a temporary folder and renamed, so a killed run leaves only complete ones. They are restored
only if every array matches its checksum; otherwise the previous checkpoint is used, with a warning.
"""

import gc
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxtune.errors import CheckpointError

log = logging.getLogger("jaxtune")
# Arrays of at least this many bytes are written in parts by all devices that hold a copy. Splitting compiles a program per device and shape
# (40 small arrays on 8 devices: 24 s before the first checkpoint was written), so smaller arrays are written whole by one device.
SLICE = 2**24


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int | None = None):
        """`keep`: how many checkpoints to keep besides the best one (None: all)."""
        self.keep, self.best = keep, None
        _hush_closed_loops()
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        one_file = "[" not in str(folder.absolute())  # Orbax finds a checkpoint's files with glob, where this character is special
        state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=one_file)
        handlers = {"state": state, "notes": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Start saving: returns once the arrays are copied from the devices; writing continues in the background."""
        if step in self.steps():
            self.manager.delete(step)  # a damaged checkpoint of this step, from before this run resumed
        flat = _flat(state)
        sums = {name: int(sum_) for name, sum_ in jax.device_get(_checksums(flat)).items()}
        saved = json.loads(json.dumps({"notes": notes, "checksums": sums}))  # copied now, since the run changes them while they are written
        saved["sha256"] = _sha256(saved)
        self.manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(flat), notes=ocp.args.JsonSave(saved)), force=True)
        self._prune(step)

    def prove(self, step: int, state: Any, notes: dict, keep: bool) -> Any:
        """Save the state, free it, read it back and compare: this shows early that the run can be resumed.

        Returns the restored state, which replaces the original so that memory never holds two copies. The checkpoint is deleted unless
        `keep`.
        """
        shapes = _shapes(state)
        self.save(step, state, notes)
        self.wait()
        jax.tree.map(lambda x: x.delete(), state)
        try:
            state = _unflat(state, self._read(shapes, step)[0])
        except CheckpointError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} does not read back as it was written ({error}), so this run could not be resumed; "
                f"look at the disk under {self.manager.directory}, or write output_dir: a folder on another one"
            ) from error
        if not keep:
            self.manager.delete(step)
        return state

    def _prune(self, unfinished: int | None = None) -> None:
        """Delete all but the newest `keep` checkpoints and the best. One still being written counts, but the last complete one always
        stays."""
        if self.keep is None:
            return
        whole = [step for step in self.steps() if step != unfinished]
        room = self.keep if unfinished is None else max(self.keep - 1, 1)
        for step in whole[:-room]:
            if step != self.best:
                self.manager.delete(step)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict]:
        """The newest complete checkpoint (or that of `step`), as a tree like `state` (arrays, or shapes with shardings), and its notes."""
        steps = self.steps() if step is None else [step]
        if not steps:
            raise CheckpointError(f"{self.manager.directory} holds no checkpoint; start without resume=true, in another folder")
        for number in reversed(steps):
            try:
                flat, notes = self._read(_shapes(state), number)
                return _unflat(state, flat), notes
            except CheckpointError as error:
                log.warning("checkpoint %d is damaged (%s)%s", number, error, "; taking the one before it" if number != steps[0] else "")
        raise CheckpointError(f"no checkpoint in {self.manager.directory} can be read; start again in another folder")

    def _read(self, shapes: dict[str, Any], step: int) -> tuple[dict[str, Any], dict]:
        """The leaves by path, and the notes, of one checkpoint; CheckpointError if it is damaged."""
        where = ocp.checkpoint_utils.construct_restore_args(shapes)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(shapes, restore_args=where), notes=ocp.args.JsonRestore())
        try:
            restored = self.manager.restore(step, args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises no narrower class for an array that cannot be decoded
            problem = str(error).splitlines()[0][:200]
        else:
            saved = restored.notes if isinstance(restored.notes, dict) else {}
            sums = jax.device_get(_checksums(restored.state))
            if saved.pop("sha256", None) != _sha256(saved):
                problem = "the notes beside it are not those that were saved"
            elif wrong := [name for name, sum_ in saved["checksums"].items() if int(sums[name]) != sum_]:
                problem = f"the checksum of {wrong[0]} does not agree"
            else:
                return restored.state, saved["notes"]
        _collect()
        raise CheckpointError(problem)

    def wait(self) -> None:
        """Wait until everything is written."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder."""
        try:
            self.wait()
            self._prune()
        except BaseException:
            _collect()
            raise
        finally:
            self.manager.close()


def _collect() -> None:
    """Garbage-collect failed reads and writes now and silently: Orbax's leftovers print complaints on stderr when they are collected."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def _hush_closed_loops() -> None:
    """Silence asyncio: reads and writes that outlive a failed one complain on stderr that their event loop is closed."""
    hook = sys.unraisablehook
    if hasattr(hook, "hushed"):
        return

    def heard(found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and "Event loop is closed" in str(found.exc_value)):
            hook(found)

    heard.hushed = hook
    sys.unraisablehook = heard


def _sha256(saved: dict) -> str:
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _flat(state: Any) -> dict[str, Any]:
    """Leaves by path; PRNG keys as the integers they consist of."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _shapes(state: Any) -> dict[str, Any]:
    """What to read from a checkpoint: shapes, dtypes and shardings."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(state))


def _unflat(state: Any, flat: dict[str, Any]) -> Any:
    """The inverse of `_flat`, as a tree like `state`."""

    def leaf(path, like):
        value = flat[_name(path)]
        return jax.random.wrap_key_data(value) if _is_key(like) else value

    return jax.tree_util.tree_map_with_path(leaf, state)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """For each array, the sum of its words, weighted by position, modulo 2^32: independent of the mesh, but sensitive to order."""

    def one(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros_like(words)
        for axis in range(words.ndim):
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(2654435761 + 2 * axis)
        return jnp.sum(words * (place | np.uint32(1)), dtype=jnp.uint32)

    return {name: one(x) for name, x in flat.items()}
