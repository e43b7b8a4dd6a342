"""Laws 3 and 4: packing, accumulation, devices and meshes do not change the loss or the gradient."""

import json

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxtune import data, parallel, peft
from jaxtune.config import LoraConfig, MeshConfig, load_config
from jaxtune.convert.load import load
from jaxtune.data.batch import Batch
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.logprobs import token_logprobs
from jaxtune.step import init_state, make_step

WORDS = "the quick brown fox jumps over lazy dog then it says hello there".split()
# seven, so that eight devices or micro-batches include one without a row
PROMPTS = [(" ".join(WORDS[i : i + 1 + i % 4]), " ".join(WORDS[i : i + 2 + i % 5])) for i in range(7)]


@pytest.fixture(scope="module", params=["lora", "qlora", "full"])
def setup(request, tmp_path_factory):
    """(config of a run, model, trainable, base) with every dimension a multiple of four, so that any mesh fits."""
    folder = tmp_path_factory.mktemp("laws")
    shape = tiny.LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64, "hidden_size": 64, "vocab_size": 400}
    tokenizer = tiny.write_chat_model(folder / "model", shape)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": f" {c}"}) + "\n" for p, c in PROMPTS))
    rows = {"train": str(folder / "rows.jsonl"), "max_length": 64, "cache_dir": str(folder / "cache"), "shuffle": False}
    config = load_config({"model": str(folder / "model"), "method": request.param, "data": rows, "per_device_train_batch_size": 8})
    model = load(folder / "model", quantization="nf4-dq" if request.param == "qlora" else None)
    if request.param == "full":
        return config, model, tokenizer, model.params, {}
    adapter = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), adapter)
    return config, model, tokenizer, adapter, model.params


def gradient_step(setup, config, mesh=None, **batch_at):
    """(metrics, gradient) of one step of plain gradient descent with rate 1 and no clipping, where the gradient is the change."""
    run, model, tokenizer, trainable, base = setup
    config = run.replace(max_grad_norm=0.0, **config)
    rows = data.load(config, tokenizer).train
    step = jax.jit(make_step(config, model.config, OBJECTIVES["sft"], optax.sgd(1.0), mesh=mesh))
    batch = rows.batch_at(0, **batch_at)
    if mesh is not None:
        trainable = jax.device_put(trainable, parallel.trainable_shardings(mesh, model.config, trainable))
        base = jax.device_put(base, parallel.param_shardings(mesh, model.config, base))
        batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    state, metrics = step(init_state(trainable, optax.sgd(1.0), 0), base, batch)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), setup[3], state.trainable)
    return {name: float(value) for name, value in metrics.items()}, change


def assert_same(left, right):
    (metrics_l, grads_l), (metrics_r, grads_r) = left, right
    for name in metrics_l:
        np.testing.assert_allclose(metrics_l[name], metrics_r[name], rtol=2e-5, err_msg=name)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads_l))
    for one, other in zip(jax.tree.leaves(grads_l), jax.tree.leaves(grads_r), strict=True):
        # sums in another order differ by about 2e-5 here; a mean of means would differ by 1e-1
        np.testing.assert_allclose(one, other, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def whole(setup):
    return gradient_step(setup, {})


@pytest.fixture(scope="module")
def padded(setup):
    """The same step on rows that are not packed."""
    return gradient_step(setup, unpacked(setup))


def unpacked(setup):
    return {"data": setup[0].data.to_dict() | {"packing": False}}


@pytest.mark.parametrize("rows, accumulation", [(1, 8), (2, 4), (4, 2)])
def test_accumulation(setup, padded, rows, accumulation):
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    assert_same(padded, gradient_step(setup, unpacked(setup) | split))


def test_packing(padded, whole):
    assert_same(padded, whole)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_mesh(setup, whole, sizes):
    mesh = parallel.make_mesh(MeshConfig(**dict(zip(parallel.AXES, sizes, strict=False))))
    assert_same(whole, gradient_step(setup, {}, mesh))


def test_packed_rows_equal_rows_alone(setup):
    """Per token: two documents in a row, followed by padding, against each document alone and after left padding."""
    _, model, _, trainable, base = setup
    params = peft.compose(base, trainable)
    rng = np.random.default_rng(0)
    docs = [rng.integers(1, 90, n).astype(np.int32) for n in (7, 11)]

    def logps(doc_starts, length):
        batch = Batch.empty((1, length))
        for number, (start, doc) in enumerate(doc_starts, 1):
            where = slice(start, start + len(doc))
            batch.tokens[0, where], batch.positions[0, where], batch.segments[0, where] = doc, np.arange(len(doc)), number
            batch.weights[0, start + 1 : start + len(doc)] = 1
        out = token_logprobs(model.config, params, batch)
        return np.asarray(out.logp_BN)[np.asarray(out.weights_BN) > 0]

    packed = logps([(0, docs[0]), (7, docs[1])], 24)
    alone = np.concatenate([logps([(0, doc)], len(doc)) for doc in docs])
    padded = np.concatenate([logps([(5, doc)], 20) for doc in docs])
    np.testing.assert_allclose(packed, alone, atol=2e-5)
    np.testing.assert_allclose(padded, alone, atol=2e-5)


def test_pmap_is_the_same_step(setup, padded):
    """The step under `jax.pmap` with an axis name: each device has its rows, and the sums are added before they are divided."""
    run, model, tokenizer, trainable, base = setup
    config = run.replace(max_grad_norm=0.0, **unpacked(setup))
    batch = data.load(config, tokenizer).train.batch_at(0)
    devices = 4
    split = jax.tree.map(lambda x: x.reshape(1, devices, -1, x.shape[-1]).swapaxes(0, 1), batch)
    step = make_step(config, model.config, OBJECTIVES["sft"], optax.sgd(1.0), axis_name="rows")
    step = jax.pmap(step, "rows", devices=jax.devices()[:devices])
    repeat = lambda tree: jax.tree.map(lambda x: jax.numpy.stack([x] * devices), tree)  # noqa: E731
    state, metrics = step(repeat(init_state(trainable, optax.sgd(1.0), 0)), repeat(base), split)
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new[0]), trainable, state.trainable)
    assert_same(padded, ({name: float(value[0]) for name, value in metrics.items()}, change))
