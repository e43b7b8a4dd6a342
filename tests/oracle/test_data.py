"""The rows TRL would train on, token for token and mask for mask, where both take the same data."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from jaxtune import data  # noqa: E402
from jaxtune.config import load_config  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
QUESTIONS = ["One and two are ", "What is the capital of France?\n", "Say hello: ", "Naïve café? "]
ANSWERS = ["three.", "Paris, I think", "hello there", "Oui 😀"]
ROWS = {
    "text": [{"text": q + a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
    "completion": [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
    "chat completion": [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ],
    "messages": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}] * 2}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ],
}


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        QUESTIONS * 4 + ANSWERS * 4,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_trl(tokenizer, rows, folder, **keys):
    """Input ids and labels as SFTTrainer prepares them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    args = SFTConfig(output_dir=str(folder / "trl"), max_length=256, report_to="none", use_cpu=True, bf16=False, **keys)
    trainer = SFTTrainer(LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_trls(kind, tokenizer, tmp_path):
    theirs = by_trl(tokenizer, ROWS[kind], tmp_path, **({"assistant_only_loss": True} if kind == "messages" else {}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    settings = {
        "train": str(tmp_path / "rows.jsonl"),
        "max_length": 256,
        "cache_dir": str(tmp_path / "cache"),
        "packing": False,
        "shuffle": False,
    }
    config = load_config({"model": "none", "output_dir": str(tmp_path / "run"), "data": settings, "per_device_train_batch_size": 4})
    batch = data.load(config, tokenizer).train.batch_at(0)
    assert batch.tokens.shape[:2] == (1, 4)
    for row, (ids, trained) in enumerate(theirs):
        length = int((batch.segments[0, row] > 0).sum())
        assert batch.tokens[0, row, :length].tolist() == ids
        expected = [False, *trained[1:]]  # TRL shifts its labels: the first is no target
        if kind == "chat completion":  # TRL trains what the template writes after the stop token, a line break; we end with the token
            stop = length - 1 - ids[::-1].index(tokenizer.eos_token_id)
            assert tokenizer.decode(ids[stop + 1 :]) == "\n"
            expected[stop + 1 :] = [False] * (length - stop - 1)
        assert batch.weights[0, row, :length].tolist() == [float(on) for on in expected]
