"""The few things a row can mean."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """Plain text; everything is trained."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A plain-text prompt and completion; the completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Turns for the tokenizer's chat template.

    Attributes:
        messages: `{"role", "content", ...}`, as the template expects them.
        start: messages before this one are the prompt.
        tools: JSON schemas for the template, or None.
        template_kwargs: further variables for the template.
    """

    messages: list[dict]
    start: int = 0
    tools: list | None = None
    template_kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Segments:
    """Plain text in pieces, each trained or not."""

    parts: list[tuple[str, bool]]


@dataclass(frozen=True)
class Tokens:
    """Token ids, used as given, and which of them are trained as targets."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first one better, by `margin` if the row gives one."""

    chosen: Completion | Chat
    rejected: Completion | Chat
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """An answer that is good (1) or not (0)."""

    example: Completion | Chat
    label: int


@dataclass(frozen=True)
class Classified:
    """A text with its target: a class by number or name, a number, or several of them."""

    example: Chat | Text
    label: int | float | str | list


@dataclass(frozen=True)
class Steps:
    """An answer in steps, each correct or not."""

    prompt: str
    steps: list[str]
    labels: list[bool]


@dataclass(frozen=True)
class Prompt:
    """A prompt alone: a string, or messages that end before the answer."""

    prompt: str | list[dict]
    tools: list | None = None
    template_kwargs: dict = field(default_factory=dict)


Example = Text | Completion | Chat | Segments | Tokens | Pair | Labelled | Classified | Steps | Prompt
