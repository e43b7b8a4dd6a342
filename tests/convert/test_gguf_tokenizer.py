"""Tokenizers through GGUF: a file's metadata gives the tokenizer from which it was written."""

import importlib.util
import json
import os

import pytest
from chat import make_tokenizer
from gguf import GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.gguf_tokenizer import SEQUENCES, SPACE, SPLITTINGS, gguf_tokenizer
from jaxtune.convert.gguf_vocabulary import add_tokenizer, splitting_name
from jaxtune.convert.tokenizer import load_tokenizer, save_tokenizer
from jaxtune.errors import ModelError

TEXTS = [
    "The quick brown fox", " leading", "trailing  ", "a  b\n\n  c\t\td", "naïve 你好 😀👩‍👧 e\u0301", "12345, 3.14 and 2024-01-02",
    "a  12  b", "I'll DON'T we're", "<|im_start|>user\nhi<|im_end|>\n", "", "\r\n\r\n", "x<|endoftext|>y", "½ ² ٣",
]  # fmt: skip


def through_gguf(tokenizer, path, generation_config=None, size=None):
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer, size or len(tokenizer), generation_config or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_tokenizer(GGUFFile(path).metadata, str(path))


def assert_same(found, wanted, texts=TEXTS):
    assert len(found) == len(wanted)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(found, name) == getattr(wanted, name), name
    for text in texts:
        ids = wanted(text)["input_ids"]
        assert found(text)["input_ids"] == ids, text
        for skip in (True, False):
            assert found.decode(ids, skip_special_tokens=skip) == wanted.decode(ids, skip_special_tokens=skip)


def with_rule(tokenizer, splitting):
    """The small tokenizer with another splitting rule."""
    backend = tokenizer.backend_tokenizer
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = splitting.ignore_merges
    return tokenizer


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_byte_level_and_its_template(tmp_path, family):
    tokenizer = make_tokenizer(family)
    again = through_gguf(tokenizer, tmp_path / "t.gguf")
    assert_same(again, tokenizer)
    talk = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Hello."}]
    assert again.apply_chat_template(talk, tokenize=False) == tokenizer.apply_chat_template(talk, tokenize=False)


@pytest.mark.parametrize("name", sorted({rule: name for name, rule in SPLITTINGS.items()}.values()))
def test_every_splitting_rule(tmp_path, name):
    rule = SPLITTINGS[name]
    tokenizer = with_rule(make_tokenizer("chatml"), rule)
    assert SPLITTINGS[splitting_name(json.loads(tokenizer.backend_tokenizer.to_str()))] == rule
    assert_same(through_gguf(tokenizer, tmp_path / "t.gguf"), tokenizer)


