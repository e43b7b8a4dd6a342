"""jaxtune data CONFIG.yaml [key=value ...] [--json] [--report FILE.html]

Shows what the model will see before the first step: rows and tokens by source, lengths, what is dropped or cut, ten rows with their trained
tokens in colour, and every problem with examples. Also writes this as a page, data_report.html.

jaxtune data convert IN OUT --to FORMAT           converts the rows of a file to another format (see --help)
jaxtune data generate MODEL IN OUT --make WHAT    creates rows with a local model (see --help)
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from jaxtune import cli, errors
from jaxtune.config import load_config
from jaxtune.data import convert, files, formats, generate, judge, page, quality, terminal
from jaxtune.data.report import report
from jaxtune.disk import make_folder
from jaxtune.errors import DataError, ModelError

GENERATE = """jaxtune data generate MODEL IN OUT.jsonl --make tasks|instructions|answers [--count N] [--how "..."]

Rows made by a local model: new tasks like those of IN, instructions that the texts of IN answer, or better answers to the prompts
of IN. Empty rows and rows like others are left out, and counted.

    --make revisions      answers to the prompts of IN, criticised by a principle and revised: preference rows, the revision chosen
    --make preferences    the two answers of IN's rows, or two drawn for its prompts, judged by a principle in both orders

These write the criticism or the judge's reasons too, and what came to nothing to OUT.refused.jsonl. What OUT has already is not made
again: a run that was stopped goes on with the same command.
"""


def main() -> None:
    """The command."""
    verbs = {"convert": _convert, "generate": _generate}
    return verbs[sys.argv[1]](sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in verbs else _report(sys.argv[1:])


def _report(argv: list[str]) -> None:
    parser = cli.config_parser("data", __doc__)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    parser.add_argument("--report", metavar="FILE.html", default=None, help="where the page goes (data_report.html; with --json: nowhere)")
    args = cli.parse(parser, argv)
    cli.log_to_terminal()
    config = load_config(args.config, args.overrides)

    from jaxtune.convert.load import open_config
    from jaxtune.convert.retokenised import tokenizer_of

    tokenizer, vocabulary = tokenizer_of(config), None
    with contextlib.suppress(ModelError):  # a folder may hold only the tokenizer
        vocabulary = open_config(config.model).vocab_size
    found = report(config, tokenizer, vocabulary=vocabulary)
    file = args.report or (None if args.json else "data_report.html")
    if file:
        page.write(found, file)
    if args.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        terminal.show(found, Console())
        print(f"\nthe same as a page: {file}")


def _convert(argv: list[str]) -> None:
    parser = cli.parser("data convert", convert.__doc__)
    parser.add_argument("source", metavar="IN", help="a file, folder, glob or hub id")
    parser.add_argument("target", metavar="OUT", help="a .jsonl, .json, .csv or .parquet file")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(convert.WRITERS))
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="the format of IN; detected by default")
    cli.add_columns(parser)
    args = parser.parse_args(argv)
    count = convert.convert(args.source, args.target, args.to, args.form, args.columns)
    print(f"{count:,} rows written to {args.target}")


def _generate(argv: list[str]) -> None:
    parser = cli.parser("data generate", GENERATE)
    parser.add_argument("model", metavar="MODEL", help="a hub id, folder, .gguf file or pypi: source")
    parser.add_argument("source", metavar="IN", help="rows: prompts for tasks and answers, texts for instructions")
    parser.add_argument("target", metavar="OUT.jsonl", help="rows are appended as they are made")
    kinds = ("tasks", "instructions", "answers", "revisions", "preferences")
    parser.add_argument("--make", required=True, choices=kinds, help="what the model writes")
    parser.add_argument("--count", type=int, default=100, help="how many tasks")
    parser.add_argument("--how", default=generate.HOW, help="what is asked of a new answer")
    parser.add_argument("--principles", metavar="FILE", help="what answers are criticised and judged by, a line each (else: four of ours)")
    parser.add_argument("--rounds", type=int, default=1, help="of criticism and revision")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    parser.add_argument("--adapter", help="an adapter of the model")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampling")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of a task, instruction or answer")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling and of the tasks shown")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise DataError(f"--count is {args.count}; it has to be 1 or more")
    said = [quality.texts(formats.parse(row, None)) for row in files.rows(args.source)]
    make_folder(Path(args.target).parent)
    judged = args.make in ("revisions", "preferences")
    done = [] if judged else generate.written(args.target, "prompt", "completion")

    from jaxtune.convert import load
    from jaxtune.convert.retokenised import with_adapter
    from jaxtune.generate import generate as write

    cli.log_to_terminal()
    model = load(args.model)
    model, adapter = with_adapter(args.adapter, model) if args.adapter else (model, None)
    settings = {"temperature": args.temperature, "top_p": 0.95, "max_new_tokens": args.max_new_tokens}
    ask = functools.partial(write, model, adapter=adapter)
    writer, made = generate.Writer(ask, settings, args.batch_size, args.seed), generate.Made()
    if judged:
        made = judge.save(_judged(args, writer, said, plain=not model.tokenizer.chat_template), args.target)
        return _tell(made, args.target)
    generate.save(_plain(args, writer, said, done, made), args.target)
    return _tell(made, args.target)


def _plain(args: argparse.Namespace, writer: generate.Writer, said: list, done: list[dict], made: generate.Made) -> Iterator[dict]:
    """The prompt and completion rows that are not done yet."""
    prompts, completions = {row["prompt"] for row in done}, {row["completion"] for row in done}
    if args.make == "tasks":
        seeds = [prompt or answer for prompt, answer, _ in said] + [row["prompt"] for row in done]
        return generate.self_instruct(writer, seeds, args.count - len(done), made=made)
    if args.make == "instructions":
        return generate.back_translate(writer, [answer for _, answer, _ in said if answer not in completions], made=made)
    given = [{"prompt": prompt, "completion": answer} for prompt, answer, _ in said if prompt not in prompts]
    return generate.rewrite(writer, given, args.how, made=made)


def _judged(args: argparse.Namespace, writer: generate.Writer, said: list, plain: bool) -> Callable:
    """The function that makes the remaining rows, for `judge.save`."""
    principles = judge.read_principles(args.principles) if args.principles else judge.PRINCIPLES
    judged = said if args.make == "preferences" else []
    pairs = list(dict.fromkeys((prompt, (answer, other)) for prompt, answer, other in judged if other))
    if pairs and not all(other for *_, other in said):
        raise DataError("only some of the rows have two answers; give one kind: pairs to be judged, or prompts")
    prompts = [prompt for prompt, _ in pairs] or judge.fresh(prompt or answer for prompt, answer, _ in said)
    if len(prompts) < len(said):
        print(f"{len(said) - len(prompts)} of {len(said)} rows are like rows before them, or empty, and are left out", file=sys.stderr)
    if args.make == "revisions":
        return lambda done: judge.revise(writer, prompts, principles, args.rounds, done, plain)
    return lambda done: judge.prefer(writer, prompts, principles, [answers for _, answers in pairs] or None, done, plain)


def _tell(made: generate.Made, target: str) -> None:
    refused = ", ".join(f"{count} {reason}" for reason, count in made.refused.items())
    print(f"{made.rows:,} rows written to {target}" + (f"; left out: {refused}" if refused else ""))


if __name__ == "__main__":
    errors.run(main)
