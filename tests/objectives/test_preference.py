"""Preference objectives with a model: the arrangement of pairs in rows, micro-batches and devices changes nothing; every method trains with
each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxtune import data, parallel, peft
from jaxtune.config import LoraConfig, MeshConfig, load_config
from jaxtune.convert.load import open_model, read_model
from jaxtune.errors import ConfigError
from jaxtune.model import decoder
from jaxtune.model.families import from_hf
from jaxtune.objectives import OBJECTIVES, answers
from jaxtune.startup import load_for_training
from jaxtune.step import init_state, make_step

WORDS = "the quick brown fox jumps over lazy dog then it says hello there".split()
ROWS = [
    {
        "prompt": " ".join(WORDS[: 3 + n % 6]), "chosen": " " + " ".join(WORDS[n : n + 2 + n % 5]),
        "rejected": " " + " ".join(WORDS[-3 - n % 4 :]),
    }
    for n in range(8)
]  # fmt: skip
ODD = [  # rows that are counted and trained on nevertheless: equal answers, an empty answer, no prompt
    {"prompt": "the fox", "chosen": " says", "rejected": " says"}, {"prompt": "the dog", "chosen": "", "rejected": " jumps"},
    {"prompt": "", "chosen": "hello there", "rejected": "over"},
]  # fmt: skip
SHAPE = tiny.LLAMA | {
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_bias": False, "sliding_window": 7,
}  # fmt: skip
BY_PAIR = [
    {"objective": "dpo", "loss_type": ["ipo", "sppo_hard"], "loss_weights": [1.0, 0.1], "ld_alpha": 0.5, "use_weighting": True},
    {"objective": "kto", "loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 16},
]
BY_MICRO_BATCH = [{"objective": "orpo"}, {"objective": "kto"}]




@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model, whose window is shorter than the rows, and rows."""
    folder = tmp_path_factory.mktemp("preference")
    tiny.write_chat_model(folder / "model", SHAPE)
    tiny.write_rows(folder, ROWS)
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5] + ODD))
    return folder


@pytest.fixture(scope="module")
def model(home):
    return read_model(open_model(str(home / "model")))


@pytest.fixture(scope="module")
def adapter(model):
    """One that has been trained somewhere."""
    rng = np.random.default_rng(0)
    fresh = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=4))
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def run(home):
    def make(objective=None, **keys):
        rows = {"train": str(home / "rows.jsonl"), "max_length": 64, "cache_dir": str(home / "cache"), "shuffle": False, "packing": False}
        top = {"model": str(home / "model"), "objective": "dpo", "per_device_train_batch_size": 8, "max_grad_norm": 0.0}
        top |= {"lora": {"r": 4}} | (objective or {})
        return load_config(top | {name: value for name, value in keys.items() if name != "data"} | {"data": rows | keys.get("data", {})})

    return make


@pytest.fixture(scope="module")
def gradient(model, adapter):
    """(metrics, gradient) of one step; the same step is taken once."""
    done = {}

    def of(config, mesh=None, pad=None):
        if (config, mesh, pad) not in done:
            rows = data.load(config, model.tokenizer).train
            assert rows.steps_per_epoch == 1
            step = jax.jit(make_step(config, model.config, OBJECTIVES[config.objective], optax.sgd(1.0)))
            trainable, base, batch = adapter, model.params, rows.batch_at(0)
            if mesh is not None:
                trainable = jax.device_put(adapter, parallel.trainable_shardings(mesh, model.config, adapter))
                base = jax.device_put(base, parallel.param_shardings(mesh, model.config, base))
                batch = jax.device_put(batch, parallel.batch_sharding(mesh))
            state, metrics = step(init_state(trainable, optax.sgd(1.0), 0), base, pad(batch) if pad else batch)
            change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), adapter, state.trainable)
            done[config, mesh, pad] = {name: float(value) for name, value in metrics.items()}, change
        return done[config, mesh, pad]

    return of


