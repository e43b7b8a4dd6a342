"""Checkpoints: verified, the newest complete one, never deleting the last good one, onto another mesh."""

import hashlib
import json
import logging
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from jaxtune import parallel, peft
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import LoraConfig, MeshConfig, load_config
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import open_model, read_model
from jaxtune.errors import CheckpointError
from jaxtune.optim import optimizer
from jaxtune.step import init_state

SHAPE = tiny.LLAMA | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
NOTES = {"best_step": None}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny.write(folder, SHAPE)
    return folder


def make_state(folder, fsdp):
    """(model, a state of random numbers that is the same for any mesh) over that many devices of fsdp."""
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
    model = read_model(open_model(folder), mesh=mesh)
    adapter = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
    config = load_config({"model": str(folder), "data": {"train": "none"}})
    state = init_state(adapter, optimizer(config, 10), 0)
    rng = np.random.default_rng(0)
    noisy = lambda tree: jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape), x.dtype), tree)  # noqa: E731
    state = state.replace(trainable=noisy(state.trainable), opt_state=noisy(state.opt_state))
    own = parallel.trainable_shardings(mesh, model.config, state.trainable)
    return model, jax.device_put(state, parallel.state_shardings(mesh, state, state.trainable, own))


def same(left, right):
    left, right = (jax.tree.leaves(x.replace(key=jax.random.key_data(x.key))) for x in (left, right))
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


def test_notes_are_those_of_the_moment_they_are_saved_at(model_folder, tmp_path, monkeypatch):
    """They are written in the background, while the run changes its own copy."""
    _, state = make_state(model_folder, 1)
    checkpoints, notes, late = Checkpoints(tmp_path), {"losses": [1.0]}, []
    save = checkpoints.manager.save
    monkeypatch.setattr(checkpoints.manager, "save", lambda step, **given: late.append((step, given)))
    checkpoints.save(3, state, notes)
    notes["losses"].append(2.0)
    ((step, given),) = late
    save(step, **given)
    checkpoints.wait()
    assert checkpoints.restore(state)[1] == {"losses": [1.0]}
    checkpoints.close()


def test_onto_another_mesh_and_the_same_bytes(model_folder, tmp_path):
    """One device -> eight -> one: the state is the same, and so are the adapter's bytes and the arrays in the checkpoints."""
    digests, arrays = set(), []
    model, state = make_state(model_folder, 1)
    for number, following in enumerate((8, 1, 1)):
        saved = Checkpoints(tmp_path / str(number))
        saved.save(3, state, NOTES)
        saved.close()
        peft_files.save_adapter(parallel.fetch(state.trainable), model, tmp_path / f"adapter-{number}")
        digests.add(hashlib.sha256((tmp_path / f"adapter-{number}" / "adapter_model.safetensors").read_bytes()).hexdigest())
        whole = ocp.StandardCheckpointer().restore(tmp_path / str(number) / "3" / "state")  # by Orbax itself, whatever the mesh was
        arrays.append({name: np.asarray(x).tobytes() for name, x in whole.items()})
        model, like = make_state(model_folder, following)
        like = like.replace(trainable=jax.tree.map(jax.numpy.zeros_like, like.trainable))
        again = Checkpoints(tmp_path / str(number))
        restored, notes = again.restore(like)
        again.close()
        assert same(restored, state) and notes["best_step"] is None
        assert jax.tree.leaves(restored.trainable)[0].sharding == jax.tree.leaves(like.trainable)[0].sharding
        state = restored
    assert len(digests) == 1 and arrays[0] == arrays[1] == arrays[2]


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    for name, later in (("[lr=1]*", "plain"), ("other", "[a]")):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        checkpoints.prove(1, {"x": jax.numpy.arange(4.0)}, NOTES, keep=True)
        checkpoints.close()
        (tmp_path / name).rename(tmp_path / later)
        checkpoints = Checkpoints(tmp_path / later / "checkpoints")
        np.testing.assert_array_equal(checkpoints.restore({"x": jax.numpy.zeros(4)})[0]["x"], [0, 1, 2, 3])
        checkpoints.close()


