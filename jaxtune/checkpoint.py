"""Training checkpoints (Orbax): the state of a step, what was being done, and a checksum of every array.

Written asynchronously into a temporary folder and renamed, so that a killed run leaves only whole checkpoints behind. Restored only
if each array's checksum is the one it was saved with; otherwise the checkpoint before it is taken, and that is said.
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
# Bytes from which each device that holds a copy of an array writes a part of it. Cutting is a compilation for each device and shape (40
# small arrays over 8 devices: 24 s before the first checkpoint was written), so small ones are written whole by one of them.
SLICE = 2**24


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int | None = None):
        """`keep`: how many to keep besides the best one (None: all)."""
        self.keep, self.best = keep, None
        _hush_closed_loops()
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        one_file = "[" not in str(folder.absolute())  # Orbax finds the parts of one by glob, to which that means something else
        state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=one_file)
        handlers = {"state": state, "notes": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps there is a checkpoint of, the oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Begin to save; returns when the arrays are copied from the devices, writes in the background."""
        if step in self.steps():
            self.manager.delete(step)  # a damaged one, that this run has gone on from before
        flat = _flat(state)
        sums = {name: int(sum_) for name, sum_ in jax.device_get(_checksums(flat)).items()}
        saved = json.loads(json.dumps({"notes": notes, "checksums": sums}))  # as they are now: the run goes on while they are written
        saved["sha256"] = _sha256(saved)
        self.manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(flat), notes=ocp.args.JsonSave(saved)), force=True)
        self._prune(step)

    def prove(self, step: int, state: Any, notes: dict, keep: bool) -> Any:
        """Save, let the state go, read it back, compare: that a run can be resumed is known before it is long.

        Returns what was read, which takes the state's place, so that no second copy has to fit. Unless `keep`, the checkpoint goes.
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
        """Delete all but the newest `keep` and the best. One that is still being written takes a place, but the last whole one stays."""
        if self.keep is None:
            return
        whole = [step for step in self.steps() if step != unfinished]
        room = self.keep if unfinished is None else max(self.keep - 1, 1)
        for step in whole[:-room]:
            if step != self.best:
                self.manager.delete(step)

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict]:
        """The newest whole checkpoint (or that of `step`) as a tree like `state` (arrays or shapes with shardings), and its notes."""
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
        """The leaves by path, and the notes, of one checkpoint; CheckpointError where it is not whole."""
        where = ocp.checkpoint_utils.construct_restore_args(shapes)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(shapes, restore_args=where), notes=ocp.args.JsonRestore())
        try:
            restored = self.manager.restore(step, args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax's own for an array whose bytes do not decode is no narrower
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
        """Until everything begun has been written."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        try:
            self.wait()
            self._prune()
        except BaseException:
            _collect()
            raise
        finally:
            self.manager.close()


def _collect() -> None:
    """Let go of what failed now and without a word: what Orbax was still reading or writing complains on stderr when it is collected."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def _hush_closed_loops() -> None:
    """What Orbax still read or wrote when another part failed comes to its end later, finds nobody waiting and complains on stderr."""
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
    """Leaves by path; PRNG keys as the integers they are made of."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves}


def _shapes(state: Any) -> dict[str, Any]:
    """What to read of a checkpoint: shapes, dtypes and where they go."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(state))


def _unflat(state: Any, flat: dict[str, Any]) -> Any:
    """The inverse, as a tree like `state`."""

    def leaf(path, like):
        value = flat[_name(path)]
        return jax.random.wrap_key_data(value) if _is_key(like) else value

    return jax.tree_util.tree_map_with_path(leaf, state)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Per array the sum of its words, each weighted by its place, modulo 2^32: the same on any mesh, and not blind to order."""

    def one(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros_like(words)
        for axis in range(words.ndim):
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(2654435761 + 2 * axis)
        return jnp.sum(words * (place | np.uint32(1)), dtype=jnp.uint32)

    return {name: one(x) for name, x in flat.items()}