def assert_same(left, right, but=()):
    (metrics, grads), (other, other_grads) = left, right
    for name in metrics.keys() - set(but):
        np.testing.assert_allclose(metrics[name], other[name], rtol=2e-5, atol=1e-6, err_msg=name)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert scale > 1e-4
    for one, two in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * scale)


# ---- shared prompts ----


def test_shared_answers_have_the_log_probabilities_they_have_alone(run, model, adapter):
    """Against each document in its own row, through all its logits."""
    config = run()
    params = peft.compose(model.params, adapter)
    rows = data.load(config, model.tokenizer).train
    batch = jax.tree.map(lambda x: x[0], rows.batch_at(0))
    shared = jax.jit(lambda p, b: answers.answer_logprobs(config, model.config, p, b).logp_BS)(params, batch)
    tokens, masks = np.zeros((2, 16, 64), np.int32)
    for number in range(16):
        ids, mask = rows.documents[number]
        tokens[number, : len(ids)], masks[number, : len(ids)] = ids, mask
    logits = jax.jit(lambda p, t: decoder.forward(model.config, p, t))(params, tokens)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    alone = (logps * masks[:, 1:]).sum(-1)
    assert rows.units.saved.min() > 0 and rows.documents.lengths.max() > 2 * SHAPE["sliding_window"]
    np.testing.assert_allclose(shared.reshape(-1), alone, rtol=1e-5)


@pytest.mark.parametrize("keys", BY_PAIR[:1] + BY_MICRO_BATCH, ids=str)
def test_sharing_prompts_changes_no_number(run, gradient, keys):
    shared, apart = gradient(run(keys)), gradient(run(keys, data={"shared_prompts": False}))
    assert_same(shared, apart, but=("tokens",))
    assert shared[0]["tokens"] < apart[0]["tokens"]


def test_sharing_is_refused_where_positions_go_by_the_length_of_the_text():
    """Beyond the original length; see jaxtune/model/rope.py."""
    for kind, settings in (
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}),
    ):
        config = from_hf(SHAPE | {"rope_scaling": {"rope_type": kind, **settings}, "original_max_position_embeddings": 128})
        answers.check_shared_prompts(config, 128)
        with pytest.raises(ConfigError, match=f"129 tokens, and beyond 128 .*{kind}.* write data.shared_prompts: false"):
            answers.check_shared_prompts(config, 129)
    answers.check_shared_prompts(from_hf(SHAPE), 10_000)


# ---- law 4: how a batch is cut cannot matter ----


@pytest.mark.parametrize("keys", BY_PAIR, ids=str)
def test_accumulation_and_packing(run, gradient, keys):
    """Rows of several pairs, one in a micro-batch, the last micro-batches empty. KTO's margin is the mean of the micro-batches'."""
    cut = keys | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert_same(
        gradient(run(keys)),
        gradient(run(cut, data={"packing": True, "max_length": 128})),
        ("rewards/margins",) if keys["objective"] == "kto" else (),
    )


@pytest.mark.parametrize("keys", BY_MICRO_BATCH[1:], ids=str)
def test_mesh(run, gradient, keys):
    """Also for the losses computed per micro-batch, which spans all devices."""
    assert_same(gradient(run(keys)), gradient(run(keys), parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))))


@pytest.mark.parametrize("keys", BY_MICRO_BATCH, ids=str)
def test_rows_of_padding_count_for_nothing(run, gradient, keys):
    assert_same(gradient(run(keys)), gradient(run(keys), pad=padded))


def padded(batch):
    """The same rows followed by two empty ones, whose answers have arbitrary values."""

    def pad(x, fill=0):
        return np.concatenate([x, np.full_like(x[:, :2], fill)], axis=1)

    return jax.tree.map(pad, batch).replace(answers=jax.tree.map(pad, batch.answers).replace(values=pad(batch.answers.values, 1)))


