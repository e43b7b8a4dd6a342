"""One adapter of each kind and shape, for the laws and for PEFT."""

from typing import Any, NamedTuple

import numpy as np

from jaxtune import config
from jaxtune.peft import kind_of
from jaxtune.peft.adapter import within_ranks
from jaxtune.peft.sites import adaptable


class Case(NamedTuple):
    method: str  # as in METHODS
    name: str  # of its config class, here and in PEFT
    settings: dict[str, Any]
    model: str = "llama"

    @property
    def merges(self):
        return kind_of(self.config()).merges

    def config(self):
        return getattr(config, self.name)(**self.settings)

    def theirs(self, library):
        return getattr(library, self.name)(**self.settings, task_type="CAUSAL_LM")


TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40], [1, 3, 3, 60, 4, 9, 12]], np.int32)
QD = ["q_proj", "down_proj"]
CASES = {
    "ia3": Case("ia3", "IA3Config", {}),
    "ia3 of some layers": Case("ia3", "IA3Config", {"target_modules": r".*layers\.[02]\..*(q|up|down)_proj",
                                                    "feedforward_modules": r".*down_proj"}),
    "ia3 of gpt2": Case("ia3", "IA3Config", {"modules_to_save": ["ln_f"]}, "gpt2"),
    "loha": Case("loha", "LoHaConfig", {"r": 3, "alpha": 6, "target_modules": QD, "rank_pattern": {"layers.1.self_attn.q_proj": 5}}),
    "lokr": Case("lokr", "LoKrConfig", {"r": 2, "alpha": 3, "target_modules": QD}),
    "lokr of both": Case("lokr", "LoKrConfig", {"r": 1, "target_modules": ["k_proj", "up_proj"], "decompose_both": True,
                                                "decompose_factor": 5}),
    "vera": Case("vera", "VeraConfig", {"r": 6, "projection_prng_key": 3, "target_modules": QD}),
    "vera without its pair": Case(
        "vera", "VeraConfig", {"r": 6, "target_modules": QD, "save_projection": False, "bias": "vera_only", "layers_to_transform": [1]}
    ),
    "vera of gpt2": Case("vera", "VeraConfig", {"r": 6, "target_modules": ["c_attn", "mlp.c_proj"]}, "gpt2"),
    "adalora": Case("adalora", "AdaLoraConfig", {"init_r": 5, "target_r": 3, "lora_alpha": 12, "total_step": 10, "target_modules": QD}),
    "adalora of gpt2": Case("adalora", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["c_attn", "c_fc"],
                                                         "bias": "lora_only"},
                            "gpt2"),
    "oft": Case("oft", "OFTConfig", {"oft_block_size": 8, "target_modules": QD, "layers_to_transform": [0, 2]}),
    "oft by inverse": Case("oft", "OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False,
                                                "target_modules": ["k_proj", "up_proj"]}),
    "oft of another size": Case("oft", "OFTConfig", {"oft_block_size": 7, "num_cayley_neumann_terms": 3, "target_modules": ["up_proj"]}),
    "bitfit": Case("bitfit", "BeftConfig", {"target_modules": ["q_proj", "o_proj"]}),
    "bitfit of some layers": Case("bitfit", "BeftConfig", {"target_modules": r".*layers\.1\..*_proj"}),
    "norms": Case("ln_tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"], "modules_to_save": ["lm_head"]}),
    "norms of gpt2": Case("ln_tuning", "LNTuningConfig", {"target_modules": r".*h\.1\.ln_[12]"}, "gpt2"),
    "prompt tuning": Case("prompt_tuning", "PromptTuningConfig", {"num_virtual_tokens": 5}),
    "prompt tuning of gpt2": Case("prompt_tuning", "PromptTuningConfig", {"num_virtual_tokens": 3}, "gpt2"),
    "p-tuning": Case("p_tuning", "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    "prefix tuning": Case("prefix_tuning", "PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prefix tuning by a network": Case(
        "prefix_tuning", "PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 24}
    ),
    "prefix tuning of gpt2": Case("prefix_tuning", "PrefixTuningConfig", {"num_virtual_tokens": 3}, "gpt2"),
    "prefix tuning with windows": Case("prefix_tuning", "PrefixTuningConfig", {"num_virtual_tokens": 3}, "gemma2"),
    "prompt tuning with windows": Case("prompt_tuning", "PromptTuningConfig", {"num_virtual_tokens": 3}, "gemma2"),
    "boft": Case("boft", "BOFTConfig", {"boft_block_size": 4, "target_modules": QD}),
    "boft of some layers": Case("boft", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4, "target_modules": ["o_proj"],
                                                       "layers_to_transform": 1, "bias": "boft_only"}),
}  # fmt: skip


def stir(adapter, model, seed=0, size=0.1):
    """Noise in everything that is trained, within the ranks that a layer has."""
    rng, kind, rows, params = np.random.default_rng(seed), kind_of(adapter.config), adaptable(model.config), {}

    def noisy(leaf):
        return leaf + size * rng.standard_normal(leaf.shape).astype(np.float32)

    if not adapter.sites:
        params = {path: {name: noisy(leaf) for name, leaf in arrays.items()} for path, arrays in adapter.params.items()}
    for site in adapter.sites:
        parts = kind.parts(adapter.config, site.path, rows[site.path], max(site.ranks))
        params[site.path] = {name: within_ranks(parts[name], noisy(leaf), site) for name, leaf in adapter.params[site.path].items()}
    return adapter.replace(params=params, saved={path: noisy(leaf) for path, leaf in adapter.saved.items()})
