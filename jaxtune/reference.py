"""The reference model of DPO and KTO, without a second model wherever possible.

    an adapter is trained       the base without it; or the initial adapter (`init_adapter`, LoftQ), or another one (`ref_model: FOLDER`)
    the whole model is trained  its initial weights, whose log-probabilities are computed before the first step
    ref_model: MODEL            a separate checkpoint, loaded beside the policy, or only until its log-probabilities are computed

`precompute_ref_log_probs` computes the log-probabilities once for every answer of the run, and caches them on disk under a hash of the rows
and of the reference model's files: later runs on the same rows neither load the reference nor run its forward pass.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import data, parallel, runfolder
from jaxtune.config import Config
from jaxtune.config.policy import POLICY, kl_weight
from jaxtune.convert import peft as peft_files
from jaxtune.convert.load import Model, Opened, open_model, read_model
from jaxtune.convert.sources import is_adapter
from jaxtune.data.tokenised import cache_dir
from jaxtune.disk import replacing
from jaxtune.errors import ConfigError
from jaxtune.model.families.base import HOW
from jaxtune.objectives.answers import REFERENCE, answer_logprobs
from jaxtune.objectives.symptoms import WITH_REFERENCE
from jaxtune.peft import compose, partial
from jaxtune.peft.adapter import Adapter

log = logging.getLogger("jaxtune")


def prepare(config: Config, opened: Opened, model: Model, trainable: Any, rows: data.Data, mesh: jax.sharding.Mesh) -> dict:
    """The `base` of the step: the frozen tree (in full tuning whatever is not trained), with the reference model in it if that is another
    tree.

    Log-probabilities computed beforehand are put into the rows. Raises ConfigError for an unsuitable reference model.
    """
    base = partial.rest(model.params, trainable) if config.method == "full" else model.params
    if not compares(config):
        return base
    if not beforehand(config):
        reference = _reference(config, model, trainable, mesh)
        return base if reference is model.params else base | {REFERENCE: reference}
    digest = _identity(config, opened)
    todo = [source for source in (rows.train, rows.eval) if source is not None and not _cached(config, source, digest)]
    if todo:
        reference = _reference(config, model, trainable, mesh)
        for source in todo:
            _compute(config, model, reference, source, mesh)
            _store(_file(config, source, digest), source.ref_logps)
        log.info("reference: log-probabilities of %s answers", f"{sum(len(source.ref_logps) for source in todo):,}")
    else:
        log.info("reference: log-probabilities found in %s", cache_dir(config) / "reference")
    return base


def compares(config: Config) -> bool:
    """Whether there is a reference model that does not change."""
    return (config.objective in WITH_REFERENCE or (config.objective in POLICY and kl_weight(config) != 0)) and not config.sync_ref_model


def beforehand(config: Config) -> bool:
    """Whether the reference's log-probabilities are computed before the first step."""
    asked = config.precompute_ref_log_probs or (config.method == "full" and config.ref_model is None)
    return asked and config.objective in WITH_REFERENCE and not config.sync_ref_model


def _reference(config: Config, model: Model, trainable: Any, mesh: jax.sharding.Mesh) -> dict:
    """The reference model's tree, which shares what it can with the model's."""
    if config.ref_model is None:
        loftq = isinstance(trainable, Adapter) and getattr(trainable.config, "init_lora_weights", None) == "loftq"
        start = jax.tree.map(lambda x: x.copy(), trainable) if config.init_adapter or loftq else None  # the step donates what is trained
        if config.method == "full":  # answers that are not sampled yet cannot be computed beforehand
            log.info("reference: a copy of the initial weights is kept for the KL term; an adapter (method: lora) needs none")
            return compose(model.params, jax.tree.map(jnp.copy, trainable))
        return compose(model.params, start)
    path = Path(config.ref_model).expanduser()
    if is_adapter(path):
        adapter = peft_files.load_adapter(path, model)
        return compose(model.params, parallel.place(adapter, parallel.trainable_shardings(mesh, model.config, adapter)))
    opened = open_model(config.ref_model)
    if not set(opened.config.cuts) <= set(model.config.cuts):
        raise ConfigError(
            f"ref_model {config.ref_model} leaves some modules of some layers dense and packs the others, which the model does not; name a "
            "checkpoint that is packed as the model is, or a dense one"
        )
    opened.config = dataclasses.replace(opened.config, cuts=model.config.cuts)
    if opened.config != _comparable(model.config, opened.config):
        raise ConfigError(
            f"ref_model {config.ref_model} has another architecture than the model ({_difference(opened.config, model.config)}); "
            "name a checkpoint of the same model, or an adapter for it"
        )
    return read_model(opened, config.dtype, config.quantization, mesh).params


def _comparable(config: Any, like: Any) -> Any:
    """The model's config with the other's computation settings."""
    return config.__class__(**{**vars(config), **{name: getattr(like, name) for name in HOW}})


def _difference(a: Any, b: Any) -> str:
    names = [name for name in vars(a) if name not in (*HOW, "hf_json") and getattr(a, name) != getattr(b, name)]
    return ", ".join(f"{name} {getattr(a, name)} instead of {getattr(b, name)}" for name in names[:2])


# ---- computed beforehand ----


def _compute(config: Config, model: Model, reference: dict, source: data.Source, mesh: jax.sharding.Mesh) -> None:
    """Fill `source.ref_logps`."""

    @jax.jit
    def logps(params: dict, batch: data.Batch) -> jax.Array:
        rows = jax.tree.map(lambda x: x[0], batch)
        return jax.lax.with_sharding_constraint(answer_logprobs(config, model.config, params, rows).logp_BS, parallel.replicated(mesh))

    def of(batch: data.Batch) -> np.ndarray:
        return np.asarray(logps(reference, parallel.put(batch, mesh)))

    source.ref_logps = source.each_answer(of, *parallel.row_part(mesh))


def _identity(config: Config, opened: Opened) -> dict:
    """Everything the reference's log-probabilities depend on besides the rows: files, and how they are read."""
    paths = {"model": opened.path, "init_adapter": config.init_adapter, "ref_model": config.ref_model}
    if config.ref_model is not None and not Path(config.ref_model).expanduser().exists():
        paths["ref_model"] = open_model(config.ref_model).path
    files = {name: runfolder.file_hashes(Path(path).expanduser()) for name, path in paths.items() if path is not None}
    if config.ref_model is not None:
        files.pop("init_adapter", None)
    begun = {"lora": config.lora.to_dict()} if config.lora.init_lora_weights == "loftq" else {}
    return files | begun | {name: getattr(config, name) for name in ("dtype", "param_dtype", "quantization", "ld_alpha")}


def _file(config: Config, source: data.Source, identity: dict) -> Path:
    rows = source.documents.fingerprint, source.units.settings
    key = hashlib.sha256(json.dumps([rows, identity, config.data.max_length], sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir(config) / "reference" / f"{key}.npy"


def _cached(config: Config, source: data.Source, identity: dict) -> bool:
    """Whether the source's log-probabilities were cached; if so, they are now set."""
    path = _file(config, source, identity)
    if not path.is_file():
        return False
    source.ref_logps = np.load(path, allow_pickle=False)
    return True


def _store(path: Path, values: np.ndarray) -> None:
    if jax.process_index() != 0:
        return
    with replacing(path) as scratch:
        np.save(scratch, values)
