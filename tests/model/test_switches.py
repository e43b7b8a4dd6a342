"""Switching off any feature of a family must change its logits: no golden is blind to a switch.

This depends on the golden only, so a switch that several cases have is checked in the first; in all when a golden is made:
JAXTUNE_TEST_SWITCHES=all pytest ...
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig, from_hf
from jaxtune.model.families.factors import Growth
from jaxtune.model.rope import Rope
from jaxtune.model.spec import spec
from jaxtune.tree import flatten, unflatten

TOLERANCE = 1e-4
forward = jax.jit(decoder.forward, static_argnums=0)
PLAIN = {  # the value of a field in a model without special features
    "attention_softcap": 0.0,
    "logits_softcap": 0.0,
    "logits_scaling": 1.0,
    "embed_scale": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "parallel_residual": False,
    "shared_norm": False,
    "position_offset": 0,
    "bare_norms": (),
    "qk_norm_last": False,
    "qkv_clip": 0.0,
    "query_growth": Growth(),
    "alibi": None,
}
OPTIONAL = ("_bias", "q_norm", "k_norm", "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "positions", "embed_norm",
            "shared_router", "sinks", "router_correction", "layer_scale", "input_post_norm", "attn_gate", "laurel_norm")  # fmt: skip


def without(config: ModelConfig) -> dict[str, ModelConfig]:
    """The config with one switch off or inverted, for every switch that it has on."""
    layers, head_dim = config.num_layers, config.head_dim
    fields = {name: plain for name, plain in PLAIN.items() if getattr(config, name) != plain}
    if config.attention_scale != head_dim**-0.5:
        fields["attention_scale"] = head_dim**-0.5
    if any(config.layer_windows):
        fields["layer_windows"] = (0,) * layers
    if -1 in config.layer_ropes and config.ropes:
        fields["layer_ropes"] = (0,) * layers
    if config.norm != "rms_float32":  # differs from "rms" only in low precision: tests/model/test_layers.py
        fields["norm"] = "rms_offset" if config.norm == "rms" else "rms"
    fields["hidden_act"] = "gelu" if config.hidden_act in ("gelu_pytorch_tanh", "gelu_new") else "relu"
    fields["norm_eps"] = 0.1
    changed = {name: dataclasses.replace(config, **{name: value}) for name, value in fields.items()}
    if config.cutoffs:
        changed["cutoffs"] = dataclasses.replace(config, cutoffs=tuple(c if c is None else c + 1 for c in config.cutoffs))
    if config.streams:
        for name, plain in (("active", 0), ("scaled", False)):
            changed[f"streams {name}"] = dataclasses.replace(config, streams=config.streams._replace(**{name: plain}))
    if config.interleaved:
        changed["interleaved"] = dataclasses.replace(config, ropes=tuple(dataclasses.replace(r, interleaved=False) for r in config.ropes))
    if any(rope.backwards for rope in config.ropes):
        changed["backwards"] = dataclasses.replace(config, ropes=tuple(dataclasses.replace(r, backwards=False) for r in config.ropes))
    if any(config.layer_windows):
        one_more = tuple(window + 1 if window else 0 for window in config.layer_windows)
        changed["window of one more"] = dataclasses.replace(config, layer_windows=one_more)
    if len(config.ropes) > 1:
        changed["one rope"] = dataclasses.replace(config, layer_ropes=(0,) * layers)
    for i, rope in enumerate(config.ropes):
        for field, plain in (("kind", "default"), ("theta", 10000.0), ("attention_factor", 1.0), ("dim", head_dim)):
            if getattr(rope, field) != plain:
                base = Rope(rope.dim, rope.theta) if field == "kind" else rope
                other = base if field == "kind" else dataclasses.replace(base, **{field: plain})
                if field == "dim" and rope.kind != "default":
                    continue  # as many factors as frequencies
                changed[f"rope {i} {field}"] = dataclasses.replace(config, ropes=(*config.ropes[:i], other, *config.ropes[i + 1 :]))
    if config.moe:
        moe = config.moe
        changed["moe normalize"] = dataclasses.replace(config, moe=dataclasses.replace(moe, normalize=not moe.normalize))
        changed["moe chosen"] = dataclasses.replace(config, moe=dataclasses.replace(moe, experts_per_token=1))
        for name, plain in (("sigmoid", False), ("groups", (1, 1)), ("scale", 1.0), ("shared_scale", 1.0)):
            if getattr(moe, name) != plain:
                changed[f"moe {name}"] = dataclasses.replace(config, moe=dataclasses.replace(moe, **{name: plain}))
        if moe.clamp:
            changed["moe clamp"] = dataclasses.replace(config, moe=dataclasses.replace(moe, clamp=(7.0, moe.clamp[1])))
        if moe.shared_intermediate_size:
            changed["moe shared"] = dataclasses.replace(config, moe=dataclasses.replace(moe, shared_intermediate_size=0))
    return changed


def lacking(params: dict) -> dict[str, dict]:
    """The tree without the rows of one optional part (for biases: zeros, since a LayerNorm always has one)."""
    leaves = flatten(params)
    found = {}
    for part in OPTIONAL:
        rest = {path: leaf for path, leaf in leaves.items() if not path.endswith(part)}
        if len(rest) < len(leaves):
            zeros = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if path.endswith(part) and part == "_bias"}
            found[part] = unflatten(rest | zeros)
    return found


GENERIC = {"norm", "hidden_act", "norm_eps", "rope 0 theta", "attn_norm", "mlp_norm"}  # every model has them: tested where they are listed
# what makes each case more than a plain Llama; complete except for the generic switches
SWITCHES = {
    "apertus": {"_bias", "q_norm", "k_norm", "hidden_act", "rope 0 kind", "rope 0 theta"},
    "arcee": {"_bias", "hidden_act"},
    "cohere": {"parallel_residual", "shared_norm", "logits_scaling", "interleaved", "q_norm", "k_norm", "norm", "norm_eps", "attn_norm"},
    "cohere2": {
        "parallel_residual", "shared_norm", "logits_scaling", "interleaved", "layer_ropes", "layer_windows", "window of one more", "_bias",
    },
    "deepseek_v2": {"interleaved", "rope 0 dim", "moe chosen", "moe groups", "moe scale", "moe shared", "moe normalize"},
    "deepseek_v3": {"interleaved", "_bias", "rope 0 kind", "attention_scale", "moe chosen", "moe groups", "moe normalize", "moe scale",
                    "moe shared", "moe sigmoid", "router_correction"},
    "dynamic": {"rope 0 kind"},
    "ernie4_5": {"interleaved", "_bias"},
    "exaone4": {"layer_ropes", "layer_windows", "window of one more", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm"},
    "ernie4_5_moe": {"interleaved", "moe chosen", "moe normalize", "moe shared", "router_correction"},
    "falcon": {"parallel_residual", "_bias", "norm", "norm_eps", "attn_norm", "mlp_norm", "hidden_act"},
    "falcon_one_head": {"parallel_residual", "shared_norm", "_bias"},
    "gemma": {"embed_scale", "norm", "hidden_act"},
    "gemma2": {
        "embed_scale", "attention_softcap", "logits_softcap", "attention_scale", "layer_windows", "window of one more", "norm", "norm_eps",
        "hidden_act", "attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm",
    },
    "gemma3": {
        "embed_scale", "logits_softcap", "attention_scale", "layer_windows", "window of one more", "one rope", "rope 0 kind",
        "rope 1 theta", "hidden_act", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm",
    },
    "gemma3n": {
        "embed_scale", "logits_softcap", "attention_scale", "bare_norms", "layer_windows", "window of one more", "one rope", "rope 1 theta",
        "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm", "input_post_norm", "cutoffs", "streams active", "streams scaled",
        "laurel_norm",
    },
    "gemma4": {
        "embed_scale", "logits_softcap", "attention_scale", "bare_norms", "layer_windows", "window of one more", "one rope", "rope 0 kind",
        "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm", "input_post_norm", "layer_scale",
    },
    "glm": {"interleaved", "rope 0 dim", "_bias", "norm_eps"},
    "glm4": {"interleaved", "rope 0 dim", "attn_post_norm", "mlp_post_norm"},
    "glm4_moe": {"_bias", "rope 0 dim", "q_norm", "k_norm", "moe chosen", "moe normalize", "moe scale", "moe shared", "moe sigmoid",
                 "router_correction"},
    "gpt2": {"positions", "_bias", "norm", "norm_eps", "hidden_act"},
    "gpt2_unscaled": {"positions", "_bias", "attention_scale", "hidden_act"},
    "gpt_bigcode": {"positions", "_bias", "hidden_act"},
    "gpt_neox": {"parallel_residual", "_bias", "rope 0 dim", "rope 0 theta", "hidden_act"},
    "gpt_neox_sequential": {"rope 0 dim", "_bias"},
    "gpt_oss": {"_bias", "layer_windows", "window of one more", "rope 0 kind", "rope 0 theta", "rope 0 attention_factor", "moe chosen",
                "moe normalize", "moe clamp", "sinks"},
    "gptj": {"parallel_residual", "shared_norm", "interleaved", "rope 0 dim", "_bias", "hidden_act"},
    "granite": {"embedding_multiplier", "residual_multiplier", "attention_scale", "logits_scaling"},
    "granitemoe": {"_bias", "embedding_multiplier", "residual_multiplier", "attention_scale", "logits_scaling", "moe normalize",
                   "moe chosen"},
    "granitemoeshared": {"embedding_multiplier", "residual_multiplier", "attention_scale", "logits_scaling", "moe normalize", "moe chosen",
                         "moe shared"},
    "helium": {"interleaved", "norm_eps"},
    "hunyuan": {"qk_norm_last", "q_norm", "k_norm", "rope 0 theta"},
    "lfm2": {"q_norm", "k_norm", "norm_eps"},
    "lfm3": {"layer_windows", "window of one more", "one rope", "rope 0 kind", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm",
             "attn_gate", "norm_eps"},
    "linear": {"rope 0 kind"},
    "llama": {"_bias", "norm", "hidden_act", "norm_eps", "rope 0 theta", "attn_norm", "mlp_norm"},
    "llama3": {"rope 0 kind"},
    "ministral": {"layer_windows", "window of one more"},
    "ministral3": {"query_growth", "rope 0 kind"},
    "bloom": {"alibi", "embed_norm", "_bias", "norm", "norm_eps", "hidden_act"},
    "mpt": {"alibi", "qkv_clip", "attention_scale", "norm", "norm_eps", "hidden_act"},
    "mistral": {"layer_windows", "window of one more"},
    "mixtral": {"moe normalize", "moe chosen", "rope 0 theta"},
    "nanochat": {"bare_norms", "backwards", "logits_softcap", "norm", "hidden_act", "norm_eps"},
    "nemotron": {"rope 0 dim", "_bias", "norm", "norm_eps", "hidden_act"},
    "olmo": {"bare_norms", "qkv_clip", "norm", "norm_eps"},
    "olmo2": {"q_norm", "k_norm", "attn_post_norm", "mlp_post_norm", "norm_eps"},
    "olmoe": {"moe normalize", "moe chosen", "q_norm", "k_norm"},
    "olmo3": {
        "rope 0 kind", "rope 0 attention_factor", "rope 1 theta", "one rope", "layer_windows", "window of one more", "q_norm", "k_norm",
        "attn_post_norm", "mlp_post_norm",
    },
    "opt": {"positions", "position_offset", "_bias"},
    "phi": {"parallel_residual", "shared_norm", "rope 0 dim", "_bias", "q_norm", "k_norm", "attn_norm", "norm", "norm_eps", "hidden_act"},
    "phi3": {"layer_windows", "window of one more"},
    "phi4_mini": {"rope 0 kind", "rope 0 attention_factor"},
    "phi4_mini_short": {"rope 0 kind", "rope 0 attention_factor"},
    "qwen2": {"_bias", "layer_windows", "window of one more"},
    "qwen2_full": {"_bias"},
    "qwen2_moe": {"_bias", "layer_windows", "window of one more", "moe normalize", "moe chosen", "moe shared", "shared_router"},
    "qwen3": {"q_norm", "k_norm"},
    "qwen3_5": {"_bias", "rope 0 dim", "q_norm", "k_norm"},
    "qwen3_moe": {"moe normalize", "moe chosen", "q_norm", "k_norm"},
    "qwen3_moe_raw": {"moe normalize", "moe chosen", "layer_windows", "window of one more", "q_norm", "k_norm"},
    "qwen3_yarn": {"rope 0 kind", "rope 0 attention_factor", "_bias", "q_norm", "k_norm"},
    "seed_oss": {"_bias"},
    "smollm3": {"layer_ropes"},
    "smollm3_window": {"layer_ropes", "layer_windows", "window of one more"},
    "stablelm": {"rope 0 dim", "_bias", "norm", "q_norm", "k_norm"},
    "starcoder2": {"layer_windows", "window of one more", "_bias", "norm", "norm_eps", "hidden_act"},
}  # fmt: skip


# whose switches are all among those of other cases (lfm2_moe: lfm2's and glm4_moe's; minimax_m2: olmoe's and lfm2_moe's)
KIN = {"apertus1p5", "bamba", "codegen", "cohere2_moe", "cwm", "dots1", "exaone", "exaone_moe", "falcon_alibi", "flex_olmo",
       "glm4_moe_lite", "gpt_neo", "granitemoe_swa", "granitemoehybrid", "granitemoehybrid_dense", "hunyuan_moe", "hy_v3", "internlm3",
       "jais2", "lfm2_moe", "mamba2", "mellum", "minicpm3", "minimax_m2", "mistral4", "qwen3_next", "solar_open", "vaultgemma", "youtu"}
# whose switches were each checked once (docs/decisions.md): a program for each takes a second
SEEN = {"afmoe", "falcon_h1", "granite_swa", "hyperclovax", "llama4", "nemotron_h", "olmo_hybrid", "phimoe"}


def asked() -> dict[str, set[str]]:
    """The switches to check in each case: those that no earlier case has, or all."""
    cases, found = {case: SWITCHES[case] for case in references.TEXT if case not in KIN | SEEN}, set()
    if os.environ.get("JAXTUNE_TEST_SWITCHES") == "all":
        return cases
    new = {}
    for case, switches in cases.items():
        new[case] = switches - found
        found |= switches
    return {case: switches for case, switches in new.items() if switches}


@pytest.mark.parametrize("case", asked())
def test_every_switch_shows(case):
    golden = references.load(case)
    config = from_hf(golden.config)
    params = references.tree(config, golden.tensors)
    runs = {name: (changed, params) for name, changed in without(config).items()}
    runs |= {name: (config, tree) for name, tree in lacking(params).items()}
    assert runs.keys() >= SWITCHES[case] >= runs.keys() - GENERIC
    tokens, wanted = golden.documents[0][None], golden.logits["alone"][0]
    moved = {}
    for name in sorted(asked()[case]):
        changed, tree = runs[name]
        # one small program an operation, which nearly all runs share; the delta rule's are more than it is worth
        with jax.disable_jit(config.recurrent is None or config.recurrent.state is None):
            logits = forward(changed, tree, tokens)[0]
        moved[name] = float(np.abs(np.asarray(logits) - wanted).max())
    print(case, {name: f"{value:.1e}" for name, value in moved.items()})
    assert {name: value for name, value in moved.items() if value < 3 * TOLERANCE} == {}


def features(case: str) -> set:
    """The features of a case's backward pass: its rows, and their computation."""
    config = from_hf(references.load(case).config)
    ways = {(name, getattr(config, name)) for name in ("norm", "attention_softcap", "parallel_residual", "interleaved", "hidden_act")}
    ways |= {(name, getattr(config.moe, name)) for name in ("sigmoid", "clamp") if config.moe}
    rows = {path.rpartition("/")[2] for path in spec(config)}
    return rows | ways | {("windows", any(config.layer_windows)), ("stacks", len(config.stacks) > 1)}


def with_all_features() -> list[str]:
    """The cases that have a feature which no earlier case has."""
    seen, chosen = set(), []
    for case in references.TEXT:
        chosen += [case] if features(case) - seen else []
        seen |= features(case)
    return chosen


@pytest.mark.parametrize("case", with_all_features())
def test_every_parameter_is_trained_and_padding_makes_no_nan(case):
    golden = references.load(case)
    config = dataclasses.replace(from_hf(golden.config), remat="full")
    params = references.tree(config, golden.tensors)
    batch = references.layout(golden.documents, "left")

    def loss(params):
        logits = decoder.forward(config, params, batch.tokens, batch.positions, batch.segments)
        return jnp.where((batch.segments > 0)[..., None], logits, 0.0).var()

    gradient = flatten(jax.jit(jax.grad(loss))(params))
    for path, row in spec(config).items():
        g = np.asarray(gradient[path])
        per_layer = np.abs(g).reshape(g.shape[0], -1).max(1) if row.layers else np.abs(g).max()[None]
        still = path.endswith(("router_correction", "layer_scale", "act_beta", "act_eps"))
        assert np.isfinite(g).all() and (per_layer == 0 if still else per_layer > 0).all(), path
