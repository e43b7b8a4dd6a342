"""LoRA adapters as GGUF: base and pairs, added as in llama.cpp, equal the merged model's file."""

import dataclasses

import jax
import numpy as np
import pytest
import references
import tiny

from jaxtune.config import IA3Config, LoraConfig
from jaxtune.convert.gguf_adapter import save_gguf_adapter
from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.gguf_out import save_gguf
from jaxtune.convert.load import Model
from jaxtune.errors import ModelError
from jaxtune.model.families import from_hf
from jaxtune.peft import compose, init_adapter
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.lora import LoRA
from jaxtune.tree import flatten, unflatten


def make(hf, **fields):
    """A model and an adapter with an effect."""
    config, rng = from_hf(hf), np.random.default_rng(0)
    model = Model(config, references.tree(config, tiny.hf_tensors(hf)))
    own = LoraConfig(r=2, lora_alpha=6, **{"target_modules": "all-linear"} | fields)
    shapes = jax.eval_shape(lambda key: init_adapter(key, model, own), jax.random.key(0))
    adapter = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), shapes)
    for site in adapter.sites:  # beyond a layer's rank there is nothing
        for number, rank in enumerate(site.ranks):
            adapter.params[site.path]["a"][(number,) if site.stacked else ()][..., rank:, :] = 0
    return model, adapter


def merged(params, adapter):
    """`W + scale b a`, by numpy."""
    leaves = flatten(compose(params, adapter))
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRA):
            leaves[path] = np.asarray(leaf.base) + np.asarray(leaf.scale)[..., None, None] * (np.asarray(leaf.b) @ np.asarray(leaf.a))
    return unflatten(leaves)


def added(file, name):
    """What llama.cpp adds to a tensor (src/llama-adapter.cpp); for an embedding, it looks up `lora_a` by the token."""
    a, b = file.read(f"{name}.lora_a").astype(np.float32), file.read(f"{name}.lora_b").astype(np.float32)
    return file.metadata["adapter.lora.alpha"] / b.shape[-1] * ((b @ a.T).T if name == "token_embd.weight" else b @ a)


TARGETS = r".*(layers\.[01]\..*(q_proj|k_proj|up_proj)|embed_tokens|lm_head)"
PATTERNS = dict(use_rslora=True, rank_pattern={"1.self_attn.q_proj": 3}, alpha_pattern={"up_proj": 9}, target_modules=TARGETS)
# golden model, changes that llama.cpp needs, the adapter
CASES = [
    ("llama", dict(tie_word_embeddings=False), PATTERNS),
    ("falcon", dict(bias=False), {}),
    ("gpt2", {}, {}),
    ("granitemoeshared", {}, {}),
    ("qwen3_5", dict(num_hidden_layers=4, layer_types=None, full_attention_interval=4, rms_norm_eps=1e-6), {}),
]


@pytest.mark.parametrize(("case", "changes", "fields"), CASES, ids=[case for case, *_ in CASES])
def test_base_and_pairs_are_the_merged_file(tmp_path, case, changes, fields):
    model, adapter = make(references.load(case).config | changes, **fields)
    save_gguf(model.config, model.params, tmp_path / "base.gguf", type="f32")
    save_gguf(model.config, merged(model.params, adapter), tmp_path / "merged.gguf", type="f32")
    save_gguf_adapter(model.config, adapter, tmp_path / "lora.gguf", name="mine")
    base, both, lora = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("base", "merged", "lora"))
    adapted = {name.rpartition(".")[0] for name in lora.tensors}
    for name in base.tensors:
        change = both.read(name) - base.read(name)
        assert bool(change.any()) == (name in adapted), name
        if name in adapted:
            np.testing.assert_allclose(added(lora, name).reshape(change.shape), change, atol=2e-6, err_msg=name)
    keys = {"general.type": "adapter", "adapter.type": "lora", "general.name": "mine"}
    assert keys.items() <= lora.metadata.items()
    assert lora.metadata["general.architecture"] == base.metadata["general.architecture"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(use_dora=True), "no adapters with use_dora"),
        (dict(lora_bias=True, target_modules=["q_proj"]), "no adapters with lora_bias"),
        (dict(modules_to_save=["lm_head"]), r"has trained head whole \(modules_to_save"),
        (dict(target_modules=["embed_tokens"]), "on its embed alone; merge it into its base instead: --format gguf"),
        (dict(type="q4_0"), "'q4_0' is not a type of an adapter"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, fields, message):
    fields, how = dict(fields), {"type": fields.get("type", "f32")}
    fields.pop("type", None)
    model, adapter = make(tiny.LLAMA | dict(tie_word_embeddings="modules_to_save" not in fields), **fields)
    with pytest.raises(ModelError, match=message):
        save_gguf_adapter(model.config, adapter, tmp_path / "lora.gguf", **how)
    assert not list(tmp_path.iterdir())


def test_other_methods_and_latents_are_refused(tmp_path):
    model, adapter = make(tiny.LLAMA)
    loftq = adapter.replace(config=dataclasses.replace(adapter.config, init_lora_weights="loftq"))
    with pytest.raises(ModelError, match="no GGUF file is packed so; merge it"):
        save_gguf_adapter(model.config, loftq, tmp_path / "lora.gguf")
    ia3 = Adapter({}, (), IA3Config())
    with pytest.raises(ModelError, match="of method ia3; merge it"):
        save_gguf_adapter(model.config, ia3, tmp_path / "lora.gguf")
    for config in (references.load("deepseek_v3").config | dict(attention_bias=False), references.load("gemma4").config):
        model, adapter = make(config)
        with pytest.raises(ModelError, match="adds no pairs to latent attention"):
            save_gguf_adapter(model.config, adapter, tmp_path / "lora.gguf")
