"""From a user's input to token ids, and the token ids that end an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.masks import open_ids
from jaxtune.data.templates import dropped, end_of_turn, refusal, written
from jaxtune.data.tokenizer import listed
from jaxtune.errors import DataError, ModelError


def is_one_prompt(prompts: Any) -> bool:
    """Whether this is one prompt (a text, a conversation, a list of token ids) rather than a list of prompts."""
    return isinstance(prompts, str) or (len(prompts) > 0 and (isinstance(prompts[0], Mapping) or _is_token(prompts[0])))


def require_tokenizer(model: Any) -> None:
    """ModelError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ModelError("the model has no tokenizer, so it reads and writes no texts; load it from a folder that holds tokenizer.json")


def token_ids(model: Any, prompt: Any, name: str, chat: bool | None = None) -> list[int]:
    """Token ids of one prompt: a text, a conversation (a list of messages) or token ids.

    A conversation is formatted with the tokenizer's chat template, including the opening of an answer. So is a text, as the user's turn, if
    `chat` (None: if there is a template); otherwise it is tokenised as it is, with the special tokens that the tokenizer adds (BOS). `name`
    is used in errors. DataError for a prompt that is empty or of another type, ModelError for a missing template.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{name} is empty; write a text to continue")
        if chat or (chat is None and model.tokenizer.chat_template):
            return _chat_ids(model, [{"role": "user", "content": prompt}], name)
        return _known(model, open_ids(model.tokenizer, prompt), name)
    if not isinstance(prompt, Sequence) or len(prompt) == 0:
        given = "empty" if isinstance(prompt, Sequence) else f"of type {type(prompt).__name__}"
        raise DataError(f'{name} is {given}; a prompt is a text, a list of messages like {{"role": "user", "content": ...}}, or token ids')
    if isinstance(prompt[0], Mapping):
        return _chat_ids(model, list(prompt), name)
    return _known(model, prompt, name)


def check_room(config: Any, ids: Sequence[int], new: int, virtual: int, name: str, key: str = "max_new_tokens") -> None:
    """DataError if a prompt of these tokens, after `virtual` ones, leaves no room for `new` more; `key` names that number."""
    most = config.max_position_embeddings - virtual
    if len(ids) + new > most:
        advice = f"{key}={most - len(ids)} or less" if len(ids) < most else f"a prompt of fewer than {most} tokens"
        raise DataError(
            f"{name} has {len(ids)} tokens, and {new} more are asked for, but the model's "
            f"max_position_embeddings{f', less {virtual} virtual tokens,' if virtual else ''} is {most}; use {advice}"
        )


def _known(model: Any, ids: Sequence[Any], name: str) -> list[int]:
    """The token ids, checked against the model's vocabulary: a tokenizer may have more tokens than the model."""
    for token in ids:
        if not _is_token(token) or not 0 <= token < model.config.vocab_size:
            raise DataError(f"{name} holds {token!r}, which is no token id of this model; ids go from 0 to {model.config.vocab_size - 1}")
    return [int(token) for token in ids]


def _is_token(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _chat_ids(model: Any, messages: list[Mapping], name: str) -> list[int]:
    if not model.tokenizer.chat_template:
        raise ModelError(
            f"{name} is a conversation, but the tokenizer of {model.source or 'this model'} has no chat template to format it; "
            "give a text with chat=False (--no-chat), or use the instruct version of the model"
        )
    try:
        text = written(model.tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # jinja2's own, raise_exception() of the template, or a TypeError inside it
        raise DataError(f"{name}: {refusal(error)}, or put another beside the tokenizer (chat_template.jinja)") from None
    if missing := dropped(messages, text):
        raise DataError(
            f"{name}: the chat template drops {missing}, or changes its text; leave the message out, or put a template that shows it "
            "beside the tokenizer (chat_template.jinja)"
        )
    return _known(model, model.tokenizer(text, add_special_tokens=False)["input_ids"], name)


def stop_tokens(model: Any) -> set[int]:
    """Token ids that end an answer: those of generation config, config.json and tokenizer, and the chat template's end of turn.

    All of them, because files disagree: a base model's config names the end of a document, its template another token for the end of a
    turn.
    """
    found = {end_of_turn(model.tokenizer), model.tokenizer.eos_token_id}
    for settings in (model.generation_config, model.hf_config, model.hf_config.get("text_config") or {}):
        named = listed(settings.get("eos_token_id"))
        if wrong := [token for token in named if token is not None and not _is_token(token)]:
            raise ModelError(f"eos_token_id of {model.source or 'this model'} is {wrong[0]!r}; it has to be a token id or a list of them")
        found.update(named)
    return {token for token in found if token is not None and 0 <= token < model.config.vocab_size}
