"""Every key of transformers' config class of a family changes what is built here, or is refused: none is ignored silently."""

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from jaxtune.errors import ModelError
from jaxtune.model.families import FAMILIES, from_hf

# Keys that change no logits: for training, the tokenizer, caches and heads for other tasks.
NO_LOGITS = {
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "classifier_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_cache", "output_router_logits", "is_decoder", "reorder_and_upcast_attn", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "pretraining_tp", "eod_token_id",
    "embedding_dropout", "residual_dropout", "dropout", "layerdrop", "num_nextn_predict_layers", "mamba_chunk_size", "chunk_size",
    "num_logits_to_keep", "sep_token_id", "embedding_initializer_range", "embed_dropout", "resid_dropout",
}  # fmt: skip
# Keys that count only together with another, which the class's own defaults omit or override: layer_types determines the layers' windows.
BESIDE_ANOTHER = {"max_window_layers", "sliding_window", "use_sliding_window", "no_rope_layer_interval", "_sliding_window_pattern",
                  "sliding_window_pattern", "num_kv_heads", "num_ln_in_parallel_attn", "full_attn_idxs",
                  "interleave_moe_layer_step", "mamba_expand", "global_attn_every_n_layers"}  # fmt: skip
# keys together with which others count, or for which the class has no default
NEEDED = {"deepseek_v2": dict(num_experts_per_tok=2, topk_method="group_limited_greedy", n_group=4, topk_group=2),
          "ernie4_5_moe": dict(moe_layer_end_index=20),
          "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 16, position_embedding_type="rope"),
          "cohere2_moe": dict(expert_selection_fn="sigmoid", prefix_dense_intermediate_size=8, num_hidden_layers=2,
                              layer_types=["full_attention", "sliding_attention"], mlp_layer_types=["dense", "sparse"]),
          "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
          "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], moe_latent_size=8),
          "phimoe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
          "falcon_h1": dict(mamba_rms_norm=True),
          "gemma4_unified_text": dict(num_kv_shared_layers=12),
          "lfm2": dict(full_attn_idxs=[0, 3]),
          "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
          "gemma4_text": dict(num_kv_shared_layers=12, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=8)}
UNREAD = {"gemma3_text": {"attn_logit_softcapping"}, "gemma3n_text": {"altup_coef_clip"},  # 120, of coefficients in training
          "cohere2": {"head_dim"},
          "gpt_bigcode": {"num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"},
          "llama4_text": {"router_aux_loss_coef", "router_jitter_noise"},
          "nemotron_h": {"attention_bias", "expand", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
                         "mtp_layers_block_type", "n_shared_experts", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor",
                         "time_step_limit", "time_step_max", "use_mamba_kernels"},
          "mamba2": {"residual_in_fp32", "rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank"},
          "bloom": {"slow_but_exact"},
          "codegen": {"n_ctx"},
          "cohere2_moe": {"rope_theta"},  # beside rope_parameters
          "exaone_moe": {"first_k_dense_replace"},  # beside mlp_layer_types
          "gpt_neo": {"attention_types"},  # beside attention_layers
          "hy_v3": {"enable_moe_fp32_combine"},  # how a sum is rounded
          # of new weights
          "olmo_hybrid": {"linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min"},
          "mellum": {"mtp_layer_types", "mtp_mlp_layer_types"},  # of layers that predict further tokens
          "mpt": {"attn_config", "emb_pdrop", "embedding_fraction", "expansion_ratio", "init_device", "learned_pos_emb", "logit_scale",
                  "no_bias", "norm_type"},  # the first one's keys: tests/model/test_from_hf.py
          **dict.fromkeys(("granite_swa", "granitemoe_swa"), {"rope_parameters"}),  # whose base is overridden by layer_rope_theta
          # transformers reads them nowhere
          **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "sarvam_mla", "youtu"),
                          {"head_dim", "qk_head_dim"})}


def others(value):
    """Values of the same type with another meaning."""
    if value is None:
        return [1]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 2 + 0.5]
    if isinstance(value, list):
        return [value[::-1] + value[:1], [0]]
    if isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values()):
        return [{name: inner | {"rope_theta": 7.0} for name, inner in value.items()}]
    return [value | {"rope_theta": 7.0}] if isinstance(value, dict) else [f"{value}x"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_passed_over(family):
    config = CONFIG_MAPPING[family](**NEEDED.get(family, {})).to_dict()
    plain, common = from_hf(config), set(PretrainedConfig().to_dict())

    def heard(key):
        for value in others(config[key]):
            try:
                if from_hf(config | {key: value}) != plain:
                    return True
            except ModelError:
                return True
        return False

    silent = {key for key in set(config) - common if not heard(key)}
    assert silent <= NO_LOGITS | BESIDE_ANOTHER | UNREAD.get(family, set())
