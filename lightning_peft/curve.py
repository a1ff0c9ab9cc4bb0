"""A picture of a run: losses and the watched metric over the steps, from Lightning's metrics.csv. Needs matplotlib."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]


def read(path: Path) -> Points:
    """metrics.csv -> metric -> [(step, value), ...]"""
    points: Points = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    points[name].append((int(row["step"]), float(value)))
    return dict(points)


def draw(metrics: Path, picture: Path, metric: str) -> Path:
    """Two panels, loss and `metric` (one, if that is the loss) -> a PNG file"""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"No {picture.name}: it needs matplotlib. Run: pip install 'lightning_peft[demo]'") from error
    points = read(metrics)
    shown = list(dict.fromkeys(["loss", metric.rpartition("/")[2]]))
    figure = Figure(figsize=(4.5 * len(shown), 3.2), layout="constrained")
    for index, name in enumerate(shown):
        panel(figure.add_subplot(1, len(shown), index + 1), points, name)
    figure.savefig(picture, dpi=120)
    return picture


def panel(axes: Any, points: Points, name: str) -> None:
    """One metric of all splits: training as a line, validation with marks, the test as a dashed level."""
    for split, style in {"train": "-", "val": "o-", "test": "--"}.items():
        curve = points.get(f"{split}/{name}", [])
        if split == "test" and curve:
            axes.axhline(curve[-1][1], linestyle=style, color="grey", label="test")
        elif curve:
            axes.plot(*zip(*curve, strict=True), style, label=split)
    axes.set(xlabel="step", ylabel=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