def test_rules_in_other_words(tmp_path):
    """Falcon's steps are of several kinds; OLMo 2 and others discard what their pattern, which matches everything, does not match."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.backend_tokenizer.pre_tokenizer = SEQUENCES["falcon"]
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    assert splitting_name(described) == "falcon"
    assert_same(through_gguf(tokenizer, tmp_path / "t.gguf"), tokenizer)
    described = json.loads(with_rule(tokenizer, SPLITTINGS["dbrx"]).backend_tokenizer.to_str())
    described["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert splitting_name(described) == "dbrx"
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"  # which omits something
    with pytest.raises(ModelError, match="has no name for that we know"):
        splitting_name(described)


def test_digits_are_cut_off_before_spaces_are_counted(tmp_path):
    """SmolLM's rule, named smollm in llama.cpp: two spaces before a digit stay together. GPT-2's own rule gives one to the digit."""
    cut = {}
    for name in ("smollm", "gpt-2"):
        tokenizer = through_gguf(with_rule(make_tokenizer("chatml"), SPLITTINGS[name]), tmp_path / f"{name}.gguf")
        cut[name] = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    assert cut == {"smollm": ["a", "ĠĠ", "1", "2"], "gpt-2": ["a", "Ġ", "Ġ12"]}


def sentencepiece(prefix: bool):
    """A small BPE with byte fallback, as Llama 2's."""
    from transformers import PreTrainedTokenizerFast

    pieces = [SPACE, *"abcdehlorwTx", "he", "ll", "hell", "hello", "or", "ld"]
    pieces += [SPACE + piece for piece in ("w", "wor", "world", SPACE)]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces, "<sep>"]
    merges = [("h", "e"), ("l", "l"), ("o", "r"), ("l", "d"), (SPACE, "w"), ("he", "ll"), (f"{SPACE}w", "or"), ("hell", "o")]
    merges += [(f"{SPACE}wor", "ld"), (SPACE, SPACE)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken("<sep>", normalized=False, special=False)])
    specials = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **specials)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_recovers_its_merges(tmp_path, prefix):
    tokenizer = sentencepiece(prefix)
    texts = ["hello world", " hello", "hello  world", "héllo 你", "x</s>hello", "hello<sep> world", "or ld he"]
    again = through_gguf(tokenizer, tmp_path / "t.gguf")
    assert_same(again, tokenizer, texts)
    assert again("hello world")["input_ids"][0] == again.bos_token_id
    kinds = GGUFFile(tmp_path / "t.gguf").metadata["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[3], kinds[259], kinds[-1]) == (2, 3, 6, 1, 4)


@pytest.mark.parametrize("opening, prefix", [("{{ bos_token }}", False), ("User: ", True)])
def test_a_space_at_the_beginning_alone(tmp_path, opening, prefix):
    """llama.cpp prepends one after every special token or none: as a chat needs it."""
    tokenizer = sentencepiece(False)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.chat_template = opening + "{{ messages[0].content }}"
    again = through_gguf(tokenizer, tmp_path / "t.gguf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}], tokenize=False)
    assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert GGUFFile(tmp_path / "t.gguf").metadata["tokenizer.ggml.add_space_prefix"] is prefix


def test_templates_with_names(tmp_path):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    assert_same(through_gguf(tokenizer, tmp_path / "t.gguf"), tokenizer)


def test_a_token_without_an_embedding_is_left_out(tmp_path, caplog):
    tokenizer = make_tokenizer("chatml")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    again = through_gguf(tokenizer, tmp_path / "t.gguf", size=size)
    assert len(again) == size and again.pad_token is None and "no embedding of them: [PAD]" in caplog.text
    with pytest.raises(ModelError, match="do not belong together"):
        through_gguf(tokenizer, tmp_path / "u.gguf", size=size - 1)


def test_turns_may_end_in_two_ways(tmp_path):
    tokenizer = make_tokenizer("chatml")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    through_gguf(tokenizer, tmp_path / "t.gguf", {"eos_token_id": [tokenizer.eos_token_id, other]})
    assert GGUFFile(tmp_path / "t.gguf").metadata["tokenizer.ggml.eot_token_id"] == other


def test_unknown_rules_and_kinds_are_refused(tmp_path):
    tokenizer = make_tokenizer("chatml")
    through_gguf(tokenizer, tmp_path / "t.gguf")
    metadata = GGUFFile(tmp_path / "t.gguf").metadata
    for pre in ("viking", None):
        with pytest.raises(ModelError, match=rf"m.gguf: tokenizer.ggml.pre is {pre!r}, a way to split text that is not known"):
            gguf_tokenizer(metadata | {"tokenizer.ggml.pre": pre}, "m.gguf")
    with pytest.raises(ModelError, match="the vocabulary is damaged"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.merges": ["Q QQQ"]}, "m.gguf")
    with pytest.raises(ModelError, match="400 tokens|different ones"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.tokens": ["a"] * len(tokenizer)}, "m.gguf")
    assert gguf_tokenizer({}, "m.gguf") is None
    bytes_, other = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=True)
    for steps in (  # each was mistaken for the rule without it
        [pre_tokenizers.Whitespace()], [pre_tokenizers.Split("-", "isolated"), bytes_], [pre_tokenizers.Digits(), bytes_], [other],
        [pre_tokenizers.Split(Regex(r"\p{N}"), "removed"), bytes_],
    ):  # fmt: skip
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        with pytest.raises(ModelError, match="cuts text in a way that llama.cpp has no name for"):
            through_gguf(tokenizer, tmp_path / "u.gguf")
    with pytest.raises(ModelError, match="they do not belong together"):
        add_tokenizer(GGUFWriter(None, "llama"), make_tokenizer("chatml"), 10, {})


def test_ids_without_a_token_are_padding(tmp_path):
    tokenizer = make_tokenizer("chatml")
    writer = GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, tokenizer, len(tokenizer) + 3, {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "t.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]" and metadata["tokenizer.ggml.token_type"][-1] == 5


# ---- folders ----


def test_saved_tokenizers_open_in_older_transformers_too(tmp_path):
    tokenizer = make_tokenizer("llama3")
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert_same(load_tokenizer(tmp_path), tokenizer)


def test_a_damaged_tokenizer_is_named_and_code_is_never_run(tmp_path):
    assert load_tokenizer(tmp_path) is None
    save_tokenizer(make_tokenizer("chatml"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="a tokenizer_config.json but no tokenizer.json; copy that"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    if not importlib.util.find_spec("sentencepiece"):
        with pytest.raises(ModelError, match="tokenizer.model is read by the package sentencepiece; pip install sentencepiece"):
            load_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.environ['JAXTUNE_RAN_CODE'] = '1'\nclass Tok: pass\n")
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)
    assert "JAXTUNE_RAN_CODE" not in os.environ
