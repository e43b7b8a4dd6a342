"""Rows as questions for a model: what it is asked, and what it should answer."""

from dataclasses import dataclass
from typing import Any

from jaxtune.config import Config
from jaxtune.data.encode import with_system
from jaxtune.data.examples import Chat, Classified, Completion, Labelled, Pair, Prompt
from jaxtune.data.files import Row
from jaxtune.data.masks import open_ids
from jaxtune.data.prepare import held_out, require
from jaxtune.data.templates import Template
from jaxtune.data.tokenizer import run_tokenizer
from jaxtune.errors import DataError


@dataclass(frozen=True)
class Question:
    """One evaluation row.

    Attributes:
        row: its place.
        text: the prompt as the model reads it, with the opening of the answer.
        ids: its token ids, as in training.
        answer: the expected answer; empty for a row that has only a prompt.
        messages: the prompt's turns, None for plain text.
    """

    row: Row
    text: str
    ids: list[int]
    answer: str
    messages: list[dict] | None = None


def questions(config: Config, tokenizer: Any, limit: int | None = None, name: str = "eval") -> list[Question]:
    """The `eval` (or `test`) rows of `config` as questions; in a conversation, the last answer is asked for.

    If `data.eval` is a share of the training rows, these are the rows held out from training. Rows of plain text ask nothing and are
    skipped.

    Raises:
        DataError: there are no evaluation rows, or none of them asks anything.
    """
    require(config, name)
    tokenizer, found = run_tokenizer(config, tokenizer), []
    for row, example in held_out(config, tokenizer, name):
        question = _question(row, example, config, tokenizer)
        if question is not None:
            found.append(question)
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise DataError("no evaluation row has a prompt with an answer, so nothing can be asked; plain text is measured by perplexity")
    return found


def _question(row: Row, example: Any, config: Config, tokenizer: Any) -> Question | None:
    if isinstance(example, Pair):
        example = example.chosen
    if isinstance(example, Labelled | Classified):
        example = example.example
    if isinstance(example, Completion):
        return Question(row, example.prompt, open_ids(tokenizer, example.prompt), example.completion)
    if isinstance(example, Prompt):
        if isinstance(example.prompt, str):
            return Question(row, example.prompt, open_ids(tokenizer, example.prompt), "")
        example = Chat([*example.prompt, {"role": "assistant", "content": ""}], 0, example.tools, example.template_kwargs)
    if not isinstance(example, Chat):
        return None
    chat = with_system(example, config.data.system)
    last = max((n for n, message in enumerate(chat.messages) if message["role"] == "assistant"), default=0)
    if not last:
        return None
    text = Template(tokenizer).render(row, chat, chat.messages[:last], generation=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Question(row, text, ids, chat.messages[last].get("content") or "", chat.messages[:last])
