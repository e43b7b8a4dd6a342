"""Where the reference model comes from, what it costs, and when cached log-probabilities are found again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxtune import data, parallel, peft, reference
from jaxtune.config import LoraConfig, MeshConfig, load_config
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import open_model, read_model
from jaxtune.errors import ConfigError
from jaxtune.objectives import OBJECTIVES, answers
from jaxtune.step import how_to_compute, init_state, make_eval_step, make_step

ROWS = [{"prompt": "the quick brown " * (1 + n % 3), "chosen": " fox" * (1 + n % 4), "rejected": " dog" * (1 + n % 3)} for n in range(8)]




@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models of one shape, an adapter for them, and rows."""
    folder = tmp_path_factory.mktemp("reference")
    for number, name in enumerate(("model", "other")):
        tiny.write_chat_model(folder / name, tiny.LLAMA, seed=number)
    tiny.write_rows(folder, ROWS)
    model = read_model(open_model(str(folder / "model")))
    peft_files.save_adapter(trained(model, 0), model, folder / "adapter")
    return folder


def trained(model, seed):
    """An adapter that has been trained somewhere."""
    rng = np.random.default_rng(seed)
    fresh = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def opened(home):
    return open_model(str(home / "model"))


@pytest.fixture(scope="module")
def model(opened):
    return read_model(opened)


@pytest.fixture(scope="module")
def adapter(model):
    return trained(model, 1)


@pytest.fixture
def run(home, tmp_path):
    def make(**keys):
        rows = {
            "train": str(home / "rows.jsonl"),
            "max_length": 24,
            "cache_dir": str(tmp_path / "cache"),
            "packing": False,
            "shuffle": False,
        }
        return load_config({"model": str(home / "model"), "objective": "dpo"} | keys | {"data": rows | keys.get("data", {})})

    return make


def prepare(config, opened, model, trainable):
    rows = data.load(config, opened.tokenizer)
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    return reference.prepare(config, opened, model, trainable, rows, mesh), rows


def loss(config, model, trainable, base, rows):
    batch = jax.tree.map(lambda x: x[0], rows.train.batch_at(0))
    out = jax.jit(make_eval_step(config, model.config, OBJECTIVES[config.objective]))(trainable, base, batch)
    return float(out.total / out.weight)


# ---- what it is ----


@pytest.mark.parametrize("keys", [{"objective": "dpo", "ld_alpha": 0.5}, {"objective": "kto"}], ids=str)
def test_computed_beforehand_is_the_same_and_found_again(run, opened, model, adapter, monkeypatch, keys):
    config = run(**keys, precompute_ref_log_probs=True)
    base, rows = prepare(config, opened, model, adapter)
    assert base is model.params and rows.train.ref_logps is not None
    each_step = run(**keys)
    now = loss(each_step, model, adapter, model.params, data.load(each_step, opened.tokenizer))
    nothing = model.params | {answers.REFERENCE: {}}  # a reference that cannot be evaluated
    assert loss(config, model, adapter, nothing, rows) == pytest.approx(now, rel=1e-5)
    monkeypatch.setattr(reference, "answer_logprobs", None)  # nothing may be computed again
    _, again = prepare(run(**keys, precompute_ref_log_probs=True, seed=7, gradient_accumulation_steps=2), opened, model, adapter)
    assert (again.train.ref_logps == rows.train.ref_logps).all()


def test_full_tuning_is_held_to_where_it_began(run, opened, model):
    config = run(method="full")
    base, rows = prepare(config, opened, model, model.params)
    assert base == {} and rows.train.ref_logps is not None
    assert loss(config, model, model.params, {}, rows) == pytest.approx(np.log(2), abs=1e-5)


def test_a_fresh_adapter_begins_at_log_two(run, model):
    config = run()
    fresh = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
    assert loss(config, model, fresh, model.params, data.load(config, model.tokenizer)) == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["the adapter it began as", "another adapter", "a checkpoint"])
def test_an_adapter_or_a_checkpoint_as_reference(run, home, opened, model, adapter, kind):
    keys = {
        "the adapter it began as": {"init_adapter": str(home / "adapter")}, "another adapter": {"ref_model": str(home / "adapter")},
        "a checkpoint": {"ref_model": str(home / "other")},
    }  # fmt: skip
    config = run(**keys[kind])
    model = dataclasses.replace(model, config=how_to_compute(config.replace(dtype="float32"), model.config, tiny.mesh_on("cpu")))
    start = peft_files.load_adapter(home / "adapter", model)
    base, rows = prepare(config, opened, model, start)
    whole = kind == "a checkpoint"
    want = read_model(open_model(str(home / "other"))).params if whole else peft.compose(model.params, start)
    batch = jax.tree.map(lambda x: x[0], rows.train.batch_at(0))
    logps = jax.jit(lambda tree: answers.answer_logprobs(config, model.config, tree, batch).logp_BS)
    found = jax.jit(lambda tree: answers.reference_logps(config, model.config, tree, batch))(base)
    np.testing.assert_allclose(found, logps(want), rtol=1e-5)
    assert np.abs(found - logps(model.params)).max() > 0.1
    assert base["embed"] is model.params["embed"] and (whole or base[answers.REFERENCE]["embed"] is model.params["embed"])


