"""Batches of sequences of unlike length: padding, an order of its own for every epoch, and buckets by length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler
from typing_extensions import override

IGNORE = -100
"""The label of a token that is no part of the loss."""


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """rows of ids -> (batch, longest), filled with `value` at one side"""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    both = zip(rows, fill, strict=True)
    return torch.tensor([[*row, *rest] if side == "right" else [*rest, *row] for row, rest in both], dtype=torch.long)


class Collate:
    """Rows {"input_ids": ids, "labels": id or ids} -> the batch a transformers model takes.

    input_ids, attention_mask: (batch, time); labels: (batch,) for classes, (batch, time) for tokens, where they are
    given.
    """

    def __init__(self, pad_id: int | None, side: str = "right") -> None:
        self.pad_id, self.side = pad_id or 0, side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows -> batch"""
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": pad(ids, self.pad_id, self.side),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, self.side),
        }
        if "labels" in rows[0]:
            batch["labels"] = self.labels([row["labels"] for row in rows])
        return batch

    def labels(self, labels: list[Any]) -> Tensor:
        """One id a row, or one id a token."""
        return pad(labels, IGNORE, self.side) if isinstance(labels[0], list) else torch.tensor(labels)


class Shuffle(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone: the same after a resume, and blind to the global RNG."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class LengthBuckets(BatchSampler):
    """Batches of like length: `pool` batches at a time are sorted by length, cut, and come in shuffled order.

    The signature is that of `BatchSampler` plus the lengths, so that Lightning can put a distributed sampler in.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        *,
        lengths: Sequence[int],
        pool: int = 50,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths, self.pool = lengths, pool

    @override
    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        if self.drop_last:
            indices = indices[: len(indices) - len(indices) % self.batch_size]
        step = self.pool * self.batch_size
        for start in range(0, len(indices), step):
            yield from self.buckets(indices[start : start + step])

    def buckets(self, indices: list[int]) -> list[list[int]]:
        """The batches of one pool; their order follows from the order of the sampler, hence from (seed, epoch)."""
        generator = torch.Generator().manual_seed(sum(place * index for place, index in enumerate(indices[:8], 1)))
        ordered = sorted(indices, key=self.lengths.__getitem__)
        batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class ResumableLoader(DataLoader[Any]):
    """A loader that a checkpoint remembers: a run resumed in mid-epoch goes on with the batch that was next.

    Lightning saves and loads the state of loaders that have one, and starts all others from the first batch again. The
    skip holds for the epoch that was interrupted only, so a checkpoint from the end of a shortened epoch
    (`limit_train_batches`) is right too.
    """

    given = 0
    interrupted: dict[str, int] | None = None

    @property
    def epoch(self) -> int:
        """Where the sampler is."""
        return self.batch_sampler.sampler.epoch  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, int]:
        """What Lightning puts into a checkpoint."""
        return {"epoch": self.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What Lightning took from a checkpoint."""
        self.interrupted = state

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator: the epoch is read at the first batch, when Lightning has set it
        state, self.interrupted = self.interrupted, None
        self.given = state["batches"] if state and state["epoch"] == self.epoch else 0
        drawn = torch.get_rng_state()
        batches = super().__iter__()  # draws a number for its workers from the global generator
        if self.given:  # which the interrupted run did at the start of the epoch
            torch.set_rng_state(drawn)
        for batch in islice(batches, self.given, None):
            self.given += 1
            yield batch


def training_loader(
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Any],
    batch_size: int,
    seed: int,
    buckets: bool,
    **options: Any,
) -> ResumableLoader:
    """Rows in an order that depends on (seed, epoch), in batches of like length if `buckets`."""
    order = Shuffle(len(rows), seed)
    if not buckets:
        return ResumableLoader(rows, sampler=order, batch_size=batch_size, collate_fn=collate, **options)  # type: ignore[arg-type]
    batches = LengthBuckets(order, batch_size, lengths=[len(row["input_ids"]) for row in rows])
    return ResumableLoader(rows, batch_sampler=batches, collate_fn=collate, **options)  # type: ignore[arg-type]
