"""What may be wrong with rows, and what to do about it."""

import difflib

from jaxtune.config import Config
from jaxtune.errors import ConfigError

# problem -> what to do unless `data.quality` says otherwise: drop the row, keep it (and count it), or stop with an error
DEFAULTS = {
    "double_bos": "error",
    "stop_token_untrained": "error",
    "chosen_equals_rejected": "keep",
    "prompts_differ": "error",
    "no_prompt": "keep",
    "empty_answer": "keep",
}


def policies(config: Config) -> dict[str, str]:
    """What to do about each problem."""
    for name, policy in config.data.quality:
        if name not in DEFAULTS:
            near = difflib.get_close_matches(name, DEFAULTS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DEFAULTS)}"
            raise ConfigError(f"data.quality.{name}: {policy} names no problem that is looked for; {hint}")
    return DEFAULTS | dict(config.data.quality)
