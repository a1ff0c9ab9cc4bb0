"""Which storages live when: a dispatch mode that follows them from birth to death, and what that adds up to."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, CONSTANTS, ADAPTERS, COPIES = "weights", "quantisation constants", "adapters", "copies"
GRADIENTS, OPTIMIZER = "gradients", "optimizer state"
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
LABELS = (WEIGHTS, CONSTANTS, ADAPTERS, COPIES, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES)
StandIn = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(eq=False)
class Record:
    """One storage: its bytes, what it is, and from when to when it lived; died is None while it lives."""

    bytes: int
    label: str
    born: int
    died: int | None = None
    frozen: bool = False

    def lives_at(self, time: int) -> bool:
        """Whether the storage is there at this time."""
        return self.born <= time and (self.died is None or time < self.died)


def by_label(records: Iterable[Record]) -> dict[str, int]:
    """label -> bytes"""
    found: dict[str, int] = defaultdict(int)
    for record in records:
        found[record.label] += record.bytes
    return dict(found)


class Tracker(TorchDispatchMode):
    """Sees the results of every operator; a storage is born with the first tensor on it and dies with the last.

    time: operators so far; calls: which. stand_in: answers in place of an operator, or NotImplemented.
    """

    def __init__(self, stand_in: StandIn | None = None) -> None:
        super().__init__()
        self.stand_in, self.time = stand_in, 0
        self.calls: list[Any] = []
        self.records: list[Record] = []
        self.living: dict[int, tuple[Record, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)  # every look at a tensor's device comes by
        out = self.stand_in(func, args, kwargs or {}) if self.stand_in else NotImplemented
        out = func(*args, **(kwargs or {})) if out is NotImplemented else out
        self.time += 1
        self.calls.append(func)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.record(leaf)
        return out

    def record(self, tensor: Tensor, label: str = TEMPORARIES, frozen: bool = False) -> Record:
        """The record of the tensor's storage, made where there is none."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.living:
            record = Record(storage.nbytes(), label, self.time, frozen=frozen)
            self.living[key] = record, weakref.ref(storage, lambda _: self.forget(key))
            self.records.append(record)
        return self.living[key][0]

    def forget(self, key: int) -> None:
        """Called when a storage is freed: until then it was there beside the result of the running operator."""
        self.living.pop(key)[0].died = self.time + 1

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Say what a storage is that an operator made."""
        record = self.record(tensor)
        if record.label in (TEMPORARIES, ACTIVATIONS):
            record.label = label

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Know gradients as such when they are complete."""
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.complete)

    def complete(self, parameter: nn.Parameter) -> None:
        """The gradient of this parameter is there."""
        if parameter.grad is not None:
            self.relabel(parameter.grad, GRADIENTS)

    def tick(self) -> int:
        """A time between operators."""
        self.time += 1
        self.calls.append(None)
        return self.time

    def alive(self, since: int = -1) -> list[Record]:
        """The records of what lives now and was born after `since`."""
        return [record for record, _ in self.living.values() if record.born > since]

    def peak(self, start: int, end: int, counts: Callable[[Record], bool]) -> list[Record]:
        """What lived at the time from start to end when most bytes lived, of the records that count."""
        change: dict[int, int] = defaultdict(int)
        within = list(self.within(start, end, counts))
        for record in within:
            change[max(record.born, start)] += record.bytes
            if record.died is not None:
                change[record.died] -= record.bytes
        now, most, when = 0, -1, start
        for time in sorted(time for time in change if time <= end):
            now += change[time]
            most, when = max((most, when), (now, time), key=lambda pair: pair[0])
        return [record for record in within if record.lives_at(when)]

    def within(self, start: int, end: int, counts: Callable[[Record], bool]) -> Iterator[Record]:
        """What lived at some time from start to end, of the records that count."""
        for r in self.records:
            if r.born <= end and (r.died is None or r.died > start) and counts(r):
                yield r

    def course(self, start: int, end: int) -> Tensor:
        """Bytes at every time from start to end: (end - start + 1, labels)"""
        change = torch.zeros(end - start + 2, len(LABELS), dtype=torch.int64)
        for record in self.within(start, end, lambda record: True):
            change[max(record.born, start) - start, LABELS.index(record.label)] += record.bytes
            if record.died is not None and record.died <= end:
                change[record.died - start, LABELS.index(record.label)] -= record.bytes
        return change[:-1].cumsum(0)
