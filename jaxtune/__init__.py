"""jaxtune: fine-tuning of Hugging Face language models in JAX, on TPU, GPU or CPU.

    import jaxtune as jt
    model = jt.load("path-or-id", dtype="bfloat16", quantization="nf4-dq")
    adapter = jt.init_adapter(jax.random.key(0), model, jt.LoraConfig(r=16))
    logits = jt.forward(model.config, jt.compose(model.params, adapter), tokens)

Names are imported on first use, so `import jaxtune` is fast and starts no device.
"""

import importlib
import os
import signal
import sys

__version__ = "0.1.0"

_WHERE = {
    "load": "jaxtune.convert",
    "Model": "jaxtune.convert",
    "save": "jaxtune.convert",
    "load_adapter": "jaxtune.convert",
    "load_scorer": "jaxtune.convert",
    "save_adapter": "jaxtune.convert",
    "forward": "jaxtune.model.decoder",
    "init_adapter": "jaxtune.peft",
    "compose": "jaxtune.peft",
    "merge": "jaxtune.peft",
    "combine": "jaxtune.peft.combine",
    "mix": "jaxtune.peft.combine",
    "generate_tokens": "jaxtune.generate",
    "best_of_n": "jaxtune.best_of",
    "Config": "jaxtune.config",
    "LoraConfig": "jaxtune.config",
    "IA3Config": "jaxtune.config",
    "LoHaConfig": "jaxtune.config",
    "LoKrConfig": "jaxtune.config",
    "VeraConfig": "jaxtune.config",
    "AdaLoraConfig": "jaxtune.config",
    "OFTConfig": "jaxtune.config",
    "BOFTConfig": "jaxtune.config",
    "BeftConfig": "jaxtune.config",
    "LNTuningConfig": "jaxtune.config",
    "PromptTuningConfig": "jaxtune.config",
    "PromptEncoderConfig": "jaxtune.config",
    "PrefixTuningConfig": "jaxtune.config",
    "load_config": "jaxtune.config",
    "JaxtuneError": "jaxtune.errors",
}
_VERBS = ("train", "sweep", "evaluate", "generate", "serve", "score", "export", "report", "plan")  # callable modules

__all__ = ["__version__", *_WHERE, *_VERBS]


def _interrupted(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def _interrupts_end() -> None:
    """Until `errors.run` hears it, Ctrl-C ends the process, and says so: a KeyboardInterrupt out of the imports of a command may be
    a traceback, an ImportError or a segmentation fault."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


_module = sys.argv[:1] == ["-m"] and any(word.partition(".")[0] in ("jaxtune", "-mjaxtune") for word in sys.orig_argv)
if _module or os.path.basename("".join(sys.argv[:1])) in ("jaxtune", "jaxtune.exe"):
    _interrupts_end()  # `python -m jaxtune.train` or `jaxtune train`, whose modules are imported after this one; not a user's package


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _VERBS:
        return importlib.import_module(f"jaxtune.{name}")
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
