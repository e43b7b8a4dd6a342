"""From turns to text, and where in that text the assistant speaks.

The tokenizer's own Jinja template is the only template. Each turn is rendered a second time between two markers (characters of Unicode's
private plane 16, which no text contains); the markers' places are the places of the turn's text. The marked text without its markers must
equal the plain text, otherwise the template depends on the content and the row is refused. A turn that cannot carry markers (tool calls, an
empty answer, text that the template rewrites) is found as the difference between the prompt and the prompt with the answer, which must both
be prefixes of the whole.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateSyntaxError

from jaxtune.data.examples import Chat
from jaxtune.data.files import Row, RowError
from jaxtune.data.masks import FLAGS, squeeze
from jaxtune.data.tokenizer import special_ids, special_texts
from jaxtune.errors import DataError

_MARK = re.compile("[\U00100000-\U0010fffd]")
_BASE = 0x100000
_SHOW = "remove the message, or set data.chat_template to a template that shows it"
# Switches in a message for the template, which removes them from the text (SmolLM3, Nemotron).
_SWITCH = re.compile(r"/(?:no_)?think\b")
_PROBE = "ZQX"  # an answer that no template changes
REASONING = ("reasoning_content", "reasoning", "thinking")  # Qwen's, vLLM's, gpt-oss's


@dataclass(frozen=True)
class Turn:
    """Where message `number`'s text is: `text[start:end]` is the content, `text[end:stop]` the token that ends the turn."""

    number: int
    role: str
    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `turns` lists the requested turns."""

    text: str
    turns: list[Turn] = field(default_factory=list)


def refusal(error: Exception) -> str:
    """The template's own message when it cannot render a conversation."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return f"the chat template is not valid Jinja (line {error.lineno}: {reason}). Fetch the tokenizer's files again"
    return f"the chat template refuses the messages: {reason}. Write them as it expects them"


def written(tokenizer: Any, messages: Sequence[Mapping], **keys: Any) -> str:
    """Messages as the text that the tokenizer's template makes of them (`apply_chat_template`)."""
    messages = _in_parts(messages) if wants_parts(tokenizer) else list(messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, **keys)


def wants_parts(tokenizer: Any) -> bool:
    """Whether the template shows `[{"type": "text", "text": ...}]` alone, no plain content: those of LLaVA, Idefics 3 and SmolVLM."""
    plain = [{"role": "user", "content": "word"}]
    for messages in (plain, _in_parts(plain)):
        try:
            if "word" in tokenizer.apply_chat_template(messages, tokenize=False):
                return messages is not plain
        except Exception:  # jinja2's own, or a TypeError inside the template
            continue
    return False


