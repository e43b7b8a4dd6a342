"""Tokenizers without torch: from a folder with transformers, from a GGUF file by rebuilding what llama.cpp stored."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.convert.tensors import read_json, write_json
from jaxtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PROCESSORS = "chat_template.json"  # where older processors (Mistral Small 3's, for example) kept the template
TEMPLATES = "additional_chat_templates"  # the folder of those with names of their own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def import_transformers():
    """Import transformers without its message about missing torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found", at every import
    import transformers

    return transformers


def load_tokenizer(folder: str | os.PathLike) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a model folder; None if the folder has none. Code in the folder is never run.

    Raises ModelError if its files cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything from OSError to a bare Exception here
        for name in (*TOKENIZER_FILES, "special_tokens_map.json"):
            if name.endswith(".json") and (folder / name).is_file():
                read_json(folder / name)  # says which of them is damaged, and where
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        models = [name for name in SENTENCEPIECE if (folder / name).is_file()]
        if models and not (folder / "tokenizer.json").is_file() and not importlib.util.find_spec("sentencepiece"):
            reason = (
                f"there is no tokenizer.json, and {models[0]} is read by the package sentencepiece; pip install sentencepiece, or put the "
                "tokenizer.json there that transformers saves where it is installed"
            )
        elif not models and not any((folder / name).is_file() for name in TOKENIZER_FILES[:-1]):
            reason = "there is a tokenizer_config.json but no tokenizer.json; copy that from the model it came with"
        else:
            reason += "; fetch its files again, all of them from one model"
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {reason}") from error
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise ModelError(f"{folder}/tokenizer_config.json has model_max_length={longest!r}; it has to be a number")
    if tokenizer.chat_template is None and (folder / PROCESSORS).is_file():
        tokenizer.chat_template = read_json(folder / PROCESSORS).get("chat_template")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """The tokenizer's files and chat template, as transformers writes them, in a form that its older versions open too."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = read_json(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it; 4 (and hence vLLM) knows only this name
        write_json(file, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
