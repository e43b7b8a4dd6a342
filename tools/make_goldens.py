"""Writes tests/goldens/*.npz: tiny random models of every family with transformers' own logits, in float32 with eager attention.

    python tools/make_goldens.py [case ...]          needs torch; without names all cases

A golden holds `config` (config.json as transformers 5 writes it), `hub` (the same in the spelling files on the hub have), `tensor/NAME`
(float16, exact), and for three documents `tokens/I`, `alone/I` (logits of the document by itself), `right/I` and `left/I` (padded into one
batch).
Matrices are scaled up, norms and biases made random, windows and caps small, so that a forgotten switch shows in the logits.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
LENGTHS = (13, 9, 6)
TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SMALL = TINY | dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24)  # for cases about one thing
DEEPSEEK = {key: value for key, value in SMALL.items() if key != "head_dim"} | dict(num_key_value_heads=4)
DEEPSEEK |= dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
DEEPSEEK |= dict(moe_intermediate_size=20, n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3)
GEMMA = dict(head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True)
NO_HEAD_DIM = {key: value for key, value in TINY.items() if key != "head_dim"}
PHI3 = NO_HEAD_DIM | dict(hidden_size=64, intermediate_size=40, num_hidden_layers=2)
GRANITEMOE = dict(attention_multiplier=0.4, embedding_multiplier=3.0, residual_multiplier=0.22, logits_scaling=4.0)
GRANITEMOE |= dict(num_local_experts=6, num_experts_per_tok=3, intermediate_size=20, tie_word_embeddings=True)
QWEN3_MOE = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, intermediate_size=32)
BARE = {key: value for key, value in SMALL.items() if key not in ("head_dim", "rms_norm_eps")} | dict(hidden_size=32)
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
OLD = {key: BARE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")}
FALCON = OLD | dict(model_type="falcon", ffn_hidden_size=24, layer_norm_epsilon=1e-3)
COHERE = BARE | dict(tie_word_embeddings=True, logit_scale=0.25)
QWEN3_5 = dict(
    num_hidden_layers=6,
    full_attention_interval=3,
    hidden_size=16,
    intermediate_size=24,
    tie_word_embeddings=True,
    rope_parameters=dict(
        rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True
    ),
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, shared_expert_intermediate_size=12)
GEMMA4 = SMALL | dict(model_type="gemma4_text", global_head_dim=24, sliding_window=5, final_logit_softcapping=0.5)
GEMMA4 |= dict(head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True)
LFM2 = {key: value for key, value in SMALL.items() if key != "rms_norm_eps"} | dict(norm_eps=1e-3, num_hidden_layers=3, tie_embedding=True)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LLAMA4 = SMALL | dict(head_dim=8, intermediate_size_mlp=24, intermediate_size=12, num_local_experts=4, attention_chunk_size=5)
LLAMA4 |= dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0), floor_scale=3, attn_scale=0.9)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=32, layer_norm_epsilon=1e-5)
NEOX = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rotary_pct=0.25,
    rotary_emb_base=1000,
)
MINISTRAL = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=4, mscale=1.0, mscale_all_dim=1.0)
MINISTRAL |= dict(llama_4_scaling_beta=0.5)
QWEN_VL = {key: value for key, value in SMALL.items() if key != "head_dim"} | dict(hidden_size=32, num_attention_heads=2)
VISUAL = dict(depth=1, num_heads=2, intermediate_size=8, patch_size=2, spatial_merge_size=1)
TOWER = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2)
PHIMOE = dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 1.5, 2.5, 4.0], short_mscale=1.3, long_mscale=1.3)
PHIMOE |= dict(original_max_position_embeddings=32)
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=16)

# config.json of every case, as files on the hub spell it
CASES = {
    "llama": TINY | dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama3": TINY
    | dict(model_type="llama", tie_word_embeddings=True, rope_scaling=LLAMA3),
    "linear": SMALL | dict(model_type="llama", rope_scaling=dict(type="linear", factor=4.0)),
    "dynamic": SMALL | dict(model_type="llama", rope_scaling=dict(type="dynamic", factor=4.0), max_position_embeddings=8),
    "mistral": TINY | dict(model_type="mistral", sliding_window=5),
    "mixtral": TINY
    | dict(model_type="mixtral", head_dim=None, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": NO_HEAD_DIM
    | dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen2_full": SMALL | dict(model_type="qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=0),
    "qwen2_moe": SMALL
    | dict(model_type="qwen2_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, shared_expert_intermediate_size=20)
    | dict(use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": TINY | dict(model_type="qwen3"),
    "qwen3_yarn": SMALL | dict(model_type="qwen3", attention_bias=True, rope_scaling=YARN | dict(beta_fast=4.0, beta_slow=1.0)),
    "qwen3_moe": TINY
    | QWEN3_MOE
    | dict(model_type="qwen3_moe", norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[1], num_hidden_layers=4),
    "qwen3_moe_raw": SMALL | QWEN3_MOE | dict(model_type="qwen3_moe", norm_topk_prob=False, use_sliding_window=True, sliding_window=5),
    "deepseek_v2": DEEPSEEK
    | dict(model_type="deepseek_v2", q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=3.0)
    | dict(first_k_dense_replace=0),
    "deepseek_v3": DEEPSEEK
    | dict(model_type="deepseek_v3", first_k_dense_replace=1, attention_bias=True)
    | dict(rope_scaling=YARN | dict(beta_fast=4.0, mscale=1.0, mscale_all_dim=1.0)),
    "ernie4_5_moe": SMALL
    | dict(model_type="ernie4_5_moe", tie_word_embeddings=True, moe_num_experts=6, moe_k=3, moe_intermediate_size=20)
    | dict(moe_num_shared_experts=1, moe_layer_start_index=0),
    "gemma": TINY | GEMMA | dict(model_type="gemma", hidden_act="gelu"),
    "gemma2": TINY
    | GEMMA
    | dict(
        model_type="gemma2",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=5,
        attn_logit_softcapping=0.2,
        final_logit_softcapping=0.5,
    ),
    "gemma3": TINY
    | GEMMA
    | dict(
        model_type="gemma3_text",
        num_hidden_layers=6,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=5,
        sliding_window_pattern=3,
        rope_theta=10000.0,
        rope_local_base_freq=100.0,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        attn_logit_softcapping=0.2,
        final_logit_softcapping=0.5,
    ),
    "phi3": PHI3 | dict(model_type="phi3", sliding_window=5, original_max_position_embeddings=64),
    "phi4_mini": PHI3
    | dict(
        model_type="phi3",
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        max_position_embeddings=64,
        original_max_position_embeddings=5,
        rope_scaling=dict(
            type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[1.0, 1.5, 2.5, 4.0, 8.0, 16.0]
        ),
    ),
    "phi4_mini_short": PHI3
    | dict(
        model_type="phi3",
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling=dict(
            type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], long_factor=[1.0, 1.5, 2.5, 4.0, 8.0, 16.0]
        ),
    ),
    "qwen3_5": TINY | QWEN3_5 | dict(model_type="qwen3_5_text"),
    "smollm3": TINY | dict(model_type="smollm3", tie_word_embeddings=True, no_rope_layers=[1, 0, 1, 0]),
    "smollm3_window": SMALL
    | dict(
        model_type="smollm3",
        tie_word_embeddings=True,
        num_hidden_layers=4,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=5,
    ),
    "olmo2": TINY | dict(model_type="olmo2"),
    "olmoe": SMALL
    | dict(model_type="olmoe", head_dim=4, intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=None),
    "glm4_moe": SMALL
    | dict(model_type="glm4_moe", attention_bias=True, use_qk_norm=True, n_routed_experts=6, num_experts_per_tok=3)
    | dict(first_k_dense_replace=0, num_nextn_predict_layers=0, moe_intermediate_size=20, routed_scaling_factor=1.5, norm_topk_prob=False)
    | dict(partial_rotary_factor=0.5),
    "gpt_oss": SMALL
    | dict(model_type="gpt_oss", intermediate_size=20, num_local_experts=6, num_experts_per_tok=3, sliding_window=5)
    | dict(swiglu_limit=0.7, rope_scaling=YARN | dict(truncate=False, beta_fast=4.0)),
    "granite": TINY
    | dict(
        model_type="granite",
        tie_word_embeddings=True,
        attention_multiplier=0.4,
        embedding_multiplier=3.0,
        residual_multiplier=0.22,
        logits_scaling=4.0,
    ),
    "granitemoe": SMALL | GRANITEMOE | dict(model_type="granitemoe", attention_bias=True),
    "granitemoeshared": SMALL | GRANITEMOE | dict(model_type="granitemoeshared", shared_intermediate_size=20, num_hidden_layers=1),
    "gpt2": GPT2 | dict(model_type="gpt2"),
    "gpt2_unscaled": GPT2
    | dict(model_type="gpt2", n_layer=2, n_inner=40, scale_attn_weights=False, activation_function="gelu", tie_word_embeddings=False),
    "gpt_neox": NEOX | dict(model_type="gpt_neox", use_parallel_residual=True),
    "gpt_neox_sequential": NEOX | dict(model_type="gpt_neox", use_parallel_residual=False, attention_bias=False, rotary_pct=0.5),
    "cohere": COHERE | dict(model_type="cohere", use_qk_norm=True, layer_norm_eps=1e-3),
    "cohere2": COHERE
    | dict(model_type="cohere2", attention_bias=True, num_hidden_layers=3, sliding_window=5, sliding_window_pattern=3),
    "glm": SMALL | dict(model_type="glm", partial_rotary_factor=0.5, attention_bias=True),
    "glm4": SMALL | dict(model_type="glm4", partial_rotary_factor=0.5, attention_bias=False),
    "olmo": BARE | dict(model_type="olmo", clip_qkv=0.6),
    "olmo3": SMALL | MIXED | dict(model_type="olmo3", rope_scaling=YARN | dict(rope_type="yarn", beta_fast=4.0)),
    "exaone4": SMALL | MIXED | dict(model_type="exaone4", sliding_window_pattern="LG"),
    "phi": BARE | dict(model_type="phi", layer_norm_eps=1e-3, qk_layernorm=True),
    "starcoder2": BARE | dict(model_type="starcoder2", norm_epsilon=1e-3, sliding_window=5),
    "stablelm": BARE | dict(model_type="stablelm", layer_norm_eps=1e-3, use_qkv_bias=True, partial_rotary_factor=0.5)
    | dict(qk_layernorm=True),
    "nemotron": SMALL | dict(model_type="nemotron", norm_eps=1e-3, partial_rotary_factor=0.5, rope_theta=100.0),
    "arcee": SMALL | dict(model_type="arcee", mlp_bias=True),
    "ministral": SMALL | MIXED | dict(model_type="ministral"),
    "seed_oss": SMALL | dict(model_type="seed_oss"),
    "ernie4_5": SMALL | dict(model_type="ernie4_5", use_bias=True),
    "helium": BARE | dict(model_type="helium", head_dim=8, rms_norm_eps=1e-3),
    "hunyuan": SMALL | dict(model_type="hunyuan_v1_dense", rope_scaling=dict(type="dynamic", alpha=50.0, factor=1.0)),
    "falcon": FALCON | dict(num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "falcon_one_head": FALCON | dict(multi_query=True, parallel_attn=True),
    "gpt_bigcode": GPT2 | dict(model_type="gpt_bigcode", n_layer=2),
    "gptj": GPT2 | dict(model_type="gptj", n_layer=2, rotary_dim=4),
    "opt": OLD | dict(model_type="opt", ffn_dim=24, pad_token_id=0),
}
# checkpoints that hold more than a language model
CASES |= {
    "gemma3_nested": dict(
        model_type="gemma3",
        text_config=SMALL
        | GEMMA
        | dict(model_type="gemma3_text", sliding_window=5, sliding_window_pattern=2, rope_scaling=dict(rope_type="linear", factor=8.0)),
        vision_config=TOWER | dict(model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=95,
    ),
    "mistral3": dict(
        model_type="mistral3",
        text_config=SMALL | dict(model_type="mistral", sliding_window=None),
        vision_config=TOWER | dict(model_type="pixtral", head_dim=4),
        tie_word_embeddings=False,
        image_token_index=95,
    ),
    "ministral3": SMALL | dict(model_type="ministral3", rope_parameters=MINISTRAL),
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl",
        text_config=QWEN_VL | dict(model_type="qwen2_5_vl_text", rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])),
        vision_config=VISUAL | dict(hidden_size=8, out_hidden_size=32, fullatt_block_indexes=[0]),
    ),
    "qwen2_vl": dict(
        model_type="qwen2_vl",
        **QWEN_VL | dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3])),
        vision_config=VISUAL | dict(embed_dim=8, hidden_size=32),
    ),
    "qwen3_5_nested": dict(
        model_type="qwen3_5",
        text_config=TINY | QWEN3_5 | dict(model_type="qwen3_5_text", num_hidden_layers=2, full_attention_interval=2),
        vision_config=VISUAL | dict(hidden_size=8, out_hidden_size=16, num_position_embeddings=4),
        tie_word_embeddings=True,
    ),
    "qwen3_vl": dict(
        model_type="qwen3_vl",
        text_config=SMALL
        | dict(model_type="qwen3_vl_text", rope_scaling=dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)),
        vision_config=VISUAL | dict(hidden_size=8, out_hidden_size=16, num_position_embeddings=4, deepstack_visual_indexes=[0]),
    ),
    "qwen3_vl_moe": dict(
        model_type="qwen3_vl_moe",
        text_config=SMALL
        | QWEN3_MOE
        | dict(model_type="qwen3_vl_moe_text", rope_scaling=dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)),
        tie_word_embeddings=False,
        vision_config=VISUAL | dict(hidden_size=8, out_hidden_size=16, num_position_embeddings=4, deepstack_visual_indexes=[0]),
    ),
}
# later ones: a case's seed is its place here
CASES |= {
    "qwen3_next": TINY
    | QWEN3_5
    | dict(model_type="qwen3_next", num_hidden_layers=2, full_attention_interval=2, mlp_only_layers=[1])
    | dict(norm_topk_prob=False, **EXPERTS),
    "qwen3_5_moe_nested": dict(
        model_type="qwen3_5_moe",
        text_config=TINY | QWEN3_5 | dict(model_type="qwen3_5_moe_text", num_hidden_layers=2, full_attention_interval=2, **EXPERTS),
        vision_config=VISUAL | dict(hidden_size=8, out_hidden_size=16, num_position_embeddings=4),
        tie_word_embeddings=True,
    ),
    "gemma4": GEMMA4
    | dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, use_double_wide_mlp=True)
    | dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=96),
    "gemma4_nested": dict(
        model_type="gemma4",
        text_config=GEMMA4 | dict(hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1)
        | dict(enable_moe_block=True, num_experts=6, top_k_experts=3, moe_intermediate_size=12)
        | dict(layer_types=["sliding_attention", "full_attention"]),
        vision_config=TOWER | dict(model_type="gemma4_vision", num_key_value_heads=2, head_dim=8, position_embedding_size=8),
        image_token_id=96,  # none of the documents': transformers puts padding in its place
    ),
    "lfm2": LFM2 | dict(model_type="lfm2", full_attn_idxs=[2], block_ff_dim=36, block_multiple_of=8, block_ffn_dim_multiplier=0.9),
    "lfm2_moe": LFM2
    | dict(model_type="lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1, moe_intermediate_size=20)
    | dict(num_experts=6, num_experts_per_tok=3, routed_scaling_factor=1.5, num_hidden_layers=2),
    "lfm3": LFM2
    | dict(model_type="lfm3", layer_types=["conv", "full_attention", "sliding_attention"], conv_L_cache=5, sliding_window=5, head_dim=8)
    | dict(tie_word_embeddings=True),
    "olmo_hybrid": SMALL  # transformers cuts the convolution into thirds
    | dict(model_type="olmo_hybrid", layer_types=["linear_attention", "full_attention"], linear_key_head_dim=6, linear_value_head_dim=6),
    "apertus": {key: value for key, value in SMALL.items() if key != "rope_theta"}
    | dict(model_type="apertus", attention_bias=True, rope_scaling=LLAMA3),
    "granitemoehybrid": SMALL
    | GRANITEMOE
    | dict(model_type="granitemoehybrid", layer_types=["mamba", "attention"], position_embedding_type="nope")
    | dict(shared_intermediate_size=20, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=4),
    "granitemoehybrid_dense": SMALL
    | GRANITEMOE
    | dict(model_type="granitemoehybrid", layer_types=["attention"] * 2, num_local_experts=0, num_experts_per_tok=0)
    | dict(shared_intermediate_size=24, position_embedding_type="rope", mamba_n_heads=4, mamba_d_head=8),
    "glm4_moe_lite": {key: value for key, value in DEEPSEEK.items() if key != "n_group"}
    | dict(model_type="glm4_moe_lite", topk_group=1, mlp_layer_types=["sparse"], routed_scaling_factor=1.5, num_hidden_layers=1),
    "dots1": SMALL
    | dict(model_type="dots1", n_routed_experts=6, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=20)
    | dict(routed_scaling_factor=1.5, norm_topk_prob=True, sliding_window=5, max_window_layers=1),
    "flex_olmo": SMALL
    | dict(model_type="flex_olmo", head_dim=4, intermediate_size=20, num_experts=6, num_experts_per_tok=3)
    | dict(rms_norm_eps=0.1),  # else the norm after them undoes what the experts' weights sum to
    "llama4": LLAMA4
    | dict(model_type="llama4_text", no_rope_layer_interval=2, interleave_moe_layer_step=2, num_experts_per_tok=2)
    | dict(rms_norm_eps=0.1),
    "falcon_h1": SMALL
    | dict(model_type="falcon_h1", head_dim=4, mamba_d_ssm=24, mamba_n_heads=6, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=4)
    | dict(mamba_rms_norm=True, projectors_bias=True, mlp_multipliers=[0.7, 1.6], ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 2.0])
    | dict(key_multiplier=3.0, attention_in_multiplier=1.5, attention_out_multiplier=0.6, ssm_in_multiplier=1.2, ssm_out_multiplier=2.0)
    | dict(embedding_multiplier=5.0, lm_head_multiplier=1.5, rms_norm_eps=1e-3),
    "nemotron_h": {key: value for key, value in SMALL.items() if key not in ("num_hidden_layers", "rms_norm_eps", "rope_theta")}
    | dict(model_type="nemotron_h", hybrid_override_pattern="M-*E", head_dim=8, layer_norm_epsilon=1e-3, moe_intermediate_size=12)
    | dict(mamba_num_heads=6, mamba_head_dim=4, n_groups=2, ssm_state_size=6, chunk_size=4, time_step_min=0.7, mlp_bias=True)
    | dict(n_routed_experts=4, moe_latent_size=12, moe_shared_expert_intermediate_size=20, routed_scaling_factor=1.5),
    "llama4_nested": dict(
        model_type="llama4",
        text_config=LLAMA4 | dict(model_type="llama4_text", use_qk_norm=False, no_rope_layers=[1, 0]),
        vision_config=TOWER | dict(model_type="llama4_vision_model", vision_output_dim=8, projector_input_dim=8, projector_output_dim=8),
        tie_word_embeddings=False,
    ),
    "phimoe": {key: value for key, value in SMALL.items() if key != "head_dim"}
    | dict(model_type="phimoe", num_local_experts=6, num_experts_per_tok=2, router_jitter_noise=0.4, attention_bias=True, lm_head_bias=True)
    | dict(sliding_window=5, original_max_position_embeddings=32, rope_scaling=PHIMOE, rms_norm_eps=1e-3, num_key_value_heads=4)
    | dict(hidden_size=32, num_attention_heads=4),
    "minimax_m2": SMALL | dict(model_type="minimax_m2", rotary_dim=8, intermediate_size=12, num_local_experts=6, num_experts_per_tok=3),
    "hunyuan_moe": SMALL
    | dict(model_type="hunyuan_v1_moe", intermediate_size=12, num_experts=6, moe_topk=[3, 3], num_hidden_layers=2)
    | dict(rope_scaling=dict(type="dynamic", alpha=50.0, factor=1.0)),
    "exaone": {key: value for key, value in SMALL.items() if key not in ("num_hidden_layers", "rms_norm_eps")}
    | dict(model_type="exaone", num_layers=2, layer_norm_epsilon=1e-3, activation_function="silu"),
    "internlm3": SMALL | dict(model_type="internlm3", qkv_bias=True, bias=True, num_hidden_layers=1),
    "cwm": SMALL | dict(model_type="cwm", sliding_window=5, rope_scaling=LLAMA3),
    "hyperclovax": SMALL
    | dict(model_type="hyperclovax", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.4),
    "jais2": SMALL | dict(model_type="jais2", layer_norm_eps=1e-3),
    "vaultgemma": SMALL | GEMMA | dict(model_type="vaultgemma", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24)
    | dict(sliding_window=5, attn_logit_softcapping=0.2, final_logit_softcapping=0.5),
    "minicpm3": {key: value for key, value in DEEPSEEK.items() if not key.startswith(("moe", "n_", "num_exp", "topk"))}
    | dict(model_type="minicpm3", scale_emb=3.0, scale_depth=0.7, dim_model_base=4, tie_word_embeddings=True),
    "youtu": {key: value for key, value in DEEPSEEK.items() if not key.startswith(("moe", "n_", "num_exp", "topk"))}
    | dict(model_type="youtu", q_lora_rank=None, tie_word_embeddings=True, initializer_range=0.02),
    "afmoe": SMALL
    | dict(model_type="afmoe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, num_shared_experts=1, num_dense_layers=1)
    | dict(global_attn_every_n_layers=2, sliding_window=5, route_scale=1.5, mup_enabled=True, rms_norm_eps=1e-3),
    "granite_swa": SMALL
    | dict(model_type="granite_swa", sliding_window=5, layer_rope_theta=[0, 1000.0, 200.0], num_hidden_layers=3)
    | dict(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.4, logits_scaling=0.5),
    "granitemoe_swa": {key: value for key, value in SMALL.items() if key != "head_dim"}
    | GRANITEMOE
    | dict(model_type="granitemoe_swa", shared_intermediate_size=20, sliding_window=5, logits_scaling=1.0),
    "gemma4_unified": dict(
        model_type="gemma4_unified",
        text_config={key: value for key, value in GEMMA4.items() if key != "model_type"}
        | dict(model_type="gemma4_unified_text", layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(model_type="gemma4_unified_vision", patch_size=2, mm_embed_dim=8, mm_posemb_size=4, output_proj_dims=16),
        audio_config=None,
        image_token_id=96,
    ),
    "llava": dict(
        model_type="llava",
        text_config={key: value for key, value in SMALL.items() if key != "head_dim"} | dict(model_type="qwen2"),
        vision_config=TOWER | dict(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=96,
    ),
    "smolvlm": dict(
        model_type="smolvlm",
        text_config=SMALL | dict(model_type="llama"),
        vision_config=TOWER | dict(model_type="smolvlm_vision"),
        scale_factor=1,
        image_token_id=96,
        tie_word_embeddings=True,
    ),
    "glm4v": dict(
        model_type="glm4v",
        text_config={key: value for key, value in SMALL.items() if key != "head_dim"}
        | dict(model_type="glm4v_text", hidden_size=32, rope_scaling=dict(type="default", mrope_section=[1, 1]), partial_rotary_factor=0.5),
        vision_config=VISUAL | dict(model_type="glm4v_vision", hidden_size=8, out_hidden_size=32, image_size=4),
        image_token_id=96,
        video_token_id=97,
    ),
    "cohere2_vision": dict(
        model_type="cohere2_vision",
        text_config=COHERE | dict(model_type="cohere2", sliding_window=5, sliding_window_pattern=2, hidden_size=16),
        vision_config=TOWER | dict(model_type="siglip_vision_model", vision_use_head=False),
        alignment_intermediate_size=8,
        image_token_id=96,
    ),
    "bloom": dict(model_type="bloom", vocab_size=96, hidden_size=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-3, pad_token_id=0),
    "mpt": dict(model_type="mpt", vocab_size=96, d_model=24, n_layers=2, n_heads=3, max_seq_len=64, layer_norm_epsilon=1e-3)
    | dict(attn_config=dict(clip_qkv=0.6, softmax_scale=0.5)),
    "nanochat": SMALL | dict(model_type="nanochat", final_logit_softcapping=0.5, rms_norm_eps=1e-3, tie_word_embeddings=False),
    "codegen": GPT2 | dict(model_type="codegen", n_layer=2, rotary_dim=4, tie_word_embeddings=False),
    "gpt_neo": dict(model_type="gpt_neo", vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=32)
    | dict(attention_types=[[["global", "local"], 1]], window_size=5, intermediate_size=40),
    "exaone_moe": {key: value for key, value in SMALL.items() if key != "head_dim"}
    | MIXED
    | dict(model_type="exaone_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, first_k_dense_replace=1)
    | dict(n_group=2, topk_group=1, num_shared_experts=1, routed_scaling_factor=1.5),
    "hy_v3": SMALL
    | dict(model_type="hy_v3", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, router_scaling_factor=1.5),
    "mellum": {key: value for key, value in SMALL.items() if key != "rope_theta"}
    | MIXED
    | dict(model_type="mellum", mlp_layer_types=["sparse", "dense"], num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12)
    | dict(rope_parameters=dict(full_attention=YARN | dict(rope_type="yarn", rope_theta=1000.0), sliding_attention=dict(rope_theta=100.0))),
    "mistral4": DEEPSEEK
    | dict(model_type="mistral4", rope_parameters=MINISTRAL, first_k_dense_replace=1, routed_scaling_factor=1.5),
    "solar_open": SMALL
    | dict(model_type="solar_open", n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, attention_bias=True),
    "cohere2_moe": COHERE
    | dict(model_type="cohere2_moe", head_dim=8, num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"])
    | dict(mlp_layer_types=["dense", "sparse", "sparse"], prefix_dense_intermediate_size=20, intermediate_size=12, sliding_window=5)
    | dict(num_experts=6, num_experts_per_tok=3, num_shared_experts=1, expert_selection_fn="sigmoid", norm_topk_prob=False)
    | dict(rms_norm_eps=1e-3),
    "bamba": {key: value for key, value in SMALL.items() if key != "head_dim"}
    | dict(model_type="bamba", attn_layer_indices=[1], mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=4)
    | dict(attention_bias=True, mlp_bias=True),
    "mamba2": dict(model_type="mamba2", vocab_size=96, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=6)
    | dict(n_groups=2, chunk_size=4, layer_norm_epsilon=1e-3),
    "falcon_alibi": FALCON  # slopes that bfloat16 rounds
    | dict(alibi=True, bias=True, parallel_attn=False, multi_query=False, hidden_size=24, num_attention_heads=12),
    "mllama": dict(
        model_type="mllama",
        text_config={key: value for key, value in SMALL.items() if key != "head_dim"}
        | dict(model_type="mllama_text_model", num_hidden_layers=5, cross_attention_layers=[1, 3], pad_token_id=0)
        | dict(rope_scaling=LLAMA3),
        vision_config=dict(hidden_size=8, num_hidden_layers=1, num_global_layers=1, attention_heads=1, intermediate_size=8)
        | dict(vision_output_dim=16, image_size=4, patch_size=2, max_num_tiles=1, intermediate_layers_indices=[0])
        | dict(supported_aspect_ratios=[[1, 1]]),
        image_token_index=96,
    ),
    "gemma3n": SMALL | GEMMA
    | dict(model_type="gemma3n_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5)
    | dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=90, altup_num_inputs=3, altup_active_idx=1)
    | dict(laurel_rank=4, activation_sparsity_pattern=[0.4, 0.0, 0.0, 0.3], final_logit_softcapping=0.5, intermediate_size=[24] * 4)
    | dict(rope_local_base_freq=100.0),
    "apertus1p5": {key: value for key, value in SMALL.items() if key != "rope_theta"}
    | dict(model_type="apertus1p5_text", vocab_size=104, output_vocab_size=96),
}
EQUAL_LENGTHS = ("dynamic",)  # transformers takes the frequencies of the longest row for the whole batch; here each text has its own


def lengths(case: str) -> tuple[int, ...]:
    """Lengths of a case's documents."""
    return (13, 13, 13) if case in EQUAL_LENGTHS else LENGTHS


