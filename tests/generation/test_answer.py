import chat
import pytest

from jaxtune.generation.answer import Answer, Reader

TEXT = "Naïve café: 你好 🦊, yes.\n\nThey are three."


@pytest.fixture(scope="module")
def tokenizer():
    return chat.make_tokenizer("chatml")


def _grow(reader, tokens, pieces, step=1):
    """An answer that sees `step` more tokens at a time."""
    answer = Answer(reader, len(tokens), pieces.append)
    for end in [*range(step, len(tokens), step), len(tokens)]:
        answer.update(tokens[:end])
    return answer


def test_text_comes_in_whole_characters(tokenizer):
    tokens, pieces = tokenizer(TEXT)["input_ids"], []
    assert len(tokenizer("🦊")["input_ids"]) > 1
    answer = _grow(Reader(tokenizer, frozenset()), tokens, pieces)
    assert "".join(pieces) == answer.text == TEXT
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 10
    assert answer.finish_reason == "length" and answer.tokens == tokens


def test_a_character_that_stays_incomplete_is_shown_at_the_end(tokenizer):
    tokens, pieces = tokenizer("yes 🦊")["input_ids"][:-1], []
    answer = _grow(Reader(tokenizer, frozenset()), tokens, pieces)
    assert pieces[-1].strip("\ufffd") == "" and "".join(pieces) == answer.text
    assert answer.text.startswith("yes ") and answer.text.endswith("\ufffd")


def test_a_stop_token_ends_the_answer_and_is_not_in_the_text(tokenizer):
    stop = tokenizer("s")["input_ids"][0]  # an ordinary token, which skip_special_tokens would keep
    tokens = tokenizer("yes")["input_ids"][:-1] + [stop]
    answer = _grow(Reader(tokenizer, frozenset({stop})), tokens, [])
    assert answer.finish_reason == "stop" and answer.tokens == tokens and answer.text == tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stop_string_cuts_text_and_tokens(tokenizer, step):
    tokens, pieces = tokenizer(TEXT)["input_ids"], []
    answer = _grow(Reader(tokenizer, frozenset(), ("They", ".\n\nT", "nowhere")), tokens, pieces, step)
    assert "".join(pieces) == answer.text == "Naïve café: 你好 🦊, yes"
    assert answer.finish_reason == "stop"
    assert ".\n\nT" in tokenizer.decode(answer.tokens) and ".\n\nT" not in tokenizer.decode(answer.tokens[:-1])


def test_what_may_be_the_beginning_of_a_stop_string_waits(tokenizer):
    tokens, pieces = tokenizer("one and two")["input_ids"], []
    _grow(Reader(tokenizer, frozenset(), ("and then",)), tokens, pieces)
    assert "".join(pieces) == "one and two"
    assert not any(piece.endswith("a") for piece in pieces) and any("and" in piece for piece in pieces)


def test_nothing_changes_after_the_end(tokenizer):
    tokens, pieces = tokenizer("one. two")["input_ids"], []
    answer = Answer(Reader(tokenizer, frozenset(), (".",)), 2 * len(tokens), pieces.append)
    answer.update(tokens)
    answer.update(tokens + tokens)
    assert (answer.text, answer.finish_reason, pieces) == ("one", "stop", ["one"])
