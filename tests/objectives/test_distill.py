"""Distillation: the loss and its gradients from all logits at once, and a run whose student learns to agree with its teacher."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune import data, parallel
from jaxtune.config import MeshConfig, load_config
from jaxtune.convert.load import load, open_tokenizer
from jaxtune.data.batch import Batch
from jaxtune.data.units import prompt_of
from jaxtune.errors import ConfigError, DataError
from jaxtune.model.decoder import forward
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params
from jaxtune.objectives.distill import TEACHER, Teacher, distill
from jaxtune.on_policy import OnPolicy
from jaxtune.teacher import check_tokens
from jaxtune.train import train

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 80, (3, 11)).astype(np.int32)
WEIGHTS = (RNG.random((3, 11)) < 0.6).astype(np.float32) * RNG.random((3, 11)).astype(np.float32)
WEIGHTS[:, 0] = 0
BATCH = Batch(TOKENS, WEIGHTS, np.broadcast_to(np.arange(11, dtype=np.int32), (3, 11)), np.ones((3, 11), np.int32), capacity=10)


def model(seed, **keys):
    config = from_hf(tiny.LLAMA | {"num_hidden_layers": 1, "initializer_range": 0.3} | keys)
    return dataclasses.replace(config, logits_chunk=6), init_params(jax.random.key(seed), config)


def plain(config, student, teacher):
    """The loss from all logits, over the 80 tokens that both have."""
    logits, theirs = (forward(*one, TOKENS)[:, :-1] for one in (student, teacher))
    q, p = (jax.nn.softmax(x[..., :80] / config.temperature) for x in (logits, theirs))
    kl = lambda a, b: (a * (jnp.log(a) - jnp.log(b))).sum(-1)  # noqa: E731
    m = config.beta * p + (1 - config.beta) * q
    apart = {0.0: kl(p, q), 1.0: kl(q, p)}.get(config.beta, config.beta * kl(p, m) + (1 - config.beta) * kl(q, m))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)[..., 0]
    return ((config.kd_ratio * apart + (1 - config.kd_ratio) * nll) * WEIGHTS[:, 1:]).sum()


def test_loss_and_gradients_are_those_of_all_logits():
    """A teacher of another shape, whose embedding is not padded, and which gets no gradient.

    (Every beta: tests/oracle/test_distill.py.)
    """
    config = types.SimpleNamespace(beta=0.3, temperature=1.7, kd_ratio=0.7, router_aux_loss_coef=0.0)
    (own, params), (theirs, teacher) = model(0), model(1, hidden_size=16, vocab_size=80)

    def loss(tree, teacher):
        return distill(config, own, tree, {TEACHER: Teacher(teacher, theirs)}, BATCH).total

    def expected(tree):
        return plain(config, (own, tree), (theirs, teacher))

    value, (grads, of_teacher) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, teacher)
    right, right_grads = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(right_grads))
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(right_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student of one layer, a wider teacher of two, and rows."""
    folder = tmp_path_factory.mktemp("distill")
    tiny.write_chat_model(folder / "student", tiny.LLAMA | {"num_hidden_layers": 1})
    tiny.write_chat_model(folder / "teacher", tiny.LLAMA | {"num_hidden_layers": 2, "hidden_size": 64}, seed=1)
    words = "one two three hello there fox dog quick".split()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {w}.", "completion": f" {w} {w}"}) + "\n" for w in words))
    return folder


def run(folder, tmp_path, **keys):
    data = {"train": str(folder / "rows.jsonl"), "eval": 0.3, "cache_dir": str(folder / "cache"), "max_length": 32}
    return {
        "model": str(folder / "student"), "objective": "distill", "teacher": str(folder / "teacher"), "method": "full", "max_steps": 8,
        "data": data, "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1,
        "compilation_cache": False, "report_to": [], "save_strategy": "no",
    } | keys  # fmt: skip


def test_a_run_comes_nearer_to_its_teacher(folder, tmp_path):
    ended = train(run(folder, tmp_path, teacher_quantization="nf4-dq", mesh={"data": 4, "fsdp": 2}, lmbda=0.3, max_completion_length=8))
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["on_policy"] for row in log if "on_policy" in row} == {0.0, 1.0}
    losses = [row["kd_loss"] for row in log if row.get("on_policy") == 0.0]
    assert losses[-1] < 0.8 * losses[0]
    assert {"teacher_agreement", "class_loss", "mean_token_accuracy"} <= log[0].keys() and "eval_kd_loss" in ended.metrics
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]["sha256"]["model.safetensors"]


def test_answers_that_are_drawn_are_drawn_again(folder, tmp_path):
    """What a step learns from is a function of the step and the weights; whoever answers, prompts and shapes are those of the rows."""
    config = load_config(run(folder, tmp_path, lmbda=0.5, seq_kd=True, max_completion_length=12, per_device_train_batch_size=4, seed=1))
    student, teacher = load(folder / "student"), load(folder / "teacher")
    rows, mesh = data.load(config, student.tokenizer).train, parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    state, base = types.SimpleNamespace(trainable=student.params), {TEACHER: Teacher(teacher.params, teacher.config)}
    found = [OnPolicy(config, student, mesh, rows) for _ in range(2)]
    steps = [next(step for step in range(9) if found[0].is_own(step) is own) for own in (True, False)]
    for step in steps:
        (batch, told), (again, _) = (one.batch_at(step, state, base) for one in found)
        jax.tree.map(np.testing.assert_array_equal, batch, again)
        own = rows.batch_at(step)
        assert batch.tokens.shape == own.tokens.shape and batch.capacity == own.capacity and not np.array_equal(batch.tokens, own.tokens)
        asked = [[tokens[:mask.argmax()].tolist() for tokens, mask in zip(x.tokens[0], x.weights[0], strict=True)] for x in (batch, own)]
        assert asked[0] == asked[1] and told["on_policy"] == (step == steps[0]) and 1 <= told["completions/mean_length"] <= 12
    with pytest.raises(DataError, match="leaves no room for 30 tokens in data.max_length 32; lower max_completion_length"):
        data.load(config.replace(max_completion_length=30), student.tokenizer)


def test_prompts_end_where_the_last_answer_begins():
    tokens = np.arange(10)
    assert prompt_of(tokens, np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1])).tolist() == list(range(7))
    assert prompt_of(tokens, np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])).tolist() == list(range(4))
    assert prompt_of(tokens, np.zeros(10)).tolist() == []


def test_a_teacher_of_other_tokens_or_too_few_is_refused(folder, tmp_path):
    config = types.SimpleNamespace(teacher="t", model="m")
    own, other = open_tokenizer(folder / "student"), open_tokenizer(folder / "student")
    other.add_tokens(["more"])
    check_tokens(config, own, other)
    vocabulary = own.get_vocab()
    swapped = types.SimpleNamespace(get_vocab=lambda: vocabulary | {"e": vocabulary["t"], "t": vocabulary["e"]})
    with pytest.raises(ConfigError, match="has another tokenizer than m: 2 of .* take a teacher of the student's family"):
        check_tokens(config, own, swapped)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check_tokens(config, own, None)
    narrow = tiny.LLAMA | {"vocab_size": 5}
    tiny.write(tmp_path / "narrow", narrow, tiny.hf_tensors(narrow))
    own.save_pretrained(tmp_path / "narrow")
    with pytest.raises(DataError, match="^teacher .*narrow: .*, row .*: the tokenizer makes token"):
        train(run(folder, tmp_path, teacher=str(tmp_path / "narrow")))
