"""Instructions and answers for a causal language model: only the answer is learned, and it is never cut."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.tasks.batches import IGNORE, Collate, training_loader
from lightning_peft.tasks.tables import Row, order_by_hash, read_table
from lightning_peft.tasks.tokens import Tokenizer, tokenizer

PROMPTS = ("prompt", "instruction", "question", "input")
ANSWERS = ("answer", "output", "response", "completion")


class Instructions(LightningDataModule):
    """rows {prompt, answer} -> ids = begin + template(prompt) + answer + end, labels = -100 outside of answer and end

    path: JSON, JSON Lines or CSV; `val` and `test` files are optional, else they are held out of it. The columns are
    found by their usual names (prompt, instruction, question; answer, output, response, completion) unless given. In
    `template`, {prompt} is the prompt's column and {any_other} the column of that name. What does not fit in
    `max_length` tokens is dropped from the left of the prompt. Training is padded on the right; prediction gives
    prompts alone, padded on the left.
    """

    def __init__(
        self,
        path: str | Path,
        val: str | Path | None = None,
        test: str | Path | None = None,
        tokenizer: str | Path | Tokenizer = "bytes",
        prompt: str | None = None,
        answer: str | None = None,
        template: str = "{prompt}\n",
        format: str | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        val_share: float = 0.1,
        test_share: float = 0.1,
        buckets: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if val_share < 0 or test_share < 0 or val_share + test_share >= 1:
            raise ValueError(f"val_share={val_share} and test_share={test_share} must be shares whose sum is below 1.")
        self.files, self.format, self.template = {"train": path, "val": val, "test": test}, format, template
        self.columns = {"prompt": prompt, "answer": answer}
        self._tokenizer, self.batch_size, self.max_length = tokenizer, batch_size, max_length
        self.shares, self.use_buckets, self.num_workers, self.seed = (val_share, test_share), buckets, num_workers, seed

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first needed."""
        return tokenizer(self._tokenizer)

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        """The rows of the three splits."""
        given = {name: read_table(file, self.format) for name, file in self.files.items() if file is not None}
        rows = order_by_hash(given["train"], self.seed)
        for name, share in zip(("val", "test"), self.shares, strict=True):
            if name not in given:
                count = max(1, round(share * len(given["train"])))
                rows, given[name] = rows[count:], rows[:count]
        if not rows:
            raise ValueError(f"{self.files['train']} has {len(given['train'])} rows: too few to hold some out.")
        return {"train": rows, "val": given["val"], "test": given["test"]}

    @cached_property
    def rows(self) -> dict[str, list[dict[str, list[int]]]]:
        """The encoded splits."""
        return {name: [self.encode(row) for row in rows] for name, rows in self.tables.items()}

    def column(self, row: Row, kind: str, usual: tuple[str, ...]) -> str:
        """The text of the prompt or the answer of a row."""
        named = self.columns[kind]
        found = next((name for name in ([named] if named else usual) if name in row), None)
        if found is None:
            raise ValueError(
                f"No column {named or ' / '.join(usual)!r} for the {kind} in {row!r:.200}. Columns there:"
                f" {', '.join(map(str, row))}. Name it: {kind}=..."
            )
        if not isinstance(row[found], str) or not row[found].strip():
            raise ValueError(f"The column {found!r} is empty or no text in {row!r:.200}.")
        return row[found]

    def prompt(self, row: Row) -> str:
        """The template, filled in."""
        values: Mapping[str, Any] = {**row, "prompt": self.column(row, "prompt", PROMPTS)}
        try:
            return self.template.format_map(values)
        except KeyError as error:
            raise ValueError(
                f"template={self.template!r} names {error}. Columns there: {', '.join(map(str, row))}, prompt."
            ) from error

    def encode(self, row: Row) -> dict[str, list[int]]:
        """A row -> ids and labels of one length, at most max_length"""
        prompt, answer = self.prompt_ids(self.prompt(row)), self.answer_ids(self.column(row, "answer", ANSWERS))
        room = self.max_length - len(answer)
        if room < 1:
            raise ValueError(
                f"An answer of {len(answer)} tokens and one of its prompt do not fit in max_length={self.max_length}:"
                f" {row!r:.200}. An answer is never cut: raise max_length or leave the row out."
            )
        prompt = self.fit(prompt, room)
        return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}

    def prompt_ids(self, text: str) -> list[int]:
        """begin + prompt"""
        begin = self.tokenizer.bos_token_id
        return ([] if begin is None else [begin]) + self.ids(text)

    def answer_ids(self, text: str) -> list[int]:
        """answer + end"""
        end = self.tokenizer.eos_token_id
        return self.ids(text) + ([] if end is None else [end])

    def ids(self, text: str) -> list[int]:
        """text -> ids, no special ones"""
        return self.tokenizer([text], add_special_tokens=False)["input_ids"][0]

    def fit(self, prompt: list[int], room: int) -> list[int]:
        """The end of a prompt that is too long, behind its begin token."""
        if len(prompt) <= room:
            return prompt
        kept = 0 if self.tokenizer.bos_token_id is None else 1
        return prompt[:kept] + prompt[len(prompt) - room + kept :]

    def batch(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rows with a prompt -> the prompts of one batch, padded on the left, to generate from."""
        prompts = [{"input_ids": self.fit(self.prompt_ids(self.prompt(row)), self.max_length)} for row in rows]
        return Collate(self.tokenizer.pad_token_id, side="left")(prompts)

    def decode(self, ids: Tensor) -> list[str]:
        """(batch, time) -> texts"""
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]

    @override
    def setup(self, stage: str) -> None:
        self.rows  # noqa: B018  tokenise before the loaders are timed

    @property
    def options(self) -> dict[str, Any]:
        """Options of every loader."""
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        rows, collate = self.rows["train"], Collate(self.tokenizer.pad_token_id)
        return training_loader(rows, collate, self.batch_size, self.seed, self.use_buckets, **self.options)

    def loader(self, split: str) -> DataLoader[Any]:
        """The rows of a split, in their order."""
        collate = Collate(self.tokenizer.pad_token_id)
        return DataLoader(self.rows[split], batch_size=self.batch_size, collate_fn=collate, **self.options)  # type: ignore[arg-type]

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts of the test rows."""
        rows: Any = self.tables["test"]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.batch, **self.options)
