"""Compare LoRA SFT on the same rows by jaxtune and its peers, and by jaxtune without its optimisations: each in its own process, one after
the other, measured from outside. Tokens per second, memory, loss.

    python tools/bench.py peers  MODEL ROWS.jsonl [--trl PYTHON] [--tunix PYTHON] [--easydel PYTHON]     jaxtune and its peers, in float32
    python tools/bench.py ladder MODEL ROWS.jsonl                                         baseline, + packing, + ...
    python tools/bench.py gpu    CONFIG [--length 2048] [--trl PYTHON] [--unsloth PYTHON] on one GPU: random weights of config.json's shapes

TRL + PEFT need the [oracle] extra, here or in the given Python; the other peers run in the given Python, and are skipped without one.
`--only NAME` runs one row of a table. Every round appends a line per row to `--results`; a table contains the medians of all rounds with
the same settings, and `--write docs/benchmarks.md` puts it between that file's marks.

ROWS.jsonl has `question` and `answer` (gsm8k), each used once. Tokens do not include padding. "job" is the whole process, with imports,
loading, compilation from an empty cache and saving; "per CPU second" is tokens per second of processor time, which other jobs disturb less;
"start" is the time to the end of the first step; "steps" is the speed from there on. Peak memory is the process's largest resident size, on
a GPU the allocator's peak.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

JOBS = Path(__file__).parent / "bench"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIVEN = {
    "batch": 8, "length": 1024, "method": "lora", "dtype": "float32", "learning_rate": 2e-4, "remat": False, "completion_only": True,
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}, "keys": {}, "packed": False,
}  # fmt: skip


class Side(NamedTuple):
    """A row of a table: its name, the job that runs it (tools/bench/JOB_job.py), and its differences from GIVEN."""

    name: str
    job: str
    changes: dict


PACKED = {"packed": True}  # half as many rows of 512: about as many token slots per step as the padded rows of the others
PADDED = {"data": {"packing": False}}
PLAIN = PADDED | {"gradient_checkpointing": False}
SUITES = {
    "peers": [
        Side("TRL + PEFT", "trl", {}),
        Side("TRL + PEFT, rows padded alike", "trl", {"pad_alike": True}),
        Side("Tunix", "tunix", {}),
        Side("EasyDeL", "easydel", {}),
        Side("jaxtune, rows padded alike", "jaxtune", {"keys": PADDED}),
        Side("jaxtune", "jaxtune", PACKED),
    ],
    "ladder": [
        Side("baseline: padded rows, all logits at once, nothing recomputed", "jaxtune", {"keys": PLAIN, "logits": "all at once"}),
        Side("+ logits by chunks", "jaxtune", {"keys": PLAIN, "logits": "all"}),
        Side("+ logits of trained tokens only", "jaxtune", {"keys": PLAIN}),
        Side("+ remat policy `dots`", "jaxtune", {"keys": PADDED}),
        Side("+ packing (the defaults)", "jaxtune", PACKED),
        Side("+ remat `full`", "jaxtune", PACKED | {"keys": {"gradient_checkpointing": "full"}}),
        Side("+ NF4 base (QLoRA), `full`", "jaxtune", PACKED | {"method": "qlora", "keys": {"gradient_checkpointing": "full"}}),
        Side("defaults in bfloat16", "jaxtune", PACKED | {"dtype": "bfloat16"}),
    ],
    "gpu": [
        Side(f"{name}, {'QLoRA' if method == 'qlora' else 'LoRA'}", job, {"method": method, "remat": True, "completion_only": False} | keys)
        for method in ("lora", "qlora")
        for name, job, keys in (
            ("TRL + PEFT", "trl", {}),
            ("Unsloth", "unsloth", {}),
            ("jaxtune", "jaxtune", {"keys": {"data": {"train_on": "all"}}}),
        )
    ],
}  # fmt: skip


def settings(side: Side, given: argparse.Namespace) -> dict:
    """Everything that determines what a side does, except paths."""
    job = GIVEN | ({"length": 2048, "batch": 2, "dtype": "bfloat16"} if given.suite == "gpu" else {})
    job |= {name: value for name in ("batch", "length") if (value := getattr(given, name)) is not None}
    job |= side.changes | {"suite": given.suite, "side": side.name, "rows": given.rows}
    return job | ({"batch": job["batch"] // 2, "length": 512} if job["packed"] else {})


def pythons(given) -> dict[str, str | None]:
    """The Python for a job; None: none was given."""
    own = {"jaxtune": sys.executable, "trl": given.trl or sys.executable}
    return own | {"tunix": given.tunix, "easydel": given.easydel, "unsloth": given.unsloth}


def run(side: Side, job: dict, python: str) -> dict:
    """One process from start to end: its reported steps and measured cost; or `error`, its last line."""
    with tempfile.TemporaryDirectory() as work:
        argument = json.dumps(job | {"work": work})
        with open(Path(work, "log"), "w+") as log:
            started = time.monotonic()
            process = subprocess.Popen([python, str(JOBS / f"{side.job}_job.py"), argument], stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        if process.returncode:
            return {"error": lines[-1][:300] if lines else f"exit status {process.returncode}"}
        found = json.loads(Path(work, "result.json").read_text())
    times, tokens = found.pop("times"), found["tokens"]
    if len(tokens) < 2:
        raise SystemExit(f"{side.name} has taken a single step, which is the one that compiles; give it more rows")
    scale = 1 if sys.platform == "darwin" else 1024
    return found | {
        "job_seconds": seconds, "start_seconds": times[1] - started, "processor_speed": sum(tokens) / (used.ru_utime + used.ru_stime),
        "job_speed": sum(tokens) / seconds, "step_speed": sum(tokens[1:]) / (times[-1] - times[1]), "peak": used.ru_maxrss * scale,
    }  # fmt: skip


# ---- what is measured, and where ----


def machine() -> str:
    """The processor and its cores, or the GPU."""
    if gpu := _gpu():
        return gpu
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _gpu() -> str:
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return asked.stdout.splitlines()[0]


def flops_per_token(config: dict, length: int) -> float:
    """FLOPs per token of LoRA training without recomputation: 2 per matrix element forward, 2 backward (a frozen matrix has no gradient),
    and causal attention's two products, of which the backward pass takes four."""
    D, F, L = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    H, K = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    h = config.get("head_dim") or D // H
    matrices = L * (2 * D * H * h + 2 * D * K * h + 3 * D * F) + config["vocab_size"] * D
    return 4 * matrices + 6 * L * length * H * h


