"""The tokenizer of a run: the model's own, with the chat template and the EOS token that the config names."""

import copy
import difflib
from pathlib import Path
from typing import Any

from jaxtune.config import Config
from jaxtune.errors import DataError


def run_tokenizer(config: Config, tokenizer: Any) -> Any:
    """`tokenizer` itself, or a copy with `data.chat_template` and `data.eos_token` in place of its own.

    Raises DataError for a template that cannot be read and a token that the tokenizer lacks.
    """
    template, eos = _template(config), config.data.eos_token
    template = tokenizer.chat_template if template is None else template
    eos = tokenizer.eos_token if eos is None else _known(tokenizer, eos)
    if (template, eos) == (tokenizer.chat_template, tokenizer.eos_token):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template, changed.eos_token = template, eos
    return changed


def listed(ids: Any) -> list:
    """The tokens of a key like eos_token_id, which holds one, a list of them or null."""
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of special and added tokens."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def special_texts(tokenizer: Any) -> set[str]:
    """The texts of special and added tokens."""
    return {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}


def _template(config: Config) -> str | None:
    """The Jinja source in the file `data.chat_template`; None for the tokenizer's own."""
    if not config.data.chat_template:
        return None
    path = Path(config.data.chat_template).expanduser()
    if not path.is_file():
        missing = "no such file; name a Jinja file"
        what = "a folder; name the Jinja file in it, whose tokens this tokenizer has to have" if path.is_dir() else missing
        raise DataError(f"data.chat_template {config.data.chat_template}: {what}")
    return path.read_text(encoding="utf-8")


def _known(tokenizer: Any, token: str) -> str:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        special = sorted(special_texts(tokenizer))
        near = difflib.get_close_matches(token, special, 3) or special[:5]
        raise DataError(
            f"data.eos_token {token!r} is no token of the model's tokenizer, and a new one has no embedding; name one of its own"
            + (f", such as {', '.join(near)}" if near else "")
        )
    return token