def auto_class(config: dict):
    """transformers' config of a model, the class that opens it, and which of its attentions to compare with."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    hf = AutoConfig.for_model(**json.loads(json.dumps(config)))  # which takes a nested config apart
    assert hf.model_type == config["model_type"]
    alone = "vision_config" not in config and type(hf) in AutoModelForCausalLM._model_mapping  # not Mistral 4
    how = "sdpa" if config.get("alibi") else "eager"  # which adds Falcon's ALiBi twice
    return hf, AutoModelForCausalLM if alone else AutoModelForImageTextToText, how


def make_model(config: dict, seed: int):
    """A random transformers model whose weights are float16 numbers held in float32."""
    import torch

    torch.manual_seed(seed)
    hf, opener, how = auto_class(config)
    model = opener.from_config(hf, attn_implementation=how).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(12.0 if ".mlp." in name or ".feed_forward." in name else 4.0)  # large enough for one gelu to differ from the other
            else:
                p.add_(0.2 * torch.randn(p.shape))
            p.copy_(p.half().float())
        for name, b in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                b.copy_((0.2 * torch.randn(b.shape)).half().float())
            if name.endswith(("layer_scalar", "act_fn.beta")):
                b.copy_((1 + 0.2 * torch.randn(b.shape)).half().float())
            if name.endswith("act_fn.eps"):
                b.copy_(b.half().float())
    return model


def reference(model, documents: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Logits of each document alone, and in one batch padded on the right and on the left."""
    import torch

    found, llama4 = {}, model.config.model_type.startswith("llama4")
    model = getattr(model, "language_model", model) if llama4 else model  # the whole's own forward fails in transformers 5.24
    rows, width = len(documents), max(len(d) for d in documents) + 1
    with torch.no_grad():
        for i, tokens in enumerate(documents):
            found[f"alone/{i}"] = model(torch.tensor(tokens)[None].long()).logits[0].numpy()
        for side in ("right", "left"):
            tokens, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
            for i, document in enumerate(documents):
                place = slice(0, len(document)) if side == "right" else slice(width - len(document), width)
                tokens[i, place], mask[i, place] = torch.tensor(document).long(), 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits
            for i in range(rows):
                found[f"{side}/{i}"] = logits[i][mask[i] == 1].numpy()
        if llama4:  # its queries grow by padding on the left too, there
            found |= {f"left/{i}": found[f"alone/{i}"] for i in range(rows)}
    return found


def saved(model) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and the tensors as transformers writes them."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


def documents(case: str, seed: int) -> list[np.ndarray]:
    """Random tokens, one array a document."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 96, n).astype(np.int32) for n in lengths(case)]


def main(names: list[str]) -> None:
    GOLDENS.mkdir(exist_ok=True)
    for case in names or CASES:
        seed = list(CASES).index(case)
        model, texts = make_model(CASES[case], seed), documents(case, seed)
        config, tensors = saved(model)
        arrays = {f"tensor/{name}": array.astype(np.float16) for name, array in tensors.items()}
        assert all(np.array_equal(arrays[f"tensor/{name}"].astype(np.float32), array) for name, array in tensors.items())
        arrays |= {f"tokens/{i}": tokens for i, tokens in enumerate(texts)} | reference(model, texts)
        path = GOLDENS / f"{case}.npz"
        np.savez_compressed(path, config=json.dumps(config), hub=json.dumps(CASES[case]), **arrays)
        spread = np.std(arrays["alone/0"])
        print(f"{case}: {path.stat().st_size / 1000:.0f} kB, logits' standard deviation {spread:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", choices=[*CASES, []], help="one or more; without any, all of them")
    main(parser.parse_args().case)
