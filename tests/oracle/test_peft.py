"""Law 9: adapters written here open in PEFT with the same logits, and PEFT's open here."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")
import references  # noqa: E402
import tiny  # noqa: E402
from oracle.peft_logits import TOKENS, ours, theirs  # noqa: E402

from jaxtune import peft  # noqa: E402
from jaxtune.config import LoraConfig  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.convert.peft import load_adapter, save_adapter  # noqa: E402

SUM = {"a": {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "b": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}}
VARIANTS = {
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "list": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 4, "target_modules": r".*layers\.[02]\..*(k|up)_proj"},
    "layers": {"r": 4, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
    "exclude": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "rsLoRA": {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 2, "target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {"up_proj": 64}, "use_rslora": True,
    },
    "DoRA": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "head": {"r": 4, "target_modules": ["lm_head", "o_proj"], "lora_bias": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens"]},
    "DoRA of the ends": {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "all biases": {"r": 4, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "all biases and a whole module": {"r": 4, "bias": "all", "modules_to_save": ["k_proj"], "target_modules": ["q_proj", "o_proj"]},
    "biases of some layers": {"r": 4, "bias": "lora_only", "target_modules": ["k_proj", "o_proj"], "layers_to_transform": [0, 2]},
    "biases of its own": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "o_proj"], "layers_pattern": "layers",
                          "layers_to_transform": 1},
    "modules": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens", "norm", "layers.1.mlp"]},
    "both uses of a tied matrix": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 60]},
}  # fmt: skip
EXPERTS = {
    "all-linear of experts": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "parameters": {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "mlp.experts.gate_up_proj"],
                   "rank_pattern": {"down_proj": 2}},
    "its parameters": {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2},
                       "target_parameters": ["experts.down_proj", "experts.gate_up_proj", "router.weight"]},
    "one parameter": {"r": 4, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
    "old names": {"r": 2, "target_modules": ["k_proj", "w1", "w2", "w3"]},
    "regex of experts": {"r": 2, "target_modules": r".*layers\.1\..*[qv]_proj"},
}  # fmt: skip

# fused projections, Conv1D matrices and their own names
GPT2 = {
    "biases of c_attn": {"r": 4, "bias": "lora_only", "target_modules": ["c_attn", "mlp.c_proj"]},
    "its modules": {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe", "h.1.mlp.c_fc"]},
    "its tokens": {"r": 4, "target_modules": ["c_fc"], "trainable_token_indices": [3, 9, 60]},
    "its own biases": {"r": 4, "lora_bias": True, "use_rslora": True, "alpha_pattern": {"c_fc": 5}, "target_modules": ["c_fc", "c_attn"]},
    "its DoRA": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
    "its layers": {"r": 4, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
}
NEOX = {
    "all its biases": {"r": 4, "bias": "all", "target_modules": ["query_key_value", "dense"]},
    "modules of NeoX": {"r": 4, "target_modules": ["dense_h_to_4h"], "modules_to_save": ["final_layer_norm", "lm_head"]},
    "head of NeoX": {"r": 4, "target_modules": ["dense", "lm_head"]},
    "tokens of NeoX": {"r": 4, "target_modules": ["dense"], "trainable_token_indices": {"embed_in": [3, 9]}},
    "biases of its own in NeoX": {"r": 4, "lora_bias": True, "target_modules": ["query_key_value", "dense_4h_to_h"]},
    "DoRA of NeoX": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
}
FUSED = {"gemma4": {"r": 4, "target_modules": "all-linear"},
         "phi3": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
         "gemma2": {"r": 4, "use_dora": True, "target_modules": r".*\.(?:q|o|gate)_proj",
                    "rank_pattern": {r"\d\.self_attn\.(q|o)_proj": 6}},
         "olmo2": {"r": 4, "use_dora": True, "bias": "all", "target_modules": "all-linear"}}  # fmt: skip
# beside a vision tower, whose modules' names end as those of the language model do
BESIDE = {
    "not the tower": {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "exclude_modules": r".*vision_tower.*"},
    "regex within": {"r": 4, "target_modules": r".*language_model\..*(k|up)_proj", "modules_to_save": ["embed_tokens", "q_norm"]},
}
VARIANTS |= GPT2 | NEOX | FUSED | BESIDE


# every variant once, and over a tied matrix those that touch it
OTHERS = {name: kind for kind, names in {"gpt2": GPT2, "gpt_neox": NEOX}.items() for name in names} | {name: name for name in FUSED}
OTHERS |= dict.fromkeys(BESIDE, "gemma3_nested")
EACH = [(OTHERS.get(name, "untied"), name) for name in VARIANTS if "tied" not in name]
EACH += [("tied", name) for name in ("head", "embedding", "DoRA of the ends", "modules", "both uses of a tied matrix", "tokens")]
EACH += [("mixtral", name) for name in ("all-linear of experts", "one parameter", "old names")]
EACH += [("deepseek_v3", "all-linear of experts"), ("gpt_oss", "its parameters"), ("granitemoe", "its parameters")]
EACH += [(kind, "all-linear of experts") for kind in ("hunyuan_moe", "qwen2_moe", "qwen3_next")]
EACH += [("qwen3_moe", name) for name in ("all-linear of experts", "parameters", "regex of experts")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("untied", "tied"):
        shape = tiny.LLAMA | {"tie_word_embeddings": kind == "tied"}
        tiny.write(root / kind, shape, tiny.hf_tensors(shape))
    mixtures = "deepseek_v3", "gpt_oss", "granitemoe", "hunyuan_moe", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"
    for kind in (*mixtures, "gemma3_nested", "gpt2", "gpt_neox", *FUSED):
        golden = references.load(kind)
        tiny.write(root / kind, golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.files.items()})
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and of embeddings it saves whole
@pytest.mark.parametrize("kind, name", EACH)
def test_ours_opens_in_peft(folders, tmp_path, kind, name):
    folder, settings = folders[kind], (VARIANTS | EXPERTS)[name]
    model = load(folder)
    adapter = _stir(peft.init_adapter(jax.random.key(0), model, LoraConfig(**settings)))
    save_adapter(adapter, model, tmp_path / "adapter")
    opened = peft_library.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = opened(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours(folder, lambda _: adapter), expected, atol=1e-4)


def _stir(adapter):
    """Noise in what is trained, in the ranks a layer has."""
    rng, params = np.random.default_rng(0), {}
    for site in adapter.sites:
        pair = dict(adapter.params[site.path])
        live = np.arange(max(site.ranks)) < np.asarray(site.ranks)[:, None]
        live = live.reshape(-1, *(1,) * (pair["b"].ndim - 2), max(site.ranks)) if pair["b"].ndim > 2 else live[0]
        pair["b"] = pair["b"] + 0.1 * rng.standard_normal(pair["b"].shape).astype(np.float32) * live
        params[site.path] = pair | {name: pair[name] + 0.2 for name in ("bias", "magnitude") if name in pair}
    saved = {path: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in adapter.saved.items()}
    return adapter.replace(params=params, saved=saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, name", EACH)
def test_pefts_opens_here(folders, tmp_path, kind, name):
    torch.manual_seed(0)
    folder, settings = folders[kind], (VARIANTS | EXPERTS)[name]
    settings = peft_library.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    made = peft_library.get_peft_model(theirs(folder), settings).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lora_" not in name:  # what is trained whole
                parameter += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = made(torch.tensor(TOKENS)).logits.numpy()
        base = theirs(folder)(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected - base).max() > 1e-2
    np.testing.assert_allclose(ours(folder, lambda model: load_adapter(tmp_path / "adapter", model)), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_weighted_sum_is_pefts_cat(folders, tmp_path):
    folder = folders["tied"]
    torch.manual_seed(0)
    made = None
    for name, settings in SUM.items():
        settings = peft_library.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
        made = made or peft_library.get_peft_model(theirs(folder), settings, adapter_name=name)
        if name not in made.peft_config:
            made.add_adapter(name, settings)
    made.add_weighted_adapter(list(SUM), [0.7, -0.4], "sum", combination_type="cat")
    made.set_adapter("sum")
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = made.eval()(torch.tensor(TOKENS)).logits.numpy()

    def combined(model):
        return peft.combine.combine(model.config, [load_adapter(tmp_path / name, model) for name in SUM], [0.7, -0.4])

    np.testing.assert_allclose(ours(folder, combined), expected, atol=1e-4)
    np.testing.assert_allclose(ours(folder, lambda model: load_adapter(tmp_path / "sum", model)), expected, atol=1e-4)
