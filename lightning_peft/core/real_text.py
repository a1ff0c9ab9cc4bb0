"""Keys and values of a real text in the model as it is: a start for prefixes; and the shift that such prefixes need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.sites import Site, Sites, TargetError

POSITIONS = {"wpe", "position_embeddings", "position_embedding"}  # learned tables, looked up by position


class RealText:
    """Runs `ids` through a transformers model once, for all the adapters that note what their layer attends to."""

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self.model, self.ids = model, ids
        self.running = False
        self.seen: dict[int, Tensor] = {}

    def note(self, adapter: Adapter, key: Tensor, value: Tensor) -> None:
        """Of the one row (1, kv_heads, length, head_dim)."""
        self.seen[id(adapter)] = torch.cat([key, value]).transpose(1, 2)

    def kv(self, adapter: Adapter) -> Tensor:  # (2, length, kv_heads, head_dim)
        if id(adapter) not in self.seen:
            self.run()
        if id(adapter) not in self.seen:
            raise TargetError(
                f"init='text': a text in {type(self.model).__name__} does not pass {type(adapter.place).__name__}, "
                "where a prefix is to start from it. Narrow the targets to the layers that read text."
            )
        return self.seen.pop(id(adapter))

    @torch.no_grad()
    def run(self) -> None:
        ids = torch.tensor([self.ids], device=next(self.model.parameters()).device)
        get: Any = getattr(self.model, "get_input_embeddings", lambda: None)
        size = getattr(get(), "num_embeddings", None)
        if size is not None and (wrong := [i for i in self.ids if not 0 <= i < size]):
            raise TargetError(f"text: the token id {wrong[0]} is not among the {size} rows of the embedding.")
        names = inspect.signature(type(self.model).forward).parameters
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        self.running = True
        try:
            self.model(**{name: ids for name in ("input_ids", "decoder_input_ids") if name in names})
        finally:
            self.running = False
            for module in training:
                vars(module)["training"] = True


def reader(sites: Sites) -> nn.Module:
    """The outermost module around the sites that takes `input_ids`."""
    parts = sites[0].name.split(".")
    above = [sites.model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    found = [m for m in above if not hasattr(m, "training_step") and "input_ids" in _names(m)]
    if not found:
        raise TargetError(
            f"init='text' runs token ids through the model, and nothing around {sites[0].name!r} takes `input_ids`. "
            "Use init='normal'."
        )
    return found[0]


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


# ------------------------------------------------------------------ positions
class ShiftedPositions(Adapter):
    """p + length where positions become vectors: a learned table, or rotary angles."""

    def __init__(self, module: nn.Module, length: int, text: RealText | None) -> None:
        super().__init__()
        self.length, self.text = length, text
        self.rows: int | None = None
        if isinstance(module, nn.Embedding):  # RoBERTa and its like start behind the padding index
            self.rows = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        self.index = 0 if isinstance(module, nn.Embedding) else _names(module).index("position_ids")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.text is not None and self.text.running:  # the text of the prefix itself
            return base(*args, **kwargs)
        if "position_ids" in kwargs:
            return base(*args, **{**kwargs, "position_ids": kwargs["position_ids"] + self.length})
        if self.rows is not None and args[0].shape[-1] + self.length > self.rows:
            raise ValueError(
                f"{args[0].shape[-1]} tokens behind a prefix of {self.length} need more than the {self.rows} positions "
                "that the model learned. Shorten the text or the prefix, or leave shift_positions off."
            )
        before, positions, after = args[: self.index], args[self.index], args[self.index + 1 :]
        return base(*before, positions + self.length, *after, **kwargs)


def shifted(sites: Sites, length: int, text: RealText | None) -> Iterable[tuple[Site, Adapter]]:
    """An adapter at every place where the model turns positions into vectors; an error where there is none."""
    found = [(n, m) for n, m in sites.model.named_modules() if _takes_positions(n, m)]
    stacks = {site.stack for site in sites}
    if not found or len(stacks) > 1:
        raise TargetError(
            "shift_positions=True counts the text from the end of the prefix, and "
            + (
                f"there are {len(stacks)} stacks here."
                if found
                else "this model shows no table or rotation of positions."
            )
            + " Known: one stack with rotary positions or a learned table (not T5, BART, OPT, vision transformers). "
            "Leave shift_positions off: the prefix learns its place."
        )
    for name, module in found:
        yield Site(name, module, "positions"), ShiftedPositions(module, length, text)


def _takes_positions(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return name.rpartition(".")[2] in POSITIONS and type(module).forward is nn.Embedding.forward
    return type(module).__name__.endswith("RotaryEmbedding") and "position_ids" in _names(module)
