"""What every text classification data set shares: classes, tokens, splits that are checked, and the loaders."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.tasks.batches import Collate, training_loader
from lightning_peft.tasks.tokens import Tokenizer, tokenizer


class Example(NamedTuple):
    """One text, the name of its class, and where it is from."""

    text: str
    label: str
    source: str = ""


Splits = dict[str, list[Example]]
"""The examples of "train", "val" and "test"."""


class TextData(LightningDataModule):
    """texts with a class each -> batches {input_ids, attention_mask: (batch, time), labels: (batch,)}

    A data set is a subclass with one method, `load`. Class ids are the places in `classes`, the sorted names. Texts
    longer than `max_length` tokens are cut at the end. Training batches are shuffled by (seed, epoch) and, with
    `buckets`, hold texts of like length, which saves most of the padding.
    """

    def __init__(
        self,
        tokenizer: str | Path | Tokenizer = "minilm",
        batch_size: int = 32,
        max_length: int = 128,
        buckets: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size={batch_size} and max_length={max_length} must be at least 1.")
        self._tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self.use_buckets, self.num_workers, self.seed = buckets, num_workers, seed

    @abstractmethod
    def load(self) -> Splits:
        """Read the three splits."""

    @cached_property
    def splits(self) -> Splits:
        """What `load` gives, read once and checked."""
        return check(self.load())

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes; the id of a class is its place here."""
        return sorted({example.label for example in self.splits["train"]})

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first needed."""
        return tokenizer(self._tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all examples of all splits"""
        rows = [f"{name}\t{example.label}\t{example.text}\n" for name, rows in self.splits.items() for example in rows]
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """texts -> ids, at most `max_length` of them each"""
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts typed by a user -> one batch without labels."""
        return self.collate([{"input_ids": ids} for ids in self.encode(texts)])

    @property
    def collate(self) -> Collate:
        """rows -> batch"""
        return Collate(self.tokenizer.pad_token_id)

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The tokenised splits."""
        return {name: self.tokenise(examples) for name, examples in self.splits.items()}

    def tokenise(self, examples: list[Example]) -> list[dict[str, Any]]:
        """examples -> rows of ids with the number of the class"""
        number = {name: index for index, name in enumerate(self.classes)}
        ids = self.encode([example.text for example in examples])
        return [{"input_ids": row, "labels": number[e.label]} for row, e in zip(ids, examples, strict=True)]

    @override
    def setup(self, stage: str) -> None:
        self.rows  # noqa: B018  tokenise before the loaders are timed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        rows = self.rows["train"]
        return training_loader(rows, self.collate, self.batch_size, self.seed, self.use_buckets, **self.workers)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.rows["val"], batch_size=self.batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.rows["test"], batch_size=self.batch_size)

    predict_dataloader = test_dataloader

    def loader(self, rows: list[dict[str, Any]], **options: Any) -> DataLoader[Any]:
        """rows in their order -> batches"""
        return DataLoader(rows, collate_fn=self.collate, **self.workers, **options)  # type: ignore[arg-type]

    @property
    def workers(self) -> dict[str, Any]:
        """Options of every loader."""
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}


def check(splits: Splits) -> Splits:
    """The splits, if something can be learned from them and measured on them."""
    known = {example.label for example in splits["train"]}
    if len(known) < 2:
        raise ValueError(
            f"The training data has {len(known)} classes ({', '.join(known) or 'no rows'}); two are needed."
        )
    for name, examples in splits.items():
        if not examples:
            raise ValueError(f"The {name} split is empty. Give it a file of its own, or more rows to take it from.")
        for example in examples:
            if example.label not in known:
                raise ValueError(
                    f"{example.source}: the label {example.label!r} of the {name} split is not in the training data,"
                    f" which knows: {', '.join(sorted(known))}."
                )
    return splits
