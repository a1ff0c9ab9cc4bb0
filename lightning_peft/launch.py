"""A command line given to Hydra: whose configs are found first, who reports errors, and what is left behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from lightning_peft import schema
from lightning_peft.checks import ConfigError
from lightning_peft.composition import named
from lightning_peft.config import check, compose, conf_dir, found_first, groups, options
from lightning_peft.logs import clean_logging

Task = Callable[[DictConfig], Any]


def launch(command: str, parser: argparse.ArgumentParser, argv: list[str], first: Sequence[str] = ()) -> None:
    """Parse `argv`, compose, check, and run `command` once, or once for each job of a sweep.

    first: overrides that come before the user's.
    """
    schema.register()
    parser.description = (parser.description or "").replace("{groups}", ", ".join(groups()))
    parser.description = parser.description.replace("{methods}", ", ".join(options("peft")))
    given = parser.parse_intermixed_args(argv)
    overrides = named([*first, *given.overrides])
    directory = own_directory(given.config_dir or given.config_path)
    for point in points(overrides) if given.multirun else [overrides]:
        compose(point, directory, given.config_name)  # what is wrong shows before there is a run directory
    failed: list[Exception] = []
    task = job(command, [sys.argv[0], command, *argv], None if given.multirun else failed)
    main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=given.config_name)
    with hydra_arguments([*flags(given), *overrides]), found_first(directory), clean_logging():
        main(task)()
    if failed:
        raise failed[0]


def points(overrides: list[str]) -> Iterator[list[str]]:
    """Jobs of a sweep in which every choice and both ends of every range are met; glob and interval are left out."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        yield overrides  # composing it says what is wrong
        return
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    listed = [o for o in parsed if o.is_choice_sweep() or o.is_range_sweep()]
    values = [[f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] for o in listed]
    values = [[each[0], each[-1]] if o.is_range_sweep() else each for o, each in zip(listed, values, strict=True)]
    first = [each[0] for each in values]
    yield fixed + first
    for index, each in enumerate(values):
        yield from ([*fixed, *first[:index], value, *first[index + 1 :]] for value in each[1:])


def own_directory(given: str | None) -> Path | None:
    """The user's config directory, absolute."""
    if given is None:
        return None
    if not Path(given).is_dir():
        raise ConfigError(f"--config-dir={given} is no directory. Give one that holds groups such as peft/ or model/.")
    return Path(given).absolute()


def flags(given: argparse.Namespace) -> list[str]:
    """Hydra's own options."""
    found = ["--multirun"] if given.multirun else []
    found += ["--cfg", given.cfg] if given.cfg else []
    found += ["--resolve"] if given.resolve else []
    return found + (["--package", given.package] if given.package else [])


def job(command: str, argv: list[str], failed: list[Exception] | None) -> Task:
    """What Hydra calls with a config. failed: takes the error, which Hydra would print with a traceback."""

    def task(config: DictConfig) -> None:
        sys.argv = argv  # the child processes of DDP are started with it
        try:
            check(config)
            commands()[command](config)
        except Exception as error:
            if failed is None:
                raise
            failed.append(error)

    return task


def commands() -> dict[str, Task]:
    """command -> function of a config"""
    from lightning_peft.demo import compare
    from lightning_peft.train import run

    return {"train": run, "demo": compare}


@contextlib.contextmanager
def hydra_arguments(arguments: list[str]) -> Iterator[None]:
    """`sys.argv` for Hydra, which is told to raise errors instead of printing them."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
