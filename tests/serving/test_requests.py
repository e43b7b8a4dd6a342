import pytest

from jaxtune import generate
from jaxtune.serving.requests import Refusal, parse, read

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
PLAIN = {"model": "base", "prompt": "hello"}


def _read(model, body, chat):
    def encode(asked, prompt, name, chat=None):
        return generate.token_ids(models[asked], prompt, name, chat)

    models = {"base": model, "tuned": model}
    return read(body, chat, {"base": 0, "tuned": 10}, models, 100, encode)


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"{", "the body is no JSON"),
        (b"", "the body is no JSON"),
        (b"[1]", r"the body is \[1\]; send an object"),
        (b'{"prompt": "\\ud800"}', "the body is no JSON"),
        (b'{"temperature": NaN}', "the body is no JSON"),
        (b"\xff", "the body is no JSON"),
        (b"[" * 100_000, "nested too deeply|recursion"),
    ],
)
def test_bodies_that_are_no_request(raw, said):
    with pytest.raises(Refusal, match=said) as refused:
        parse(raw)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "body, said",
    [
        ({"prompt": "x"}, "model is null; it must be one of the served models; this server has base, tuned"),
        (PLAIN | {"model": "gpt"}, 'there is no model "gpt"; this server has base, tuned'),
        (PLAIN | {"max_token": 3}, '"max_token" is not a key of this request; did you mean max_tokens?'),
        (PLAIN | {"echo": True}, "echo is not supported"),
        (CHAT | {"tools": [{}]}, "tools is not supported by this server; leave it out"),
        (PLAIN | {"prompt": ""}, "prompt 1 of 1 is empty"),
        (PLAIN | {"prompt": []}, "prompt has to be a text"),
        (PLAIN | {"prompt": [5, 9999]}, "prompt 1 of 1 holds 9999, which is no token id"),
        (PLAIN | {"prompt": CHAT["messages"]}, "messages belong to /v1/chat/completions"),
        (CHAT | {"messages": []}, "messages has to be a list"),
        (CHAT | {"messages": [{"content": "x"}]}, "message 1 has no role"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the content of message 1 is no text"),
        (CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "the content of message 1 is no text"),
        (PLAIN | {"max_tokens": 300}, "has 2 tokens, and 300 more are asked for.* is 256; use max_tokens=254 or less"),
        (CHAT | {"max_completion_tokens": 256}, "use max_completion_tokens=165 or less"),
        (PLAIN | {"prompt": [5] * 256}, "use a prompt of fewer than 256 tokens"),
        (PLAIN | {"max_tokens": 0}, "max_tokens is 0; it has to be a whole number of 1 or more"),
        (PLAIN | {"temperature": "hot"}, 'temperature is "hot"; it has to be a number'),
        (PLAIN | {"temperature": -1}, "temperature is -1.0; it must be 0"),
        (PLAIN | {"top_p": 2}, "top_p is 2.0; it must be above 0"),
        (PLAIN | {"seed": 10**400}, "seed is 1000.*; it has to be a whole number"),
        (PLAIN | {"n": 2, "temperature": 0}, "n is 2, but temperature 0 repeats the same answer"),
        (PLAIN | {"n": 128, "prompt": ["x"] * 9}, "1152 answers are asked for"),
        (PLAIN | {"stop": ["a", ""]}, "none of them empty"),
        (PLAIN | {"stream": "yes"}, 'stream is "yes"; it has to be true or false'),
        (PLAIN | {"logprobs": 21}, "logprobs is 21; it has to be a whole number from 0 to 20"),
        (CHAT | {"top_logprobs": 2}, "top_logprobs needs logprobs"),
        (PLAIN | {"stream_options": {"usage": True}}, "stream_options has to be"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(model, body, said):
    with pytest.raises(Refusal, match=said) as refused:
        _read(model, body, "messages" in body)
    assert refused.value.status == (404 if body.get("model") == "gpt" else 400)
    named = str(refused.value).split()[0]
    assert refused.value.param in {*body, "model"} and (named not in body.keys() - {"prompt"} or refused.value.param == named)
    assert refused.value.code == ("context_length_exceeded" if "asked for, but the" in str(refused.value) else refused.value.code)


def test_what_is_asked_for(model):
    asked = _read(model, CHAT | {"user": "me", "presence_penalty": 0, "tool_choice": "none"}, True)
    assert (asked.sampling.temperature, asked.each, asked.most, asked.likely, asked.stop) == (1.0, 1, [100], None, ())
    assert asked.ids == [generate.token_ids(model, "hello", "prompt")]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert _read(model, CHAT | {"messages": [{"role": "user", "content": parts}]}, True).ids == asked.ids
    plain = _read(model, PLAIN | {"model": "tuned", "prompt": [[5] * 200, [6]], "top_k": -1, "stop": "x", "logprobs": 3}, False)
    assert (plain.most, plain.sampling.top_k, plain.stop, plain.likely) == ([46, 100], None, ("x",), 3)  # ten virtual tokens
    assert len({_read(model, PLAIN, False).seed for _ in range(3)}) == 3 and _read(model, PLAIN | {"seed": 4}, False).seed == 4
    model_without = type(model)(model.config, model.params, type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer))
    with pytest.raises(Refusal, match="no chat template; use /v1/completions"):
        _read(model_without, CHAT, True)
