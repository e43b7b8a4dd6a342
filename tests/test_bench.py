"""tools/bench.py: what it counts and writes. Its jobs use other libraries and are not run here."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("bench", Path(__file__).parent.parent / "tools" / "bench.py")
assert spec and spec.loader
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def row(side: str, **found) -> dict:
    return {"side": side, "machine": "a processor, 2 cores"} | found


def took(speed: float) -> dict:
    speeds = {"job_speed": speed, "step_speed": 2 * speed, "processor_speed": speed / 2}
    return speeds | {"start_seconds": 3.0, "peak": 2 * 10**9, "losses": [1.5, 1.25]}


def test_a_table_is_of_medians_and_says_why_a_side_did_not_run():
    results = [row("jaxtune", **took(speed)) for speed in (100.0, 900.0, 200.0)] + [row("Tunix", error="No module named 'tunix'")]
    text = bench.table("peers", results, "python tools/bench.py peers MODEL ROWS.jsonl")
    assert "| jaxtune | 200 | 100 | 400 | 3 s | 2.0 GB | 1.500, 1.250 (2) | 5 |" in text
    assert "| Tunix | did not run: `No module named 'tunix'` | | | | | | 2 |" in text
    assert "TRL" not in text and "the median of 3 rounds" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


def test_a_table_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- bench gpu -->\nold\n<!-- end of bench gpu -->\nbelow\n")
    bench.write(page, "gpu", "new\n")
    assert page.read_text() == "above\n<!-- bench gpu -->\nnew\n<!-- end of bench gpu -->\nbelow\n"
    with pytest.raises(SystemExit, match="bench peers"):
        bench.write(page, "peers", "new\n")


@pytest.mark.parametrize(
    "device, flops",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A10", 125e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name(device, flops):
    assert bench.peak_flops(device) == flops


def test_flops_of_a_token_are_those_of_its_matrices_and_of_causal_attention():
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"vocab_size": 32}
    q_and_o, k_and_v, feed_forward, head = 2 * 8 * 8, 2 * 8 * 4, 3 * 8 * 16, 32 * 8
    matrices = 3 * (q_and_o + k_and_v + feed_forward) + head
    scores = 10 / 2  # a token of a row of ten attends to half of it on average
    attention = 3 * 2 * (2 * 2 * scores * 4)  # layers, heads; two products of head size 4
    assert bench.flops_per_token(config, 10) == 2 * 2 * matrices + 3 * attention
