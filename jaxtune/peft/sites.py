"""Which parameters of a model a `LoraConfig` names, by PEFT's rules: what pairs adapt, and what is trained whole besides."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtune.config import LoraConfig, MatrixConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import FAMILIES, ModelConfig, heads, nested
from jaxtune.model.spec import Row, spec

AnyConfig = LoraConfig | MatrixConfig


class Site(NamedTuple):
    """One adapted row of the table: for each layer of its stack the rank (0: not adapted) and the scale `alpha / r`."""

    path: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def stacked(self) -> bool:
        """Whether its arrays have an axis of layers."""
        return self.path not in ("embed", "head")


class Whole(NamedTuple):
    """A parameter that is trained itself: all of it, or `numbers` along its first axis (layers of a stack, tokens of an embedding)."""

    path: str
    numbers: tuple[int, ...] | None = None


# transformers 5's names for the parameters of an expert layer, which PEFT adapts as parameters (`target_parameters`), not as modules
EXPERTS = {"router": "{router}.weight", "experts_gate_up": "{experts}.gate_up_proj", "experts_up": "{experts}.up_proj",
           "experts_down": "{experts}.down_proj"}  # up alone: without a gate
# and the names of the modules that they replaced; PEFT translates these
HEADS = {"score", "classifier"}  # scoring heads that PEFT adds to `modules_to_save` by itself: both names, whichever exists
RENAMED_HEAD = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's name in files, and the one in transformers 5 (and hence PEFT)
# PEFT leaves the out_proj of their Mamba-2 layers alone: kernels use its weight outside the module
WITHOUT_OUT = ("falcon_h1", "mamba2", "nemotron_h")
BY_INPUT = ("llama4_text",)  # whose experts' matrices `[E, in, out]` PEFT takes for `[E, out, in]`
_LIKE_QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
TRANSLATED = {
    **dict.fromkeys(("minimax_m2", "mixtral"), {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}),
    "hunyuan_v1_moe": {name: new for name, new in _LIKE_QWEN.items() if name != "gate"},  # its router is a linear layer
    **dict.fromkeys(("afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
                     "glm4_moe_lite", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "sarvam_mla", "solar_open"), _LIKE_QWEN),
}


def module_rows(model_config: ModelConfig) -> dict[str, Row]:
    """The row table, with the tensor names of transformers' class for the whole checkpoint."""
    return {path: row._replace(hf=nested.module(model_config, row.hf)) for path, row in spec(model_config).items()}


def adaptable(model_config: ModelConfig) -> dict[str, Row]:
    """The rows that a pair can adapt: matrices inside the layers, the embedding, the output head (also a tied one, by itself), routers, and
    experts, whose gate and up are one matrix `[2 F, D]` here (`experts_gate_up`)."""
    rows, family = module_rows(model_config), FAMILIES[model_config.model_type]
    if "head" not in rows and not model_config.num_labels:
        rows["head"] = rows["embed"]._replace(hf=nested.module(model_config, f"{family.ends['head']}.weight"))
    if "head" in rows:
        rows["head"] = rows["head"]._replace(hf=RENAMED_HEAD.get(rows["head"].hf, rows["head"].hf))
    table = {path: row for path, row in rows.items() if row.is_matrix or path in ("embed", "head")}
    if model_config.model_type in WITHOUT_OUT:
        table = {path: row for path, row in table.items() if not path.endswith("/out")}
    for path in [path for path in rows if path.endswith("/experts_down")]:
        stack = path.removesuffix("experts_down")
        up, own = rows[f"{stack}experts_up"], {"experts_down": rows[path]}
        L, E, F, D = up.shape
        joint = f"{stack}experts_gate" in rows
        own = ({"experts_gate_up": rows[f"{stack}experts_gate"]._replace(shape=(L, E, 2 * F, D))} if joint else {"experts_up": up}) | own
        own = own if model_config.model_type not in BY_INPUT else {}
        own |= {"router": rows[f"{stack}router"]} if f"{stack}router" in rows else {}  # otherwise it is a linear layer
        called = dict(zip(("router", "experts"), family.moe, strict=True))
        for name, row in own.items():
            table[stack + name] = row._replace(hf=nested.module(model_config, family.prefix + EXPERTS[name].format(**called)))
    return table


def is_parameter(path: str) -> bool:
    """Whether PEFT treats the row as a parameter of an expert layer, not as a module."""
    return path.rpartition("/")[2] in EXPERTS


