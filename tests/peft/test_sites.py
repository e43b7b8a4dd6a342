"""What a LoraConfig names in a model, and possible mistakes. tests/oracle/test_peft.py checks what it should name."""

import jax
import numpy as np
import pytest
import tiny

from jaxtune import peft
from jaxtune.config import LoraConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import from_hf
from jaxtune.model.spec import abstract, init_params
from jaxtune.peft.sites import find_sites, settle

MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
MOE = tiny.LLAMA | MOE
TIED = tiny.LLAMA | {"tie_word_embeddings": True}


def init(hf, **settings):
    config = from_hf(hf)
    return jax.eval_shape(lambda p: peft.lora.init(jax.random.key(0), config, p, LoraConfig(**settings)), abstract(config))


def test_all_linear_of_a_mixture_is_attention_router_and_experts():
    config = settle(from_hf(MOE), LoraConfig(r=3, lora_alpha=6))
    assert config.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert config.target_parameters == ("down_proj", "gate.weight", "gate_up_proj")
    sites = {site.path: site for site in find_sites(from_hf(MOE), config)}
    assert sites["layers/0/experts_gate_up"].ranks == (6,) and sites["layers/0/experts_gate_up"].scales == (2.0,)
    assert sites["layers/2/experts_down"].ranks == (3,) and "layers/1/gate" not in sites  # PEFT leaves the dense layers' out too
    pair = init(MOE, r=3).params["layers/0/experts_gate_up"]
    assert pair["a"].shape == (1, 4, 6, 32) and pair["b"].shape == (1, 4, 48, 6)


@pytest.mark.parametrize("key, value, layers", [
    ("layers_pattern", "layers", (0, 3, 0)), ("layers_pattern", "h", None), ("target_modules", ("model.layers.2.mlp.up_proj",), (0, 0, 3)),
])  # fmt: skip
def test_layers(key, value, layers):
    settings = {"r": 3, "target_modules": ("up_proj",), "layers_to_transform": 1, key: value}
    if layers is None:
        with pytest.raises(ConfigError, match="matches no linear layer"):
            init(tiny.LLAMA, **settings)
    else:
        assert init(tiny.LLAMA, **settings).sites[0].ranks == layers


def test_a_module_to_save_is_not_adapted_too():
    adapter = init(tiny.LLAMA, modules_to_save=("layers.0.mlp", "lm_head"))
    assert {site.path: site.ranks[0] > 0 for site in adapter.sites} == {
        f"layers/0/{name}": name in "qkvo" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    wholes = {whole.path: whole.numbers for whole in adapter.wholes}
    assert wholes == {"head": None, "layers/0/gate": (0,), "layers/0/up": (0,), "layers/0/down": (0,)}


def test_both_uses_of_a_tied_matrix_are_trained_as_one_where_asked():
    for module in ("embed_tokens", "lm_head"):
        assert init(TIED, modules_to_save=module, ensure_weight_tying=True).saved.keys() == {"embed"}
    config = from_hf(TIED)
    params = init_params(jax.random.key(0), config)
    adapter = peft.lora.init(jax.random.key(0), config, params, LoraConfig(r=2, modules_to_save="embed_tokens"))
    np.testing.assert_array_equal(peft.compose(params, adapter)["head"], params["embed"])


WRONG = {
    "dense": (tiny.LLAMA, {"target_parameters": ("mlp.experts.down_proj",)}, "matches no parameter of experts.*; there is none"),
    "no such": (MOE, {"target_parameters": ("w9",)}, "w9 matches no parameter of experts.*mlp.experts.gate_up_proj"),
    "text": (tiny.LLAMA, {"target_modules": "q_proj,v_proj"}, r"there are .*a text is a regular expression.*write a list, \[NAME"),
    "none": (tiny.LLAMA, {"target_modules": ()}, "names no matrix and nothing else is trained"),
    "half": (MOE, {"target_modules": ("gate_proj",)}, "gate_proj without up_proj"),
    "dropout": (MOE, {"lora_dropout": 0.1}, "lora.lora_dropout cannot be used where experts are adapted"),
    "dora": (MOE, {"use_dora": True}, "lora.use_dora cannot be used where experts are adapted"),
    "bias": (tiny.LLAMA, {"lora_bias": True, "target_modules": ("embed_tokens",)}, "lora.lora_bias cannot be used where"),
    "module": (tiny.LLAMA, {"modules_to_save": ("classifier",)}, "classifier is no module of this model; there are .*lm_head"),
    "experts": (MOE, {"modules_to_save": ("mlp",), "target_modules": ("q_proj",)}, "mlp holds experts, which are not trained whole"),
    "token": (tiny.LLAMA, {"trainable_token_indices": (96,)}, "96 is there twice, or is no token of a vocabulary of 96"),
    "tokens": (tiny.LLAMA, {"trainable_token_indices": {"norm": (1,)}}, "norm is neither model.embed_tokens nor lm_head"),
    "head": (TIED, {"trainable_token_indices": {"lm_head": (1,)}}, "the head is tied to the embedding"),
    "both": (tiny.LLAMA, {"modules_to_save": "embed_tokens", "trainable_token_indices": 1}, "embed_tokens is in modules_to_save and in"),
    "pair": (tiny.LLAMA, {"target_modules": "model.embed_tokens", "trainable_token_indices": 1}, "a pair at model.embed_tokens goes with"),
    "tie": (TIED, {"target_modules": ("lm_head",), "ensure_weight_tying": True}, "a pair at lm_head goes with neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(case):
    hf, settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        init(hf, **settings)


@pytest.mark.parametrize(("r", "told"), [(32, False), (33, True)])
def test_a_rank_that_no_matrix_has_is_told(r, told, caplog):
    peft.lora.tell_rank(from_hf(tiny.LLAMA), LoraConfig(r=r))
    assert ("lora.r=33 is more than the rank" in caplog.text) == told


def test_a_packed_matrix_is_not_trained_whole():
    config = from_hf(tiny.LLAMA | {"hidden_size": 64})
    params = init_params(jax.random.key(0), config)
    params["layers"]["0"]["q"] = jax.tree.map(lambda *x: np.stack(x), *[peft.lora.LoRA(np.zeros((2, 2)), 0, 0, 0)] * 3)
    with pytest.raises(ConfigError, match="modules_to_save names layers/0/q, which is packed"):
        peft.lora.init(jax.random.key(0), config, params, LoraConfig(target_modules=("k_proj",), modules_to_save=("q_proj",)))
