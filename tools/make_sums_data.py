"""Writes configs/sums/: small sums as prompts with their answers, for configs/grpo.yaml.

    python tools/make_sums_data.py

400 prompts, `What is a + b?` for a and b from 1 to 20, of which eval.jsonl has the 80 with 3a + b a multiple of 5.
"""

import argparse
import json
from pathlib import Path

from jaxtune.disk import write_text

OUT = Path(__file__).parent.parent / "configs" / "sums"


def rows() -> dict[str, list[dict]]:
    """`train` and `eval`."""
    found: dict[str, list[dict]] = {"train": [], "eval": []}
    for a in range(1, 21):
        for b in range(1, 21):
            prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]
            found["eval" if (3 * a + b) % 5 == 0 else "train"].append({"prompt": prompt, "answer": str(a + b)})
    return found


def main() -> None:
    """Write both files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for side, made in rows().items():
        write_text(OUT / f"{side}.jsonl", "".join(json.dumps(row) + "\n" for row in made))
        print(f"{OUT / side}.jsonl: {len(made)} rows")


if __name__ == "__main__":
    main()
