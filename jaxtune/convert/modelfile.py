"""An Ollama Modelfile: the GGUF file, the chat template in Go's language, the stop tokens.

Ollama does not run Jinja. What a template writes around each kind of turn is found by rendering a probe, translated to Go, and verified by
rendering whole conversations both ways; for a template that does more, no TEMPLATE is written.
"""

import json
from typing import Any, NamedTuple

from jaxtune.data.templates import written

ROLES = ("system", "user", "assistant")


class Turns(NamedTuple):
    """The text before and after the content of each role's turn, the opening of the answer, and the default for a missing system turn."""

    begin: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    no_system: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The Go template's rendering of a conversation, with the answer opened."""
        start = self.begin + ("" if messages[0]["role"] == "system" else self.no_system)
        turns = [(getattr(self, message["role"]), message["content"]) for message in messages]
        return start + "".join(before + content + after for (before, after), content in turns) + self.opening

    def go(self, begin: str) -> str:
        """The same as a Go template, as Ollama runs it over `.Messages`."""
        contents = {role: "{{ .Content }}".join(getattr(self, role)) for role in ROLES}
        turns = [f'{{{{ if eq .Role "{role}" }}}}{content}{{{{ end }}}}' for role, content in contents.items()]
        default = f"{{{{ if not .System }}}}{self.no_system}{{{{ end }}}}" if self.no_system else ""
        return f"{begin}{default}{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{self.opening}"


def modelfile(gguf_name: str, tokenizer: Any, stop: list[str], context: int) -> str:
    """The text of a Modelfile beside `gguf_name`; `stop` are the texts that end an answer."""
    lines = [f"FROM ./{gguf_name}"]
    turns = find_turns(tokenizer)
    if turns is not None:
        adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # then llama.cpp writes it, before the template
        lines.append(f'TEMPLATE """{turns.go("" if adds_bos else turns.begin)}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template does more than a TEMPLATE can say; Ollama takes the one in the GGUF file.")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop]
    lines.append(f"PARAMETER num_ctx {min(context, 8192)}")
    return "\n".join(lines) + "\n"


def find_turns(tokenizer: Any) -> Turns | None:
    """The turns of a chat template, or None if it cannot be expressed this way (or there is none)."""
    if not tokenizer.chat_template:
        return None
    try:
        turns = _probe(tokenizer)
        same = all(_render(tokenizer, talk, True) == turns.render(talk) for talk in _talks("One?", "Two.", "Three."))
    except Exception:  # a template may refuse a conversation (with a system turn, for example) with any exception
        return None
    text = str(turns)
    return turns if same and '"""' not in text and "{{" not in text else None


def _talks(*contents: str) -> list[list[dict[str, str]]]:
    """Conversations with and without a system turn, of one question and of three."""
    user, assistant, system = contents
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}] * 2 + [{"role": "user", "content": user}]
    start = [{"role": "system", "content": system}]
    return [turns[:1], turns, start + turns[:1], start + turns]


def _render(tokenizer: Any, messages: list[dict[str, str]], opened: bool) -> str:
    return written(tokenizer, messages, add_generation_prompt=opened)


def _probe(tokenizer: Any) -> Turns:
    """Cut rendered conversations at their contents: the texts between are the ends and beginnings of turns."""
    alone, _, _, talk = _talks("\x02u\x03", "\x02a\x03", "\x02s\x03")
    plain = _render(tokenizer, talk, False)
    opening = _render(tokenizer, talk, True).removeprefix(plain)
    pieces = [plain]
    for message in talk:
        pieces[-1:] = pieces[-1].split(message["content"], 1)
    first, after_system, after_user, after_assistant = pieces[:4]
    end = pieces[-1]  # what ends the last turn, a user's, ends every user's
    ends_alike = after_system.startswith(end) and after_assistant.startswith(end)
    user = after_system[len(end) :] if ends_alike else _common_ending(after_system, after_assistant)
    bos = tokenizer.bos_token or ""
    begin = bos if first.startswith(bos) and not user.startswith(bos) else ""  # SmolLM's BOS is the opening of every turn
    start = _render(tokenizer, alone, False).split(alone[0]["content"])[0]
    return Turns(
        begin=begin,
        system=(first.removeprefix(begin), after_system.removesuffix(user)),
        user=(user, end),
        assistant=(after_user.removeprefix(end), after_assistant.removesuffix(user)),
        opening=opening,
        no_system=start.removeprefix(begin).removesuffix(user),
    )


def _common_ending(a: str, b: str) -> str:
    count = 0
    while count < min(len(a), len(b)) and a[-count - 1] == b[-count - 1]:
        count += 1
    return a[len(a) - count :]
