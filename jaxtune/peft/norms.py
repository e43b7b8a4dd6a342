"""LayerNorm tuning (arXiv 2312.11420): only the norms' own scales and biases."""

from typing import Any, ClassVar

import jax

from jaxtune.config import LNTuningConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec
from jaxtune.peft.adapter import Adapter, Kind, own_values, put_saved
from jaxtune.peft.sites import Site, Whole, find_wholes, module_rows, named
from jaxtune.tree import flatten, unflatten


class NormKind(Kind):
    """Starts as the base's norms."""

    config = LNTuningConfig
    peft_type = "LN_TUNING"

    stands: ClassVar[bool] = False

    def wholes(self, model_config: ModelConfig, config: LNTuningConfig, sites: tuple[Site, ...] = ()) -> tuple[Whole, ...]:
        """The named norms, and what `modules_to_save` names."""
        rows = {path: row for path, row in module_rows(model_config).items() if _is_norm(path) and not row.is_apart}
        targets, found, hits = config.target_modules, [], set()
        for path, row in rows.items():
            modules = [row.hf.format(layer=layer).rpartition(".")[0] for layer in row.layers or (None,)]
            left_out = [bool(config.exclude_modules and named(name, config.exclude_modules)) for name in modules]
            hit = [None if out else name if targets is None else named(name, targets) for name, out in zip(modules, left_out, strict=True)]
            hits |= set(hit)
            if any(hit):
                chosen = tuple(number for number, one in enumerate(hit) if one)
                found.append(Whole(path, None if len(chosen) == len(hit) else chosen))
        wanted = set() if targets is None else {targets} if isinstance(targets, str) else set(targets)
        if missing := sorted(wanted - hits):
            there = sorted({row.hf.rsplit(".", 2)[-2] for row in rows.values()})
            raise ConfigError(f"ln_tuning.target_modules: {', '.join(missing)} matches no norm of this model; there are {', '.join(there)}")
        return (*found, *find_wholes(model_config, config, ()))

    def init(self, key: jax.Array, model_config: ModelConfig, params: dict, config: LNTuningConfig, tokenizer: Any = None) -> Adapter:
        leaves, wholes = flatten(params), self.wholes(model_config, config)
        return Adapter({}, (), config, {whole.path: own_values(whole, leaves[whole.path], config) for whole in wholes}, wholes)

    def compose(self, base: dict, adapter: Adapter, key: jax.Array | None = None) -> dict:
        leaves = flatten(base)
        put_saved(leaves, adapter)
        return unflatten(leaves)

    def whole_name(self, path: str, module: str, kind: str) -> str:
        return f"{module}.ln_tuning_layers.{kind}" if _is_norm(path) else f"{module}.{kind}"

    def fields(self, adapter: Adapter, model_config: ModelConfig) -> dict[str, Any]:
        """PEFT needs explicit targets."""
        fields, rows = adapter.config.to_dict(), spec(model_config)
        ends = sorted({rows[whole.path].hf.rsplit(".", 2)[-2] for whole in adapter.wholes if _is_norm(whole.path)})
        return fields | ({"target_modules": ends} if fields["target_modules"] is None else {})


def _is_norm(path: str) -> bool:
    return "norm" in path.rpartition("/")[2]


KIND: Any = NormKind()
