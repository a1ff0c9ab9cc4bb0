"""Text classification on data of one's own: a CSV, JSON or JSON Lines file, or a data set of the Hugging Face hub."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_peft.tasks.data import Example, Splits, TextData
from lightning_peft.tasks.extras import optional
from lightning_peft.tasks.tables import order_by_hash, read_table


def examples(rows: Sequence[Mapping[str, Any]], text: str, label: str, source: str) -> list[Example]:
    """Rows of a table -> examples; an empty cell is an error that names its row."""
    found = []
    for number, row in enumerate(rows, 1):
        for column in (text, label):
            if column not in row:
                raise ValueError(
                    f"{source}, row {number}: no column {column!r}. Columns there: {', '.join(map(str, row))}."
                    " Set text=... and label=... to the names of yours."
                )
            if row[column] is None or not str(row[column]).strip():
                raise ValueError(f"{source}, row {number}: the column {column!r} is empty. Fill it or delete the row.")
        found.append(Example(str(row[text]), str(row[label]), f"{source}, row {number}"))
    return found


def hold_out(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out): `share` of every class, taken from each in the order of a hash."""
    if not 0 < share < 1:
        raise ValueError(f"A split of {share} was asked for; give a share between 0 and 1, such as 0.1.")
    groups = defaultdict(list)
    for row in order_by_hash(rows, seed, key=lambda row: f"{row.text}\t{row.label}"):
        groups[row.label].append(row)
    counts = {label: min(round(share * len(group)) or 1, len(group) - 1) for label, group in groups.items()}
    held = {id(row) for label, group in groups.items() for row in group[: counts[label]]}
    return [row for row in rows if id(row) not in held], [row for row in rows if id(row) in held]


class TextFile(TextData):
    """CSV, JSON or JSON Lines with a text and a label column -> text classification

    Give `path` for one file, or `train` and, where there are such files, `val` and `test`. What is not given is held
    out of the training rows: `val_share` and `test_share` of every class, the same ones every time. `format` is "csv",
    "json" or "jsonl" (default: by the file's ending). The other arguments are those of `TextData`.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        text: str = "text",
        label: str = "label",
        format: str | None = None,
        val_share: float = 0.1,
        test_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (path is None) == (train is None):
            raise ValueError(f"Give either path= or train=; path={path!r} and train={train!r} were given.")
        self.files = {"train": path or train, "val": val, "test": test}
        self.columns, self.format, self.shares = (text, label), format, {"test": test_share, "val": val_share}

    @override
    def load(self) -> Splits:
        given = {name: self.read(file) for name, file in self.files.items() if file is not None}
        return complete(given, self.shares, self.seed)

    def read(self, file: str | Path) -> list[Example]:
        """The examples of one file."""
        return examples(read_table(file, self.format), *self.columns, source=str(file))


def complete(given: Splits, shares: dict[str, float], seed: int) -> Splits:
    """Hold the splits that are missing out of the training rows; shares are of all rows given for training."""
    rows, left = given["train"], 1.0
    for name, share in shares.items():
        if name not in given:
            rows, given[name] = hold_out(rows, share / left, seed)
            left -= share
    return {"train": rows, "val": given["val"], "test": given["test"]}


class HFText(TextData):
    """a data set of the Hugging Face hub, or a folder in its format -> text classification

    `name` and `config` are those of `datasets.load_dataset`; `train`, `val` and `test` name its splits, where None
    means "hold it out of the training rows". Needs the extra [hf] and, for a name of the hub, a connection or the
    hub's cache.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = "test",
        text: str = "text",
        label: str = "label",
        val_share: float = 0.1,
        test_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dataset, self.config, self.columns = name, config, (text, label)
        self.split_names = {"train": train, "val": val, "test": test}
        self.shares = {"test": test_share, "val": val_share}

    @override
    def load(self) -> Splits:
        tables = self.download()
        for split in filter(None, self.split_names.values()):
            if split not in tables:
                raise ValueError(f"{self.dataset} has no split {split!r}; it has: {', '.join(tables)}.")
        given = {key: self.read(tables[split]) for key, split in self.split_names.items() if split is not None}
        return complete(given, self.shares, self.seed)

    def download(self) -> Any:
        """name of a split -> table"""
        datasets = optional("datasets", f"HFText({self.dataset!r})")
        try:
            return datasets.load_dataset(self.dataset, self.config)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"Cannot load the data set {self.dataset!r} from disk or the Hugging Face hub ({reason}). Way out:"
                " check the name and the connection, or save its rows as CSV or JSON for TextFile (data=csv, json)."
            ) from error

    def read(self, table: Any) -> list[Example]:
        """Class ids become the names that the data set gives them; -1, where labels are held back, is an empty cell."""
        label = self.columns[1]
        names = getattr(table.features.get(label), "names", None)
        rows = list(table)
        if names:
            rows = [{**row, label: names[row[label]] if row[label] >= 0 else ""} for row in rows]
        return examples(rows, *self.columns, source=self.dataset)