# ---- every objective, by every method ----

OBJECTIVE_KEYS = [
    {"objective": "dpo"}, {"objective": "orpo"}, {"objective": "cpo"}, {"objective": "simpo"}, {"objective": "kto"},
    {"objective": "kto", "loss_type": "apo_zero_unpaired"},
]  # fmt: skip
METHODS = ("full", "lora", "qlora")


@pytest.fixture(scope="module")
def started(run):
    """For each method: what is trained, and what is not."""
    out = {}
    for method in METHODS:
        config = run(method=method, dtype="float32")
        model, trainable = load_for_training(config, open_model(config.model), parallel.make_mesh(MeshConfig(), jax.devices()[:1]))
        out[method] = model.config, trainable, {} if method == "full" else model.params
    return out


@pytest.mark.parametrize("number", range(len(OBJECTIVE_KEYS)))
def test_every_objective_trains_by_every_method_on_rows_that_are_odd_too(run, home, model, started, number):
    """Each objective's value is traced with all three methods; with one of them three steps are taken, and the loss falls (not for simpo,
    which is cpo's function). Every other objective shares prompts (which changes no number: above)."""
    share = number % 2 == 0
    config = run(OBJECTIVE_KEYS[number], data={"train": str(home / "odd.jsonl"), "shared_prompts": share})
    config = config.replace(max_grad_norm=1.0, per_device_train_batch_size=16)
    loaded, objective = data.load(config, model.tokenizer), OBJECTIVES[config.objective]
    assert loaded.ledger["train"][0]["problems"] == {"chosen_equals_rejected": [6], "empty_answer": [7], "no_prompt": [8]}
    for place, method in enumerate(METHODS):
        model_config, trainable, base = started[method]
        batch = loaded.train.batch_at(0)
        if method == "full" and config.objective in ("dpo", "kto"):
            batch = batch.replace(answers=batch.answers.replace(ref_logps=np.full_like(batch.answers.values, -20.0)))
        if place != (number + number // 3) % len(METHODS) or config.objective == "simpo":
            micro = jax.tree.map(lambda x: x[0], batch)
            loss = jax.eval_shape(lambda t, b, m: objective(config, model_config, peft.compose(b, t), b, m), trainable, base, micro)  # noqa: B023
            assert loss.total.shape == loss.weight.shape == () and loss.total.dtype == np.float32
            continue
        optimizer, losses = optax.adam(1e-3), []
        step, state = jax.jit(make_step(config, model_config, objective, optimizer)), init_state(trainable, optimizer, 0)
        for _ in range(3):
            state, metrics = step(state, base, batch)
            losses.append(float(metrics["loss"]))
            assert np.isfinite(float(metrics["grad_norm"])) and float(metrics["grad_norm"]) > 0
        assert losses[2] < losses[0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"loss_type": "sigmod"}, "loss_type sigmod is not one of objective dpo; did you mean sigmoid"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2 losses"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, "which bco_pair is not"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting weighs each pair"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "needs it to stay fixed"),
        ({"sync_ref_model": True}, "write ref_model_mixup_alpha: 1"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"objective": "orpo", "ref_model": "x"}, "ref_model is a key of objective dpo or kto"),
        ({"objective": "kto", "loss_type": ["kto", "kto"]}, "only objective dpo adds several up"),
    ],
)
def test_keys_that_cannot_work_say_so(run, keys, said):
    with pytest.raises(ConfigError, match=said):
        run(keys)


def test_defaults_of_objectives(run):
    assert run().loss_type == ("sigmoid",) and run().beta == 0.1
    assert run({"objective": "cpo"}).cpo_alpha == 1.0 and run({"objective": "simpo"}).cpo_alpha == 0.0
    assert run({"objective": "simpo"}).loss_type == ("simpo",) and run({"objective": "kto"}).loss_type == ("kto",)
