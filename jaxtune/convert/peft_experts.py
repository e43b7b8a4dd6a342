"""Adapters from transformers 4, where every expert was a separate module: a pair for each expert's matrix.

    ...layers.0.block_sparse_moe.experts.3.w1.lora_A.weight        (Mixtral: w1 gate, w3 up, w2 down)
    ...layers.0.mlp.experts.3.gate_proj.lora_A.weight              (Qwen 3 MoE)

They are read as PEFT writes them today, with one pair for all of a layer's experts. Gate and up are one matrix there, whose pair has both
ranks: `a = [a_gate; a_up]`, and `b` block-diagonal with `b_gate` above `b_up`, so the product is bit-identical.
"""

import re

import numpy as np

from jaxtune.convert.tensors import Checkpoint
from jaxtune.errors import ModelError

_EXPERT = re.compile(r"(.*\.)(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_ROUTER = re.compile(r"(.*\.)block_sparse_moe\.(gate\.lora_[AB]\.weight)")
_KIND = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class PerExpert:
    """A checkpoint of such an adapter under today's names."""

    def __init__(self, checkpoint: Checkpoint, experts: int):
        self.checkpoint, self.experts = checkpoint, experts
        self.entries = dict(checkpoint.entries)
        self._layers: dict[str, dict[tuple[int, str, str], str]] = {}
        self._made: dict[str, tuple[str, tuple[str, ...], str]] = {}
        self._renamed: dict[str, str] = {}
        for name in checkpoint.entries:
            if match := _EXPERT.fullmatch(name):
                layer, number, kind, side = match.groups()
                self._layers.setdefault(layer, {})[int(number), _KIND.get(kind, kind), side] = name
                del self.entries[name]
            elif match := _ROUTER.fullmatch(name):
                self._renamed[f"{match[1]}mlp.{match[2]}"] = name
                self.entries[f"{match[1]}mlp.{match[2]}"] = self.entries.pop(name)
        for layer, names in self._layers.items():
            kinds = {kind for _, kind, _ in names}
            inner = ".base_layer" if "down" in kinds else ""
            for wanted, place in ((("gate", "up"), inner), (("down",), "")):
                if not kinds.intersection(wanted):
                    continue
                for side in "AB":
                    made = f"{layer}mlp.experts{place}.lora_{side}.weight"
                    self._made[made] = (layer, wanted, side)
                    self.entries[made] = checkpoint.entries[next(iter(names.values()))]

    def read(self, name: str) -> np.ndarray:
        """One tensor; those of experts in PEFT's layout, `lora_A [E r, in]` expert by expert, `lora_B [out, r E]` rank by rank."""
        if name not in self._made:
            return self.checkpoint.read(self._renamed.get(name, name))
        layer, kinds, side = self._made[name]
        pairs = [self._joined([self._one(layer, number, kind, side) for kind in kinds], side) for number in range(self.experts)]
        return np.concatenate(pairs) if side == "A" else np.stack(pairs, axis=-1).reshape(len(pairs[0]), -1)

    def _one(self, layer: str, number: int, kind: str, side: str) -> np.ndarray:
        names = self._layers[layer]
        if (number, kind, side) not in names:
            there = next(iter(names.values()))
            raise ModelError(f"{self.checkpoint.entries[there].file}: lora_{side} of expert {number}'s {kind} in {layer}* is missing")
        return self.checkpoint.read(names[number, kind, side]).astype(np.float32)

    @staticmethod
    def _joined(parts: list[np.ndarray], side: str) -> np.ndarray:
        if side == "A" or len(parts) == 1:
            return np.concatenate(parts)
        (out, rank), (more, other) = (part.shape for part in parts)
        whole = np.zeros((out + more, rank + other), np.float32)
        whole[:out, :rank], whole[out:, rank:] = parts
        return whole


def is_per_expert(checkpoint: Checkpoint) -> bool:
    """Whether the file has pairs of single experts."""
    return any(_EXPERT.fullmatch(name) for name in checkpoint.entries)