def names(path: str, row: Row) -> list[str]:
    """PEFT's names for the members of a row's stack, one per layer: modules (`model.layers.0.self_attn.q_proj`), or parameters of expert
    layers."""
    found = [row.hf.format(layer=layer) for layer in row.layers or (None,)]
    return found if is_parameter(path) else [name.removesuffix(".weight") for name in found]


# ---- pairs ----


def settle(model_config: ModelConfig, config: LoraConfig) -> LoraConfig:
    """The config with the names of today's modules: targets that are no modules in a mixture of experts become parameters, as PEFT
    translates them, and GPT-NeoX's head gets its present name.

    "all-linear" becomes attention, router and experts; `gate_proj` and `up_proj` (`w1`, `w3`) become one matrix of twice the rank and
    alpha.
    """
    table = TRANSLATED.get(model_config.model_type)
    if model_config.model_type == "gpt_neox":
        given = {key: getattr(config, key) for key in ("target_modules", "modules_to_save", "exclude_modules")}
        new = {key: tuple("lm_head" if name == "embed_out" else name for name in value) for key, value in given.items()
               if isinstance(value, tuple) and "embed_out" in value}  # fmt: skip
        config = dataclasses.replace(config, **new)
    targets = config.target_modules
    if table is None or model_config.moe is None or isinstance(targets, str) and targets != "all-linear":
        return config
    if targets == "all-linear":
        linear = {name.rpartition(".")[2] for path, row in spec(model_config).items() if row.is_matrix for name in names(path, row)}
        targets = tuple(sorted(linear | table.keys()))
    translated = {target: table.get(target.rpartition(".")[2]) for target in targets}
    old = {target.rpartition(".")[2] for target, new in translated.items() if new == "gate_up_proj"}
    if missing := {name for name, new in table.items() if new == "gate_up_proj"} - old if old else None:
        raise ConfigError(f"lora.target_modules names {', '.join(old)} without {', '.join(missing)}; experts hold both in one matrix")
    patterns = {name: getattr(config, name) for name in ("rank_pattern", "alpha_pattern")}
    if old:
        patterns["rank_pattern"] += ((r".*\.gate_up_proj", 2 * config.r),)
        patterns["alpha_pattern"] += ((r".*\.gate_up_proj", 2 * config.lora_alpha),)
    parameters = {*(config.target_parameters or ()), *(new for new in translated.values() if new)}
    modules = tuple(target for target, new in translated.items() if new is None)
    return dataclasses.replace(config, target_modules=modules, target_parameters=tuple(sorted(parameters)) or None, **patterns)


def _rows_for(model_config: ModelConfig, config: AnyConfig) -> dict[str, Row]:
    """The rows that the config's method can adapt: LoRA all of them, the others linear layers."""
    rows = adaptable(model_config)
    return rows if isinstance(config, LoraConfig) else {path: row for path, row in rows.items() if row.is_matrix or path == "head"}


def find_sites(model_config: ModelConfig, config: AnyConfig) -> tuple[Site, ...]:
    """The rows and layers that the (settled) config's `target_modules` and `target_parameters` name, with ranks and scales.

    A list matches a module's full name or its end (`q_proj`), a string is a regular expression for the full name, "all-linear" is every
    linear layer but the output head. ConfigError for a target that matches nothing, listing the candidates, and for combinations that
    expert layers do not support.
    """
    sites, matched = [], set()
    rows = _rows_for(model_config, config)
    for path, row in rows.items():
        hits = [_matches(path, name, row, config) for name in names(path, row)]
        matched.update(hit for hit in hits if hit)
        if any(hits):
            pairs = [rank_and_scale(name, config) if hit else (0, 0.0) for name, hit in zip(names(path, row), hits, strict=True)]
            sites.append(Site(path, tuple(r for r, _ in pairs), tuple(s for _, s in pairs)))
    _check_targets(config, "target_modules", config.target_modules, matched, [p for p in rows if rows[p].is_matrix], rows)
    check_parameters(model_config, config)
    if isinstance(config, LoraConfig):
        _check_kinds(config, [site.path for site in sites])
    return tuple(sites)


def targeted(model_config: ModelConfig, config: AnyConfig) -> set[str]:
    """PEFT's names of the modules and parameters that a (settled) config names, even if some targets match nothing."""
    return {name for path, row in _rows_for(model_config, config).items() for name in names(path, row) if _matches(path, name, row, config)}


def check_parameters(model_config: ModelConfig, config: AnyConfig) -> None:
    """ConfigError for `target_parameters` that are none of this model's."""
    rows = {path: row for path, row in _rows_for(model_config, config).items() if is_parameter(path)}
    matched = {hit for path, row in rows.items() for name in names(path, row) if (hit := _matches(path, name, row, config))}
    _check_targets(config, "target_parameters", config.target_parameters or (), matched, list(rows), rows)


