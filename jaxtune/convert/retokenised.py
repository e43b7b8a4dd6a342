"""A model with another tokenizer than its folder's: the one that a run trains with, or the one beside an adapter, and its vocabulary."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from jaxtune.config import Config
from jaxtune.convert.load import SPECIAL, Model, Opened, open_model, open_tokenizer
from jaxtune.convert.more_tokens import with_tokens
from jaxtune.convert.peft import load_adapter
from jaxtune.convert.peft_embeddings import tokens_of
from jaxtune.convert.tokenizer import load_tokenizer
from jaxtune.data.templates import end_of_turn
from jaxtune.data.tokenizer import listed, run_tokenizer
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig, nested

log = logging.getLogger("jaxtune")

AnyModel = TypeVar("AnyModel", Model, Opened)
_SHOWN = ("chat_template", "bos_token", "eos_token")  # what else than the vocabulary makes two tokenizers differ


def for_run(config: Config, model: AnyModel) -> AnyModel:
    """The model with the tokenizer of a run: that beside `init_adapter`, or its own, with the chat template and EOS token of the config."""
    model = beside([config.init_adapter], model) if config.init_adapter else model
    if config.data.chat_template is None and config.data.eos_token is None or model.tokenizer is None:  # opened later, beside other work
        return model
    return with_tokenizer(model, run_tokenizer(config, model.tokenizer))


def tokenizer_of(config: Config, fetch: bool = True) -> Any:
    """A run's tokenizer before the chat template and EOS token of its config, with no other file of its model (`open_tokenizer`)."""
    found = _found(config.init_adapter) if config.init_adapter else None
    return open_tokenizer(config.model, fetch) if found is None else found


def beside(folders: Iterable[str | os.PathLike], model: AnyModel) -> AnyModel:
    """The model with the tokenizer that its adapters were trained with, from their folders; with its own if there is none, or the same one.
    Its vocabulary grows to the size that an adapter's was resized to (`more_tokens`).

    The log says if folders differ, or if one's tokenizer cannot be read (many hold a part of its files): the model's own is used then.
    """
    folders = list(folders)
    model = _resized(model, max((tokens_of(folder, model.config) for folder in folders), default=model.config.vocab_size))
    found = [_beside(folder, model) for folder in folders]
    first = found[0] if found else model
    if all(one is first or _alike(one.tokenizer, first.tokenizer) for one in found):
        return first
    log.warning("the adapters have different tokenizers or chat templates; prompts are written by the model's own")
    return model


def with_adapter(folder: str | os.PathLike, model: Model) -> tuple[Model, Any]:
    """The model as an adapter's folder needs it (`beside`), and the adapter."""
    model = beside([folder], model)
    return model, load_adapter(folder, model)


def as_tuned(base: Model, tuned: Model | str | os.PathLike) -> Model:
    """A base with the tokenizer of the model tuned from it, so that both read the same tokens; itself if the vocabularies differ."""
    own, found = base.tokenizer, tuned.tokenizer if isinstance(tuned, Model) else open_tokenizer(tuned)
    if own is None or found is None or _alike(found, own) or found.get_vocab() != own.get_vocab():
        return base
    return with_tokenizer(base, found)


def _beside(folder: str | os.PathLike, model: AnyModel) -> AnyModel:
    found, own = _found(folder), model.tokenizer
    if found is None or _alike(found, own):
        return model if own is None else with_tokenizer(model, own)
    log.info("tokenizer: that of %s", folder)
    return with_tokenizer(model, found)


def _resized(model: AnyModel, tokens: int) -> AnyModel:
    if tokens == model.config.vocab_size or model.config.outer:  # a multimodal model's names are others
        return model
    log.info("vocabulary: resized from %d to %d tokens, as the adapter's was", model.config.vocab_size, tokens)
    if isinstance(model, Opened):
        return model if model.path.is_file() else open_model(model.source, tokens)
    config, params = with_tokens(model.config, model.params, tokens)
    return dataclasses.replace(model, config=config, params=params, hf_config=json.loads(config.hf_json))


def _found(folder: str | os.PathLike) -> Any:
    """The tokenizer beside an adapter; None if it has none that can be read."""
    try:
        return load_tokenizer(Path(folder).expanduser())
    except ModelError as error:
        log.warning("the tokenizer beside the adapter is not used: %s", error)
        return None


def _alike(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(getattr(a, name) == getattr(b, name) for name in _SHOWN) and a.get_vocab() == b.get_vocab()


def with_tokenizer(model: AnyModel, tokenizer: Any) -> AnyModel:
    """The model with that tokenizer; itself if that changes nothing. Its EOS token is config.json's too, as HF's Trainer writes it; with
    the token that ends a turn of its chat template it is among those of the generation config, which end an answer."""
    config, generation = _ends(model.config, model.generation_config, tokenizer)
    if tokenizer is model.tokenizer and config is model.config and generation is model.generation_config:
        return model
    changes = dict(config=config, generation_config=generation)
    if isinstance(model, Opened):
        return dataclasses.replace(model, open_tokenizer=lambda: tokenizer, **changes)
    return dataclasses.replace(model, tokenizer=tokenizer, hf_config=json.loads(config.hf_json), **changes)


def _ends(config: ModelConfig, generation: dict, tokenizer: Any) -> tuple[ModelConfig, dict]:
    hf = json.loads(config.hf_json)
    said, eos = hf.get("text_config") or hf, tokenizer.eos_token_id
    own = listed(said.get("eos_token_id"))
    if eos is not None and eos not in own:
        config = dataclasses.replace(config, hf_json=json.dumps(nested.changed(hf, eos_token_id=eos)))
    ends = [token for token in (eos, end_of_turn(tokenizer)) if token is not None]
    named = listed(generation.get("eos_token_id")) if generation else own
    if set(ends) <= set(named):
        return config, generation
    if not generation:  # what transformers makes of config.json
        generation = {key: said[key] for key in SPECIAL if said.get(key) is not None}
    ends = list(dict.fromkeys((*ends, *named, *own)))
    return config, generation | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
