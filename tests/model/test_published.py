"""Every family at its published size: parameter counts as on the model cards, and the forward pass by shape alone."""

import jax
import jax.numpy as jnp
import pytest

from jaxtune.model import decoder
from jaxtune.model.families import FAMILIES, NESTED, from_hf
from jaxtune.model.spec import abstract, parameter_count, spec

LLAMA31 = dict(
    model_type="llama",
    vocab_size=128256,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
)
QWEN3_5 = dict(
    vocab_size=248320,
    full_attention_interval=4,
    max_position_embeddings=262144,
    rope_parameters=dict(
        rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_section=[11, 11, 10], mrope_interleaved=True
    ),
)
LLAMA4 = dict(model_type="llama4_text", vocab_size=202048)
LFM2_MOE = ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]
LONGROPE = dict(type="longrope", short_factor=[1.0] * 48, long_factor=[1.5] * 48)


def size(hidden, inner, layers, heads):
    return dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)


def nested(outer, **text):
    return dict(model_type=outer, text_config=text, vision_config={})


UNIFIED = dict(vocab_size=262144, attention_k_eq_v=True, num_global_key_value_heads=1, num_key_value_heads=8) | size(3840, 15360, 48, 16)
PUBLISHED = {
    "Llama-2-7b": (dict(model_type="llama", vocab_size=32000, rms_norm_eps=1e-5) | size(4096, 11008, 32, 32), 6738415616),
    "Llama-3.1-8B": (LLAMA31 | size(4096, 14336, 32, 32), 8030261248),
    "Llama-3.1-70B": (LLAMA31 | size(8192, 28672, 80, 64), 70553706496),
    "Llama-3.2-1B": (LLAMA31 | size(2048, 8192, 16, 32) | dict(head_dim=64, tie_word_embeddings=True), 1235814400),
    "SmolLM2-135M": (
        dict(model_type="llama", vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True) | size(576, 1536, 30, 9),
        134515008,
    ),
    "Mistral-7B-v0.1": (
        dict(model_type="mistral", vocab_size=32000, num_key_value_heads=8, sliding_window=4096) | size(4096, 14336, 32, 32),
        7241732096,
    ),
    "Mixtral-8x7B-v0.1": (
        dict(model_type="mixtral", vocab_size=32000, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
        | size(4096, 14336, 32, 32),
        46702792704,
    ),
    "Qwen2.5-7B": (
        dict(model_type="qwen2", vocab_size=152064, num_key_value_heads=4, rope_theta=1e6, use_sliding_window=False, sliding_window=131072)
        | size(3584, 18944, 28, 28),
        7615616512,
    ),
    "Qwen1.5-MoE-A2.7B": (
        dict(model_type="qwen2_moe", vocab_size=151936, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4)
        | dict(moe_intermediate_size=1408, shared_expert_intermediate_size=5632)
        | size(2048, 5632, 24, 16),
        14315784192,
    ),
    "Qwen3-8B": (
        dict(model_type="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128, rope_theta=1e6) | size(4096, 12288, 36, 32),
        8190735360,
    ),
    "Qwen3-30B-A3B": (
        dict(model_type="qwen3_moe", vocab_size=151936, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8)
        | dict(moe_intermediate_size=768, norm_topk_prob=True, mlp_only_layers=[])
        | size(2048, 6144, 48, 32),
        30532122624,
    ),
    "gemma-7b": (
        dict(model_type="gemma", vocab_size=256000, num_key_value_heads=16, head_dim=256, hidden_act="gelu") | size(3072, 24576, 28, 16),
        8537680896,
    ),
    "gemma-2-9b": (
        dict(model_type="gemma2", vocab_size=256000, num_key_value_heads=8, head_dim=256) | size(3584, 14336, 42, 16),
        9241705984,
    ),
    "gemma-3-1b": (
        dict(model_type="gemma3_text", vocab_size=262144, num_key_value_heads=1, sliding_window=512) | size(1152, 6912, 26, 4),
        999885952,
    ),
    "Apertus-v1.5-8B": (
        dict(model_type="apertus1p5_text", vocab_size=266752, output_vocab_size=131272, num_key_value_heads=8)
        | size(4096, 21504, 32, 32),
        8609902656 + 2 * 32,  # with two buffers a layer, which the file holds
    ),
    "Apertus-v1.5-8B, beside its tokenizers": (
        nested("apertus1p5", vocab_size=266752, output_vocab_size=131272, num_key_value_heads=8, **size(4096, 21504, 32, 32)),
        8609902656 + 2 * 32,
    ),
    "gemma-3n-E2B": (
        nested("gemma3n", model_type="gemma3n_text", num_kv_shared_layers=10, activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20,
               **size(2048, 8192, 30, 8) | dict(intermediate_size=[8192] * 30)),
        4435182688,
    ),
    "gemma-3n-E4B (text)": (dict(model_type="gemma3n_text") | size(2048, 16384, 35, 8), 6835235568),
    "gemma-4-E2B (text)": (
        dict(model_type="gemma4_text", num_key_value_heads=1, num_kv_shared_layers=20, use_double_wide_mlp=True, vocab_size=262144)
        | dict(layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7, final_logit_softcapping=30.0)
        | size(1536, 6144, 35, 8),
        4628569379,
    ),
    # the language model of each, without the other parts of its checkpoint
    "gemma-3-4b-it": (nested("gemma3", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3880263168),
    "gemma-3-12b-it": (nested("gemma3", num_key_value_heads=8, **size(3840, 15360, 48, 16)), 11766034176),
    "gemma-3-27b-it": (
        nested("gemma3", head_dim=128, num_key_value_heads=16, query_pre_attn_scalar=168, **size(5376, 21504, 62, 32)),
        27009346304,
    ),
    "gemma-4-26B-A4B": (
        nested("gemma4", num_key_value_heads=8, num_global_key_value_heads=2, vocab_size=262144, sliding_window=1024, num_experts=128,
               attention_k_eq_v=True, hidden_size_per_layer_input=0, enable_moe_block=True, top_k_experts=8, moe_intermediate_size=704,
               **size(2816, 2112, 30, 16)),
        25233141790,
    ),
    "Mistral-Small-3.1-24B": (
        nested("mistral3", vocab_size=131072, head_dim=128, rope_theta=1e9, sliding_window=None, **size(5120, 32768, 40, 32)),
        23572403200,
    ),
    "Ministral-3-8B": (dict(model_type="ministral3", vocab_size=131072) | size(4096, 14336, 34, 32), 8489553920),
    "Qwen2.5-VL-7B": (
        dict(model_type="qwen2_5_vl", vocab_size=152064, num_key_value_heads=4, vision_config={}, **size(3584, 18944, 28, 28)),
        7615616512,
    ),
    "Qwen2-VL-2B": (
        dict(model_type="qwen2_vl", vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, vision_config={})
        | size(1536, 8960, 28, 12),
        1543714304,
    ),
    "Qwen3-VL-30B-A3B": (
        nested("qwen3_vl_moe", vocab_size=151936, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
               moe_intermediate_size=768, **size(2048, 6144, 48, 32))  # fmt: skip
        | {"tie_word_embeddings": False},
        30532122624,
    ),
    # without the head for further tokens (mtp), which is kept as it is
    "Qwen3.5-0.8B": (
        nested("qwen3_5", **QWEN3_5 | dict(num_key_value_heads=2, linear_num_value_heads=16, **size(1024, 3584, 24, 8)))
        | dict(tie_word_embeddings=True),
        752393024,
    ),
    "Qwen3.5-4B": (dict(model_type="qwen3_5_text", tie_word_embeddings=True) | QWEN3_5 | size(2560, 9216, 32, 16), 4205751296),
    "Qwen3.5-27B": (nested("qwen3_5", **QWEN3_5 | dict(linear_num_value_heads=48, **size(5120, 17408, 64, 24))), 26895998464),
    "Qwen3-Next-80B-A3B": (
        dict(model_type="qwen3_next", vocab_size=151936, rope_theta=1e7) | size(2048, 5120, 48, 16),
        79674391296,
    ),
    "Qwen3.5-35B-A3B": (
        nested("qwen3_5_moe", **QWEN3_5, hidden_size=2048, num_hidden_layers=40, num_attention_heads=16) | dict(tie_word_embeddings=False),
        34660610688,
    ),
    "Qwen3.5-35B-A3B (text)": (
        dict(model_type="qwen3_5_moe_text", hidden_size=2048, num_hidden_layers=40, num_attention_heads=16) | QWEN3_5,
        34660610688,
    ),
    "Qwen3-VL-4B": (
        nested("qwen3_vl", vocab_size=151936, num_key_value_heads=8, tie_word_embeddings=True, **size(2560, 9728, 36, 32)),
        4022468096,
    ),
    "Llama-4-Scout": (LLAMA4 | size(5120, 8192, 48, 40), 107769861120),  # with its tower, as the hub counts it: 108641793536
    "Llama-4-Maverick": (
        nested("llama4", **LLAMA4, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, **size(5120, 8192, 48, 40)),
        400711848960,
    ),
    "Falcon-H1-0.5B": (
        dict(model_type="falcon_h1", vocab_size=32784, num_key_value_heads=2, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24)
        | dict(mamba_d_state=128)
        | size(1024, 2048, 36, 8),
        521411104,
    ),
    "Nemotron-Nano-9B-v2": (
        dict(model_type="nemotron_h", vocab_size=131072, mamba_head_dim=80)
        | dict(hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-")
        | size(4480, 15680, 56, 40),
        8888227328,
    ),
    "Nemotron-3-Nano-30B-A3B": (  # with its 2944 corrections of routers
        dict(model_type="nemotron_h", vocab_size=131072, num_key_value_heads=2, mamba_num_heads=64, n_routed_experts=128)
        | dict(num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712)
        | dict(hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME")
        | size(2688, 1856, 52, 32),
        31577940288,
    ),
    "Phi-3.5-MoE": (
        dict(model_type="phimoe", vocab_size=32064, attention_bias=True, lm_head_bias=True) | size(4096, 6400, 32, 32),
        41873153344,
    ),
    "MiniMax-M2": (  # with its 15872 corrections of routers
        dict(model_type="minimax_m2", vocab_size=200064, rotary_dim=64) | size(3072, 1536, 62, 48),
        228689764864,
    ),
    "LFM2-1.2B": (
        dict(model_type="lfm2", vocab_size=65536, full_attn_idxs=[2, 5, 8, 10, 12, 14], block_ff_dim=12288) | size(2048, 12288, 16, 32),
        1170340608,
    ),
    "LFM2-8B-A1B": (
        dict(model_type="lfm2_moe", vocab_size=65536, layer_types=LFM2_MOE) | size(2048, 7168, 24, 32),
        8339930560,
    ),
    "LFM3-1.7B": (dict(model_type="lfm3", vocab_size=128000) | size(2048, 7680, 24, 16), 1728801536),
    "Olmo-Hybrid-7B": (dict(model_type="olmo_hybrid", vocab_size=100352) | size(3840, 11008, 32, 30), 7430870688),
    "Apertus-8B-2509": (
        dict(model_type="apertus", vocab_size=131072, num_key_value_heads=8, rope_scaling=LLAMA31["rope_scaling"], rope_theta=12e6)
        | size(4096, 21504, 32, 32),
        8053338240,
    ),
    "granite-4.0-h-tiny": (
        dict(model_type="granitemoehybrid", vocab_size=100352, num_key_value_heads=4, tie_word_embeddings=True, mamba_n_heads=48)
        | dict(layer_types=["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)], mamba_d_head=64)
        | dict(mamba_d_state=128, num_local_experts=64, num_experts_per_tok=6, shared_intermediate_size=1024)
        | size(1536, 512, 40, 12),
        6939037248,
    ),
    "granite-4.0-micro": (
        dict(model_type="granitemoehybrid", vocab_size=100352, num_key_value_heads=8, tie_word_embeddings=True, rope_theta=1e7)
        | dict(layer_types=["attention"] * 40, num_local_experts=0, shared_intermediate_size=8192, position_embedding_type="rope")
        | size(2560, 8192, 40, 40),
        3402836480,
    ),
    "Phi-3-mini-4k": (dict(model_type="phi3", vocab_size=32064, sliding_window=2047) | size(3072, 8192, 32, 32), 3821079552),
    "Phi-3-mini-128k": (
        dict(model_type="phi3", vocab_size=32064, max_position_embeddings=131072, original_max_position_embeddings=4096)
        | dict(rope_scaling=LONGROPE | dict(type="su"), sliding_window=262144)
        | size(3072, 8192, 32, 32),
        3821079552,
    ),
    "phi-4": (dict(model_type="phi3", vocab_size=100352, num_key_value_heads=10) | size(5120, 17920, 40, 40), 14659507200),
    "Phi-4-mini": (
        dict(model_type="phi3", vocab_size=200064, num_key_value_heads=8, partial_rotary_factor=0.75, tie_word_embeddings=True)
        | dict(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=LONGROPE, sliding_window=262144)
        | size(3072, 8192, 32, 24),
        3836021760,
    ),
    "SmolLM3-3B": (dict(model_type="smollm3", vocab_size=128256, num_key_value_heads=4) | size(2048, 11008, 36, 16), 3075098624),
    "OLMo-2-1124-7B": (dict(model_type="olmo2", vocab_size=100352, rope_theta=500000) | size(4096, 11008, 32, 32), 7298617344),
    "OLMoE-1B-7B-0924": (
        dict(model_type="olmoe", vocab_size=50304, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, clip_qkv=None)
        | size(2048, 1024, 16, 16),
        6919161856,
    ),
    "gpt-oss-20b": (
        dict(model_type="gpt_oss", vocab_size=201088, num_key_value_heads=8, head_dim=64, num_local_experts=32, sliding_window=128)
        | size(2880, 2880, 24, 64),
        20914757184,
    ),
    "granite-3.1-8b": (
        dict(model_type="granite", vocab_size=49155, num_key_value_heads=8, tie_word_embeddings=True, attention_multiplier=0.0078125)
        | dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=16.0, rope_theta=1e7)
        | size(4096, 12800, 40, 32),
        8170848256,
    ),
    "DeepSeek-V2-Lite": (
        dict(model_type="deepseek_v2", vocab_size=102400, q_lora_rank=None, moe_intermediate_size=1408, n_routed_experts=64)
        | dict(n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1)
        | size(2048, 10944, 27, 16),
        15706484224,
    ),
    "DeepSeek-V3": (
        dict(model_type="deepseek_v3", vocab_size=129280, first_k_dense_replace=3) | size(7168, 18432, 61, 128),
        671026419200,
    ),
    "ERNIE-4.5-21B-A3B": (
        dict(model_type="ernie4_5_moe", vocab_size=103424, num_key_value_heads=4, head_dim=128) | size(2560, 12288, 28, 20),
        21825437888,
    ),
    "GLM-4.5-Air": (
        dict(model_type="glm4_moe", vocab_size=151552, head_dim=128, attention_bias=True) | size(4096, 10944, 46, 96),
        106852251264,
    ),
    "GLM-4.7-Flash": (  # without its layer for further tokens, as the hub counts it: 31221488576
        dict(model_type="glm4_moe_lite", vocab_size=154880, head_dim=64, rope_theta=1e6) | size(2048, 10240, 47, 20),
        29943393920,
    ),
    "dots.llm1": (
        dict(model_type="dots1", vocab_size=152064, n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=2, sliding_window=None)
        | dict(first_k_dense_replace=1)
        | size(4096, 10944, 62, 32),
        142774381696,
    ),
    "FlexOlmo-7x7B-1T": (dict(model_type="flex_olmo", vocab_size=100352) | size(4096, 11008, 32, 32), 33270665216),
    "c4ai-command-r-v01": (dict(model_type="cohere", vocab_size=256000, rope_theta=8e6) | size(8192, 22528, 40, 64), 34980831232),
    "c4ai-command-r7b-12-2024": (
        dict(model_type="cohere2", vocab_size=256000, num_key_value_heads=8, rope_theta=50000, logit_scale=0.25)
        | size(4096, 14336, 32, 32),
        8028033024,
    ),
    "glm-4-9b-chat-hf": (dict(model_type="glm", vocab_size=151552) | size(4096, 13696, 40, 32), 9399951360),
    "GLM-4-9B-0414": (dict(model_type="glm4", vocab_size=151552) | size(4096, 13696, 40, 32), 9400279040),
    "granite-3.1-3b-a800m": (
        dict(model_type="granitemoe", vocab_size=49155, num_key_value_heads=8, tie_word_embeddings=True, num_local_experts=40)
        | dict(num_experts_per_tok=8, attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22)
        | size(1536, 512, 32, 24),
        3298793472,
    ),
    "granitemoeshared": (  # counted by hand: no card says it
        dict(model_type="granitemoeshared", vocab_size=49152, num_key_value_heads=8, tie_word_embeddings=True, num_local_experts=62)
        | dict(num_experts_per_tok=6, shared_intermediate_size=1024)
        | size(1536, 512, 40, 24),
        6370887168,
    ),
    "OLMo-7B-hf": (dict(model_type="olmo", vocab_size=50304) | size(4096, 11008, 32, 32), 6888095744),
    "Olmo-3-7B": (dict(model_type="olmo3", vocab_size=100278) | size(4096, 11008, 32, 32), 7298011136),
    "EXAONE-4.0-32B": (
        dict(model_type="exaone4", vocab_size=102400, num_key_value_heads=8, rope_theta=1e6) | size(5120, 27392, 64, 40),
        32003216384,
    ),
    "phi-1_5": (dict(model_type="phi", vocab_size=51200) | size(2048, 8192, 24, 32), 1418270720),
    "phi-2": (dict(model_type="phi", vocab_size=51200, partial_rotary_factor=0.4) | size(2560, 10240, 32, 32), 2779683840),
    "starcoder2-3b": (
        dict(model_type="starcoder2", vocab_size=49152, num_key_value_heads=2, sliding_window=4096) | size(3072, 12288, 30, 24),
        3030371328,
    ),
    "stablelm-2-1_6b": (dict(model_type="stablelm", vocab_size=100352, use_qkv_bias=True) | size(2048, 5632, 24, 32), 1644515328),
    "Minitron-4B": (
        dict(model_type="nemotron", vocab_size=256000, num_key_value_heads=8, head_dim=128) | size(3072, 9216, 32, 24),
        4190509056,
    ),
    "AFM-4.5B": (
        dict(model_type="arcee", vocab_size=128004, num_key_value_heads=4, head_dim=128) | size(2560, 18432, 36, 20),
        4619184640,
    ),
    "Ministral-8B": (
        dict(model_type="ministral", vocab_size=131072, head_dim=128, layer_types=["sliding_attention"] * 36)
        | size(4096, 12288, 36, 32),
        8019808256,
    ),
    "Seed-OSS-36B": (dict(model_type="seed_oss", vocab_size=155136, rope_theta=1e7) | size(5120, 27648, 64, 80), 36151104512),
    "ERNIE-4.5-0.3B": (dict(model_type="ernie4_5", vocab_size=103424) | size(1024, 3072, 18, 16), 360748032),
    "helium-1-preview-2b": (dict(model_type="helium", vocab_size=48000) | size(2560, 7040, 24, 20), 2172643840),
    "Hunyuan-0.5B": (
        dict(model_type="hunyuan_v1_dense", vocab_size=120818, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
        | size(1024, 3584, 24, 16),
        539010048,
    ),
    "falcon-7b": (
        dict(model_type="falcon", vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, num_kv_heads=71),
        6921720704,
    ),
    "falcon-40b": (
        dict(model_type="falcon", vocab_size=65024, hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, num_kv_heads=8)
        | dict(new_decoder_architecture=True),
        41303293952,
    ),
    "starcoderbase-1b": (
        dict(model_type="gpt_bigcode", vocab_size=49152, n_embd=2048, n_layer=24, n_head=16, n_positions=8192),
        1137207296,
    ),
    "gpt-j-6b": (dict(model_type="gptj", vocab_size=50400, n_embd=4096, n_layer=28, n_head=16), 6050882784),
    "opt-1.3b": (dict(model_type="opt", vocab_size=50272, ffn_dim=8192) | size(2048, None, 24, 32), 1315758080),
    "gpt2": (dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024), 124439808),
    "gpt2-xl": (dict(model_type="gpt2", vocab_size=50257, n_embd=1600, n_layer=48, n_head=25, n_positions=1024), 1557611200),
    "pythia-1b": (dict(model_type="gpt_neox", vocab_size=50304, rotary_pct=0.25) | size(2048, 8192, 16, 8), 1011781632),
    "stablelm-2-12b": (
        dict(model_type="stablelm", vocab_size=100352, num_key_value_heads=8, qk_layernorm=True, use_parallel_residual=True)
        | size(5120, 13824, 40, 32),
        12143185920,
    ),
    "EXAONE-3.5-2.4B": (
        dict(model_type="exaone", vocab_size=102400, num_layers=30, head_dim=80, tie_word_embeddings=True) | size(2560, 7168, None, 32),
        2405327360,
    ),
    "internlm3-8b": (dict(model_type="internlm3", vocab_size=128512) | size(4096, 10240, 48, 32), 8804241408),
    "cwm": (dict(model_type="cwm", vocab_size=128256) | size(6144, 21504, 64, 48), 32581097472),
    "Hunyuan-A13B": (
        dict(model_type="hunyuan_v1_moe", vocab_size=128167, num_key_value_heads=8, head_dim=128, num_experts=64, moe_topk=[8] * 32)
        | dict(tie_word_embeddings=True)
        | size(4096, 3072, 32, 32),
        80393183232,
    ),
    "HyperCLOVAX-SEED-Think-14B": (
        dict(model_type="hyperclovax", vocab_size=110592, num_key_value_heads=8) | size(6144, 14336, 38, 48),
        14748112896,
    ),
    "Jais-2-8B": (dict(model_type="jais2", vocab_size=150272) | size(3328, 26624, 32, 26), 8090401280),
    "vaultgemma-1b": (dict(model_type="vaultgemma", vocab_size=256000) | size(1152, 6912, 26, 4), 1038741120),
    "MiniCPM3-4B": (dict(model_type="minicpm3", vocab_size=73448) | size(2560, 6400, 62, 40), 4073875968),
    "Youtu-LLM-2B": (dict(model_type="youtu", vocab_size=128256) | size(2048, 6144, 32, 16), 1961560064),
    "Trinity-Mini": (
        dict(model_type="afmoe", vocab_size=200192, num_key_value_heads=4, moe_intermediate_size=1024, num_experts=128)
        | dict(num_experts_per_tok=8, num_shared_experts=1, num_dense_layers=2, mup_enabled=True, sliding_window=2048)
        | size(2048, 6144, 32, 32),
        26123974400,
    ),
    "granite_swa, as transformers describes it": (
        dict(model_type="granite_swa", vocab_size=100352) | size(2560, 8192, 24, 20),
        2144463840,
    ),
    "granitemoe_swa, as transformers describes it": (
        dict(model_type="granitemoe_swa", vocab_size=32000) | size(4096, 11008, 32, 32),
        37039117312,
    ),
    "a unified Gemma 4, alone": (UNIFIED | dict(model_type="gemma4_unified_text"), 11907350320),
    "a unified Gemma 4": (nested("gemma4_unified", **UNIFIED), 11907350320),
    "llava-1.5-7b": (nested("llava", model_type="llama", vocab_size=32064, rms_norm_eps=1e-5), 6738939904),  # which leaves its sizes out
    "llava-v1.6-mistral-7b": (nested("llava_next", model_type="mistral", vocab_size=32064, num_key_value_heads=8), 7242256384),
    "llava-onevision-qwen2-7b": (
        nested("llava_onevision", model_type="qwen2", vocab_size=152000, num_key_value_heads=4, **size(3584, 18944, 28, 28)),
        7615157760,
    ),
    # the text model of Llama 3.1, with eight more rows of its embedding; the eight layers that attend to images are left as they are
    "Llama-3.2-11B-Vision": (nested("mllama", rope_scaling=LLAMA31["rope_scaling"]), 8030261248 + 8 * 4096),
    "Llama-3.2-90B-Vision": (
        nested("mllama", cross_attention_layers=list(range(3, 100, 5)), **size(8192, 28672, 100, 64)),
        70553706496 + 8 * 8192,
    ),
    "SmolVLM-Instruct": (nested("smolvlm", model_type="llama", vocab_size=49155, **size(2048, 8192, 24, 32)), 1812051968),
    "Idefics3-8B": (
        nested("idefics3", model_type="llama", vocab_size=128259, num_key_value_heads=8, **size(4096, 14336, 32, 32)),
        8030285824,
    ),
    "InternVL3-8B": (
        nested("internvl", model_type="qwen2", vocab_size=151674, num_key_value_heads=4, **size(3584, 18944, 28, 28))
        | dict(tie_word_embeddings=False),
        7612820992,
    ),
    "aya-vision-8b": (
        nested("aya_vision", model_type="cohere2", vocab_size=256000, num_key_value_heads=8, **size(4096, 14336, 32, 32)),
        8028033024,
    ),
    "command-a-vision": (
        nested("cohere2_vision", model_type="cohere2", vocab_size=256000, num_key_value_heads=8, **size(12288, 36864, 64, 96)),
        111057580032,
    ),
    "LFM2-VL-1.6B": (
        nested("lfm2_vl", model_type="lfm2", vocab_size=65536, full_attn_idxs=[2, 5, 8, 10, 12, 14], **size(2048, 12288, 16, 32)),
        1170340608,
    ),
    "LFM3-VL-2B": (nested("lfm3_vl", model_type="lfm3", vocab_size=128000, **size(2048, 7680, 24, 16)), 1728801536),
    "GLM-4.1V-9B": (nested("glm4v", model_type="glm4v_text", vocab_size=151552, **size(4096, 13696, 40, 32)), 9400279040),
    "GLM-4.6V-Flash": (nested("glm46v", model_type="glm4v_text", vocab_size=151552, **size(4096, 13696, 40, 32)), 9400279040),
    "GLM-4.5V": (
        nested("glm4v_moe", model_type="glm4v_moe_text", vocab_size=151552, head_dim=128, **size(4096, 10944, 46, 96)),
        106852251264,
    ),
    "a Granite 4 with vision": (
        nested("granite4_vision", vocab_size=100352, num_key_value_heads=8, **size(2560, 8192, 40, 40)),
        3659737600,
    ),
    "EXAONE-4.5-33B": (
        nested("exaone4_5", model_type="exaone4", vocab_size=153600, num_key_value_heads=8, **size(5120, 27392, 64, 40)),
        32527504384,
    ),
    "bloom-560m": (dict(model_type="bloom", vocab_size=250880, n_embed=1024, n_layer=24, num_attention_heads=16), 559214592),
    "mpt-7b": (dict(model_type="mpt", vocab_size=50432, d_model=4096, n_layers=32, n_heads=32), 6649286656),
    "Bamba-9B": (
        dict(model_type="bamba", vocab_size=128000, attn_layer_indices=[9, 18, 27]) | size(4096, 14336, 32, 32),
        9808584064,
    ),
    "Mamba-Codestral-7B": (dict(model_type="mamba2", vocab_size=32768, hidden_size=4096, num_hidden_layers=64), 7285403648),
    "nanochat-d32": (dict(model_type="nanochat", vocab_size=65536) | size(2048, 8192, 32, 16), 1879048192),
    "codegen-350M-mono": (dict(model_type="codegen", vocab_size=51200, n_embd=1024, n_layer=20, n_head=16), 356712448),
    "gpt-neo-125m": (
        dict(model_type="gpt_neo", vocab_size=50257, hidden_size=768, num_layers=12, num_heads=12)
        | dict(attention_types=[[["global", "local"], 6]]),
        125198592,
    ),
    "K-EXAONE-236B-A23B": (
        dict(model_type="exaone_moe", vocab_size=153600, num_key_value_heads=8, head_dim=128, num_experts=128, moe_intermediate_size=2048)
        | size(6144, 18432, 48, 64),
        236571150336 + 6016,  # with its routers' corrections
    ),
    "Hy3-preview": (dict(model_type="hy_v3", vocab_size=120832) | size(4096, 13312, 80, 64), 295033528320 + 15168),
    "IQuest-Coder-V1-40B": (dict(model_type="iquestcoder", vocab_size=76800) | size(5120, 27648, 80, 40), 39794283520),
    "Mellum2-12B-A2.5B": (dict(model_type="mellum", vocab_size=98304) | size(2304, 7168, 28, 32), 12149923072),
    "Mistral-Small-4-119B": (dict(model_type="mistral4", vocab_size=131072) | size(4096, 12288, 36, 32), 118972826624),
    "sarvam-105b": (dict(model_type="sarvam_mla", vocab_size=262144) | size(4096, 16384, 32, 64), 106031763456 + 3968),
    "Solar-Open-100B": (
        dict(model_type="solar_open", vocab_size=196608, hidden_size=4096, num_hidden_layers=48, num_attention_heads=64),
        102651793408 + 6144,
    ),
    "cohere2_moe": (dict(model_type="cohere2_moe", vocab_size=256000) | size(8192, 22528, 40, 64), 190004928512),
    "gpt-neox-20b": (dict(model_type="gpt_neox", vocab_size=50432, rotary_pct=0.25) | size(6144, 24576, 44, 64), 20554567680),
}


def test_every_family_is_here():
    assert {hf["model_type"] for hf, _ in PUBLISHED.values()} == FAMILIES.keys() | NESTED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(name):
    hf, parameters = PUBLISHED[name]
    config = from_hf(hf)
    assert parameter_count(config) == parameters
    names = [(name, row.part) for row in spec(config).values() for name in row.hf_names()]
    assert len(set(names)) == len(names)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    logits = jax.eval_shape(lambda params, tokens: decoder.forward(config, params, tokens), abstract(config, "bfloat16"), tokens)
    assert logits.shape == (2, 64, config.vocab_size) and logits.dtype == jnp.float32