def _check_targets(config: AnyConfig, key: str, targets, matched: set, paths: list[str], rows: dict[str, Row]) -> None:
    wanted = {targets} if isinstance(targets, str) else set(targets)
    if missing := sorted(wanted - matched):
        last = 1 if key == "target_modules" else 3  # parts of a name that distinguish it from the others
        there = sorted({".".join(name.split(".")[-last:]) for path in paths for name in names(path, rows[path])})
        what = "linear layer" if key == "target_modules" else "parameter of experts"
        there = f"there are {', '.join(there)}" if there else "there is none"
        there += "; other matrices go into target_modules" if key == "target_parameters" else ""
        whole = "; a text is a regular expression for a whole name: write a list, [NAME, ...]" if isinstance(targets, str) else ""
        raise ConfigError(f"{config.group}.{key}: {', '.join(missing)} matches no {what} of this model; {there}{whole}")


def _check_kinds(config: LoraConfig, paths: list[str]) -> None:
    """Refuse what PEFT does not support either, since PEFT could not open the file."""
    for key, nothing in (("lora_dropout", 0.0), ("use_dora", False), ("lora_bias", False)):
        if getattr(config, key) != nothing and any(is_parameter(path) for path in paths):
            raise ConfigError(f"lora.{key} cannot be used where experts are adapted; leave it out, or name the attention's modules alone")
    if config.lora_bias and "embed" in paths:
        raise ConfigError("lora.lora_bias cannot be used where the embedding is adapted; leave it out")


def _matches(path: str, name: str, row: Row, config: AnyConfig) -> str | None:
    """The target that names this module or parameter, or None."""
    if is_parameter(path):
        return named(name, config.target_parameters or ())
    if config.exclude_modules and named(name, config.exclude_modules):
        return None
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save or ()):
        return None
    if config.target_modules == "all-linear":
        return "all-linear" if row.is_matrix else None
    hit = named(name, config.target_modules)
    if hit and hit != name and config.layers_to_transform is not None and not isinstance(config.target_modules, str):
        return hit if _in_layers(name, config) else None
    return hit


def _in_layers(name: str, config: AnyConfig) -> bool:
    patterns = (config.layers_pattern,) if isinstance(config.layers_pattern, str) else config.layers_pattern
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    found = next(filter(None, (_compiled(expression).match(name) for expression in expressions)), None)
    chosen = config.layers_to_transform
    return found is not None and int(found.group(1)) in ((chosen,) if isinstance(chosen, int) else chosen or ())


def _compiled(expression: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"lora: {expression!r} is not a regular expression: {error}") from error


def named(name: str, targets) -> str | None:
    """Which target names a module: by its full name or its end, or as a regular expression."""
    if isinstance(targets, str):
        return targets if _compiled(targets).fullmatch(name) else None
    return next((t for t in targets if name == t or name.endswith("." + t)), None)


def rank_and_scale(name: str, config: AnyConfig) -> tuple[int, float]:
    """Rank and `alpha / r` (rsLoRA: `alpha / sqrt r`); the first matching key of a pattern counts, as in PEFT."""

    def pattern(patterns, default):
        return next((value for key, value in dict(patterns).items() if _compiled(rf"(.*\.)?({key})").fullmatch(name)), default)

    rank, alpha = config.rank_and_alpha
    rank, alpha = pattern(config.rank_pattern, rank), pattern(config.alpha_pattern, alpha)
    if rank < config.least_rank:
        raise ConfigError(f"{config.group}: the rank of {name} is {rank}; it has to be 1 or more")
    return rank, config.scaling(rank, alpha)


def check_trained(config: AnyConfig, sites: tuple[Site, ...], wholes: tuple[Whole, ...]) -> None:
    """ConfigError if the config names nothing at all."""
    if not sites and not wholes:
        raise ConfigError(
            f"{config.group}.target_modules names no matrix and nothing else is trained either; write all-linear, or a list of names "
            "([q_proj, v_proj])"
        )


# ---- parameters that are trained whole ----


def whole_rows(model_config: ModelConfig) -> dict[str, Row]:
    """The rows that can be trained whole, under PEFT's names: all but experts and norms stored one tensor per head; also a tied head, by
    itself."""
    rows, found = module_rows(model_config), adaptable(model_config)
    rows |= {"head": found["head"]} if "head" in found else {}
    return {path: found.get(path, row) for path, row in rows.items() if not (row.is_experts or row.is_apart)}


