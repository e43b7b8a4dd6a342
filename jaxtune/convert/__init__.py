"""Reading and writing other tools' formats: Hugging Face, PEFT, bitsandbytes, GGUF."""

from jaxtune.convert.heads import load_scorer
from jaxtune.convert.hf import save
from jaxtune.convert.load import Model, load
from jaxtune.convert.peft import load_adapter, save_adapter

__all__ = ["Model", "load", "load_adapter", "load_scorer", "save", "save_adapter"]
