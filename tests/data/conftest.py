"""A small byte-level tokenizer made here, and the chat templates of three families."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxtune.config import load_config

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}\
{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}\
{% for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
SPECIAL = {
    "chatml": (CHATML, "<|im_start|>", "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, "<bos>", "<end_of_turn>", ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
}
TEXT = [
    "The quick brown fox jumps over the lazy dog, then it says: hello there!",
    "One and two are three.\n\nYes, they are. Naïve café, 你好 😀",
]


def make_tokenizer(family: str, template: str | None = None, prefix: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 entries with the special tokens and template of `family`, adding BOS to plain text where that family does."""
    chat_template, bos, eos, special = SPECIAL[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXT * 4, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if family != "chatml":
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]))
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=special[0])
    tokenizer.chat_template = template or chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    """One tokenizer for each family."""
    return {family: make_tokenizer(family) for family in SPECIAL}


@pytest.fixture
def config(tmp_path):
    """Make a config over rows or a file; the cache is the test's own."""

    def make(train, top=None, **data):
        if isinstance(train, list) and isinstance(train[0], dict) and "path" not in train[0]:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in train))
            train = str(file)
        data = {"train": train, "max_length": 128, "cache_dir": str(tmp_path / "cache")} | data
        return load_config({"model": "none", "output_dir": str(tmp_path / "run"), "data": data} | (top or {}))

    return make


@pytest.fixture
def bare():
    """A tokenizer without a chat template."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    return tokenizer
