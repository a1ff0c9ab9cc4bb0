"""What a comparison found: a row for each setting, one entry a seed; as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.planning.sizes import show

COLUMNS = (
    "name", "metric", "mean", "sd", "seeds", "failed", "trained", "percent", "stored_bytes", "peak_bytes", "step_ms",
    "fit_s", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One seed of a row. value: of the metric on the test split; error: of a run that failed, None of one that did not.

    peak_bytes: on CUDA of the allocator, elsewhere what the process had more than before the run; step_ms: the median
    time from one batch's start to its end.
    """

    seed: int
    directory: str
    value: float | None = None
    trained: int | None = None
    percent: float | None = None
    stored_bytes: int | None = None
    peak_bytes: int | None = None
    step_ms: float | None = None
    fit_s: float | None = None
    error: str | None = None


@dataclass
class Row:
    """A setting: its name, the words that it adds, and its runs."""

    name: str
    words: tuple[str, ...]
    runs: list[Run] = field(default_factory=list)

    def of(self, name: str) -> list[Any]:
        """The values of a field, of the runs that have one."""
        return [value for run in self.runs if (value := getattr(run, name)) is not None]

    @property
    def mean(self) -> float | None:
        values = self.of("value")
        return statistics.fmean(values) if values else None

    @property
    def sd(self) -> float | None:
        """Of the sample, n - 1; None of fewer than two seeds."""
        values = self.of("value")
        return statistics.stdev(values) if len(values) > 1 else None

    def cells(self, metric: str) -> dict[str, Any]:
        """column -> plain value: sizes of the largest run, times of the median one"""
        found: dict[str, Any] = {"name": self.name, "metric": metric, "mean": self.mean, "sd": self.sd}
        found |= {"seeds": len(self.of("value")), "failed": len(self.of("error"))}
        sizes = ("trained", "percent", "stored_bytes", "peak_bytes")
        found |= {name: max(self.of(name), default=None) for name in sizes}
        found |= {name: statistics.median(self.of(name)) if self.of(name) else None for name in ("step_ms", "fit_s")}
        return found | {"error": next(iter(self.of("error")), None)}


@dataclass
class Comparison:
    """Rows as they were asked for. metric: its name on the test split; maximum: whether more is better."""

    metric: str
    maximum: bool
    seeds: tuple[int, ...]
    words: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """A dict of `COLUMNS` for each row, best mean first, those without a mean last."""
        cells = [row.cells(self.metric) for row in self.rows]
        sign = -1 if self.maximum else 1
        return sorted(cells, key=lambda c: (1, 0.0) if c["mean"] is None else (0, sign * c["mean"]))

    @property
    def best(self) -> tuple[Row, Run] | None:
        """The run with the best value, and its row."""
        runs = [(row, run) for row in self.rows for run in row.runs if run.value is not None]
        sign = 1 if self.maximum else -1
        return max(runs, key=lambda pair: sign * (pair[1].value or 0.0), default=None)

    def foot(self) -> list[str]:
        """The best run in words."""
        if self.best is None:
            return []
        row, run = self.best
        return [f"best run: {row.name}, seed {run.seed}, {self.metric} {run.value:.4f}, {run.directory}"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"metric": self.metric, "maximum": self.maximum, "seeds": [*self.seeds], "words": [*self.words]}
        rows = [{**asdict(row), "words": [*row.words]} for row in self.rows]
        best = None if self.best is None else {"name": self.best[0].name, **asdict(self.best[1])}
        return {**found, "best": best, "table": self.table(), "rows": rows}

    def csv(self) -> str:
        """One line a row."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.table())
        return buffer.getvalue()

    def lines(self) -> list[list[str]]:
        """Cells for people, the head first."""
        head = ["", self.metric, "seeds", "trained", "stored", "peak", "step", "fit"]
        return [head, *(shown(cells) for cells in self.table())]

    def markdown(self) -> str:
        """A table for a README, the best run and errors below it."""
        lines = self.lines()
        text = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in text]
        below = [*self.foot(), *self.errors()]
        return "\n".join([*rows, *([""] if below else []), *(f"- {line}" for line in below)]) + "\n"

    def errors(self) -> list[str]:
        """A line for each run that failed."""
        return [f"{row.name}, seed {r.seed}: {r.error}" for row in self.rows for r in row.runs if r.error is not None]

    def __str__(self) -> str:
        lines = self.lines()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:], *self.foot(), *(f"failed: {error}" for error in self.errors())])

    def write(self, directory: Path) -> None:
        """compare.json, compare.csv, compare.md"""
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"
        for name, content in {"json": text, "csv": self.csv(), "md": self.markdown()}.items():
            (directory / f"compare.{name}").write_text(content, encoding="utf-8")


def shown(cells: dict[str, Any]) -> list[str]:
    """A row for people."""
    spread = "" if cells["sd"] is None else f" ± {cells['sd']:.4f}"
    value = "failed" if cells["mean"] is None else f"{cells['mean']:.4f}{spread}"
    seeds = f"{cells['seeds']}" + (f" ({cells['failed']} failed)" if cells["failed"] and cells["seeds"] else "")
    trained = "-" if cells["trained"] is None else f"{cells['trained']:,} ({cells['percent']:.2f} %)"
    sizes = ["-" if cells[n] is None else show(cells[n]).partition(" (")[0] for n in ("stored_bytes", "peak_bytes")]
    step = "-" if cells["step_ms"] is None else f"{cells['step_ms']:.1f} ms"
    fit = "-" if cells["fit_s"] is None else f"{cells['fit_s']:.1f} s"
    return [cells["name"], value, seeds, trained, *sizes, step, fit]


def names(words: Sequence[tuple[str, ...]]) -> list[str]:
    """What tells the rows apart: the words that not all of them have, without `peft=`; of a single row, its method."""
    common = set.intersection(*(set(each) for each in words))
    if len(words) == 1:
        common = {word for word in common if not word.startswith("peft")}
    found = [" ".join(word.removeprefix("peft=") for word in each if word not in common) for each in words]
    return [name or "as configured" for name in found]