def damage(folder, share=0.5):
    """Flip bytes of a checkpoint's largest file, from that fraction of it on."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    start = int(share * len(data))
    data[start : start + 64] = bytes(byte ^ 0xFF for byte in data[start : start + 64])
    file.write_bytes(data)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(model_folder, tmp_path, caplog):
    _, state = make_state(model_folder, 1)
    saved = Checkpoints(tmp_path / "run")
    for step in (1, 2):
        saved.save(step, state.replace(step=state.step + step), NOTES)
    saved.close()
    damage(tmp_path / "run" / "2")
    saved = Checkpoints(tmp_path / "run")
    with caplog.at_level(logging.WARNING, "jaxtune"):
        restored, _ = saved.restore(state)
    assert int(restored.step) == 1 and "checkpoint 2 is damaged" in caplog.text and "taking the one before it" in caplog.text
    damage(tmp_path / "run" / "1")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        saved.restore(state)
    saved.close()


@pytest.mark.parametrize("change", [lambda n: n["notes"].pop("best_step"), lambda n: n.pop("checksums"), lambda n: n.pop("sha256")])
def test_notes_that_were_changed(model_folder, tmp_path, change):
    _, state = make_state(model_folder, 1)
    saved = Checkpoints(tmp_path / "run")
    saved.save(1, state, NOTES | {"losses": [0.1, float("nan")]})
    saved.wait()
    assert np.isnan(saved.restore(state)[1]["losses"][1])
    file = tmp_path / "run" / "1" / "notes" / "metadata"
    notes = json.loads(file.read_text())
    change(notes)
    file.write_text(json.dumps(notes))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        saved.restore(state)
    saved.close()


def test_damage_anywhere_is_seen_or_harmless(model_folder, tmp_path):
    """Orbax raises many kinds of exceptions, depending on where the bytes are."""
    _, state = make_state(model_folder, 1)
    saved = Checkpoints(tmp_path / "run")
    saved.save(1, state, NOTES)
    saved.close()
    refused = 0
    for share in (0.0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999):
        folder = tmp_path / str(share)
        shutil.copytree(tmp_path / "run", folder)
        damage(folder / "1", share)
        copy = Checkpoints(folder)
        try:
            assert same(copy.restore(state)[0], state)
        except CheckpointError:
            refused += 1
        copy.close()
    assert refused >= 5


def test_the_limit_never_deletes_the_only_good_one(model_folder, tmp_path, monkeypatch):
    _, state = make_state(model_folder, 1)
    saved = Checkpoints(tmp_path / "run", keep=1)
    saved.save(1, state, NOTES)
    saved.wait()
    seen = []
    save = saved.manager.save
    monkeypatch.setattr(saved.manager, "save", lambda step, **kwargs: (save(step, **kwargs), seen.append(saved.steps())))
    saved.save(2, state, NOTES)
    assert (tmp_path / "run" / "1").is_dir()  # 2 is still being written: 1 is the only good one
    saved.close()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()] == ["2"]


def test_a_state_that_does_not_read_back_stops_the_run_before_it_is_long(model_folder, tmp_path, monkeypatch):
    _, state = make_state(model_folder, 1)
    saved = Checkpoints(tmp_path / "run")
    proven = saved.prove(1, jax.tree.map(lambda x: x.copy(), state), NOTES, keep=True)
    assert same(proven, state)
    monkeypatch.setattr(saved, "wait", lambda: (Checkpoints.wait(saved), damage(tmp_path / "run" / "2")))
    with pytest.raises(CheckpointError, match="checkpoint of step 2 does not read back.*another"):
        saved.prove(2, state, NOTES, keep=True)
    monkeypatch.undo()
    saved.close()
