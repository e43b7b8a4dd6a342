"""Writes tests/goldens/adapters/methods.npz: an adapter of each case of tests/methods.py as PEFT saves it, and PEFT's logits with it.

    python tools/make_adapter_goldens.py          needs torch and peft

Of a case NAME: `NAME/config` (adapter_config.json), `NAME/tensor/TENSOR` (float16, exact), `NAME/logits` (at the end of TOKENS).
The models are not in it: tests/tiny.py's, and those of the other goldens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent.parent / "tests"
OUT = TESTS / "goldens" / "adapters" / "methods.npz"

sys.path.insert(0, str(TESTS))
import references  # noqa: E402
import tiny  # noqa: E402
from methods import CASES, TOKENS  # noqa: E402


def made(case, folder: Path, out: Path) -> np.ndarray:
    """PEFT's adapter with noise in all that it trains, saved; its logits."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(base, case.theirs(peft)).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half().float())
        for buffer in (buffer for name, buffer in model.named_buffers() if "vera_" in name and case.settings.get("save_projection", True)):
            buffer.copy_(buffer.half().float())
        model.save_pretrained(out)
        return model(torch.tensor(TOKENS)).logits[:, -1:].numpy()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        tiny.write(root / "llama")
        for kind in {case.model for case in CASES.values()} - {"llama"}:
            golden = references.load(kind)
            tiny.write(root / kind, golden.config, {name: np.ascontiguousarray(tensor) for name, tensor in golden.tensors.items()})
        for name, case in CASES.items():
            torch.manual_seed(0)
            logits = made(case, root / case.model, root / name)
            config = json.loads((root / name / "adapter_config.json").read_text()) | {"base_model_name_or_path": case.model}
            arrays |= {f"{name}/config": np.array(json.dumps(config)), f"{name}/logits": logits}
            for tensor, value in load_file(root / name / "adapter_model.safetensors").items():
                exact = np.array_equal(value.astype(np.float16).astype(np.float32), value)
                arrays[f"{name}/tensor/{tensor}"] = value.astype(np.float16) if exact else value
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **arrays)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
