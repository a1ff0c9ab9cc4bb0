"""Reads the file of an offline W&B run back: LevelDB-style framing around protobuf records.

header `:W&B`, u16 magic, u8 version; then blocks of 32 KiB with records `crc32 u32, length u16, type u8` (1 whole,
2 first, 3 middle, 4 last), whose payload is a `wandb_internal_pb2.Record`. A record never starts in the last 6 bytes of
a block.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK, FRAME = 7, 32 * 1024, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass
class Artifact:
    """An artifact: what is in its manifest, by path."""

    name: str
    type: str
    metadata: dict[str, Any]
    paths: list[str]


@dataclass
class OfflineRun:
    """What an offline run recorded."""

    id: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    exit_code: int | None = None


def payloads(data: bytes) -> Iterator[bytes]:
    """The records of a run file, put together from their pieces."""
    if data[:4] != b":W&B":
        raise ValueError(f"Not a W&B run file: it starts with {data[:4]!r}, expected b':W&B'.")
    place, parts = HEADER, []
    while place + FRAME.size <= len(data):
        if (room := BLOCK - place % BLOCK) < FRAME.size:
            place += room
            continue
        _, length, kind = FRAME.unpack_from(data, place)
        place += FRAME.size
        parts = [] if kind in (WHOLE, FIRST) else parts
        parts.append(data[place : place + length])
        place += length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)


def update(into: dict[str, Any], items: Any) -> None:
    """Write `key` or the path in `nested_key` of each item."""
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        place = into
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)


def read_artifact(record: Any) -> Artifact:
    paths = sorted(entry.path for entry in record.manifest.contents)
    return Artifact(record.name, record.type, json.loads(record.metadata or "{}"), paths)


def read_record(run: OfflineRun, record: Record) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.id, run.project, run.group = record.run.run_id, record.run.project, record.run.run_group
        run.tags = list(record.run.tags)
        update(run.config, record.run.config.update)
    elif kind == "config":
        update(run.config, record.config.update)
    elif kind == "history":
        run.history.append({})
        update(run.history[-1], record.history.item)
    elif kind == "summary":
        update(run.summary, record.summary.update)
    elif kind == "artifact":
        run.artifacts.append(read_artifact(record.artifact))
    elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
        run.artifacts.append(read_artifact(record.request.log_artifact.artifact))
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def read(path: Path) -> OfflineRun:
    """The run in `path`: a `run-<id>.wandb` file, or the `offline-run-*` directory that holds it."""
    file = next(path.glob("run-*.wandb")) if path.is_dir() else path
    run = OfflineRun()
    for payload in payloads(file.read_bytes()):
        read_record(run, Record.FromString(payload))
    return run


def read_all(save_dir: Path) -> list[OfflineRun]:
    """Every run below `save_dir`, oldest first."""
    runs = (save_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return [read(path) for path in sorted(runs, key=lambda p: p.stat().st_mtime_ns)]
