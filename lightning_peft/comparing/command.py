"""`lightning-peft compare`: from words to a table."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml

from lightning_peft.checks import ConfigError
from lightning_peft.comparing.comparison import compare
from lightning_peft.launch import own_directory
from lightning_peft.logs import only_warnings


def options(parser: argparse.ArgumentParser) -> None:
    """What `compare` has beside the overrides."""
    parser.add_argument("--row", action="append", default=[], metavar="WORDS", help="words of one row; repeat it")
    parser.add_argument("--json", action="store_true", help="print compare.json instead of the table")


def run(given: argparse.Namespace) -> None:
    """Print the table."""
    if given.multirun or given.cfg:
        raise ConfigError("compare has no --multirun and no --cfg: values with commas are rows already.")
    words, seeds, home = [], 1, None
    for word in given.overrides:
        key, _, value = word.partition("=")
        if key == "seeds":
            seeds = numbers(value)
        elif key == "run_dir":
            home = value
        else:
            words.append(word)
    check_seed(words)
    directory = own_directory(given.config_dir or given.config_path)
    with only_warnings():
        found = compare(
            words, rows=given.row, seeds=seeds, directory=home, configs=directory, name=given.config_name, say=say
        )
    print(json_text(found) if given.json else found)
    if not any(row.of("value") for row in found.rows):
        raise ConfigError("Every run failed; their tracebacks are in error.txt of each run directory.")


def say(line: str) -> None:
    """Progress does not go where the table goes."""
    print(line, file=sys.stderr, flush=True)


def numbers(text: str) -> Any:
    """ "3" or "[0,1,2]", or 0,1,2"""
    try:
        return yaml.safe_load(f"[{text}]" if "," in text and not text.startswith("[") else text)
    except yaml.YAMLError:
        return text


def check_seed(words: list[str]) -> None:
    """`seed` belongs to `seeds`."""
    if any(word.partition("=")[0] == "seed" for word in words):
        raise ConfigError("compare sets the seed of each run itself: give seeds=3, or seeds=[7] for one of your own.")


def json_text(found: Any) -> str:
    """What compare.json holds."""
    import json

    return json.dumps(found.as_dict(), indent=2, allow_nan=False)
