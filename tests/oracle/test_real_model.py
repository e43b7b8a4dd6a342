"""SmolLM2 itself: logits against transformers in every layout, NF4 against bitsandbytes on all 210 matrices, QLoRA's logits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from jaxtune import generate  # noqa: E402
from jaxtune.convert.gguf_out import save_gguf  # noqa: E402
from jaxtune.convert.load import load  # noqa: E402
from jaxtune.model import quant  # noqa: E402
from jaxtune.model.decoder import forward  # noqa: E402

TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n    return", "1, 1, 2, 3, 5, 8, 13, 21,"]


@pytest.fixture(scope="module")
def model(smollm2):
    return load(smollm2)


@pytest.fixture(scope="module")
def documents(model):
    return [np.asarray(model.tokenizer(text)["input_ids"], np.int32) for text in TEXTS]


def alone(theirs, documents):
    with torch.no_grad():
        return [theirs(torch.tensor(doc[None].astype(np.int64))).logits[0].float().numpy() for doc in documents]


@pytest.fixture(scope="module")
def theirs(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_logits(model, documents, theirs, kind):
    """Within 1e-4 of the size of the logits (about 30; transformers' own float32 is 1e-4 from its float64)."""
    expected = alone(theirs, documents)
    longest = max(map(len, documents))
    rows, width = (1, sum(map(len, documents)) + 3) if kind == "packed" else (len(documents), longest + 3)
    tokens, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(3))
    places, start = [], 0
    for number, doc in enumerate(documents):
        row, begin = (0, start) if kind == "packed" else (number, 0 if kind == "right" else width - len(doc))
        where = (row, slice(begin, begin + len(doc)))
        tokens[where], positions[where], segments[where] = doc, np.arange(len(doc)), number + 1 if kind == "packed" else 1
        places.append(where)
        start += len(doc)
    ours = np.asarray(jax.jit(forward, static_argnums=0)(model.config, model.params, tokens, positions, segments))
    for where, logits in zip(places, expected, strict=True):
        assert np.abs(ours[where] - logits).max() <= 1e-4 * max(1.0, np.abs(logits).max())
        assert np.mean(ours[where].argmax(-1) == logits.argmax(-1)) == 1.0


def test_nf4_is_bitsandbytes_on_every_matrix(smollm2):
    """Codes and absmax bit for bit; the nested codes but for those that a lookup table of 65536 bins rounds otherwise (0.25 %)."""
    from bitsandbytes import functional

    from jaxtune.convert.bitsandbytes import _pairs

    tensors = {name: w for name, w in load_file(smollm2 / "model.safetensors").items() if name.endswith("_proj.weight")}
    assert len(tensors) == 210
    wrong = total = 0
    for name, w in tensors.items():
        packed, state = functional.quantize_4bit(torch.tensor(w), quant_type="nf4", compress_statistics=True)
        ours = quant.quantize(w, "nf4-dq")
        plain = quant.quantize(w, "nf4")
        np.testing.assert_array_equal(_pairs(quant.unpack(ours.codes, 64)), packed.numpy().reshape(-1), err_msg=name)
        _, flat = functional.quantize_4bit(torch.tensor(w), quant_type="nf4")
        np.testing.assert_array_equal(np.asarray(plain.absmax).T.reshape(-1), flat.absmax.numpy(), err_msg=name)
        # torch sums in float32, in an order that depends on its threads, and is ulps off the mean; ours is summed in float64
        np.testing.assert_allclose(ours.nested_offset, state.offset.numpy(), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(ours.nested_absmax, state.state2.absmax.numpy(), atol=1e-6 * float(state.offset), err_msg=name)
        codes = np.asarray(ours.absmax).T.reshape(-1).astype(int)
        theirs = state.absmax.numpy().astype(int)
        table = quant.dynamic_map()  # its values near 0 stand closer than the lookup table's bins
        assert np.abs(table[codes] - table[theirs])[codes != theirs].max(initial=0) <= np.diff(table).max() + 1e-6
        assert np.abs(table[codes] - table[theirs]).mean() < 1e-4
        wrong, total = wrong + int((codes != theirs).sum()), total + codes.size
    assert wrong / total < 0.004, wrong / total


def test_qlora_logits_are_those_of_transformers_with_bitsandbytes(smollm2, documents):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": settings, "dtype": torch.float32, "attn_implementation": "eager"}
    quantized = AutoModelForCausalLM.from_pretrained(smollm2, **options)
    quantized.train()  # in eval mode bitsandbytes repacks the weights on some processors and rounds their scales
    model = load(smollm2, quantization="nf4")
    for doc, expected in zip(documents, alone(quantized, documents), strict=True):
        ours = np.asarray(forward(model.config, model.params, jnp.asarray(doc[None])))[0]
        assert np.abs(ours - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def test_gguf_and_back_gives_the_same_greedy_text(model, tmp_path):
    """SmolLM2's GGUF -> here -> a GGUF of float16 -> here, tokenizer and chat template included."""
    words = dict(tokenizer=model.tokenizer, generation_config=model.generation_config)
    save_gguf(model.config, model.params, tmp_path / "m.gguf", type="f16", **words)
    again = load(tmp_path / "m.gguf")
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    questions = ["What is the capital of France?", "List three prime numbers above 10."]
    wanted = generate.generate(model, questions, max_new_tokens=24)
    assert generate.generate(again, questions, max_new_tokens=24) == wanted and all(len(text) > 20 for text in wanted)
