"""jaxtune data CONFIG.yaml [key=value ...] [--json] [--report FILE.html]

Shows what the model will see, before a single step: rows and tokens by source, lengths, what is dropped or cut, ten rows with
their trained tokens in colour, and every problem with examples. The same as a page in data_report.html.

jaxtune data convert IN OUT --to FORMAT [--columns OURS=THEIRS ...] writes the rows of a file in another format.
"""

import json
import sys

from rich.console import Console

from jaxtune import cli, errors
from jaxtune.config import load_config
from jaxtune.data import page, terminal
from jaxtune.data.report import report


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["convert"]:
        from jaxtune.data import convert

        return convert.main(sys.argv[2:])
    parser = cli.config_parser("data", __doc__)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    parser.add_argument("--report", metavar="FILE.html", default=None, help="where the page goes (data_report.html; with --json: nowhere)")
    args = cli.parse(parser)
    config = load_config(args.config, args.overrides)

    from jaxtune.convert.load import open_tokenizer

    found = report(config, open_tokenizer(config.model))
    file = args.report or (None if args.json else "data_report.html")
    if file:
        page.write(found, file)
    if args.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        terminal.show(found, Console())
        print(f"\nthe same as a page: {file}")


if __name__ == "__main__":
    errors.run(main)
