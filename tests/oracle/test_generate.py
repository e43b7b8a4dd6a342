"""Generation against transformers: the filters number by number, and greedy text token for token."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.generation import logits_process as theirs  # noqa: E402

from jaxtune import generate  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.generation import sampling as ours  # noqa: E402

PROMPTS = [
    "What is the capital of France?",
    "Hi",
    "Write one sentence about the sea and one about the mountains, and say which of the two you would rather visit in winter.",
    "List three prime numbers above 10.",
    "Translate 'good morning' into German, French and Spanish, each on a line of its own.",
    "Why is the sky blue? Answer as you would to a child of seven who has just learnt what light is.",
    "2 + 2 =",
    "Give me a short plan for a day in Rome: morning, afternoon, evening. Mention one museum, one church, one place to eat, and how to "
    "get from one to the next on foot. Do not use more than five sentences.",
]


def _scores(seed, rows=6, vocabulary=500, scale=4.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * scale).astype(np.float32)


@pytest.mark.parametrize(
    "name, value, theirs_of",
    [
        ("top_k", 1, lambda k: theirs.TopKLogitsWarper(k)),
        ("top_k", 7, lambda k: theirs.TopKLogitsWarper(k)),
        ("top_k", 10_000, lambda k: theirs.TopKLogitsWarper(k)),
        ("top_p", 0.05, lambda p: theirs.TopPLogitsWarper(p)),
        ("top_p", 0.9, lambda p: theirs.TopPLogitsWarper(p)),
        ("min_p", 0.02, lambda p: theirs.MinPLogitsWarper(p)),
        ("min_p", 1.0, lambda p: theirs.MinPLogitsWarper(p)),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_filter(name, value, theirs_of, scale):
    scores = _scores(0, scale=scale)
    expected = theirs_of(value)(None, torch.tensor(scores)).numpy()
    assert np.array_equal(getattr(ours, name)(scores, value), expected)


def test_repetition_penalty():
    scores, tokens = _scores(1), np.random.default_rng(2).integers(0, 500, (6, 40))
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(tokens), torch.tensor(scores)).numpy()
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    np.testing.assert_allclose(ours.repetition_penalty(scores, seen, 1.3), expected, rtol=1e-6)


def test_all_filters_in_transformers_order(tmp_path):
    tiny.write_chat_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = dict(temperature=0.7, top_k=60, top_p=0.85, min_p=0.03, repetition_penalty=1.2)
    asked = model.generation_config
    asked.update(do_sample=True, **settings)
    chain = model._get_logits_processor(asked, input_ids_seq_length=40, device="cpu")
    names = [type(step).__name__ for step in chain]
    assert [n for n in names if n.startswith(("Repetition", "Temperature", "TopK", "TopP", "MinP"))] == [
        "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    ]  # fmt: skip
    scores, tokens = _scores(3), np.random.default_rng(4).integers(0, 500, (6, 40))
    expected = chain(torch.tensor(tokens), torch.tensor(scores)).numpy()
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    result = np.asarray(ours.filtered(ours.Sampling.create(**settings), scores, seen))
    assert np.array_equal(np.isfinite(result), np.isfinite(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def _greedy(folder, ids, new, **settings):
    """transformers' greedy tokens of each prompt, one batch with left padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    width = max(map(len, ids))
    tokens, mask = np.zeros((2, len(ids), width), np.int64)
    for row, prompt in enumerate(ids):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    with torch.no_grad():
        out = model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
        )
    return out[:, width:].tolist()


def _cut(tokens, stops):
    """Up to the first stop token, which transformers follows with padding."""
    end = next((n + 1 for n, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_of_a_tiny_model(tmp_path, penalty):
    tiny.write_chat_model(tmp_path)
    model = load(tmp_path)
    rng = np.random.default_rng(5)
    ids = [rng.integers(5, model.config.vocab_size, length).tolist() for length in (20, 3, 31, 8)]
    stops = generate.stop_tokens(model)
    expected = [_cut(tokens, stops) for tokens in _greedy(tmp_path, ids, 40, repetition_penalty=penalty)]
    found = generate.generate_tokens(model, ids, max_new_tokens=40, repetition_penalty=penalty)
    assert [completion.tokens for completion in found] == expected


def test_greedy_of_a_real_model_over_64_tokens(smollm2):
    model = load(smollm2)
    ids = [generate.token_ids(model, prompt, "prompt") for prompt in PROMPTS]
    assert len({len(prompt) for prompt in ids}) == len(PROMPTS)
    found = generate.generate_tokens(model, PROMPTS, max_new_tokens=64)
    expected = [_cut(tokens, generate.stop_tokens(model)) for tokens in _greedy(smollm2, ids, 64)]
    assert [completion.tokens for completion in found] == expected
    assert {completion.finish_reason for completion in found} == {"stop", "length"}
