"""One run of a comparison: the one that is there from before, or a new one."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from lightning_peft.checks import ConfigError
from lightning_peft.comparing.meter import Meter
from lightning_peft.comparing.table import Run
from lightning_peft.config import plain
from lightning_peft.train import run as train

log = logging.getLogger("lightning_peft")
NAME = "run.json"
"""What a comparison knows of a run that ended well, in the run's directory."""


def earlier(config: DictConfig, where: Path) -> Run | None:
    """The run that ended well in this directory, if it was one of this config."""
    try:
        if OmegaConf.create(plain(config)) != OmegaConf.load(where / "config.yaml"):
            return None
        return Run(**json.loads((where / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, YAMLError):  # none, or not one of ours
        return None


def one(config: DictConfig, seed: int, where: Path, metric: str) -> Run:
    """A run of `train`, or the error that ended it; its traceback goes to error.txt."""
    meter, notes = Meter(), {name: where / name for name in (NAME, "error.txt")}
    for note in notes.values():
        note.unlink(missing_ok=True)
    try:
        found = train(config, [meter])
        value = measured(found["test"], metric)
    except Exception as error:
        where.mkdir(parents=True, exist_ok=True)
        notes["error.txt"].write_text(traceback.format_exc(), encoding="utf-8")
        said = " ".join(str(error).split())
        log.warning("%s failed: %s: %s", where, type(error).__name__, said)
        return Run(seed, str(where), error=f"{type(error).__name__}: {said}")
    counts = found["counts"]
    percent = counts.get("percent", 100 * counts["trainable"] / max(counts["total"], 1))
    run = Run(
        seed, str(where), value, counts["trainable"], percent, found["adapter"]["bytes"] or None, meter.peak_bytes,
        meter.step_ms, found["seconds"]["fit"],
    )  # fmt: skip
    where.mkdir(parents=True, exist_ok=True)
    notes[NAME].write_text(json.dumps(asdict(run)), encoding="utf-8")
    return run


def measured(test: Mapping[str, float], metric: str) -> float:
    """The value of the metric, if the run has one."""
    if metric not in test:
        raise ConfigError(f"The test has no {metric}. Known: {', '.join(test)}. Set monitor.name to one that it has.")
    if not math.isfinite(test[metric]):
        raise ArithmeticError(f"{metric} is {test[metric]}: the run diverged.")
    return test[metric]
