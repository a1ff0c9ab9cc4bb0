"""Use a run directory again: base model, adapter and classes, for sentences that somebody types.

run = load_run("outputs/2026-01-01/12-00-00");  run.answer(["Open a socket and listen."])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_peft.checks import ConfigError
from lightning_peft.config import build
from lightning_peft.core.files import load_adapter
from lightning_peft.train import build_task

ADAPTER, SETTINGS, RESULTS = "adapter", "config.yaml", "results.json"


@dataclass
class Run:
    """A trained model that is ready to answer. classes: [] for a language model."""

    kind: str
    task: Any
    data: Any
    classes: list[str]

    @torch.inference_mode()
    def answer(self, sentences: Sequence[str]) -> list[tuple[str, float]]:
        """Sentences -> (label, probability) each; (text, nan) from a language model"""
        if not self.classes:
            tokens = self.task.predict_step(self.data.batch([{"prompt": sentence} for sentence in sentences]))
            return [(self.data.tokenizer.decode(row, skip_special_tokens=True), float("nan")) for row in tokens]
        found = self.task.predict_step(self.data.batch(sentences))
        best = found["probabilities"].max(-1)
        return [(self.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def load_run(directory: str | Path) -> Run:
    """The run of `lightning-peft train` in this directory. Errors: ConfigError where a file is missing."""
    directory = Path(directory)
    if missing := [name for name in (SETTINGS, RESULTS, ADAPTER) if not (directory / name).exists()]:
        raise ConfigError(
            f"{directory} is no finished run: it has no {', '.join(missing)}. Give the directory that `lightning-peft"
            " train` named at its end."
        )
    config = cast(DictConfig, OmegaConf.load(directory / SETTINGS))
    results = json.loads((directory / RESULTS).read_text("utf-8"))
    data = build(config.data)
    if not hasattr(data, "batch"):
        raise ConfigError(f"{directory} is a run on {config.get('kind', 'other data')}; predict reads sentences.")
    classes = results.get("classes", [])
    task = build_task(config, classes)
    if config.get("precision") is not None:
        build(config.precision).prepare_base(task)  # the base as it was trained on
    labels = results["adapter"]["labels"]
    for index, label in enumerate(labels):  # the first tells another base; it may change what the next ones look at
        path = directory / ADAPTER if len(labels) == 1 else directory / ADAPTER / label
        load_adapter(task, path, check_base=index == 0)
    return Run(config.get("kind", ""), task.eval(), data, classes)


def batches(lines: Iterable[str], size: int = 1) -> Iterator[list[str]]:
    """Lines without their ends and without the empty ones, `size` at a time."""
    batch: list[str] = []
    for line in lines:
        batch += [line.strip()] if line.strip() else []
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
