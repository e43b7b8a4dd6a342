"""Measure the memory of conversions: merging an adapter into a random Llama, disk to disk, and quantising it to NF4 while loading.

    python tools/convert_memory.py [FOLDER] [--layers 14]

Writes a float32 model of 3 GB (with the default 14 layers) into FOLDER, then runs each conversion in its own process and prints its peak
resident memory above that after the imports.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HF = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "dtype": "float32",
    "tie_word_embeddings": False,
}  # fmt: skip


def make_model(folder: Path, hf: dict) -> int:
    """A random model, written tensor by tensor; its size in bytes."""
    from jaxtune.convert.names import cells
    from jaxtune.convert.tensors import Plan, write_json, write_tensors
    from jaxtune.model.families import from_hf
    from jaxtune.model.spec import spec

    plans = {cell.name: Plan(cell.name, np.dtype(np.float32), cell.shape) for cell in cells(spec(from_hf(hf)))}
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", hf)
    write_tensors(folder, plans.values(), lambda name: rng.standard_normal(plans[name].shape, np.float32) * np.float32(0.02), "1GB")
    return sum(plan.nbytes for plan in plans.values())


def peak() -> float:
    """Peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, folder: Path) -> dict[str, float]:
    """One conversion in this process."""
    import jax

    from jaxtune import peft
    from jaxtune.config import LoraConfig
    from jaxtune.convert import hf, load
    from jaxtune.convert.load import open_model
    from jaxtune.convert.merge import composed
    from jaxtune.tree import nbytes

    jax.devices()
    before, start = peak(), time.monotonic()
    result = 0.0
    if kind == "merge":
        opened = open_model(folder / "model")
        model = argparse.Namespace(config=opened.config, params={}, tokenizer=None)
        adapter = peft.init_adapter(jax.random.key(0), model, LoraConfig(r=16))
        params = composed(opened.config, adapter, opened.checkpoint)
        hf.save(opened.config, params, folder / f"merged-{time.time_ns()}", base=opened.checkpoint)
    else:
        result = nbytes(load(folder / "model", "bfloat16", kind).params) / 1e6
    return {"baseline": before, "peak": peak() - before, "result": result, "seconds": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder)))
        return
    Path(given.folder or ".").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        size = make_model(Path(scratch) / "model", HF | {"num_hidden_layers": given.layers})
        print(f"model: {size / 1e9:.2f} GB")
        for kind in ("merge", "nf4", "nf4-dq"):
            done = subprocess.run([sys.executable, __file__, scratch, "--measure", kind], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{kind}: {found['peak']:.0f} MB above the {found['baseline']:.0f} MB of the imports; what it left in memory: "
                f"{found['result']:.0f} MB; {found['seconds']:.0f} s"
            )


if __name__ == "__main__":
    main()
