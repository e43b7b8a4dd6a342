"""Parse a request: its body, key by key, under OpenAI's names. Unsupported values are refused, never ignored silently."""

import difflib
import functools
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.data.turns import text_of
from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.generation.prompts import check_room, is_one_prompt
from jaxtune.generation.sampling import Sampling

MOST_ROWS = 1024  # answers per request
MOST_LIKELY = 20  # alternatives per token, as in OpenAI's API
_BOTH = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "n", "stream", "stream_options",
    "logprobs",
}  # fmt: skip
KEYS = {True: _BOTH | {"messages", "max_completion_tokens", "top_logprobs"}, False: _BOTH | {"prompt"}}  # by whether it is a chat
# Metadata that changes no answer.
UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# Unsupported keys, and the values that request nothing.
NEUTRAL = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip


class Refusal(Exception):
    """A reply with a status other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        """The JSON of it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A valid request: `each` answers of at most `most[i]` tokens to every prompt `ids[i]`.

    likely: how many alternatives to report per token, with log-probabilities; None: no log-probabilities.
    """

    chat: bool
    model: str
    ids: list[list[int]]
    most: list[int]
    each: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    likely: int | None
    stream: bool
    include_usage: bool


def parse(raw: bytes) -> dict:
    """The body as a JSON object."""
    try:
        body = json.loads(raw.decode())
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair is not text, NaN is not a number
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({error or 'it is nested too deeply'}); send an object like {{\"model\": ...}}") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is {_short(body)}; send an object like {{\"model\": ...}}")
    return {key: value for key, value in body.items() if value is not None}


def read(
    body: dict, chat: bool, names: Mapping[str, int], models: Mapping[str, Any], default: int, encode: Callable[..., list[int]]
) -> Request:
    """Read a request's body.

    names    the served models, each with the number of its virtual tokens
    default  the most tokens of an answer, if the request sets no limit and the context has room
    models   the model under each of these names
    encode   `prompts.token_ids`, given a name
    """
    _check_keys(body, chat)
    there = f"this server has {', '.join(names)}"
    if not isinstance(name := body.get("model"), str):
        raise Refusal(400, f"model is {_short(name)}; it must be one of the served models; {there}", param="model")
    if name not in names:
        raise Refusal(404, f"there is no model {_short(name)}; {there}", code="model_not_found", param="model")
    try:
        ids = _prompts(body, chat, models[name], functools.partial(encode, name))
    except JaxtuneError as error:
        raise Refusal(400, str(error), param="messages" if chat else "prompt") from None
    try:
        sampling = Sampling.create(
            temperature=_number(body, "temperature", 1.0),
            top_k=max(0, _number(body, "top_k", 0, whole=True, least=-1, most=2**31 - 1)),  # -1: off, in vLLM
            top_p=_number(body, "top_p", 1.0),
            min_p=_number(body, "min_p", 0.0),
            repetition_penalty=_number(body, "repetition_penalty", 1.0),
        )
    except ConfigError as error:  # whose text begins with the key
        raise Refusal(400, str(error), param=str(error).partition(" ")[0]) from None
    each = _number(body, "n", 1, whole=True, least=1, most=128)
    if each > 1 and sampling.temperature is None:
        raise Refusal(400, f"n is {each}, but temperature 0 repeats the same answer; set temperature to 0.7, or n to 1", param="n")
    if each * len(ids) > MOST_ROWS:
        raise Refusal(400, f"{each * len(ids)} answers are asked for; ask for {MOST_ROWS} at most at a time", param="n")
    return Request(
        chat=chat,
        model=name,
        ids=ids,
        most=_most(body, ids, models[name].config, names[name], default),
        each=each,
        sampling=sampling,
        seed=_number(body, "seed", secrets.randbits(31), whole=True, least=-(2**63), most=2**63 - 1),
        stop=_stop(body.get("stop")),
        likely=_likely(body, chat),
        stream=_flag(body, "stream"),
        include_usage=_include_usage(body),
    )


def _check_keys(body: dict, chat: bool) -> None:
    known = KEYS[chat] | UNUSED | NEUTRAL.keys()
    for key, value in body.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else "leave it out"
            raise Refusal(400, f"{_short(key)} is not a key of this request; {advice}", param=key)
        if key in NEUTRAL and value not in NEUTRAL[key]:
            instead = "leave it out, or serve the exported model by vLLM or llama.cpp"
            raise Refusal(400, f"{key} is not supported by this server; {instead}", param=key)


def _prompts(body: dict, chat: bool, model: Any, encode: Callable[..., list[int]]) -> list[list[int]]:
    if chat:
        if not model.tokenizer.chat_template:
            raise Refusal(400, "this model has no chat template; use /v1/completions, or serve the instruct version of the model")
        return [encode(_messages(body.get("messages")), "messages")]
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) or isinstance(given, list) and is_one_prompt(given) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, (str, list)) for one in prompts):
        raise Refusal(400, "prompt has to be a text, a list of texts, or lists of token ids", param="prompt")
    if any(isinstance(one, list) and not all(isinstance(token, int) for token in one) for one in prompts):
        raise Refusal(400, "prompt holds a list of something other than token ids; messages belong to /v1/chat/completions", param="prompt")
    return [encode(one, f"prompt {number} of {len(prompts)}", chat=False) for number, one in enumerate(prompts, 1)]


def _messages(given: Any) -> list[dict]:
    """Messages whose contents are texts; parts of `{"type": "text"}` are joined."""
    example = 'messages has to be a list like [{"role": "user", "content": "..."}]'
    if not isinstance(given, list) or not given:
        raise Refusal(400, example, param="messages")
    messages = []
    for number, message in enumerate(given, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal(400, f"message {number} has no role; {example}", param="messages")
        if (text := text_of(message.get("content"))) is None:
            wanted = "this server accepts texts, and parts of type text"
            raise Refusal(400, f"the content of message {number} is no text; {wanted}", param="messages")
        messages.append({**message, "content": text})
    return messages


def _most(body: dict, ids: list[list[int]], config: Any, virtual: int, default: int) -> list[int]:
    """The most tokens of an answer to each prompt."""
    key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    asked = _number(body, key, 0, whole=True, least=1) if key in body else None
    found = []
    for number, prompt in enumerate(ids, 1):
        room = config.max_position_embeddings - virtual - len(prompt)
        found.append(asked or max(1, min(default, room)))
        try:
            check_room(config, prompt, found[-1], virtual, f"prompt {number} of {len(ids)}", key)
        except JaxtuneError as error:
            given = key if asked else "messages" if "messages" in body else "prompt"
            raise Refusal(400, str(error), code="context_length_exceeded", param=given) from None
    return found


def _stop(given: Any) -> tuple[str, ...]:
    strings = [given] if isinstance(given, str) else given or []
    if not isinstance(strings, list) or not all(isinstance(one, str) and one for one in strings):
        raise Refusal(400, f"stop is {_short(given)}; it has to be a text or a list of texts, none of them empty", param="stop")
    return tuple(strings)


def _likely(body: dict, chat: bool) -> int | None:
    if not chat:
        return _number(body, "logprobs", 0, whole=True, least=0, most=MOST_LIKELY) if "logprobs" in body else None
    likely = _number(body, "top_logprobs", 0, whole=True, least=0, most=MOST_LIKELY)
    if likely and not _flag(body, "logprobs"):
        raise Refusal(400, "top_logprobs needs logprobs; set logprobs to true", param="top_logprobs")
    return likely if _flag(body, "logprobs") else None


def _include_usage(body: dict) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise Refusal(400, 'stream_options has to be {"include_usage": true}', param="stream_options")
    return _flag(options, "include_usage")


def _flag(body: dict, key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{key} is {_short(value)}; it has to be true or false", param=key)
    return value


def _number(body: dict, key: str, default: float, *, whole: bool = False, least: float = -1e300, most: float = 1e300) -> Any:
    value = body.get(key, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    if not good or whole and value != int(value):
        ends = "" if least < -1e299 else f" of {least} or more" if most > 1e299 else f" from {least} to {most}"
        raise Refusal(400, f"{key} is {_short(value)}; it has to be a {'whole ' if whole else ''}number{ends}", param=key)
    return int(value) if whole else float(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
