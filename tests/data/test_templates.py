"""Templates that do more than write the turns."""

import pytest

from jaxtune.config import load_config
from jaxtune.data.encode import Encoder
from jaxtune.data.files import Row
from jaxtune.data.formats import parse
from jaxtune.data.ledger import Ledger
from jaxtune.data.templates import written
from jaxtune.errors import DataError

TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As in Qwen3: reasoning is removed from every answer but the last, which gets an empty one if it has none.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' if '</think>' not in m.content }}"
    "{{ m.content }}{% else %}{{ said }}{% endif %}{{ '<|im_end|>\\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
TURNS = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
NO_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK
NO_STOP = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SWITCHED = "{% for m in messages %}" + TURN.replace("m.content", "m.content.replace('/no_think', '').rstrip()") + "{% endfor %}" + ASK
LAST_ONLY = "{% for m in messages[-2:] %}" + TURN + "{% endfor %}" + ASK
UPPER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | upper + '<|im_end|>\\n' }}{% endfor %}" + ASK
TOOLS = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)

PARTS = TURNS.replace("m.content", "(m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(''))")  # SmolVLM


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


@pytest.fixture
def templated(tokenizer_with):
    return lambda template: tokenizer_with("chatml", template)


def test_thinking_that_is_stripped_from_an_earlier_answer_is_refused(encode, templated):
    with pytest.raises(DataError, match=r"rewrites message 2 \(assistant\) when later messages follow.*train_on: last"):
        encode(templated(THINKING), chat("One", "<think>\nhm\n</think>\n\nTwo", "Three", "Four"))


def test_thinking_of_the_last_answer_is_trained(underlined, templated):
    row = chat("One", "<think>\nhm\n</think>\n\nTwo", "Three", "<think>\nyes\n</think>\n\nFour")
    assert underlined(templated(THINKING), row, train_on="last") == "<think>\nyes\n</think>\n\nFour<|im_end|>"


def test_what_the_template_writes_before_the_answer_is_trained_since_the_model_must_write_it(underlined, templated):
    assert underlined(templated(THINKING), chat("One", "Two")) == "<think>\n\n</think>\n\nTwo<|im_end|>"


def test_a_template_of_parts(encode, underlined, templated):
    """LLaVA's, Idefics 3's and SmolVLM's write nothing for a plain text."""
    row, tokenizer = chat("One", "Two", "Three", "Four"), templated(PARTS)
    assert underlined(tokenizer, row) == "Two<|im_end|>Four<|im_end|>"
    ids, _ = encode(tokenizer, row)
    assert ids == encode(templated(TURNS), row)[0]
    turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in row["messages"]]
    assert encode(tokenizer, {"messages": turns})[0] == ids
    assert written(tokenizer, row["messages"]) == tokenizer.decode(ids)


def test_a_system_turn_that_is_dropped_is_refused(encode, templated):
    with pytest.raises(DataError, match=r"row 1: the chat template drops message 1 \(system\)"):
        encode(templated(NO_SYSTEM), chat("One", "Two", system="Be brief"))


@pytest.mark.parametrize("system", ["/no_think", "Be brief. /no_think"])
def test_a_switch_that_the_template_takes_out_is_no_dropped_turn(underlined, encode, templated, system):
    assert underlined(templated(SWITCHED), chat("One", "Two", system=system)) == "Two<|im_end|>"
    with pytest.raises(DataError, match=r"drops message 1 \(system\)"):
        encode(templated(NO_SYSTEM), chat("One", "Two", system=f"Be brief. {system}"))


def test_turns_that_are_dropped_are_refused(encode, templated):
    with pytest.raises(DataError, match=r"drops message 1 \(user\)|rewrites message 2"):
        encode(templated(LAST_ONLY), chat("One", "Two", "Three", "Four"))


def test_text_that_is_changed_is_refused(encode, templated):
    with pytest.raises(DataError, match="row 1: the chat template (drops|rewrites) message"):
        encode(templated(UPPER), chat("One", "Two"))


def test_a_stop_token_that_is_not_there_is_refused_unless_kept(encode, templated):
    with pytest.raises(DataError, match="follows message 2 .*would not learn to stop"):
        encode(templated(NO_STOP), chat("One", "Two"))
    config = load_config({"model": "none", "output_dir": "none", "data": {"train": "none"}})
    ledger = Ledger("rows").by({"stop_token_untrained": "keep"})
    row = Row("rows", 7, "row", chat("One", "Two"))
    assert len(list(Encoder(config, templated(NO_STOP), ledger).encode([(row, parse(row, None))]))) == 1
    assert ledger.problems == {"stop_token_untrained": [7]}


def test_tool_calls_are_trained_whole(encode, underlined, templated):
    call = {"name": "add", "arguments": {"a": 1}}
    said = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    turns = [
        {"role": "user", "content": "One"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "type": "function", "function": call | {"arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "It is one."},
    ]
    row = {"messages": turns, "tools": '[{"type": "function", "function": {"name": "add"}}]'}
    assert underlined(templated(TOOLS), row) == said + "It is one.<|im_end|>"
    sharegpt = {"conversations": [
        {"from": "human", "value": "One"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "It is one."},
    ], "tools": row["tools"]}  # fmt: skip
    assert encode(templated(TOOLS), sharegpt)[0] == encode(templated(TOOLS), row)[0]
    assert underlined(templated(TOOLS), row, train_on="last") == "It is one.<|im_end|>"


def test_a_call_that_loses_its_empty_thought_once_others_follow(encode, underlined, templated):
    """As in Qwen 3."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"messages": [*turns, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "It is one."}]}
    thought = "('<think>\\n\\n</think>\\n\\n' if loop.last and m.role == 'assistant' else '')"
    said = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|><think>\n\n</think>\n\nIt is one.<|im_end|>'
    assert underlined(templated(TOOLS.replace("+ m.content", f"+ {thought} + m.content")), row) == said
    with pytest.raises(DataError, match="rewrites message 2"):  # what is lost is not before it
        encode(templated(TOOLS.replace("'</tool_call>'", "('.' if m == messages[-1] else '') + '</tool_call>'")), row)


def test_a_turn_that_ends_with_two_tokens_is_trained_to_the_eos(underlined, templated):
    """Command R7B's."""
    assert underlined(templated(TURNS.replace("<|im_end|>", "<|endoftext|><|im_end|>")), chat("One", "Two")) == "Two<|endoftext|><|im_end|>"


def test_an_empty_answer_is_its_stop_token_and_is_counted(underlined, templated, tokenizers):
    assert underlined(tokenizers["chatml"], chat("One", "")) == "<|im_end|>"


def test_system_from_the_config(encode, tokenizers):
    ids, mask = encode(tokenizers["chatml"], chat("One", "Two"), system="Be brief")
    text = tokenizers["chatml"].decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user") and mask[0] == 0
    assert "SmolLM" not in text
    ids, _ = encode(tokenizers["chatml"], chat("One", "Two", system="Mine"), system="Be brief")
    assert "Be brief" not in tokenizers["chatml"].decode(ids)


def test_text_with_the_markers_own_characters_is_refused(encode, tokenizers):
    with pytest.raises(DataError, match="private plane 16"):
        encode(tokenizers["chatml"], chat("One", "Two \U00100001"))
