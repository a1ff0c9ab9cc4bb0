"""Tables on disk: CSV, JSON and JSON Lines, as lists of rows (column -> value)."""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]


def read_csv(path: Path) -> list[Row]:
    """Columns are named in the first line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> list[Row]:
    """A list of objects."""
    rows = parse(path, path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}; a list of objects is needed, one a row.")
    return rows


def read_jsonl(path: Path) -> list[Row]:
    """One object a line; empty lines are skipped."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [parse(path, line, number) for number, line in enumerate(lines, 1) if line.strip()]


def parse(path: Path, text: str, line: int = 1) -> Any:
    """One JSON value; ValueError with file and line if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}: no JSON ({error.msg}). For one object a line: format='jsonl'."
        ) from error


def order_by_hash(rows: Sequence[T], seed: int, key: Callable[[T], str] = str) -> list[T]:
    """Rows in the order of a hash of seed and content: the same on every machine, and hardly changed by a new row."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\t{key(row)}".encode()).digest())


READERS = {"csv": read_csv, "json": read_json, "jsonl": read_jsonl}


def read_table(path: str | Path, format: str | None = None) -> list[Row]:
    """The rows of a file; `format` (csv, json, jsonl) is taken from its ending if it is not given."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (looked for from {Path.cwd()}).")
    reader = READERS.get(format or path.suffix.lstrip(".").lower())
    if reader is None:
        raise ValueError(f"{path}: unknown format {format or path.suffix!r}. Known formats: {', '.join(READERS)}.")
    rows = reader(path)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: {row!r} is no object with named columns.")
    return rows
