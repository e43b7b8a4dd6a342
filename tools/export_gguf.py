"""Export a run's result, or any model, as a GGUF file with a Modelfile; the same as `jaxtune export RUN OUT --format gguf`.

python tools/export_gguf.py RUN OUT [--type q8_0]
"""

import argparse

from jaxtune import cli, errors
from jaxtune.convert.gguf_types import TYPES
from jaxtune.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--type", choices=TYPES, default="f16")
    given = parser.parse_args()
    cli.log_to_terminal()
    print(export(given.run, given.out, format="gguf", type=given.type))


if __name__ == "__main__":
    errors.run(main)