def peak_flops(device: str) -> float | None:
    """The chip's published dense bfloat16 rate, by its name."""
    from jaxtune.plan_targets import GPUS

    plain = device.lower().replace(" ", "").replace("-", "")
    found = [name for name in sorted(GPUS, key=len) if name.replace("-", "").removesuffix("80").removesuffix("40") in plain]
    return GPUS[found[-1]][0].flops if found else None


# ---- tables ----


def table(suite: str, results: list[dict], command: str) -> str:
    """The medians of all rounds of each side, as a Markdown table, with the command for each row."""
    gpu = suite == "gpu"
    columns = ["", "steps, tokens/s", "MFU"] if gpu else ["", "job, tokens/s", "per CPU second", "steps, tokens/s", "start"]
    columns += ["peak memory", "loss, first and last step", "`--only`"]
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for number, side in enumerate(SUITES[suite]):
        rounds = [row for row in results if row["side"] == side.name]
        if not rounds:
            continue
        sound = [row for row in rounds if "error" not in row]
        if not sound:
            lines.append(f"{side.name} | did not run: `{rounds[-1]['error']}`" + " |" * (len(columns) - 3) + f" | {number}")
            continue
        middle = {key: statistics.median(row[key] for row in sound) for key in sound[0] if isinstance(sound[0][key], int | float)}
        peak = f"{middle.get('device_peak', middle['peak']) / 1e9:.1f} GB"
        rate = f"{middle['step_speed']:.0f}"
        mfu = f"{100 * middle['mfu']:.1f} %" if "mfu" in middle else "not known"
        jobs = [f"{middle['job_speed']:.0f}", f"{middle['processor_speed']:.0f}", rate, f"{middle['start_seconds']:.0f} s"]
        cells = [*([rate, mfu] if gpu else jobs), peak]
        losses = sound[-1]["losses"]
        lines.append(" | ".join([side.name, *cells, f"{losses[0]:.3f}, {losses[-1]:.3f} ({len(losses)})", str(number)]))
    rounds = max((sum(row["side"] == side.name for row in results) for side in SUITES[suite]), default=0)
    said = f"    {command}\n\n{results[-1]['machine']}; the median of {rounds} round{'s' * (rounds != 1)}.\n\n"
    return said + "\n".join(f"| {line} |" for line in lines) + "\n"


