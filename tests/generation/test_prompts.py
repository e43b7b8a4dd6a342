import types

import chat
import numpy as np
import pytest

from jaxtune.errors import DataError, ModelError
from jaxtune.generation.prompts import end_of_turn, is_one_prompt, stop_tokens, token_ids

TURN = [{"role": "user", "content": "hello there"}]
SPACED = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} \n<|im_end|>\n{% endfor %}"  # as Llama 2: white space before the end
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
REFUSING = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no answers here') }}{% endif %}" + PLAIN


def _model(family="chatml", template=None, **files):
    tokenizer = chat.make_tokenizer(family, template)
    files = {"generation_config": {}, "hf_config": {}, "source": "some/model"} | files
    return types.SimpleNamespace(tokenizer=tokenizer, config=types.SimpleNamespace(vocab_size=len(tokenizer)), **files)


@pytest.mark.parametrize("family, token", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_end_of_turn_is_read_off_the_template(family, token):
    tokenizer = chat.make_tokenizer(family)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_end_of_turn_may_stand_after_white_space():
    tokenizer = chat.make_tokenizer("chatml", SPACED)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", [PLAIN, REFUSING, "{% if messages[1:] %}{{ 1 / 0 }}{% endif %}" + PLAIN])
def test_a_template_may_have_no_end_of_turn(template):
    assert end_of_turn(chat.make_tokenizer("chatml", template)) is None


def test_no_template_has_no_end_of_turn():
    tokenizer = chat.make_tokenizer("chatml")
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize("named, numbers", [(7, {7}), ([7, 8], {7, 8}), (None, set())])
def test_stop_tokens_come_from_every_file_and_the_template(named, numbers):
    model = _model("gemma", generation_config={"eos_token_id": named}, hf_config={"eos_token_id": [9]})
    model.tokenizer.eos_token = "<eos>"
    wanted = {model.tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<end_of_turn>")}
    assert stop_tokens(model) == numbers | {9} | wanted


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_a_conversation_is_what_the_template_writes(family):
    model = _model(family)
    expected = model.tokenizer.apply_chat_template(TURN, add_generation_prompt=True, return_dict=False)
    assert token_ids(model, TURN, "prompt") == expected
    assert token_ids(model, "hello there", "prompt") == expected  # a text is the user's turn
    assert token_ids(model, "hello there", "prompt", chat=True) == expected
    assert family == "chatml" or expected.count(model.tokenizer.bos_token_id) == 1


def test_a_text_may_stay_as_it_is():
    model = _model("llama3")
    ids = token_ids(model, "hello there", "prompt", chat=False)
    assert ids[0] == model.tokenizer.bos_token_id and model.tokenizer.decode(ids[1:]) == "hello there"
    model.tokenizer.chat_template = None
    assert token_ids(model, "hello there", "prompt") == ids


def test_token_ids_of_any_integer_kind():
    assert token_ids(_model(), [3, np.int32(4)], "prompt") == [3, 4]
    assert token_ids(_model(), (5,), "prompt") == [5]


def test_one_prompt_is_told_from_several():
    assert is_one_prompt("hello") and is_one_prompt(TURN) and is_one_prompt([1, 2])
    assert not is_one_prompt([]) and not is_one_prompt(["hello"]) and not is_one_prompt([TURN]) and not is_one_prompt([[1, 2]])


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "prompt 2 is empty"),
        (" \n", "prompt 2 is empty"),
        ([], "prompt 2 is empty; a prompt is a text"),
        (5, "prompt 2 is of type int; a prompt is a text"),
        ([3, 1_000_000], "prompt 2 holds 1000000, which is no token id of this model; ids go from 0 to"),
        ([3, -1], "prompt 2 holds -1"),
        ([3, "a"], "prompt 2 holds 'a'"),
        ([True], "prompt 2 holds True"),
    ],
)
def test_prompts_that_cannot_be_used(prompt, message):
    with pytest.raises(DataError, match=message):
        token_ids(_model(), prompt, "prompt 2")


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", "hello"])
def test_a_template_that_drops_a_message(template):
    with pytest.raises(DataError, match=r"prompt 2: the chat template drops message 1 \(system\)"):
        token_ids(_model(template=template), [{"role": "system", "content": "be brief"}, *TURN], "prompt 2")


def test_a_switch_that_the_template_takes_out():
    template = "{% for m in messages %}{{ m.content.replace('/no_think', '') }}{% endfor %}"
    assert token_ids(_model(template=template), [{"role": "system", "content": "be brief /no_think"}, *TURN], "prompt 2")


def test_a_template_that_refuses_the_messages():
    with pytest.raises(DataError, match="prompt 2: the chat template refuses the messages: no answers here"):
        token_ids(_model(template=REFUSING), [*TURN, {"role": "assistant", "content": "yes"}], "prompt 2")


@pytest.mark.parametrize("prompt, chat_wanted", [(TURN, None), ("hello", True)])
def test_messages_need_a_template(prompt, chat_wanted):
    model = _model()
    model.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="tokenizer of some/model has no chat template .* chat=False"):
        token_ids(model, prompt, "prompt 2", chat_wanted)
