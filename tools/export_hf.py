"""Export a run's result as a merged and verified model folder; the same as `jaxtune export RUN OUT --merge`.

python tools/export_hf.py RUN OUT [--dtype bfloat16]
"""

import argparse

from jaxtune import cli, errors
from jaxtune.convert.load import DTYPES
from jaxtune.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run folder, an adapter folder, or a model")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--dtype", choices=DTYPES[:3], help="default: the base's own")
    given = parser.parse_args()
    cli.log_to_terminal()
    print(export(given.run, given.out, format="hf", dtype=given.dtype))


if __name__ == "__main__":
    errors.run(main)