def test_a_reference_of_another_shape_is_refused(run, home, opened, model, adapter, monkeypatch):
    tiny.write_chat_model(home / "wide", tiny.LLAMA | {"hidden_size": 48})
    with pytest.raises(ConfigError, match="has another architecture than the model .*hidden_size 48 instead of 32"):
        prepare(run(ref_model=str(home / "wide")), opened, model, adapter)
    mixed = dataclasses.replace(open_model(home / "other"), config=dataclasses.replace(model.config, cuts=(1,)))
    monkeypatch.setattr("jaxtune.reference.open_model", lambda _: mixed)
    with pytest.raises(ConfigError, match="leaves some modules of some layers dense"):
        prepare(run(ref_model=str(home / "other")), opened, model, adapter)


# ---- the cache ----


def test_what_another_base_adapter_or_other_rows_give_is_computed_anew(run, home, opened, model, adapter, monkeypatch, tmp_path):
    computed = []

    def compute(config, model, tree, source, mesh):
        computed.append(config)
        source.ref_logps = np.full(int(source.units.answers.sum()), len(computed), np.float32)

    monkeypatch.setattr(reference, "_compute", compute)

    def number(opened=opened, **keys):
        """Which computation the log-probabilities came from."""
        _, rows = prepare(run(**keys, precompute_ref_log_probs=True), opened, model, adapter)
        return int(rows.train.ref_logps[0])

    assert number() == 1 and number(seed=5, beta=0.7, learning_rate=1e-3, data={"shuffle": True, "packing": True}) == 1
    assert number(opened=open_model(str(home / "other"))) == 2
    assert number(init_adapter=str(home / "adapter")) == 3 == number(init_adapter=str(home / "adapter"))
    assert number(ref_model=str(home / "other")) == 4
    assert number(ld_alpha=0.5) == 5 and number(data={"system": "Be brief."}) == 1  # plain prompts have no system turn
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    assert number(data={"train": str(tmp_path / "fewer.jsonl")}) == 6
    peft_files.save_adapter(trained(model, 2), model, tmp_path / "adapter")
    assert number(init_adapter=str(tmp_path / "adapter")) == 7
    assert number() == 1 and len(computed) == 7


# ---- what it costs ----


@pytest.fixture(scope="module")
def costs(model, adapter):
    """Ahead of time: bytes of the compiled step's arguments, and its products."""

    def of(config, base, batch):
        step = jax.jit(make_step(config, model.config, OBJECTIVES[config.objective], optax.sgd(1.0)))
        made = step.lower(init_state(adapter, optax.sgd(1.0), 0), base, batch).compile()
        return made.memory_analysis().argument_size_in_bytes, made.cost_analysis()["flops"]

    return of


def test_the_base_as_reference_takes_no_bytes_and_beforehand_no_flops(run, model, costs):
    config = run()
    batch = data.load(config, model.tokenizer).train.batch_at(0)
    known = batch.replace(answers=batch.answers.replace(ref_logps=batch.answers.values))
    own, each_step = costs(config, model.params, batch)
    beforehand, less = costs(config, model.params, known)
    second, _ = costs(config, model.params | {answers.REFERENCE: jax.tree.map(jnp.copy, model.params)}, batch)
    sft, of_sft = costs(run(objective="sft", data={"train": []}), model.params, batch)
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert abs(own - sft) <= batch.answers.numbers.nbytes < 0.1 * weights < second - own
    assert beforehand - own == known.answers.ref_logps.nbytes
    assert less < 1.02 * of_sft and each_step > 1.2 * less


def test_sharing_prompts_costs_fewer_flops(run, model, costs):
    """The same eight pairs in a step, with the prompt once and twice."""
    made = []
    for share in (True, False):
        config = run(precompute_ref_log_probs=True, data={"shared_prompts": share})
        batch = data.load(config, model.tokenizer).train.batch_at(0)
        made.append((int((batch.segments > 0).sum()), costs(config, model.params, batch)[1]))
    assert made[0][0] < 0.85 * made[1][0] and made[0][1] < 0.85 * made[1][1]


# ---- a reference that moves ----


def test_the_reference_follows_every_few_steps(run, model):
    """TR-DPO: after steps 2, 4, ... `(1 - alpha) reference + alpha policy`; unchanged in between."""
    config = run(method="full", sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=2)
    batch = data.load(config, model.tokenizer).train.batch_at(0)
    step = jax.jit(make_step(config, model.config, OBJECTIVES["dpo"], optax.sgd(0.1)))
    history = [init_state(model.params, optax.sgd(0.1), 0, config.sync_ref_model)]
    margins = []
    for _ in range(3):
        state, metrics = step(history[-1], {}, batch)
        history.append(state)
        margins.append(float(metrics["rewards/margins"]))
    start, one, two, three = (np.asarray(state.trainable["layers"]["0"]["down"]) for state in history)
    references = [np.asarray(state.reference["layers"]["0"]["down"]) for state in history]
    assert (references[1] == start).all() and not np.allclose(start, two)
    np.testing.assert_allclose(references[2], 0.4 * start + 0.6 * two, rtol=1e-6)
    assert (references[3] == references[2]).all() and not np.allclose(two, three) and not np.allclose(one, two)
    assert abs(margins[0]) < 1e-4 < margins[1] and margins[2] < 0.4 * 2.5 * margins[1]


def test_an_adapter_is_copied_whole(run):
    assert run(sync_ref_model=True, ref_model_mixup_alpha=1.0).ref_model_mixup_alpha == 1.0
    with pytest.raises(ConfigError, match="write ref_model_mixup_alpha: 1"):
        run(sync_ref_model=True)
