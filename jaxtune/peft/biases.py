"""BitFit (arXiv 2106.10199): only biases, as offsets to the model's own (PEFT's BEFT)."""

import dataclasses
from typing import Any

import jax

from jaxtune.config import BeftConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row, spec
from jaxtune.model.weight import Matrix
from jaxtune.peft.adapter import Adapter, Kind, Part, zeros
from jaxtune.peft.sites import names


class BiasKind(Kind):
    """Starts with zeros. A linear layer without a bias gets one if it is named; no merged model can hold that."""

    config = BeftConfig
    peft_type = "BEFT"
    changes_bias = True
    conv1d = False
    ignored = frozenset({"init_weights"})

    def settle(self, model_config: ModelConfig, config: BeftConfig) -> BeftConfig:
        if config.target_modules != "all-linear":
            return config
        rows = spec(model_config)
        own = {path: row for path, row in rows.items() if row.is_matrix and f"{path}_bias" in rows}
        if not own:
            raise ConfigError("method bitfit trains biases, and this model's linear layers have none; name some in bitfit.target_modules")
        own = {name.rpartition(".")[2] for path, row in own.items() for name in names(path, row)}
        return dataclasses.replace(config, target_modules=tuple(sorted(own)))

    def parts(self, config: BeftConfig, path: str, row: Row, rank: int) -> dict[str, Part]:
        return {"bias": Part((1, row.shape[-2]), (None, "out"), "beft_bias", zeros)}

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return base

    def bias(self, adapter: Adapter, own: jax.Array | None, parts: dict[str, jax.Array], scale: jax.Array) -> jax.Array | None:
        added = parts["bias"][..., 0, :]
        return added if own is None else own.astype(added.dtype) + added


KIND: Any = BiasKind()
