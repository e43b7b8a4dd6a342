"""Law 9: adapters written here open in PEFT with the same logits, and PEFT's open here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft_library = pytest.importorskip("peft")
import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from jaxtune import peft  # noqa: E402
from jaxtune.config import LoraConfig  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.convert.peft import load_adapter, save_adapter  # noqa: E402
from jaxtune.model.decoder import forward  # noqa: E402

TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40], [1, 3, 3, 60, 4, 9, 12]], np.int64)
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
    "DoRA": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "o_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    shape = tiny.LLAMA | {"tie_word_embeddings": request.param == "tied"}
    tiny.write(folder, shape, tiny.hf_tensors(shape))
    return folder


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def ours(folder, adapter_of):
    model = load(folder)
    params = peft.compose(model.params, adapter_of(model))
    return np.asarray(forward(model.config, params, jnp.asarray(TOKENS, jnp.int32)))


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and of embeddings it saves whole
@pytest.mark.parametrize("name", VARIANTS)
def test_ours_opens_in_peft(folder, tmp_path, name):
    model = load(folder)
    adapter = peft.init_adapter(jax.random.key(0), model, LoraConfig(**VARIANTS[name]))
    adapter = jax.tree.map(lambda x: jnp.where(x == 0, 0.05, x), adapter) if name != "patterns" else _stir(adapter)
    save_adapter(adapter, model, tmp_path / "adapter")
    opened = peft_library.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = opened(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours(folder, lambda _: adapter), expected, atol=1e-4)


def _stir(adapter):
    """Noise in the ranks a layer has."""
    params = {}
    for site in adapter.sites:
        live = np.arange(max(site.ranks)) < np.asarray(site.ranks)[:, None]
        params[site.path] = adapter.params[site.path] | {"b": adapter.params[site.path]["b"] + 0.05 * live[:, None, :]}
    return adapter.replace(params=params)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_pefts_opens_here(folder, tmp_path, name):
    torch.manual_seed(0)
    settings = peft_library.LoraConfig(**VARIANTS[name], init_lora_weights=False, task_type="CAUSAL_LM")
    made = peft_library.get_peft_model(theirs(folder), settings).eval()
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = made(torch.tensor(TOKENS)).logits.numpy()
        base = theirs(folder)(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected - base).max() > 1e-2
    np.testing.assert_allclose(ours(folder, lambda model: load_adapter(tmp_path / "adapter", model)), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_weighted_sum_is_pefts_cat(folder, tmp_path):
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
