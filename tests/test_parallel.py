"""Meshes of eight fake devices: the numbers of one device, and a compiled program with the intended sharding."""

import dataclasses
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxtune import parallel, peft
from jaxtune.config import LoraConfig, MeshConfig, load_config
from jaxtune.convert.load import load, open_model, read_model
from jaxtune.data.batch import Answers, Batch
from jaxtune.errors import ConfigError
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.answers import answer_logprobs
from jaxtune.objectives.distill import TEACHER, Teacher
from jaxtune.step import init_state, make_step

DENSE = tiny.LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64, "hidden_size": 512, "head_dim": 8}
DENSE |= {"num_hidden_layers": 2, "attention_bias": False}
MOE = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "architectures": ["MixtralForCausalLM"]}
# data, fsdp, tensor, sequence. tests/laws/test_batches.py covers SFT with all methods over meshes of three axes; the rest is here.
CASES = {
    ("dense", "full", "sft"): [(1, 8, 1, 1), (2, 1, 1, 4)],
    ("dense", "qlora", "dpo"): [(1, 8, 1, 1)],
    ("moe", "qlora", "sft"): [(8, 1, 1, 1)],
    ("moe", "full", "sft"): [(2, 2, 2, 1)],
    ("moe", "lora", "dpo"): [(1, 2, 2, 2)],
}
if os.environ.get("JAXTUNE_ALL_MESHES"):  # minutes
    meshes = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (2, 1, 1, 4), (1, 2, 2, 2)]
    CASES = {case: meshes for case in itertools.product(("dense", "moe"), ("full", "lora", "qlora"), ("sft", "dpo", "distill"))}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def mesh_of(sizes):
    return parallel.make_mesh(MeshConfig(**dict(zip(parallel.AXES, sizes, strict=True))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for name, hf in (("dense", DENSE), ("moe", MOE)):
        # this wide, because otherwise rounding grows
        tensors = {key: x if x.ndim == 1 else x * 0.3 for key, x in tiny.hf_tensors(hf).items()}
        tiny.write(folder / name, hf, tensors)
    return folder


def make_batch(rows=8, length=32, answers=False):
    """Rows of two documents (one pair of answers each), followed by some padding."""
    rng = np.random.default_rng(0)
    batch = Batch.empty((1, rows, length), answers=2 if answers else 0)
    batch.tokens[:] = rng.integers(1, 90, batch.tokens.shape)
    for number, (start, stop) in enumerate([(0, 13), (13, 29)], 1):
        batch.segments[..., start:stop], batch.positions[..., start:stop] = number, np.arange(stop - start)
        batch.weights[..., start + 4 : stop] = 1
        if answers:
            batch.answers.numbers[..., start + 4 : stop] = number
    batch.weights[:, 3, 10:] = 0  # rows of different weight, so that a mean of means would be noticed
    if answers:
        batch = dataclasses.replace(batch, answers=Answers(batch.answers.numbers, batch.answers.values))
    return batch


@pytest.fixture
def float64(monkeypatch):
    """The same code in float64: whatever says float32 means float64.

    Rounding grows by a factor of about 1000 from loss to gradient here, so float32 differs by 1e-4 between two meshes, which could hide a
    fault; in float64 the same factor leaves 1e-12.
    """
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


class Case:
    """One step of plain gradient descent with rate 1: the change of what is trained is the gradient."""

    def __init__(self, folder, kind, method, objective):
        self.config = load_config(
            {"model": str(folder / kind), "method": method, "objective": objective, "data": {"train": "none"}, "max_grad_norm": 0}
            | {"dpo": {"beta": 0.5}, "distill": {"teacher": "its start", "kd_ratio": 0.7}}.get(objective, {})
        )
        model = read_model(open_model(folder / kind), quantization=self.config.quantization)
        self.params = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == np.float32 else x, model.params)
        self.model_config = dataclasses.replace(model.config, dtype="float64", remat="full")
        self.trainable = self.params if method == "full" else peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
        rng, size = np.random.default_rng(0), 0.01 if method == "full" else 0.1  # away from its initial value, which is DPO's reference
        self.trainable = jax.tree.map(lambda x: np.asarray(x + size * rng.standard_normal(x.shape)), self.trainable)
        self.one = self.step(None)

    def place(self, mesh):
        """What is trained, the base and the batch, on `mesh`."""
        base, trainable, batch = self.params, self.trainable, make_batch(answers=self.config.objective == "dpo")
        if mesh is not None:
            base = parallel.place(base, parallel.param_shardings(mesh, self.model_config, base))
            trainable = parallel.place(trainable, parallel.trainable_shardings(mesh, self.model_config, trainable))
            batch = parallel.put(batch, mesh)
        if self.config.objective == "distill":
            return trainable, {TEACHER: Teacher(base, self.model_config)}, batch
        if self.config.method != "full":
            return trainable, base, batch
        if batch.answers is not None:  # its initial log-probabilities are computed beforehand, as in jaxtune/reference.py
            logps = jax.jit(lambda params, rows: answer_logprobs(self.config, self.model_config, params, rows).logp_BS)
            before = logps(base, jax.tree.map(lambda x: x[0], batch))
            batch = batch.replace(answers=batch.answers.replace(ref_logps=before[None]))
        return trainable, {}, batch

    def step(self, mesh):
        trainable, base, batch = self.place(mesh)
        step = jax.jit(make_step(self.config, self.model_config, OBJECTIVES[self.config.objective], optax.sgd(1.0), mesh=mesh))
        state = init_state(trainable, optax.sgd(1.0), 0)
        whole = mesh is not None and mesh.shape["fsdp"] == mesh.size  # whose program is examined; the others need not be good ones
        compiled = step.lower(state, base, batch).compile(compiler_options=tiny.OF_USERS if whole else QUICKLY)
        self.text = compiled.as_text()
        after, metrics = compiled(state, base, batch)
        change = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.trainable, self.trainable)
        return {name: float(value) for name, value in metrics.items()}, change


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_mesh_computes_what_one_device_does(folders, case, float64):
    expected = Case(folders, *case)
    for sizes in CASES[case]:
        metrics, change = expected.step(mesh_of(sizes))
        for name, value in expected.one[0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-10, err_msg=f"{sizes} {name}")
        for one, other in zip(jax.tree.leaves(expected.one[1]), jax.tree.leaves(change), strict=True):
            assert np.linalg.norm(other - one) <= 1e-10 * np.linalg.norm(one), (sizes, one.shape)
        if sizes == (1, 8, 1, 1):
            check_program(expected.text, case[1])


