"""The types of a file's tensors, as llama.cpp's `llama_model_quantize` chose them for files of these models (llama-cpp-python 0.3.36)."""

import pytest

from jaxtune.convert.gguf_types import TYPES, Types
from jaxtune.model.families import from_hf
from jaxtune.model.spec import spec

SIZES = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
             vocab_size=64, tie_word_embeddings=False)  # fmt: skip
LLAMA, FEWER = dict(model_type="llama") | SIZES, dict(num_key_value_heads=4)
MIXTRAL = dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2) | SIZES | dict(num_hidden_layers=6)
ODD = LLAMA | dict(hidden_size=288, intermediate_size=512, num_hidden_layers=6)  # rows of 288 are no blocks of 256
# type, model -> bits by layer of attention's values, of the feed-forward part's last matrix, of attention's last one; of embedding and head
EXPECTED = [
    ("q4_k_m", LLAMA, "664464464464464666", "664464464464464666", "4", "46"),
    ("q4_k_s", LLAMA, "555544444444444444", "554444444444444444", "4", "46"),
    ("q5_k_m", LLAMA, "665565565565565666", "665565565565565666", "5", "56"),
    ("q5_k_s", LLAMA, "5", "5", "5", "56"),
    ("q6_k", LLAMA, "6", "6", "6", "66"),
    ("q3_k_m", LLAMA, "554444444444444444", "544444444444444444", "4", "36"),
    ("q3_k_l", LLAMA, "5", "5", "5", "36"),
    ("q3_k_s", LLAMA, "3", "3", "3", "36"),
    ("q2_k", LLAMA, "4", "3", "3", "26"),
    ("q2_k", LLAMA | FEWER, "3", "3", "3", "26"),
    ("q4_k_m", LLAMA | dict(num_hidden_layers=80), "6" * 10 + "556" * 20 + "6" * 10, "6" * 10 + "446" * 20 + "6" * 10, "4", "46"),
    ("q4_k_m", MIXTRAL, "8", "446446", "5", "46"),
    ("q3_k_l", MIXTRAL, "8", "5", "3", "36"),
    ("q4_k_m", ODD, ["Q5_0", "Q5_0", "Q8_0", "Q5_0", "Q5_0", "Q8_0"], "446446", "4", ["Q5_0", "Q8_0"]),
]  # fmt: skip


@pytest.mark.parametrize(("type", "model", "values", "down", "out", "ends"), EXPECTED)
def test_mixtures(type, model, values, down, out, ends):
    config = from_hf(model)
    types, found = Types(config, "llama", type), {}
    for row in spec(config).values():
        for name in row.gguf_names():
            kind = types.kind(name, row.shape[1:] if row.layers else row.shape, row).name
            found.setdefault(name.split(".")[-2], []).append(kind)
    last = "ffn_down_exps" if config.moe else "ffn_down"
    for stems, wanted in ((("attn_v",), values), ((last,), down), (("attn_output",), out), (("token_embd", "output"), ends)):
        kinds = [kind for stem in stems for kind in found[stem]]
        wanted = wanted * (len(kinds) // len(wanted)) if isinstance(wanted, str) else wanted
        assert [kind if isinstance(wanted, list) else kind[1] for kind in kinds] == list(wanted), stems
    assert set(found["attn_norm"]) == {"F32"} and (config.moe is None or set(found["ffn_gate_inp"]) == {"F32"})


def test_every_k_quant_of_llama_cpps_is_there():
    assert {name for name in TYPES if "_k" in name} == {type for type, *_ in EXPECTED}
