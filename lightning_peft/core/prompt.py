"""Prompts: the rows that virtual tokens are made of, how they start, and which of several tasks' a batch gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.init import Draw


@dataclass(frozen=True)
class Start:
    """How the rows of a prompt begin.

    kind: "uniform" in [-0.5, 0.5], "normal" N(0, 1), "vocabulary" (different ones of the `vocabulary` first rows of the
    table), "text" (the embeddings of one list of ids, repeated or cut to the length), "labels" (the mean embedding of
    each list of ids, the rest as "vocabulary"), or "rows", which are given.
    """

    kind: str = "uniform"
    vocabulary: int = 0
    ids: tuple[tuple[int, ...], ...] = ()
    rows: Tensor | None = None

    def fill(self, tokens: Tensor, table: Any, draw: Draw) -> None:  # (length, d)
        if self.kind == "uniform":
            draw.uniform(tokens, bound=0.5)
        elif self.kind == "normal":
            draw.normal(tokens, std=1.0)
        elif not tokens.is_meta:
            with torch.no_grad():
                tokens.copy_(self.taken(len(tokens), table, draw))

    def taken(self, length: int, table: Any, draw: Draw) -> Tensor:
        """Rows that are there already: (length, d)."""
        if self.rows is not None:
            return self.rows
        if self.kind == "text":
            return embedded(table, [self.ids[0][i % len(self.ids[0])] for i in range(length)])
        means = [embedded(table, list(ids)).float().mean(0) for ids in self.ids]
        more = draw.integers(min(self.vocabulary, len(table.weight)), length - len(means))
        rest = embedded(table, more.tolist()).float()
        return torch.cat([torch.stack(means), rest]) if means else rest


def embedded(table: nn.Module, ids: list[int]) -> Tensor:
    """What the model makes of these ids (length, d), its own factor on embeddings included; no view of the table."""
    weight: Any = table.weight
    return table(torch.tensor(ids, device=weight.device, dtype=torch.long))  # type: ignore[no-any-return]


class Prompt(nn.Module):
    """P (length, d), trained as it is. Others compute their rows: override `make`, `forward` and `reset`."""

    tokens: nn.Parameter

    def __init__(self, length: int, width: int, start: Start, table: nn.Module | None = None) -> None:
        super().__init__()
        self.length, self.width, self.start = length, width, start
        self.table: Any
        vars(self)["table"] = table  # not registered: it is the base's own embedding
        self.make()

    def make(self) -> None:
        self.tokens = nn.Parameter(torch.empty(self.length, self.width))

    def forward(self, batch: int) -> Tensor:
        """(1, length, d), or (batch, length, d) where examples have prompts of their own."""
        return self.tokens.expand(1, -1, -1)  # no view: its gradient would hold that of the text too

    def reset(self, draw: Draw) -> None:
        self.start.fill(self.tokens, self.table, draw)

    def penalty(self) -> Tensor | None:
        return None

    def collapsed(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class TaskPrompt(Prompt):
    """One of `tasks` prompts for each example: by `ids` of the batch (batch,), else the one called `task`."""

    def __init__(self, tasks: int, task: int | None, *prompt: Any) -> None:
        self.tasks = tasks
        self.task = 0 if tasks == 1 else task
        self.ids: Tensor | None = None  # of this batch
        self.held: Tensor | None = None  # of all batches, while somebody says so
        super().__init__(*prompt)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": None, "held": None}

    def chosen(self, batch: int, device: torch.device) -> Tensor:
        """The task of each example: (batch,), or (1,) where it is one for all."""
        ids = self.ids if self.ids is not None else self.held
        if ids is None:
            if self.task is None:
                raise ValueError(
                    f"A prompt for each of {self.tasks} tasks is known, and not whose turn it is. Put `task_ids` "
                    "(batch,) into the batch, set `task=`, or use `method.turn(model, task_ids)` around the call."
                )
            return torch.tensor([self.task], device=device)
        if ids.dim() != 1 or batch % len(ids):
            raise ValueError(f"task_ids is {tuple(ids.shape)} for a batch of {batch}; give one for each example.")
        if not (ids.is_meta or torch.compiler.is_compiling()) and bool(((ids < 0) | (ids >= self.tasks)).any()):
            raise ValueError(f"task_ids={ids.tolist()}: there are {self.tasks} tasks, 0 to {self.tasks - 1}.")
        return ids.to(device).long().repeat_interleave(batch // len(ids))  # beams are copies of an example
