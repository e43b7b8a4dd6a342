"""Run one config with several values for its keys: one run per combination, one after the other, and a comparison of them.

    jaxtune sweep CONFIG.yaml max_steps=200 --over learning_rate=1e-4,3e-4 lora.r=8,16

Runs are written to OUTPUT_DIR/learning_rate=0.0001,lora.r=8 and so on. All configs are checked before the first run starts. If a run fails
(its loss is not finite, or it runs out of memory), this is reported and the others continue. With resume=true, finished runs are skipped, a
stopped run continues, and values may be added.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import cli, distributed, errors, runfolder
from jaxtune.config import Config, load_config
from jaxtune.config.load import parse_yaml, word
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.loop import TrainingError
from jaxtune.report import Report, is_finished, report
from jaxtune.train import settled, train

log = logging.getLogger("jaxtune")


def sweep(config: Config | Mapping | str | os.PathLike, over: Mapping[str, Sequence[Any]], overrides: Sequence[str] = ()) -> Report | None:
    """Train every combination of the values in `over` (key -> values, as in the config; dots for nested keys) and compare them.

    Returns None if a signal stopped it (and, with several processes, on all but the first).

    Raises:
        ConfigError: an invalid key or value, or nothing to sweep over; before the first run.
        CheckpointError: `output_dir` is not empty and `resume` is not set, or it holds a run with other values.
        TrainingError: no run has finished.
    """
    config = load_config(config, overrides)
    runs = combinations(config, over)
    distributed.start(config.distributed)
    runs = {name: settled(run) for name, run in runs.items()}
    folder = Path(next(iter(runs.values())).output_dir).parent
    if runfolder.is_used(folder) and not config.resume:
        raise CheckpointError(f"output_dir {folder} is not empty, and nothing is overwritten; write resume=true, or another folder")
    begun = {name for name, run in runs.items() if _is_begun(run)}
    failed: dict[str, str] = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        if name in begun and is_finished(folder / name):
            log.info("run %d of %d: %s is done", number, len(runs), name)
            continue
        log.info("run %d of %d: %s", number, len(runs), name)
        try:
            stopped = train(run.replace(resume=name in begun)).interrupted
        except Exception as error:
            why = errors.explain(error) or ""
            if not isinstance(error, TrainingError) and not why.startswith(errors.NO_MEMORY):
                raise
            failed[name] = why
            log.warning("%s: %s", name, why)
            continue
        jax.clear_caches()  # a program takes a few of a Linux process's 65,530 memory maps; many runs would use them up
        if stopped:
            log.warning("stopped in run %d of %d; continue with the same command and resume=true", number, len(runs))
            return None
    if len(failed) == len(runs):
        raise TrainingError("no run has finished: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    if not distributed.is_first():
        return None
    found = report(folder)
    found.draw(folder / "losses.png")
    log.info("%d runs%s; their losses: %s", len(runs), f", {len(failed)} of which failed" if failed else "", folder / "losses.png")
    return found


def _is_begun(run: Config) -> bool:
    """Whether the folder holds this run. CheckpointError if it holds another."""
    folder = Path(run.output_dir)
    if not (folder / "config.yaml").is_file():
        return False
    runfolder.check_same(run)
    return True


def combinations(config: Config, over: Mapping[str, Sequence[Any]]) -> dict[str, Config]:
    """`key=value,key=value` -> the config of that run, in a folder of that name."""
    if not over:
        raise ConfigError("there is nothing to sweep over; write --over KEY=VALUE,VALUE, such as --over learning_rate=1e-4,3e-4")
    if config.data.kfold is not None and config.data.fold is None:
        raise ConfigError("data.kfold already runs every fold; sweep over the folds: --over data.fold=0,1,2")
    if "output_dir" in over or "resume" in over:
        raise ConfigError("output_dir and resume apply to the whole sweep, whose runs have folders in it; write them before --over")
    folder = Path(config.output_dir or runfolder.default_folder(config, "sweep"))
    runs = {}
    for values in itertools.product(*over.values()):
        words = [f"{key}={word(value)}" for key, value in zip(over, values, strict=True)]
        name = ",".join(words).replace(os.sep, "_")
        if name in runs:
            raise ConfigError(f"--over: {name} is there twice; leave one")
        runs[name] = load_config(config, [*words, f"output_dir={word(str(folder / name))}"])
    return runs


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"--over {text}: write KEY=VALUE,VALUE, such as learning_rate=1e-4,3e-4")
    return key.strip(), parse_yaml(f"[{values}]", f"--over {key.strip()}")


def main() -> None:
    """`python -m jaxtune.sweep`."""
    parser = cli.config_parser("sweep", __doc__)
    values = "a key and its values"
    parser.add_argument("--over", metavar="KEY=VALUE,VALUE", nargs="+", action="extend", default=[], help=values)
    arguments = cli.parse(parser)
    cli.log_to_terminal()
    axes = [_axis(text) for text in arguments.over]
    found = sweep(arguments.config, dict(axes), arguments.overrides)
    if found:
        found.show()


cli.callable_module(__name__, sweep)

if __name__ == "__main__":
    errors.run(main)