def check_program(text, method):
    """With fsdp over eight devices: rows are sharded everywhere, weights are gathered one layer at a time, quantised ones in quantised
    form."""
    assert not re.search(r"f64\[8,32,(512|64)\]", text)  # the hidden states of all rows, on one device
    gathers = [(where, shape) for where, kind, shape in collectives(text) if kind == "all-gather"]
    stacks = [shape for _, shape in gathers if re.match(r"\w+\[2,\d+,\d+\]", shape)]
    assert not stacks  # both layers at once
    outside = {shape.partition("{")[0] for where, shape in gathers if where == "ENTRY"}
    assert outside <= {"s32[8,32,1]", "f64[512]", "f64[96,512]", "f64[512,96]"}, outside  # token ids, the last norm, the head
    packed = [shape for where, shape in gathers if where != "ENTRY" and shape.startswith("u8")]
    dense = [shape for where, shape in gathers if where != "ENTRY" and re.match(r"f64\[(64|32),512\]|f64\[512,64\]", shape)]
    assert (packed and not dense) if method == "qlora" else dense


def collectives(text):
    """`(computation, kind, shape)` of every collective in a compiled program."""
    where = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            where = line.split()[0]
        if found := re.match(r"\s+\S+ = (\S+|\([^)]*\)) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", line):
            yield where, found[2], found[1]


def test_a_dimension_that_does_not_divide_names_the_choices(folders):
    with pytest.raises(ConfigError, match=r"mesh.tensor is 8; layers/0/k is \(32, 512\).*divides by 1, 2, 4, 8|mesh.fsdp is 3.*divides by"):
        devices = jax.devices()[:3]
        read_model(open_model(folders / "dense"), mesh=parallel.make_mesh(MeshConfig(data=1, fsdp=3), devices))


@pytest.mark.parametrize("quantization", [None, "nf4-dq", "int8"])
def test_weights_read_by_shards_are_the_weights(folders, quantization):
    """Each device's part, read and quantised by itself, has the same bytes as the whole matrix split."""
    whole = load(folders / "moe", quantization=quantization)
    parts = read_model(open_model(folders / "moe"), quantization=quantization, mesh=mesh_of((1, 4, 2, 1)))
    assert jax.tree.structure(whole.params) == jax.tree.structure(parts.params)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    codes = jax.tree.leaves(parts.params["layers"]["0"]["q"])[0]
    assert codes.addressable_shards[0].data.size == codes.size // 8


def test_zero_1_cuts_the_optimiser_and_nothing_else(folders):
    """The same numbers with an eighth of Adam's bytes on each device."""
    opened, results, sizes = open_model(folders / "dense"), [], []
    config = load_config({"model": str(folders / "dense"), "method": "full", "data": {"train": "none"}, "max_grad_norm": 0})
    mesh, batch = mesh_of((8, 1, 1, 1)), make_batch()
    for stage in (0, 1):
        model = read_model(opened, mesh=mesh)
        optimizer = optax.adam(1e-3)
        own = jax.tree.map(lambda leaf: leaf.sharding, model.params)
        make = lambda trainable: init_state(trainable, optimizer, 0)  # noqa: B023, E731
        where = parallel.state_shardings(mesh, jax.eval_shape(make, model.params), model.params, own, stage)
        state = jax.jit(make, out_shardings=where)(model.params)
        step = jax.jit(make_step(config, model.config, OBJECTIVES["sft"], optimizer, mesh=mesh), out_shardings=(where, None))
        for _ in range(2):
            state, _ = step(state, {}, parallel.put(batch, mesh))
        sizes.append(sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state)))
        results.append(parallel.fetch(state.trainable))
    assert sizes[1] < 0.13 * sizes[0]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
