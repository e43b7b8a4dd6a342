"""Export a run's result, or any model, as a GGUF file with a Modelfile; the same as `jaxtune export RUN OUT --format gguf`.

python tools/export_gguf.py RUN OUT [--type q8_0]
"""

import argparse

from jaxtune import cli, errors
from jaxtune.convert.gguf_types import TYPES
from jaxtune.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder, an adapter folder, or a model")
    parser.add_argument("out", metavar="OUT", help="the new folder, or the new file NAME.gguf")
    parser.add_argument("--type", choices=TYPES, default="f16", help="of the matrices; default: f16")
    given = parser.parse_args()
    cli.log_to_terminal()
    print(export(given.run, given.out, format="gguf", type=given.type))


if __name__ == "__main__":
    errors.run(main)