def _in_parts(messages: Sequence[Mapping]) -> list[dict]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else dict(m) for m in messages]


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an assistant's answer; None without a template, such a turn or such a token.

    Found by rendering an answer and taking the first special or added token after it.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = written(tokenizer, turns)
    except Exception:  # jinja2's own, or a TypeError inside the template: it has no such turn
        return None
    after = text[text.rindex(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
    special = special_ids(tokenizer)
    return next((token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in special), None)


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be written as text; use the tokenizer of an instruct "
                "model, or set data.chat_template to a .jinja file"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise DataError(
                f"the tokenizer has the chat templates {', '.join(tokenizer.chat_template)} and none of them is the default; save one of "
                "them as a .jinja file and set data.chat_template to it"
            )
        added = tokenizer.added_tokens_decoder.values()
        self._parts = wants_parts(tokenizer)
        self._asks: str | None = None
        self._special = _any_of(special_texts(tokenizer))
        self._end = re.compile(f"(?:{self._special.pattern})*?{re.escape(tokenizer.eos_token)}") if tokenizer.eos_token else self._special
        self.control = _any_of({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens))

    def render(self, row: Row, chat: Chat, messages: list[dict] | None = None, generation: bool = False) -> str:
        """The text of `messages` (default: all of the chat's), with the opening of an answer if `generation`."""
        turns = [{k: v for k, v in m.items() if k not in FLAGS} for m in (chat.messages if messages is None else messages)]
        turns = _in_parts(turns) if self._parts else turns
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=chat.tools, tokenize=False, add_generation_prompt=generation, **chat.template_kwargs,
            )  # fmt: skip
        except Exception as error:  # jinja2's own, raise_exception() of the template, or a TypeError inside it
            raise row.fail(f"{refusal(error)}, or set data.chat_template to another", "template_refuses") from None

    def whole(self, row: Row, chat: Chat, generation: bool = False) -> str:
        """The text of a chat without locating turns; all of its questions must be in it."""
        text = self.render(row, chat, generation=generation)
        if missing := dropped(chat.messages, text):
            raise row.fail(f"the chat template drops {missing}, or changes its text; {_SHOW}", "template_drops")
        return text

    def locate(self, row: Row, chat: Chat, wanted: set[int]) -> Rendered:
        """The text of a chat, and the places of the turns numbered in `wanted`."""
        text = self.render(row, chat)
        self._shows_tools(row, chat, text)
        self._shows_reasoning(row, chat, text)
        places = self._marked(row, chat, text)
        switched = any(_SWITCH.search(_content(message)) for message in chat.messages)  # markers do not survive in text that is removed
        turns = []
        for number, message in enumerate(chat.messages):
            said = _content(message)
            found = number in places or message["role"] == "assistant" or (switched and _shown(said, squeeze(text)))
            if said and not found:
                missing = f"message {number + 1} ({message['role']})"
                raise row.fail(f"the chat template drops {missing}, or changes its text; {_SHOW}", "template_drops")
            if number not in wanted:
                continue
            start, end = places.get(number, (0, 0))
            faithful = number in places and text[start:end] in (said, said.strip()) and not message.get("tool_calls")
            if message["role"] == "assistant" and not (faithful and text.endswith(self._opening(row, chat), 0, start)):
                turns.append(self._difference(row, chat, text, number, (start, end) if faithful else None))
            elif faithful:
                turns.append(Turn(number, message["role"], start, end, self._stop(text, end)))
            else:
                raise row.fail(
                    f"the chat template rewrites message {number + 1} ({message['role']}), which is trained", "template_rewrites"
                )
        return Rendered(text, turns)

    def _shows_tools(self, row: Row, chat: Chat, text: str) -> None:
        """Raise if a tool, or a tool call, is missing from the text: many templates silently ignore tools."""
        offered = [tool.get("function", tool) for tool in chat.tools or [] if isinstance(tool, dict)]
        called = [call["function"] for message in chat.messages for call in message.get("tool_calls") or []]
        silent = replace(chat, messages=[{key: m[key] for key in m if key != "tool_calls"} for m in chat.messages])
        for what, functions, without in (("tool", offered, replace(chat, tools=None)), ("call of the tool", called, silent)):
            missing = [f["name"] for f in functions if isinstance(f.get("name"), str) and f["name"] not in text]
            if not missing and functions and self._alike(row, without, text):  # the names occur by chance
                missing = [functions[0].get("name")]
            if missing:
                raise row.fail(
                    f"the chat template drops the {what} {missing[0]!r}; set data.chat_template to a template that knows tools, or leave "
                    "such rows out",
                    "template_drops",
                )

    def _shows_reasoning(self, row: Row, chat: Chat, text: str) -> None:
        """Raise if the reasoning before the last answer is missing from the text. Templates omit earlier reasoning on purpose."""
        for key in REASONING:
            thought = chat.messages[-1].get(key)
            if isinstance(thought, str) and squeeze(thought) not in squeeze(text):
                raise row.fail(
                    f"the chat template drops the {key!r} of the last message; remove it, or set data.chat_template to a template that "
                    "shows it",
                    "template_drops",
                )

    def _alike(self, row: Row, chat: Chat, text: str) -> bool:
        try:
            return self.render(row, chat) == text
        except RowError:  # the template needs what was removed
            return False

    def _opening(self, row: Row, chat: Chat) -> str:
        """What the template writes before an answer when asked for one; empty if nothing. Computed once, as an optimisation."""
        if self._asks is None:
            first = next(n for n, m in enumerate(chat.messages) if m["role"] == "assistant")
            prompt = chat.messages[: max(first, 1)]
            without, asking = self.render(row, chat, prompt), self.render(row, chat, prompt, generation=True)
            self._asks = asking[len(without) :] if asking.startswith(without) else ""
        return self._asks

    def _marked(self, row: Row, chat: Chat, text: str) -> dict[int, tuple[int, int]]:
        """Start and end of each turn's content in `text`, for the turns whose two markers survived."""
        if any(_MARK.search(_content(message)) for message in chat.messages):
            raise row.fail("the text holds characters of Unicode's private plane 16, which jaxtune uses as markers; remove them")
        # A template may strip its input: markers then go inside the white space, tried first for every role but the assistant.
        for inside in (lambda role: False, lambda role: role != "assistant", lambda role: True):
            marked = [
                {**m, "content": _mark(n, m["content"], inside(m["role"]))} if _content(m) else m for n, m in enumerate(chat.messages)
            ]
            rendered = self.render(row, chat, marked)
            if _MARK.sub("", rendered) == text:
                break
        else:
            return {}
        found: dict[int, int] = {}
        for passed, match in enumerate(_MARK.finditer(rendered)):
            # setdefault: if a template repeats a turn (the first user turn as a title, for example), the first place counts
            found.setdefault(ord(match.group()) - _BASE, match.start() - passed)
        return {n: (found[2 * n], found[2 * n + 1]) for n in range(len(chat.messages)) if 2 * n in found and 2 * n + 1 in found}

    def _difference(self, row: Row, chat: Chat, text: str, number: int, content: tuple[int, int] | None) -> Turn:
        """Find the turn between the text of the prompt before it and the text that ends with it."""
        prompt = self.render(row, chat, chat.messages[:number], generation=True)
        upto = self.render(row, chat, chat.messages[: number + 1])
        if content and not (text.startswith(prompt) and len(prompt) <= content[0]):
            return Turn(number, "assistant", *content, self._stop(text, content[1]))
        if content:  # the template writes something of its own before the answer, which the model will have to write too
            return Turn(number, "assistant", len(prompt), content[1], self._stop(text, content[1]))
        if not (text.startswith(prompt) and text.startswith(upto)):
            if shorter := self._without_thought(row, chat, text, number, upto):
                return shorter
            raise row.fail(
                f"the chat template rewrites message {number + 1} (assistant) when later messages follow, so what would be trained is not "
                "what was said; use train_on: last, or one row per answer",
                "template_rewrites",
            )
        if squeeze(_content(chat.messages[number])) not in squeeze(text[len(prompt) : len(upto)]):
            raise row.fail(
                f"the chat template rewrites message {number + 1} (assistant): what would be trained differs from the row",
                "template_rewrites",
            )
        last = max(self._special.finditer(text, len(prompt), len(upto)), key=re.Match.start, default=None)
        end = len(prompt) + len(text[len(prompt) : len(upto)].rstrip())
        if last is not None and not text[last.end() : len(upto)].strip():
            return Turn(number, "assistant", len(prompt), last.start(), last.end())
        return Turn(number, "assistant", len(prompt), end, end)

    def _without_thought(self, row: Row, chat: Chat, text: str, number: int, upto: str) -> Turn | None:
        """A turn that has more in front while it is the last one, an empty thought say (Qwen 3's calls): what both texts end it with."""
        before = self.render(row, chat, chat.messages[:number])
        last = max(self._special.finditer(upto, len(before)), key=re.Match.start, default=None)
        at = text.find(last.group(), len(before)) if last and text.startswith(before) else -1
        if last is None or at < 0 or upto[last.end() :].strip():
            return None
        start = at - len(os.path.commonprefix([upto[: last.start()][::-1], text[:at][::-1]]))
        start = at - len(text[start:at].lstrip())
        message = chat.messages[number]
        said = [_content(message), *(call["function"]["name"] for call in message.get("tool_calls") or [])]
        if start <= len(before) or not all(squeeze(part) in squeeze(text[start:at]) for part in said):
            return None
        return Turn(number, "assistant", start, at, at + len(last.group()))

    def _stop(self, text: str, end: int) -> int:
        """Where the token that ends a turn ends, of several in a row the tokenizer's EOS (Command R7B); `end` if there is none."""
        match = self._end.match(text, end) or self._special.match(text, end)
        return match.end() if match else end


def dropped(messages: Sequence[Mapping], text: str) -> str | None:
    """`message N (role)`, the first whose words are missing from a template's text; reasoning may be missing from answers."""
    seen = squeeze(text)
    for number, message in enumerate(messages, 1):
        said = message.get("content")
        if message.get("role") in ("system", "developer", "user") and isinstance(said, str) and not _shown(said, seen):
            return f"message {number} ({message['role']})"
    return None


def _shown(said: str, seen: str) -> bool:
    """Whether a message's words, without its switches, are in a text without spaces."""
    return squeeze(_SWITCH.sub("", said)) in seen


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _content(message: dict) -> str:
    return message.get("content") or ""


def _mark(number: int, content: str, inside: bool) -> str:
    before, after = chr(_BASE + 2 * number), chr(_BASE + 2 * number + 1)
    if not inside:
        return before + content + after
    core = content.strip()
    at = content.index(core) if core else len(content)
    return content[:at] + before + core + after + content[at + len(core) :]
