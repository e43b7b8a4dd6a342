"""What the commands share: `jaxtune VERB`, argument parsing, and callable modules."""

import argparse
import difflib
import importlib.metadata
import inspect
import logging
import re
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

import jaxtune
from jaxtune import errors

VERBS = {
    "train": "fine-tune a model as a config says",
    "sweep": "one run for each combination of values, and a comparison",
    "evaluate": "perplexity and task metrics of base and tuned model",
    "generate": "sample from a model, with or without an adapter",
    "serve": "serve a model over HTTP, base and tuned, for any OpenAI client",
    "score": "score texts with a reward model or classifier",
    "export": "write a run's result as HF, PEFT or GGUF files",
    "data": "show what the model will see: counts, lengths, masks, problems",
    "report": "compare runs: their settings, losses and metrics",
    "plan": "whether a run fits in memory, and what takes the memory",
}


def callable_module(name: str, function: Callable) -> None:
    """Make the module `name` callable as `function`, so that `jt.generate` is both the module and the verb.

    `import jaxtune.generate` binds the module to `jaxtune.generate` and would hide a function of that name. With a callable module, the
    name works either way.
    """

    class CallableModule(types.ModuleType):
        def __call__(self, *args, **kwargs):
            return function(*args, **kwargs)

    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The help text with its default, unless the default is empty."""
        return action.help if action.default in (None, False, [], {}) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's error; for a config key written as an option, it says how to write it."""
        if message.startswith("unrecognized arguments: --") and any(action.dest == "overrides" for action in self._actions):
            key = re.split(r"[ =]", message.partition("--")[2])[0]
            message += f"; keys of the config are written without dashes: {key}=VALUE"
        super().error(message)


def parser(verb: str, description: str | None = None) -> argparse.ArgumentParser:
    """An argument parser for one verb, described by its module docstring."""
    return _Parser(
        prog=f"jaxtune {verb}", description=description or VERBS[verb], formatter_class=_Help, allow_abbrev=False
    )


def config_parser(verb: str, description: str | None = None) -> argparse.ArgumentParser:
    """A parser for `CONFIG.yaml [key=value ...]`: `config` (str) and `overrides` (list of str)."""
    result = parser(verb, description)
    result.add_argument("config", metavar="CONFIG.yaml", help="the config file")
    result.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides, nested keys with dots: lora.r=32")
    return result


def parse(the_parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments; `key=value` may stand before, between or after the options (plain argparse accepts them only together)."""
    return the_parser.parse_intermixed_args(argv)


class _Columns(argparse.Action):
    """`OURS=THEIRS ...` as a dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        pairs = [pair.partition("=") for pair in values]
        if wrong := [ours for ours, _, theirs in pairs if not ours or not theirs]:
            raise errors.ConfigError(f"--columns {wrong[0]}: write OURS=THEIRS, for example prompt=question")
        setattr(namespace, self.dest, {ours: theirs for ours, _, theirs in pairs})


def add_columns(the_parser: argparse.ArgumentParser) -> None:
    """`--columns prompt=question completion=answer`: the config's `data.columns`, as a dict."""
    names = "the names of the file's own fields: prompt=question"
    the_parser.add_argument("--columns", nargs="+", action=_Columns, default={}, metavar="OURS=THEIRS", help=names)


def print_table(console: Console, table: Table) -> None:
    """Print a table in full and as it is: a narrow terminal wraps its lines but shows every number; [a.jsonl] is no markup."""
    width = console.width
    console.width = max(width, console.measure(table, options=console.options.update(width=1000, markup=False)).maximum)
    console.print(table, markup=False)
    console.width = width


def log_to_terminal() -> None:
    """Print jaxtune's log on stderr. Orbax's threads log every exception with a traceback before raising it; that log is silenced."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logger, handler = logging.getLogger("jaxtune"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return f"usage: jaxtune VERB ...\n\n{verbs}\n\nSee jaxtune VERB --help. jaxtune VERB is the same as python -m jaxtune.VERB"


def _dispatch() -> int | None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(_usage())
        return None
    verb = sys.argv[1]
    if verb in ("-V", "--version", "version"):
        print(" ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jaxtune", "jax")))
        return None
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise errors.ConfigError(f"{verb} is not a verb of jaxtune{f'; did you mean {near[0]}?' if near else '.'}\n{_usage()}")
    sys.argv = [f"jaxtune {verb}", *sys.argv[2:]]
    jaxtune._interrupts_end()
    runpy.run_module(f"jaxtune.{verb}", run_name="__main__")
    return None


def main() -> None:
    """The `jaxtune` console script."""
    errors.run(_dispatch)