def write(path: Path, suite: str, text: str) -> None:
    """Put the table between the marks of its suite."""
    start, end = f"<!-- bench {suite} -->\n", f"<!-- end of bench {suite} -->"
    before, mark, rest = path.read_text().partition(start)
    if not mark or end not in rest:
        raise SystemExit(f"{path} has no lines {start.strip()} and {end}")
    path.write_text(before + start + text + end + rest.partition(end)[2])


# ---- the command ----


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("model", help="a Hugging Face folder; for gpu one with config.json alone")
    parser.add_argument("file", nargs="?", help="rows; for gpu they are made up")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, help="rows of a padded step")
    parser.add_argument("--length", type=int, help="tokens of a row, for gpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="rows of the table, from 0")
    parser.add_argument("--trl", metavar="PYTHON", help="default: this one; another lets jaxtune be where its users have it, without torch")
    parser.add_argument("--tunix", metavar="PYTHON")
    parser.add_argument("--easydel", metavar="PYTHON")
    parser.add_argument("--unsloth", metavar="PYTHON")
    parser.add_argument("--results", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    if (given.suite == "gpu") != (given.file is None):
        parser.error("peers and ladder take MODEL and ROWS.jsonl, gpu a folder with config.json")
    return given


def prepare(given: argparse.Namespace, work: Path) -> tuple[str, str]:
    """The locations of the model and the rows, which are generated for gpu."""
    if given.suite != "gpu":
        (work / "rows.jsonl").write_text("\n".join(Path(given.file).read_text().splitlines()[: given.rows]) + "\n")
        return given.model, str(work / "rows.jsonl")
    sizes = ["--rows", str(given.rows), "--length", str(given.length or 2048)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # the GPU is reserved for the measured jobs
    subprocess.run([sys.executable, str(JOBS / "synthetic.py"), given.model, str(work), *sizes], check=True, env=environment)
    return str(work / "model"), str(work / "rows.jsonl")


def main() -> None:
    given = parse()
    wanted = [side for number, side in enumerate(SUITES[given.suite]) if given.only is None or number in given.only]
    wanted = [side for side in wanted if pythons(given)[side.job]]
    with tempfile.TemporaryDirectory() as work:
        model, rows = prepare(given, Path(work))
        for side in [side for _ in range(given.rounds) for side in wanted]:
            how = settings(side, given)
            found = run(side, how | {"model": model, "rows": rows}, str(pythons(given)[side.job]))
            if given.suite == "gpu" and "error" not in found and (peak := peak_flops(_gpu())):
                config = json.loads(Path(model, "config.json").read_text())
                found["mfu"] = found["step_speed"] * flops_per_token(config, how["length"]) / peak
            with given.results.open("a") as file:
                file.write(json.dumps(found | {"side": side.name, "settings": how, "machine": machine()}) + "\n")
            print(f"{side.name}: {in_words(found)}", flush=True)
    alike = [settings(side, given) for side in SUITES[given.suite]]
    results = [row for row in map(json.loads, given.results.read_text().splitlines()) if row["settings"] in alike]
    text = table(given.suite, results, command(given))
    print(text)
    if given.write:
        write(given.write, given.suite, text)


def in_words(found: dict) -> str:
    if "error" in found:
        return f"did not run: {found['error']}"
    return f"job {found['job_speed']:.0f}, steps {found['step_speed']:.0f} tokens/s, {found['peak'] / 1e9:.1f} GB"


def command(given: argparse.Namespace) -> str:
    """The command line, without local paths."""
    of = {"--trl": given.trl, "--tunix": given.tunix, "--easydel": given.easydel, "--unsloth": given.unsloth}
    numbers = [f"--{name} {value}" for name in ("rows", "batch", "length") if (value := getattr(given, name)) is not None]
    named = [f"{option} PYTHON" for option, value in of.items() if value]
    files = ["CONFIG"] if given.suite == "gpu" else ["MODEL", "ROWS.jsonl"]
    return " ".join(["python tools/bench.py", given.suite, *files, *numbers, *named])


if __name__ == "__main__":
    main()
