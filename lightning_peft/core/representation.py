"""Edits of hidden states at chosen positions: on what a block returns, or on what a projection inside it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.positions import Masks, Positions

CHECKPOINT = "_gradient_checkpointing_func"  # of a transformers block


class Edit(nn.Module):
    """e(h), (..., d) -> (..., d)"""

    def reset(self, draw: Draw, identity: bool) -> None:
        """Initial tensors; with `identity` such that e(h) = 0."""
        raise NotImplementedError(f"{type(self).__name__} has no reset(draw, identity).")

    def collapsed(self) -> dict[str, Tensor]:
        """The tensors that go into a file."""
        return dict(self.state_dict())


class Edited(Adapter):
    """h + m_first * e_first(h) + m_last * e_last(h); one edit: for both; none: h."""

    def __init__(
        self, edits: list[Edit], dropout: float = 0.0, identity: bool = False, *, time_first: bool = False
    ) -> None:
        super().__init__()
        self.dropout, self.identity, self.time_first = dropout, identity, time_first
        self.edit, self.edit_last = [*edits, None, None][:2]

    def edits(self) -> dict[str, Edit]:
        """Those that there are, by name."""
        return {n: e for n, e in (("edit", self.edit), ("edit_last", self.edit_last)) if e is not None}

    def reset(self, draw: Draw) -> None:
        for edit in self.edits().values():
            edit.reset(draw, self.identity)

    def edited(self, h: Tensor, masks: Masks | None) -> Tensor:  # (batch, time, d) -> (batch, time, d), or time first
        if masks is None or self.edit is None:
            return h
        first, last = ((m.T if self.time_first else m).unsqueeze(-1).to(h.dtype) for m in masks)
        if h.dim() == 2:  # a feed-forward layer that reads all tokens of a batch as rows (OPT)
            first, last = first.flatten(0, 1), last.flatten(0, 1)
        if self.edit_last is None:
            return h + (first + last) * self._dropped(self.edit(h))
        return h + first * self._dropped(self.edit(h)) + last * self._dropped(self.edit_last(h))

    def _dropped(self, e: Tensor) -> Tensor:
        return F.dropout(e, self.dropout, self.training)

    def collapsed(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, e in self.edits().items() for key, tensor in e.collapsed().items()}


class EditedBlock(Edited):
    """What a block returns; it also notes the positions of this call for the places inside."""

    def __init__(self, positions: Positions, first: int, last: int, *edits: Any, time_first: bool) -> None:
        super().__init__(*edits, time_first=time_first)
        self.positions: Any
        vars(self)["positions"] = positions  # it is registered where it listens
        self.first, self.last = first, last
        self.masks: Masks | None = None
        self.told: tuple[Masks | None] | None = None  # of a call that runs twice
        self.asked = False  # whether a place inside wants to know

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Masks | None:
        """The positions of this call."""
        given = args[0] if args else next(iter(kwargs.values()))
        return self.positions.mask(given.transpose(0, 1) if self.time_first else given, self.first, self.last)

    def twice(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        return functools.partial(self._told, self.of(args, kwargs), run)

    def _told(self, masks: Masks | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.told = (masks,)
        try:
            return run(*args, **kwargs)
        finally:
            self.told = None

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        masks = self.of(args, kwargs) if self.told is None else self.told[0]
        own = vars(self.place)
        checkpoint = own.get(CHECKPOINT)
        if checkpoint is not None:  # transformers checkpoints inside of this call, and runs that part again without it
            own[CHECKPOINT] = lambda run, *inputs: checkpoint(functools.partial(self.within, masks, run), *inputs)
        try:
            out = self.within(masks, base, *args, **kwargs)
        finally:
            if checkpoint is not None:
                own[CHECKPOINT] = checkpoint
        return changed(out, self.edited, masks)

    def within(self, masks: Masks | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block with the positions of this call noted."""
        if not self.asked:  # a compiled block that is checkpointed may note nothing
            return run(*args, **kwargs)
        self.masks = masks
        try:
            return run(*args, **kwargs)
        finally:
            self.masks = None


class Inside(Edited):
    """At a place inside a block, which tells it the positions."""

    def __init__(self, block: EditedBlock, *edits: Any, time_first: bool) -> None:
        super().__init__(*edits, time_first=time_first)
        self.block: Any
        vars(self)["block"] = block  # it is registered at the block
        block.asked = True


class EditedInput(Inside):
    """What a projection inside a block reads."""

    def forward(self, base: Callable[..., Tensor], h: Tensor) -> Tensor:  # (batch, time, d) -> (batch, time, d_out)
        return base(self.edited(h, self.block.masks))


class EditedOutput(Inside):
    """What a module inside a block returns, alone or first of several."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return changed(base(*args, **kwargs), self.edited, self.block.masks)


def changed(out: Any, change: Callable[..., Tensor], masks: Masks | None) -> Any:
    """`change` on what a module returned, a tensor or a tuple that starts with it."""
    return (change(out[0], masks), *out[1:]) if isinstance(out, tuple) else change(out, masks)
