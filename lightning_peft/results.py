"""What a run found, as plain values: metrics with their interval, counts, sizes, versions; and the adapters on disk."""

from __future__ import annotations

import contextlib
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_peft import __version__
from lightning_peft.core import state
from lightning_peft.core.files import save_adapter


def measured(metrics: Mapping[str, float], task: torch.nn.Module, data: Any) -> dict[str, Any]:
    """What results.json holds beside the adapter and the times."""
    return {
        "test": dict(metrics),
        **class_facts(data, metrics.get("test/accuracy")),
        "counts": state.describe(task) if state.applied_to(task) else parameter_counts(task),
        "versions": versions(),
    }


def save_adapters(task: torch.nn.Module, directory: Path) -> dict[str, Any]:
    """adapter/ for one method, adapter/<label>/ for several -> path and bytes"""
    labels = list(state.applied_to(task))
    for label in labels:
        save_adapter(task, directory if len(labels) == 1 else directory / label, label)
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {"path": str(directory), "labels": labels, "bytes": sum(path.stat().st_size for path in files)}


def parameter_counts(task: torch.nn.Module) -> dict[str, int]:
    """Counts of a run without a method."""
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return {"trainable": trainable, "total": sum(p.numel() for p in task.parameters())}


def class_facts(data: Any, accuracy: float | None = None) -> dict[str, Any]:
    """The classes, the share that the most frequent class of the training data has of the test, accuracy's interval."""
    if not hasattr(data, "classes"):
        return {}
    train, test = (Counter(labels(loader())) for loader in (data.train_dataloader, data.test_dataloader))
    count = sum(test.values())
    facts: dict[str, Any] = {"classes": list(data.classes), "test_examples": count}
    facts["majority"] = test[train.most_common(1)[0][0]] / count
    if accuracy is not None:
        facts["test_interval"] = list(wilson(accuracy, count))
    return facts | ({"data": data.fingerprint} if hasattr(data, "fingerprint") else {})


def labels(batches: Any) -> Iterator[int]:
    """The labels of all batches."""
    for batch in batches:
        yield from batch["labels"].tolist()


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n): Wilson's interval, Brown et al. 2001"""
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    found = {"python": platform.python_version(), "lightning_peft": __version__, "torch": torch.__version__}
    for name in ("lightning", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
