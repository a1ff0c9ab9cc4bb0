"""`lightning-peft compare`: runs of `train` that differ in some words, with the same seeds, and a table of them.

    print(compare(["peft=lora,bitfit,ia3", "model=tiny_bert"], seeds=3))
    lightning-peft compare peft=lora,bitfit,ia3 seeds=3 model=minilm trainer.max_epochs=1

Each run is a run directory of `train`. A run that fails is an entry with its error. There is no search: what is
compared is what was asked for.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import re
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from lightning_peft import tracking
from lightning_peft.checks import ConfigError
from lightning_peft.comparing.meter import Meter
from lightning_peft.comparing.table import Comparison, Row, Run, names
from lightning_peft.config import compose, explain
from lightning_peft.logs import closing_loggers
from lightning_peft.train import build_loggers
from lightning_peft.train import run as train

log = logging.getLogger("lightning_peft")
LONGEST = 60
"""Letters of a row's name in the name of its directory."""
ONE = (1, "1", [0], "auto")


def compare(
    words: Sequence[str],
    *,
    rows: Sequence[str | Sequence[str]] = (),
    seeds: int | Sequence[int] = 1,
    directory: str | Path | None = None,
    configs: str | Path | None = None,
    name: str = "train",
    say: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Train every combination of the choices in `words` with every seed, and write compare.json, .csv and .md

    words: of `lightning-peft train`; a choice is values with commas (peft=lora,bitfit). rows: words of each row alone,
    beside the common ones, such as "peft=lora peft.rank=4"; all choices are combined with each. seeds: how many (0, 1,
    ...), or which. directory: where the runs go; None is outputs/<date>/<time>-compare. configs: a directory of the
    user's own; name: of the config to begin with. say: is told of progress. Errors: ConfigError, before anything runs.
    """
    chosen = seeds_of(seeds)
    points = [point for row in (rows or [()]) for point in product([*words, *split(row)])]
    home = Path(directory) if directory is not None else place()
    made = [compose([*point, f"seed={chosen[0]}", f"run_dir={home}"], configs, name) for point in points]
    metric, maximum = metric_of(made)
    for config in made:
        check_devices(config)
    titles = names(points)
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise ConfigError(f"Two rows are the same: {', '.join(sorted(twice))}. Leave one of them out.")
    found = Comparison(metric, maximum, chosen, tuple(words))
    found.rows = [Row(title, tuple(point)) for title, point in zip(titles, points, strict=True)]
    for seed in chosen:  # all rows have a first seed before one has a second
        for number, row in enumerate(found.rows):
            say(f"{row.name}, seed {seed}")
            where = home / f"{number}-{slug(row.name)}" / f"seed-{seed}"
            own = [*row.words, f"seed={seed}", f"run_dir={word(where)}", "trainer.devices=1"]
            row.runs.append(one(own, seed, where, metric, configs, name))
            found.write(home)
    log_table(made[0], found, home)
    say(f"all files in {home}")
    return found


# ------------------------------------------------------------------ what is compared
def product(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Words -> every combination of the choices among them."""
    try:
        parsed = OverridesParser.create().parse_overrides([*words])
    except OverrideParseException as error:
        raise ConfigError(explain(error)) from error
    values = []
    for override in parsed:
        if not override.is_sweep_override():
            values.append([str(override.input_line)])
        elif override.is_choice_sweep() or override.is_range_sweep():
            values.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line}: name the values, with commas between them, or range(...).")
    yield from itertools.product(*values)


def split(row: str | Sequence[str]) -> list[str]:
    """ "peft=lora peft.rank=4" -> its words"""
    return shlex.split(row) if isinstance(row, str) else [*row]


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """3 -> (0, 1, 2)"""
    counted = range(seeds) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    found = () if isinstance(counted, bool) else tuple(counted)
    if not found or not all(isinstance(seed, int) and seed >= 0 for seed in found) or len(set(found)) < len(found):
        raise ConfigError(f"seeds={seeds!r}: give how many (1 or more), or different ones, such as seeds=[0,1,2].")
    return found


def metric_of(configs: Sequence[DictConfig]) -> tuple[str, bool]:
    """The metric that the rows have in common, on the test split, and whether more of it is better."""
    found = {(re.sub("^val/", "test/", config.monitor.name), config.monitor.mode == "max") for config in configs}
    if len(found) > 1:
        raise ConfigError(
            f"The rows have different metrics: {', '.join(sorted(n for n, _ in found))}. Compare one task."
        )
    return found.pop()


def check_devices(config: DictConfig) -> None:
    """The child processes of several devices would run the whole comparison again."""
    if config.trainer.get("devices", 1) not in ONE or config.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: a comparison takes one device; its child processes would run "
            "it again. Use trainer.devices=1, or one `lightning-peft train` command for each row."
        )


def place() -> Path:
    """outputs/<date>/<time>-compare"""
    now = datetime.datetime.now()
    return Path("outputs") / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-compare"


def slug(name: str) -> str:
    """A name for a directory."""
    return re.sub(r"[^\w.+-]+", "_", name)[:LONGEST].strip("_") or "row"


def word(path: Path) -> str:
    """A path as Hydra reads it, whatever is in it."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


# ------------------------------------------------------------------ one run
def one(words: list[str], seed: int, where: Path, metric: str, configs: Any, name: str) -> Run:
    """A run of `train`, or the error that ended it; its traceback goes to error.txt."""
    meter = Meter()
    try:
        found = train(compose(words, configs, name), [meter])
        value = measured(found["test"], metric)
    except Exception as error:
        where.mkdir(parents=True, exist_ok=True)
        (where / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        said = " ".join(str(error).split())
        log.warning("%s failed: %s: %s", where, type(error).__name__, said)
        return Run(seed, str(where), error=f"{type(error).__name__}: {said}")
    counts = found["counts"]
    percent = counts.get("percent", 100 * counts["trainable"] / max(counts["total"], 1))
    return Run(
        seed, str(where), value, counts["trainable"], percent, found["adapter"]["bytes"] or None, meter.peak_bytes,
        meter.step_ms, found["seconds"]["fit"],
    )  # fmt: skip


def measured(test: Mapping[str, float], metric: str) -> float:
    """The value of the metric, if the run has one."""
    if metric not in test:
        raise ConfigError(f"The test has no {metric}. Known: {', '.join(test)}. Set monitor.name to one that it has.")
    if not math.isfinite(test[metric]):
        raise ArithmeticError(f"{metric} is {test[metric]}: the run diverged.")
    return test[metric]


def log_table(config: DictConfig, found: Comparison, home: Path) -> None:
    """The table as a table of W&B, in a run of its own, where the config has its logger."""
    nodes = config.get("logger") or {}
    if "wandb" not in nodes:
        return
    config = config.copy()
    config.logger = {"wandb": nodes["wandb"]}
    config.run_dir = str(home)
    with closing_loggers() as loggers:
        loggers += build_loggers(config)
        for logger in loggers:
            tracking.log_rows(logger, "compare", found.table())
