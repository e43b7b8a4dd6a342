"""Law 7: decoded, the trained tokens are what a person would underline, for every format, mask mode and template."""

import pytest
from chat import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from jaxtune.data.masks import open_ids
from jaxtune.errors import DataError

STOP = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
TRIMS = {"chatml": False, "llama3": True, "gemma": True}
FAMILIES = sorted(STOP)
MODES = ["completion", "assistant", "last", "all"]

WORDS = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Co"), blacklist_characters="<>|"), min_size=1, max_size=12)
# Ends in white space, as people's text does; does not begin with it (a header's newline may merge with it: see the seam test).
SAID = st.builds(
    lambda words, end: " ".join(words).lstrip() + end, st.lists(WORDS, min_size=1, max_size=5), st.sampled_from(["", " ", "\n"])
)
SAID = SAID.filter(lambda text: text.strip() and text[0] == text.lstrip()[0])


@st.composite
def conversations(draw):
    """Alternating turns, with or without a system turn."""
    turns = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(SAID)})
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(SAID)}, {"role": "assistant", "content": draw(SAID)}]
    return turns


def expected(family, turns, numbers, eos=True):
    """What a person would underline."""
    said = [turns[n]["content"].strip() if TRIMS[family] else turns[n]["content"] for n in numbers]
    return "".join(text + STOP[family] * eos for text in said)


def as_sharegpt(turns):
    return {
        "conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in turns]
    }


def as_prompt_completion(turns):
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def as_alpaca(turns):
    said = [t["content"] for t in turns if t["role"] != "system"]
    row = {"instruction": said[-2], "output": said[-1], "history": [list(pair) for pair in zip(said[:-2:2], said[1:-2:2], strict=True)]}
    return row | ({"system": turns[0]["content"]} if turns[0]["role"] == "system" else {})


# format: how a conversation is written in it, and which answers `completion` trains
CHATS = {
    "messages": (lambda turns: {"messages": turns}, lambda answers: answers),
    "sharegpt": (as_sharegpt, lambda answers: answers),
    "prompt_completion": (as_prompt_completion, lambda answers: answers[-1:]),
    "alpaca": (as_alpaca, lambda answers: answers[-1:]),
}


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", CHATS)
@settings(max_examples=15, deadline=None)
@given(turns=conversations())
def test_chat(underlined, tokenizers, form, mode, family, eos, turns):
    write, completion = CHATS[form]
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    tokenizer = tokenizers[family]
    got = underlined(tokenizer, write(turns), train_on=mode, train_on_eos=eos)
    if mode == "all":
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        first = tokenizer.decode(tokenizer(whole, add_special_tokens=False)["input_ids"][:1])
        assert first + got == whole
    else:
        numbers = {"completion": completion(answers), "assistant": answers, "last": answers[-1:]}[mode]
        assert got == expected(family, turns, numbers, eos)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(turns=conversations(), data=st.data())
def test_train_flags_beat_the_mode(underlined, tokenizers, family, turns, data):
    flags = data.draw(st.lists(st.sampled_from([None, True, False]), min_size=len(turns), max_size=len(turns)))
    if not any(flags):
        flags[-1] = True
    key = data.draw(st.sampled_from(["train", "training", "weight"]))
    marked = [
        turn | ({} if flag is None else {key: int(flag) if key == "weight" else flag}) for turn, flag in zip(turns, flags, strict=True)
    ]
    numbers = [n for n, flag in enumerate(flags) if (turns[n]["role"] == "assistant" if flag is None else flag)]
    if family == "gemma" and turns[0]["role"] == "system" and numbers[0] == 0:
        return  # the template writes the system text into the user's turn, so it has no stop token
    assert underlined(tokenizers[family], {"messages": marked}) == expected(family, turns, numbers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["completion", "assistant", "last", "all"])
@settings(max_examples=25, deadline=None)
@given(prompt=SAID, completion=SAID)
def test_plain(encode, tokenizers, family, mode, prompt, completion):
    tokenizer = tokenizers[family]
    ids, mask = encode(tokenizer, {"prompt": prompt + "\n\n", "completion": completion}, train_on=mode)
    assert ids == tokenizer(prompt + "\n\n" + completion)["input_ids"] + [tokenizer.eos_token_id]
    if mode == "all":
        assert mask.tolist() == [0] + [1] * (len(ids) - 1)
    else:
        assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == completion + STOP[family]


@pytest.mark.parametrize("family", ["llama3", "gemma"])
@settings(max_examples=25, deadline=None)
@given(text=SAID)
def test_text(underlined, tokenizers, family, text):
    assert underlined(tokenizers[family], {"text": text}) == text + STOP[family]


def ends_texts(tokenizer):
    """The tokenizer, appending EOS to every text (`add_eos_token`)."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("eos", [True, False])
def test_a_tokenizer_that_ends_every_text(encode, eos):
    tokenizer, wanted = ends_texts(make_tokenizer("llama3")), " there<|eot_id|>"
    ids, mask = encode(tokenizer, {"prompt": "hello", "completion": " there"}, add_eos=eos)
    assert ids == tokenizer("hello there")["input_ids"][: None if eos else -1] == [*open_ids(tokenizer, "hello there"), ids[-1]][: len(ids)]
    assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == wanted[: None if eos else -len("<|eot_id|>")]


@pytest.mark.parametrize("mode", ["assistant", "last"])
def test_text_has_no_turns(encode, tokenizers, mode):
    with pytest.raises(DataError, match=f"no turns, so train_on: {mode} trains nothing"):
        encode(tokenizers["chatml"], {"text": "hello"}, train_on=mode)


def test_a_token_over_the_seam_belongs_to_the_completion(encode, tokenizers):
    """The vocabulary contains `ello` and ` there`; the prompt ends inside one of them."""
    tokenizer = tokenizers["chatml"]
    ids, mask = encode(tokenizer, {"prompt": "hello th", "completion": "ere!"})
    assert ids[:-1] == tokenizer("hello there!")["input_ids"], "tokenised once, as it will be read"
    assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == " there!<|im_end|>"


def test_header_that_merges_with_the_answer(underlined, tokenizers):
    """ChatML's newline and one at the beginning of the answer are one token, which is trained."""
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "\n\nYes"}]
    assert underlined(tokenizers["chatml"], {"messages": turns}).lstrip("\n") == "Yes<|im_end|>"


def test_segments(underlined, tokenizers):
    parts = [("One and", False), (" two", True), (" are", False), (" three.<|im_end|>", True)]
    row = {"segments": [{"label": label, "text": text} for text, label in parts]}
    assert underlined(tokenizers["chatml"], row) == " two three.<|im_end|>"


def test_tokens_of_padding_are_left_out(encode, tokenizers):
    ids, mask = encode(tokenizers["chatml"], {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0]})
    assert ids == [5, 6, 7] and mask.tolist() == [0, 1, 1]


def test_tokens_are_used_as_they_are(encode, tokenizers):
    tokenizer = tokenizers["llama3"]
    ids = tokenizer("hello there")["input_ids"]
    got, mask = encode(tokenizer, {"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    assert got == ids and mask.tolist() == [0, 0] + [1] * (len(ids) - 2)
    with pytest.raises(DataError, match="token id 9999 is not in the tokenizer"):
        encode(tokenizer, {"input_ids": [1, 9999]})
    with pytest.raises(DataError, match="'labels' must be as long as 'input_ids', 2"):
        encode(tokenizer, {"input_ids": [1, 2], "labels": [1]})
