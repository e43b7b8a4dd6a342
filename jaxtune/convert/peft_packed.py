"""An adapter's base and how it was packed in training, which no file of PEFT's says."""

import contextlib
import logging
from pathlib import Path

from jaxtune.config import LoraConfig, read_yaml
from jaxtune.convert.load import Model
from jaxtune.errors import ConfigError, ModelError
from jaxtune.model.quant import NF4, Int8
from jaxtune.model.weight import Weight
from jaxtune.peft.sites import AnyConfig, Site
from jaxtune.tree import flatten

log = logging.getLogger("jaxtune")


def check_packed(path: Path, model: Model, config: AnyConfig, sites: tuple[Site, ...]) -> None:
    """Pairs that compensate for quantisation (LoftQ) need a base quantised in the same way; a base opened for a conversion is not checked.
    """
    _tell_packed(path, model)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "loftq" or not model.params:
        return
    bits, leaves = config.loftq_config.loftq_bits, flatten(model.params)
    if not all(isinstance(leaves[site.path], Int8 if bits == 8 else NF4) for site in sites):
        wanted = "quantization: int8" if bits == 8 else "quantization: nf4-dq or nf4, as the run had"
        raise ModelError(
            f"{path} was begun with LoftQ: it makes up for what a base loses in {bits} bits, and this one is not packed so; open the base "
            f"with {wanted}"
        )


def _tell_packed(path: Path, model: Model) -> None:
    """Say so where the run that the adapter lies in had a packed base, and this one is dense: nothing else tells it."""
    run = path.parent / "config.yaml"
    if not run.is_file() or any(isinstance(leaf, Weight) for leaf in flatten(model.params).values()):
        return
    with contextlib.suppress(ConfigError):  # of a damaged file a resume complains
        if model.params and (kind := read_yaml(run).get("quantization")):
            log.warning(
                "%s was trained over a base packed as %s, and this one is not, so answers differ from the run's; open the base with "
                "quantization %s (--quantization %s) for the same", path, kind, kind, kind,
            )  # fmt: skip
