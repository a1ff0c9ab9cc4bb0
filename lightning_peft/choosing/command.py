"""`lightning-peft choose`: candidates for the model, the data and the memory of the words that `train` takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lightning_peft.checks import methods_of
from lightning_peft.choosing.candidates import Chosen
from lightning_peft.choosing.choice import choose
from lightning_peft.choosing.risks import risks
from lightning_peft.config import build
from lightning_peft.planning.command import configuration, subjects
from lightning_peft.planning.precision import QUANTISED, arithmetic
from lightning_peft.planning.sizes import PlanError, parse


def options(parser: argparse.ArgumentParser) -> None:
    """What `choose` has beside the overrides."""
    parser.add_argument("--memory", metavar="SIZE", help="of the device, such as --memory 24GiB")
    parser.add_argument("--examples", type=int, metavar="N", help="of training")
    parser.add_argument("--inference", action="store_true", help="what a method costs at inference matters")
    parser.add_argument("--storage", action="store_true", help="the size of a task's file matters")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="tasks that one base serves")
    parser.add_argument("--quantised", action="store_true", help="the base is in 4 bits: precision=nf4")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: by trainer.accelerator, cuda for auto")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="candidates, at most (5)")
    parser.add_argument("--json", metavar="FILE", help="write what was found to this file as well; - prints it instead")
    parser.set_defaults(offload=None)


def run(given: argparse.Namespace) -> None:
    """Print the candidates."""
    check(given)
    words = list(given.overrides)
    config = configuration(words, given.config_dir or given.config_path, given.config_name)
    if given.quantised and not quantised(config):
        words = [*(word for word in words if not word.startswith("precision=")), "precision=nf4"]
        config = configuration(words, given.config_dir or given.config_path, given.config_name)
    subject, settings = subjects(config, given)
    names = ("memory", "examples", "inference", "storage", "tasks", "top")
    needs = {name: getattr(given, name) for name in names}
    how = {"kind": config.kind, "batch": subject["batch"], "words": words, "methods": asked(config, words)}
    chosen = choose(subject["module"], **needs, **how, **settings)
    show(dataclasses.replace(chosen, risks=tuple(own_risks(config, words, given.examples))), given.json)


def check(given: argparse.Namespace) -> None:
    """What is wrong with the options alone, before a model is built."""
    if given.multirun:
        raise PlanError("A choice is for one model: leave --multirun out.")
    if given.memory is not None:
        parse(given.memory)
    if given.json not in (None, "-") and not Path(given.json).parent.is_dir():
        raise PlanError(f"{given.json}: there is no folder {Path(given.json).parent}.")


def quantised(config: Any) -> bool:
    """Whether the words ask for codes already."""
    return config.get("precision") is not None and arithmetic(build(config.precision)).name in QUANTISED


def asked(config: Any, words: list[str]) -> list[str]:
    """Methods that the user's own words name."""
    named = any(word.startswith(("peft=", "experiment=")) for word in words)
    return [build(node).info.name for node in methods_of(config).values()] if named else []


def own_risks(config: Any, words: list[str], examples: int | None) -> list[str]:
    """Risks of the method and the rate that the user's own words set."""
    if config.get("peft") is None or not any(word.startswith(("peft", "optimizer")) for word in words):
        return []
    methods = [build(node) for node in methods_of(config).values()]
    return [line for method in methods for line in risks(method, config.optimizer.get("lr"), examples)]


def show(chosen: Chosen, file: str | None) -> None:
    """To the terminal, to a file, or as JSON to the terminal."""
    text = json.dumps(chosen.as_dict(), indent=2)
    print(text if file == "-" else chosen)
    if file not in (None, "-"):
        Path(str(file)).write_text(text + "\n", encoding="utf-8")
