"""`lightning-peft compare`: runs of `train` that differ in some words, with the same seeds, and a table of them.

    print(compare(["peft=lora,bitfit,ia3", "model=tiny_bert"], seeds=3))
    lightning-peft compare peft=lora,bitfit,ia3 seeds=3 model=minilm trainer.max_epochs=1

Each run is a run directory of `train`. A run that fails is an entry with its error. There is no search: what is
compared is what was asked for. Into a directory of a comparison before, runs that are there already are not run again:
so one that was interrupted goes on, and one can get more seeds, or rows behind the others, which keep their names.
"""

from __future__ import annotations

import datetime
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from lightning_peft import tracking
from lightning_peft.checks import ConfigError
from lightning_peft.comparing.runs import earlier, one
from lightning_peft.comparing.table import Comparison, Row, names
from lightning_peft.config import compose, explain
from lightning_peft.logs import closing_loggers
from lightning_peft.train import build_loggers

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
    ...), or which. directory: where the runs go, and may be already; None is outputs/<date>/<time>-compare. configs: a
    directory of the user's own; name: of the config to begin with. say: is told of progress.
    Errors: ConfigError, before anything runs.
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
    fill(found, home, configs, name, say)
    log_table(made[0], found, home)
    say(f"all files in {home}")
    return found


def fill(found: Comparison, home: Path, configs: str | Path | None, name: str, say: Callable[[str], object]) -> None:
    """Run what is not there yet; all rows have a first seed before one has a second."""
    try:
        for seed in found.seeds:
            for number, row in enumerate(found.rows):
                where = home / f"{number}-{slug(row.name)}" / f"seed-{seed}"
                own = [*row.words, f"seed={seed}", f"run_dir={word(where)}", "trainer.devices=1"]
                config = compose(own, configs, name)
                kept = earlier(config, where)
                say(f"{row.name}, seed {seed}{', from before' if kept is not None else ''}")
                row.runs.append(kept or one(config, seed, where, found.metric))
                found.write(home)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        say(f"interrupted; the same words with run_dir={home} go on from here")
        raise


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
    found = tuple(counted) if isinstance(counted, Sequence) else ()
    plain = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found)
    if not found or not plain or len(set(found)) < len(found):
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
