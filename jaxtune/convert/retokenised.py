"""A model with another tokenizer than its folder's: the one that a run trains with, or the one beside an adapter."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from jaxtune.config import Config
from jaxtune.convert.load import SPECIAL, Model, Opened, open_tokenizer
from jaxtune.convert.tokenizer import load_tokenizer
from jaxtune.data.templates import end_of_turn
from jaxtune.data.tokenizer import run_tokenizer
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig, nested

log = logging.getLogger("jaxtune")

AnyModel = TypeVar("AnyModel", Model, Opened)
_SHOWN = ("chat_template", "bos_token", "eos_token")  # what else than the vocabulary makes two tokenizers differ


def for_run(config: Config, model: AnyModel) -> AnyModel:
    """The model with the chat template and the EOS token that a run's config names; itself if there is none to change."""
    if config.data.chat_template is None and config.data.eos_token is None or model.tokenizer is None:
        return model
    return with_tokenizer(model, run_tokenizer(config, model.tokenizer))


def beside(folders: Iterable[str | os.PathLike], model: AnyModel) -> AnyModel:
    """The model with the tokenizer that its adapters were trained with, from their folders; itself if there is none, or the same one.

    The log says if folders differ, or if one's tokenizer cannot be read (many hold a part of its files): the model's own is used then.
    """
    found = [_beside(folder, model) for folder in folders]
    first = found[0] if found else model
    if all(one is first or _alike(one.tokenizer, first.tokenizer) for one in found):
        return first
    log.warning("the adapters have different tokenizers or chat templates; prompts are written by the model's own")
    return model


def as_tuned(base: Model, tuned: Model | str | os.PathLike) -> Model:
    """A base with the tokenizer of the model tuned from it, so that both read the same tokens; itself if the vocabularies differ."""
    found = tuned.tokenizer if isinstance(tuned, Model) else open_tokenizer(tuned)
    same = _alike(found, base.tokenizer) or None in (found, base.tokenizer) or found.get_vocab() != base.tokenizer.get_vocab()
    return base if same else with_tokenizer(base, found)


def _beside(folder: str | os.PathLike, model: AnyModel) -> AnyModel:
    folder, own = Path(folder).expanduser(), model.tokenizer
    try:
        found = load_tokenizer(folder)
    except ModelError as error:
        log.warning("the tokenizer beside the adapter is not used: %s", error)
        return model
    if found is None or _alike(found, own):
        return model
    log.info("tokenizer: that of %s", folder)
    return with_tokenizer(model, found)


def _alike(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return all(getattr(a, name) == getattr(b, name) for name in _SHOWN) and a.get_vocab() == b.get_vocab()


def with_tokenizer(model: AnyModel, tokenizer: Any) -> AnyModel:
    """The model with that tokenizer. Its EOS token is config.json's too, as HF's Trainer writes it; with the token that ends a turn of its
    chat template it is among those of the generation config, which end an answer."""
    config, generation = _ends(model.config, model.generation_config, tokenizer)
    changes = dict(config=config, generation_config=generation)
    if isinstance(model, Opened):
        return dataclasses.replace(model, open_tokenizer=lambda: tokenizer, **changes)
    return dataclasses.replace(model, tokenizer=tokenizer, hf_config=json.loads(config.hf_json), **changes)


def _ends(config: ModelConfig, generation: dict, tokenizer: Any) -> tuple[ModelConfig, dict]:
    hf = json.loads(config.hf_json)
    said, eos = hf.get("text_config") or hf, tokenizer.eos_token_id
    own = _listed(said.get("eos_token_id"))
    if not generation:  # what transformers makes of config.json
        generation = {key: said[key] for key in SPECIAL if said.get(key) is not None}
    found = dict.fromkeys((eos, end_of_turn(tokenizer), *_listed(generation.get("eos_token_id")), *own))
    ends = [token for token in found if token is not None]
    if eos is not None and eos not in own:
        config = dataclasses.replace(config, hf_json=json.dumps(nested.changed(hf, eos_token_id=eos)))
    return config, generation | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _listed(ids: Any) -> list:
    return ids if isinstance(ids, list) else [ids]
