"""Check PEFT adapters against their base and write them again; several become one, their weighted sum.

    python tools/convert_adapter.py MODEL OUT ADAPTER [ADAPTER=WEIGHT ...]

The sum is exact: ranks are concatenated, so the result's rank is the sum of theirs.
"""

import argparse
from pathlib import Path

from jaxtune import cli, errors
from jaxtune.convert import load_adapter, save_adapter
from jaxtune.convert.folders import check_new
from jaxtune.convert.load import Model, open_model
from jaxtune.peft.combine import combine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the adapters' base model")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="PEFT's folder, and its weight in the sum (1)")
    given = parser.parse_args()
    cli.log_to_terminal()
    check_new(given.out)
    opened = open_model(given.model)
    model = Model(opened.config, {}, opened.tokenizer, source=given.model)
    alone = [Path(text).expanduser().is_dir() or "=" not in text for text in given.adapters]  # a sweep's folders have = in their names
    pairs = [(text, "", "1") if whole else text.rpartition("=") for text, whole in zip(given.adapters, alone, strict=True)]
    try:
        weights = [float(weight) for _, _, weight in pairs]
    except ValueError:
        raise errors.ConfigError(f"{' '.join(given.adapters)}: a weight is no number; write ADAPTER=0.5") from None
    adapters = [load_adapter(path, model) for path, _, _ in pairs]
    result = adapters[0] if weights == [1.0] else combine(model.config, adapters, weights)
    print(save_adapter(result, model, given.out))


if __name__ == "__main__":
    errors.run(main)