def find_wholes(model_config: ModelConfig, config: AnyConfig, sites: tuple[Site, ...]) -> tuple[Whole, ...]:
    """What `bias`, `modules_to_save` and `trainable_token_indices` name, and a scoring head.

    ConfigError for an unknown name, or one that clashes with another.
    """
    rows = whole_rows(model_config)
    tied = "head" not in spec(model_config) and "head" in rows
    ranks = {site.path: site.ranks for site in sites}
    chosen = {path: {0} for path in heads.PATHS if path in rows}  # layers by path; 0 for rows without layers

    def choose(where: Callable[[str, int, str], bool]) -> bool:
        any_found = False
        for path, row in rows.items():
            if found := {i for i, layer in enumerate(row.layers or (None,)) if where(path, i, row.hf.format(layer=layer))}:
                chosen[path], any_found = chosen.get(path, set()) | found, True
        return any_found

    if config.bias == "all" and any(path.endswith("/experts_down_bias") for path in rows):
        raise ConfigError(f"{config.group}.bias: all would train biases of experts, which are not trained whole; write lora_only or none")
    if config.bias == "all":
        choose(lambda path, i, name: name.endswith(".bias"))
    elif config.bias != "none":  # lora_only, vera_only, ...
        choose(lambda path, i, name: name.endswith(".bias") and bool(ranks.get(path.removesuffix("_bias"), (0,) * (i + 1))[i]))
    experts = [name for path, row in adaptable(model_config).items() if is_parameter(path) and row.is_experts for name in names(path, row)]
    for module in config.modules_to_save or ():
        if model_config.num_labels and module in HEADS:
            continue  # trained anyway
        if any(part.endswith(module) for name in experts for part in ancestors(name)):
            key = f"{config.group}.modules_to_save"
            raise ConfigError(f"{key}: {module} holds experts, which are not trained whole; name them in target_parameters")
        if not choose(lambda path, i, name, module=module: any(part.endswith(module) for part in ancestors(name))):
            there = sorted({row.hf.rsplit(".", 2)[-2] for row in rows.values()})
            raise ConfigError(f"{config.group}.modules_to_save: {module} is no module of this model; there are {', '.join(there)}")
    if tied and config.ensure_weight_tying and {"embed", "head"} & chosen.keys():
        chosen["embed"] = chosen.pop("head", {0})
    wholes = [Whole(path, None if len(found) == max(1, len(rows[path].layers)) else tuple(sorted(found))) for path, found in chosen.items()]
    tokens = _token_indices(model_config, config)
    for path in {"embed", "head"} & {site.path for site in sites} if tied and config.ensure_weight_tying else tokens.keys() & ranks.keys():
        raise ConfigError(f"lora: a pair at {names(path, rows[path])[0]} goes with neither ensure_weight_tying nor trainable_token_indices")
    if both := tokens.keys() & chosen.keys():
        module = names(min(both), rows[min(both)])[0]
        raise ConfigError(f"lora: {module} is in modules_to_save and in trainable_token_indices; leave one out")
    return tuple(wholes + [Whole(path, ids) for path, ids in tokens.items()])


def ancestors(name: str) -> list[str]:
    """The modules that contain a parameter: `a.b` and `a` for `a.b.weight`."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _token_indices(model_config: ModelConfig, config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """`embed` and `head` -> token ids; a tied head follows the embedding, as in PEFT."""
    given: Any = config.trainable_token_indices
    if not given:
        return {}
    ends, found = {end: nested.module(model_config, name) for end, name in FAMILIES[model_config.model_type].ends.items()}, {}
    table: dict[str, tuple[int, ...]] = dict(given) if isinstance(given[0], tuple) else {ends["embed"]: given}
    for module, ids in table.items():
        path = next((path for path in ("embed", "head") if ends[path].endswith(module)), None)
        if path is None:
            raise ConfigError(f"lora.trainable_token_indices: {module} is neither {ends['embed']} nor {ends['head']}; write one of them")
        if wrong := [number for number in ids if not 0 <= number < model_config.vocab_size or ids.count(number) > 1]:
            size = model_config.vocab_size
            raise ConfigError(f"lora.trainable_token_indices: {wrong[0]} is there twice, or is no token of a vocabulary of {size}")
        found[path] = tuple(ids)
    if model_config.tie_word_embeddings and "head" in found:
        if found.get("embed") != found["head"]:
            raise ConfigError("lora.trainable_token_indices: the head is tied to the embedding; name the embedding's tokens alone")
        del found["head"]
    return found
