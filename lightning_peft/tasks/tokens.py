"""Tokenisers: the one that belongs to a pretrained model, or bytes, which need no file and no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_peft.tasks.extras import optional
from lightning_peft.tasks.hub import MINILM, minilm_folder, reach


class Tokenizer(Protocol):
    """What the data modules ask of a tokeniser; those of transformers have it."""

    @property
    def bos_token_id(self) -> int | None:
        """begin"""

    @property
    def eos_token_id(self) -> int | None:
        """end"""

    @property
    def pad_token_id(self) -> int | None:
        """padding"""

    def __call__(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """texts -> {"input_ids": one list of ids a text}"""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """ids -> text"""


class ByteTokenizer:
    """id = byte + 4; 0 pads, 1 begins, 2 ends, 3 is kept free (260 ids in all)"""

    pad_token_id, bos_token_id, eos_token_id, offset, vocab_size = 0, 1, 2, 4, 260

    def __call__(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, list[list[int]]]:
        """texts -> ids, called as the tokenisers of transformers are"""
        limit = max_length if truncation else None
        return {"input_ids": [self.encode(text, add_special_tokens, limit) for text in texts]}

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """UTF-8 bytes between begin and end; a cut keeps both marks."""
        ids = [byte + self.offset for byte in text.encode("utf-8")]
        if not add_special_tokens:
            return ids[:max_length]
        return [self.bos_token_id, *ids[: None if max_length is None else max(max_length - 2, 0)], self.eos_token_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Back to text; special ids are left out, broken UTF-8 becomes U+FFFD."""
        data = bytes(id - self.offset for id in map(int, ids) if id >= self.offset)
        return data.decode("utf-8", errors="replace")


def tokenizer(name: str | Path | Tokenizer = "minilm", **options: Any) -> Tokenizer:
    """The tokeniser called `name`: "bytes", "minilm", a folder or a model of the hub; or the one that was given.

    A tokeniser without a padding token pads with its end token; the mask tells the two apart.
    """
    if not isinstance(name, str | Path):
        return name
    if name == "bytes":
        return ByteTokenizer()
    source = (minilm_folder() or MINILM) if name == "minilm" else name
    auto = optional("transformers", f"tokenizer={str(name)!r}").AutoTokenizer
    with reach(source):
        loaded = auto.from_pretrained(source, **options)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded
