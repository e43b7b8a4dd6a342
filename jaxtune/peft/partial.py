"""Full tuning of some parameters (`trainable_parameters`), chosen by the names of their Hugging Face tensors.

Trained and frozen layers are in separate stacks (`ModelConfig.cuts`), so that a leaf of the tree is trained whole or not at all: the
trained part is a part of the tree, the frozen part the rest. Below the lowest trained layer there is no backward pass, since nothing there
is differentiated.
"""

import re
from collections.abc import Callable, Sequence

from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig, heads
from jaxtune.model.spec import spec
from jaxtune.tree import flatten, unflatten


def cuts(config: ModelConfig, patterns: Sequence[str]) -> tuple[int, ...]:
    """The layers at which stacks must begin, so that all layers of a stack are trained alike.

    Raises ConfigError for a pattern that is not a regular expression or matches no tensor, and for one that selects some experts of a
    layer.
    """
    for pattern in patterns:
        _check(config, pattern)
    names, numbers = _matched(config, patterns), {name: layer for layer, name in enumerate(config.layer_names)}
    layers: list[set[str]] = [set() for _ in range(config.num_layers)]  # the rows of each layer that are trained
    for path, row in spec(config).items():
        own = row.hf_names()
        for place, layer in enumerate(row.layers):
            of_layer = own[place * len(own) // len(row.layers) : (place + 1) * len(own) // len(row.layers)]
            found = names.intersection(of_layer)
            if found and len(found) < len(of_layer):
                left = next(name for name in of_layer if name not in found)
                raise ConfigError(
                    f"trainable_parameters takes {min(found)} without {left}, but the experts of a layer are one array; take all or none"
                )
            layers[numbers[layer]] |= {path.rpartition("/")[2]} if found else set()
    return tuple(layer for layer in range(1, config.num_layers) if layers[layer] != layers[layer - 1])


def trained_paths(config: ModelConfig, patterns: Sequence[str]) -> set[str]:
    """Paths of the leaves that full tuning trains, all without patterns; `config` has the cuts. A scoring head is always included."""
    rows, names = spec(config), _matched(config, patterns)
    return {path for path, row in rows.items() if not patterns or row.hf_names()[0] in names or path in heads.PATHS}


def lowest(config: ModelConfig, patterns: Sequence[str]) -> int:
    """The first layer that gradients pass through; `num_layers` if only parameters after the layers are trained."""
    rows, taken = spec(config), trained_paths(config, patterns)
    before = any(path in ("embed", "positions") or path.startswith("layer_inputs/") for path in taken)
    layers = [config.layer_names.index(rows[path].layers[0]) for path in taken if rows[path].layers]
    return 0 if before else min(layers, default=config.num_layers)


def dtypes(config: ModelConfig, patterns: Sequence[str], trained: str, frozen: str) -> Callable[[str], str]:
    """The dtype of each leaf by its path."""
    taken = trained_paths(config, patterns)
    return lambda path: trained if path in taken else frozen


def chosen(config: ModelConfig, params: dict, patterns: Sequence[str], dtype: str) -> dict:
    """The trained part of the tree, in `dtype`."""
    taken = trained_paths(config, patterns)
    return unflatten({path: leaf.astype(dtype) for path, leaf in flatten(params).items() if path in taken})


def rest(params: dict, trained: dict) -> dict:
    """The part of the tree that is not trained."""
    taken = flatten(trained)
    return unflatten({path: leaf for path, leaf in flatten(params).items() if path not in taken})


def over(base: dict, tree: dict) -> dict:
    """`base` with the leaves of `tree` in place of its own."""
    both = {name: over(base[name], leaf) for name, leaf in tree.items() if isinstance(leaf, dict) and name in base}
    return base | tree | both


def _names(config: ModelConfig) -> list[str]:
    return [name for row in spec(config).values() for name in row.hf_names()]


def _matched(config: ModelConfig, patterns: Sequence[str]) -> set[str]:
    """The tensors in whose name a pattern is found."""
    return {name for name in _names(config) if any(re.search(_literal_dots(pattern), name) for pattern in patterns)}


def _check(config: ModelConfig, pattern: str) -> None:
    """ConfigError for a pattern that is not a regular expression or matches nothing."""
    try:
        found = _matched(config, [pattern])
    except re.error as error:
        raise ConfigError(f"trainable_parameters: {pattern!r} is no regular expression: {error}") from None
    if found:
        return
    names = _names(config)
    tied = config.tie_word_embeddings and re.search(_literal_dots(pattern), "lm_head.weight")
    hint = "this model's head is its embedding; write embed_tokens" if tied else f"they are called {names[1]}, {names[-1]} and the like"
    raise ConfigError(f"trainable_parameters: {pattern!r} matches none of the model's {len(names)} tensors; {hint}")


def _literal_dots(pattern: str) -> str:
    """As in Axolotl, a dot stands for itself unless a quantifier follows: `layers.2.` does not match layer 28."""
    return re.sub(r"(?<!\\)\.(?![*+?{])", r"\\.", pattern)
