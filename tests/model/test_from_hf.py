"""config.json: what is refused, by name, and what is ignored."""

import contextlib
import dataclasses

import pytest
import references

from jaxtune.errors import ModelError
from jaxtune.model.families import FAMILIES, NESTED, dropouts, from_hf, nested
from jaxtune.model.spec import spec

FIRST = {}  # a golden config of every family, alone or within another
for name in references.CASES:
    hub = references.load(name).hub
    FIRST.setdefault(hub["model_type"], hub)
for hub in list(FIRST.values()):
    FIRST |= {text: hub["text_config"] for text in FAMILIES if text not in FIRST and hub.get("text_config", {}).get("model_type") == text}
FIRST |= {kin: FIRST[first] | dict(model_type=kin) for kin, first in {"iquestcoder": "llama", "sarvam_mla": "deepseek_v3"}.items()}
FIRST |= {outer: references.alike(outer) for outer in references.ALIKE}
LLAMA = FIRST["llama"]
YARN = dict(type="yarn", rope_theta=10.0, factor=2.0, llama_4_scaling_beta=0.3)
LONGROPE = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8)


def test_every_family_has_a_golden_or_is_like_one():
    assert FIRST.keys() == FAMILIES.keys() | NESTED.keys()


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", dict(model_type="mamba"), "model_type 'mamba' is not supported"),
        ("llama", dict(model_type=None), "model_type None is not supported"),
        ("llama", dict(hidden_size=None), "hidden_size=None; it needs a positive whole number"),
        ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000; at most 10000"),
        ("mixtral", dict(num_local_experts=10**9), "num_local_experts=1000000000; at most 10000"),
        ("llama", dict(vocab_size="96"), "vocab_size='96'"),
        ("llama", dict(num_key_value_heads=3), "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("llama", dict(hidden_act="mish"), "hidden_act 'mish' is not supported; supported are silu"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is not implemented for llama"),
        ("olmo3", dict(partial_rotary_factor=0.5), "partial_rotary_factor is not implemented for olmo3"),
        ("deepseek_v2", dict(partial_rotary_factor=0.5), "partial_rotary_factor is not implemented for deepseek_v2"),
        ("llama", dict(head_dim=9), "head_dim=9 is odd"),
        ("llama", dict(rope_scaling=dict(type="mrope")), "rope_type 'mrope' is not supported"),
        ("llama", dict(rope_scaling=dict(type="linear")), "rope_type 'linear' needs factor"),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "'llama3' needs low_freq_factor, high_freq_factor"),
        ("qwen2", dict(rope_parameters=dict(full_attention={})), "rope_parameters.full_attention: one rotary scheme per kind of layer"),
        ("qwen2", dict(layer_types=["chunked_attention"] * 4), "layer_types: 'chunked_attention' is not supported"),
        ("qwen2", dict(layer_types=["full_attention"]), "layer_types has 1 entries for num_hidden_layers=4"),
        ("qwen2", dict(layer_types=["sliding_attention"] * 4, use_sliding_window=False), "sliding_window is None"),
        ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True is not implemented for gemma"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True is not implemented for gemma2"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "not implemented for gemma3_text"),
        ("apertus1p5_text", dict(output_vocab_size=105), "output_vocab_size=105; at most vocab_size=104 is possible"),
        ("gemma3n_text", dict(intermediate_size=[24, 32] * 2), "intermediate_size=[24, 32, 24, 32] is not implemented for gemma3n_text"),
        ("gemma3n_text", dict(intermediate_size=[24, "a"]), "has intermediate_size='a'; it needs a whole number above 0"),
        ("gemma3n_text", dict(activation_sparsity_pattern=[0.5]), "activation_sparsity_pattern of this gemma3n_text model has 1 values"),
        ("gemma3n_text", dict(activation_sparsity_pattern=[1.0] * 4), "activation_sparsity_pattern of this gemma3n_text model holds 1.0"),
        ("gemma3n_text", dict(altup_active_idx=4), "altup_active_idx=4 is none of the altup_num_inputs=3 streams"),
        ("gemma4_text", dict(enable_moe_block=True), "enable_moe_block needs a positive whole number at num_experts; it is None"),
        ("gemma4_text", dict(use_bidirectional_attention="all"), "use_bidirectional_attention='all' is not implemented for gemma4_text"),
        ("gemma4_text", dict(num_kv_shared_layers=3), "num_kv_shared_layers=3 leaves no layer of each kind that makes keys and values"),
        ("gemma4_text", dict(vocab_size_per_layer_input=9), "vocab_size_per_layer_input=9 is less than vocab_size=96"),
        ("gemma4_text", dict(per_layer_config={"0": {"head_dim": 8}}), "only one head_dim and num_key_value_heads of all full layers is"),
        ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type 'linear' is not supported for phi3"),
        ("phi3", dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "'longrope' needs long_factor"),
        (
            "phi3",
            dict(rope_scaling=dict(type="su", short_factor=[1.0] * 8, long_factor=[1.0] * 7)),
            "long_factor has 7 numbers; this model's heads need 8",
        ),
        (
            "phi3",
            dict(rope_scaling=LONGROPE | dict(type="longrope", original_max_position_embeddings=16)),
            "original_max_position_embeddings is 64 in config.json and 16 in its rope_scaling",
        ),
        ("gemma3", dict(text_config=None), "text_config=None; it has to be an object"),
        ("gemma3", dict(text_config=dict(model_type="llama")), "text_config.model_type 'llama' is not supported in gemma3"),
        ("gemma3", dict(architectures=["Gemma3ForSequenceClassification"]), "a scoring head on a gemma3 model is not supported"),
        ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc' is not supported for deepseek_v2"),
        ("deepseek_v2", dict(num_key_value_heads=2), "num_key_value_heads=2 is not num_attention_heads=4"),
        ("deepseek_v3", dict(v_head_dim=32), "v_head_dim=32 is more than qk_nope_head_dim + qk_rope_head_dim=20"),
        ("deepseek_v3", dict(n_group=6, topk_group=4), "n_group=6 of 6 experts are groups of one"),
        ("glm4_moe", dict(n_group=4), "n_group=4 and topk_group=1 leave no 3 of 6 experts"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv=8.0 is not implemented for olmoe"),
        ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers has 1 entries"),
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1 is not implemented for mixtral"),
        ("mixtral", dict(num_experts_per_tok=9), "num_experts_per_tok=9 is more than the 4 experts"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True is not implemented for gpt2"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not implemented"),
        ("gpt2", dict(n_layer=0), "n_layer=0"),
        ("granitemoehybrid", dict(layer_types=["mamba"] * 2), "a model without a layer of attention is not implemented"),
        ("granitemoehybrid", dict(mamba_d_head=7), "mamba_n_heads=4 of mamba_d_head=7 do not make 32, the width of a Mamba layer"),
        ("granitemoehybrid", dict(mamba_n_groups=3), "mamba_n_heads=4 is not a multiple of mamba_n_groups=3"),
        ("granitemoehybrid", dict(time_step_limit=[0.0, 0.1]), "time_step_limit=[0.0, 0.1] is not implemented"),
        ("glm4_moe_lite", dict(mlp_layer_types=["x"]), "mlp_layer_types=['x'] is not sparse or dense for each of"),
        ("glm4_moe_lite", dict(head_dim=16), "head_dim=16 is not qk_rope_head_dim=8"),
        ("falcon_h1", dict(mamba_proj_bias=True), "mamba_proj_bias=True is not implemented for falcon_h1"),
        ("falcon_h1", dict(mlp_multipliers=[1.0]), "mlp_multipliers=[1.0] of this falcon_h1 model has to be 2 numbers"),
        ("falcon_h1", dict(mamba_d_ssm=25), "mamba_n_heads=6 of mamba_d_head=4 do not make 25, the width of a Mamba layer"),
        ("llama4_text", dict(no_rope_layers=[1]), "no_rope_layers has 1 entries for num_hidden_layers=2"),
        ("llama4_text", dict(attention_chunk_size=None, layer_types=["chunked_attention"] * 2), "attention_chunk_size is None"),
        ("nemotron_h", dict(hybrid_override_pattern="M-X"), "hybrid_override_pattern='M-X' of this nemotron_h model has to be a text"),
        ("nemotron_h", dict(hybrid_override_pattern="M-"), "a model without a layer of attention is not implemented for nemotron_h"),
        ("nemotron_h", dict(use_bias=True), "use_bias=True is not implemented for nemotron_h"),
        ("phimoe", dict(num_experts_per_tok=3), "num_experts_per_tok=3 of 6 is not implemented for phimoe"),
        ("phimoe", dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type='linear' with short_mscale=None"),
        ("lfm2", dict(conv_bias=True), "conv_bias=True is not implemented for lfm2"),
        ("lfm2", dict(full_attn_idxs=[]), "a model without a full_attention layer is not implemented for lfm2"),
        ("lfm2", dict(block_ffn_dim_multiplier=0.0), "intermediate_size is 0 in this lfm2 model by its block_ff_dim"),
        ("lfm3", dict(layer_types=["conv"] * 3), "a model without a full_attention layer is not implemented for lfm3"),
        ("lfm3", dict(rope_parameters={"full_attention": {}}), "rope_parameters of this lfm3 model holds no object for sliding_attention"),
        ("lfm3", dict(sliding_window=None), "layer_types has sliding_attention but sliding_window is None"),
        ("olmo_hybrid", dict(layer_types=["full_attention"] * 2), "layer_types of this olmo_hybrid model has no linear_attention"),
        ("olmo_hybrid", dict(linear_num_value_heads=8), "linear_num_value_heads=8 and linear_num_key_heads=4 have to be equal"),
        ("olmo_hybrid", dict(linear_key_head_dim=None, hidden_size=1), "linear_num_key_heads=4 is more than hidden_size=1 has room for"),
        ("lfm2_moe", dict(layer_types=None), "this lfm2_moe model lacks layer_types"),
        ("bamba", dict(attn_layer_indices=[2]), "attn_layer_indices=[2] of this bamba model are not numbers of its 2 layers"),
        ("bamba", dict(z_loss_coefficient=0.1), "z_loss_coefficient=0.1 is not implemented for bamba"),
        ("cohere2_moe", dict(expert_selection_fn="x"), "expert_selection_fn='x' and shared_expert_combination_strategy='average'"),
        ("codegen", dict(n_embd=30, n_head=2), "n_embd=30 of this codegen model is not a multiple of 4"),
        ("gpt_neo", dict(attention_types=[[["global"], 1]]), "have to be global or local for each of num_layers=2"),
        ("gpt_neo", dict(attention_types=[7]), "attention_types=[7] of this gpt_neo model have to be like"),
        ("mellum", dict(rope_parameters=dict(full_attention={})), "rope_parameters of this mellum model lacks sliding_attention"),
        ("mistral4", dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5 of this mistral4 model"),
        ("cohere", dict(logit_scale=0.0), "logit_scale=0.0; it needs a number above 0"),
        ("bloom", dict(n_head=5), "the width 24 of this bloom model is not a multiple of its 5 heads"),
        ("bloom", dict(n_layer=None), "this bloom model has n_layer=None; it needs a positive whole number"),
        ("mpt", dict(attn_config=dict(clip_qkv=-1.0)), "attn_config of this mpt model has clip_qkv=-1.0; it needs a number above 0"),
        ("falcon", dict(num_ln_in_parallel_attn=3), "num_ln_in_parallel_attn=3, which no Falcon model has"),
        ("opt", dict(word_embed_proj_dim=512), "word_embed_proj_dim=512 is not implemented for opt; only hidden_size=32 is"),
        ("opt", dict(do_layer_norm_before=False), "do_layer_norm_before=False is not implemented for opt"),
        ("exaone4", dict(layer_types=None, sliding_window_pattern="LLLG"), "sliding_window_pattern is 'LLLG' and layer_types is missing"),
        ("olmo", dict(clip_qkv=-1.0), "clip_qkv=-1.0; it needs a number above 0"),
        ("hunyuan_v1_moe", dict(moe_topk=[3, 2]), "moe_topk=[3, 2] is not implemented for hunyuan_v1_moe"),
        ("exaone", dict(num_layers=None), "this exaone model has num_layers=None"),
        ("internlm3", dict(bias=False), "qkv_bias=True and bias=False are not implemented for internlm3"),
        ("granite_swa", dict(layer_rope_theta=[1000.0]), "layer_rope_theta=[1000.0] has to be a number for each of num_hidden_layers=3"),
        ("cohere2", dict(sliding_window=None), "sliding_window is None"),
        ("qwen2_moe", dict(decoder_sparse_step=0), "decoder_sparse_step=0; it needs a whole number above 0"),
        ("granitemoe", dict(logits_scaling=None), "logits_scaling=None; it needs a number"),
        ("mixtral", dict(num_experts_per_tok=0), "num_experts_per_tok=0 is no number of experts"),
        ("gemma3_text", dict(rope_scaling=dict(type="linear", factor=8.0)), "type='linear'; transformers reads rope_type there"),
        ("deepseek_v3", dict(rope_scaling=dict(type="yarn", mscale_all_dim=1.0)), "rope_type 'yarn' needs factor"),
        ("llama", dict(rope_scaling="yarn"), "rope_scaling='yarn'; it needs an object"),
        ("llama", dict(head_dim=None, hidden_size=3), "num_attention_heads=4 is more than hidden_size=3 has room for"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(model_type, change, message):
    with pytest.raises(ModelError) as error:
        from_hf(FIRST[model_type] | change)
    assert message in str(error.value)


def test_a_value_of_another_kind_is_no_traceback():
    for model_type, hub in FIRST.items():
        keys = {*hub, "architectures", "layer_types", "num_experts", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        keys |= {*FAMILIES[model_type].defaults} if model_type in FAMILIES else {"text_config"}
        for key in keys:
            for value in (None, "x", [1], {"full_attention": "x"}, -1, float("nan")):
                with contextlib.suppress(ModelError):
                    spec(from_hf(hub | {key: value}))


@pytest.mark.parametrize(
    ("model_type", "change", "same"),
    [
        # transformers' AutoConfig treats a Mistral with layer_types as a Ministral
        ("mistral", dict(layer_types=["full_attention", "sliding_attention"] * 2), dict(model_type="ministral")),
        ("mixtral", dict(num_experts=5), dict(num_local_experts=5, num_experts=None)),
        ("gpt2", dict(max_position_embeddings=16), dict(n_positions=16)),
        ("bloom", dict(n_embed=48), dict(hidden_size=48)),
        ("ministral3", dict(rope_scaling=YARN), dict(rope_parameters=YARN, rope_scaling=None)),
        ("ministral3", dict(rope_parameters=None), dict(rope_parameters=FAMILIES["ministral3"].defaults["rope_parameters"])),
    ],
)
def test_two_spellings_of_one_model(model_type, change, same):
    other = FIRST[model_type] | change | same
    assert from_hf(FIRST[model_type] | change) == from_hf({key: value for key, value in other.items() if value is not None})
    assert from_hf(FIRST[model_type] | change) != from_hf(FIRST[model_type])


def test_an_original_length_beside_schemes_by_kind_of_layer_is_not_read():
    scaled = FIRST["olmo3"] | dict(rope_scaling=dict(rope_type="yarn", factor=4.0))
    assert from_hf(scaled | dict(original_max_position_embeddings=8)) == from_hf(scaled)  # transformers reads it inside only


def test_a_missing_key_is_named():
    with pytest.raises(ModelError, match="lacks intermediate_size"):
        from_hf({key: value for key, value in LLAMA.items() if key != "intermediate_size"})


@pytest.mark.parametrize("model_type", [*FAMILIES, *NESTED])
def test_keys_that_change_nothing_are_ignored(model_type):
    extra = dict(use_cache=True, torch_dtype="bfloat16", attention_dropout=0.1, transformers_version="4.40.0", pretraining_tp=2, mine="x")
    config = from_hf(FIRST[model_type] | extra)
    assert config == from_hf(FIRST[model_type]) and hash(config) == hash(from_hf(FIRST[model_type]))


def test_keys_left_out_mean_what_transformers_takes():
    bare = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, vocab_size=96)
    gemma3 = from_hf(bare | dict(model_type="gemma3_text", head_dim=16, num_key_value_heads=2))
    assert gemma3.layer_windows == (4096,) * 5 + (0,) and gemma3.layer_ropes == (1,) * 5 + (0,)
    assert [rope.theta for rope in gemma3.ropes] == [1e6, 1e4] and gemma3.tie_word_embeddings
    assert from_hf(bare | dict(model_type="mixtral", num_key_value_heads=2)).ropes[0].theta == 1e6
    assert from_hf(bare | dict(model_type="smollm3")).layer_ropes == (0, 0, 0, -1, 0, 0)
    assert from_hf(bare | dict(model_type="mistral", num_key_value_heads=2)).layer_windows == (4096,) * 6
    qwen = from_hf(bare | dict(model_type="qwen2", num_key_value_heads=2, use_sliding_window=True, max_window_layers=4))
    assert qwen.layer_windows == (0,) * 4 + (4096,) * 2
    gpt_oss = from_hf(bare | dict(model_type="gpt_oss", num_key_value_heads=2))
    assert gpt_oss.layer_windows == (128, 0) * 3 and gpt_oss.moe.clamp == (7.0, 1.702)
    assert gpt_oss.ropes[0].theta == 150000 and gpt_oss.ropes[0].kind == "yarn" and not gpt_oss.ropes[0].truncate
    cohere2 = from_hf(bare | dict(model_type="cohere2"))
    assert cohere2.layer_windows == (4096, 4096, 4096, 0, 4096, 4096) and cohere2.layer_ropes == (0, 0, 0, -1, 0, 0)
    assert cohere2.logits_scaling == 16 and from_hf(bare | dict(model_type="cohere")).ropes[0].theta == 5e5
    assert from_hf(bare | dict(model_type="glm")).ropes[0].dim == 64
    exaone = from_hf(bare | dict(model_type="exaone4", num_key_value_heads=4))
    assert exaone.layer_windows == (4096, 4096, 4096, 0, 4096, 4096) and exaone.layer_ropes == (0, 0, 0, -1, 0, 0)
    whole = from_hf(bare | dict(model_type="exaone4", num_key_value_heads=4, sliding_window=None))
    assert whole.layer_windows == (0,) * 6 and whole.layer_ropes == (0,) * 6
    olmo3 = from_hf(bare | dict(model_type="olmo3"))
    assert olmo3.layer_ropes == (1, 1, 1, 0, 1, 1) and [rope.theta for rope in olmo3.ropes] == [5e5, 5e5]
    ministral3 = from_hf(bare | dict(model_type="ministral3", num_key_value_heads=2))
    assert ministral3.query_growth[:2] == (0.1, 16384) and ministral3.ropes[0].kind == "yarn" and ministral3.ropes[0].theta == 1e6
    assert from_hf(bare | dict(model_type="ministral", num_key_value_heads=2)).layer_windows == (4096,) * 6
    assert from_hf(bare | dict(model_type="nemotron")).hidden_act == "relu2"
    moe = from_hf(bare | dict(model_type="qwen3_moe", num_local_experts=4, num_experts_per_tok=2, decoder_sparse_step=3)).moe
    assert moe.layers == (2, 5) and moe.num_experts == 4


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_under_the_names_it_had_in_phi3(kind):
    bare = {key: value for key, value in FIRST["phi3"].items() if key != "original_max_position_embeddings"}
    above = from_hf(bare | dict(original_max_position_embeddings=16, rope_scaling=LONGROPE | dict(type=kind)))
    inside = from_hf(bare | dict(rope_scaling=LONGROPE | dict(type="su", original_max_position_embeddings=16)))
    assert above.ropes == inside.ropes and above.ropes[0].kind == "longrope" and above.ropes[0].original_max == 16
    assert from_hf(bare | dict(rope_scaling=LONGROPE | dict(type=kind))).ropes[0].original_max == 4096


def test_a_nested_config_is_that_of_its_language_model():
    for name in NESTED:
        hub = FIRST[name]
        alone = from_hf(nested.text_config(hub))
        apart = dataclasses.replace(from_hf(hub), outer="", together=False, file_layers=(), unwritten=alone.unwritten)
        assert apart == alone and alone.model_type in FAMILIES
        assert from_hf(hub).outer == name
    said = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, model_type="gemma3_text", sliding_window=1024)
    gemma = from_hf(dict(model_type="gemma3", text_config=said))  # as in the hub's 4b
    assert (gemma.vocab_size, gemma.num_heads, gemma.num_kv_heads, gemma.head_dim) == (262208, 8, 4, 256) and gemma.tie_word_embeddings
    layer_types = dict(text_config=FIRST["mistral3"]["text_config"] | dict(layer_types=["full_attention"]))
    assert from_hf(FIRST["mistral3"] | layer_types) == from_hf(FIRST["mistral3"])  # a Mistral within: no Ministral
    mistral = FIRST["mistral3"] | dict(tie_word_embeddings=True)
    assert from_hf(mistral).tie_word_embeddings  # the outer value, which transformers reads


def test_dropout_of_training_is_named():
    rates = dict(attn_pdrop=0.1, embd_pdrop=0.0, resid_pdrop=0.2, summary_first_dropout=0.1)
    assert dropouts(from_hf(FIRST["gpt2"] | rates)) == dict(attn_pdrop=0.1, resid_pdrop=0.2)
    inside = FIRST["mistral3"]["text_config"] | dict(attention_dropout=0.3)
    assert dropouts(from_hf(FIRST["mistral3"] | dict(text_config=inside))) == dict(attention_dropout=0.3)
    assert dropouts(from_hf(LLAMA)) == {}


def test_an_untied_copy_has_a_head_row():
    config = from_hf(FIRST["gemma"])
    assert "head" not in spec(config)
    assert spec(dataclasses.replace(config, tie_word_embeddings=False))["head"].hf_names() == ["lm_head.weight"]
