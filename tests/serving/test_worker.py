"""An answer does not depend on what it is batched with."""

import math
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxtune import generate
from jaxtune.model import decoder
from jaxtune.serving import worker

HELLO = [{"role": "user", "content": "hello"}]
NEW = 16


def _assert_logprobs(model, prompt, tokens, told):
    """Those of the model itself, however the row is sampled."""
    logits_TV = jax.jit(decoder.forward, static_argnums=0)(model.config, model.params, np.asarray([prompt + tokens]))[0]
    logps_NV = np.asarray(jax.nn.log_softmax(logits_TV))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(told["token_logprobs"], logps_NV[np.arange(len(tokens)), tokens], atol=1e-4)
    np.testing.assert_allclose([max(two.values()) for two in told["top_logprobs"]], logps_NV.max(-1), atol=1e-4)
    assert told["tokens"] == [model.tokenizer.decode([token]) for token in tokens]
    assert told["text_offset"] == [sum(map(len, told["tokens"][:n])) for n in range(len(tokens))]


def test_requests_that_wait_are_one_batch_and_each_is_answered_as_generate_does(ask, model, adapter, monkeypatch):
    """Greedy and sampled, with many settings, with stop strings, for both models: all at once, and token for token those of `generate`."""
    greedy = generate.generate_tokens(model, [HELLO, "one two", "The quick brown fox"], max_new_tokens=NEW, chat=False)
    drawn = generate.generate_tokens(model, [HELLO], temperature=1.2, top_p=0.9, seed=7, num_return_sequences=2, max_new_tokens=NEW)
    tuned = generate.generate_tokens(model, [HELLO], adapter, max_new_tokens=NEW)
    stop = greedy[2].text[3:5]
    batches, answer = [], worker.Worker._answer
    monkeypatch.setattr(worker.Worker, "_answer", lambda self, jobs: batches.append(jobs) or answer(self, jobs))
    monkeypatch.setattr(worker, "GATHER", 0.5)
    greedily, drawing = {"max_tokens": NEW, "temperature": 0}, {"max_tokens": NEW, "temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 2}
    requests = [
        ("/v1/chat/completions", {"model": "base", "messages": HELLO, **greedily}),
        ("/v1/chat/completions", {"model": "tuned", "messages": HELLO, **greedily}),
        ("/v1/completions", {"model": "base", "prompt": ["one two", "The quick brown fox"], "stop": stop, "logprobs": 2, **greedily}),
        ("/v1/chat/completions", {"model": "base", "messages": HELLO, **drawing}),
        ("/v1/completions", {"model": "base", "prompt": "x", "temperature": 0.3, "top_k": 5, "min_p": 0.1, "max_tokens": 3}),
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(lambda request: ask("POST", *request), requests))
    assert [status for status, _ in found] == [200] * len(requests)
    assert sorted(len(jobs) for jobs in batches) == [1, 4]
    answers = {id(job.request): [one.tokens for one in job.answers] for jobs in batches for job in jobs}
    by_kind = {(job.request.model, job.request.chat, job.request.each): answers[id(job.request)] for jobs in batches for job in jobs}
    assert by_kind["base", True, 1] == [greedy[0].tokens]
    assert by_kind["base", True, 2] == [one.tokens for one in drawn] and drawn[0].tokens != drawn[1].tokens
    assert by_kind["tuned", True, 1] == [tuned[0].tokens] != [greedy[0].tokens]
    texts = [[choice.get("text") or choice["message"]["content"] for choice in body["choices"]] for _, body in found]
    assert texts[:4] == [[greedy[0].text], [tuned[0].text], [one.text.split(stop)[0] for one in greedy[1:]], [one.text for one in drawn]]
    assert [choice["finish_reason"] for choice in found[2][1]["choices"]][1] == "stop"
    assert found[4][1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    prompt = generate.token_ids(model, "one two", "prompt", chat=False)
    _assert_logprobs(model, prompt, greedy[1].tokens, found[2][1]["choices"][0]["logprobs"])


def test_a_fault_is_the_answer_and_not_the_end(ask, model, monkeypatch):
    body = {"model": "tuned", "messages": HELLO, "max_tokens": 4, "temperature": 0}
    with monkeypatch.context() as broken:
        broken.setattr(model, "params", model.params | {"norm": model.params["norm"] * math.nan})
        status, found = ask("POST", "/v1/chat/completions", body)
    assert status == 500 and "logits that are not numbers" in found["error"]["message"]
    assert ask("POST", "/v1/chat/completions", body)[0] == 200
