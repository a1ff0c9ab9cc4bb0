"""Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning. Wang, Panda, Karlinsky, Feris, Sun, Kim,
ICLR 2023. https://arxiv.org/abs/2303.02861
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.files import AdapterFileError, read_tensors
from lightning_peft.core.init import Draw
from lightning_peft.core.prompt import Prompt, TaskPrompt
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.prompt_start import START
from lightning_peft.methods.task_prompts import TaskPrompts


class DecomposedPrompt(TaskPrompt):
    """P_t = P o (U_t V_t): P (length, d), U_t (length, rank), V_t (rank, d)."""

    def __init__(self, rank: int, given: tuple[Tensor, Tensor] | None, *prompt: Any) -> None:
        self.rank, self.given = rank, given
        super().__init__(*prompt)

    def make(self) -> None:
        super().make()
        self.columns = nn.Parameter(torch.empty(self.tasks, self.length, self.rank))
        self.rows = nn.Parameter(torch.empty(self.tasks, self.rank, self.width))

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        for i, factor in enumerate((self.columns, self.rows)):
            draw.normal(factor, std=0.02, mean=self.rank**-0.5)
            if self.given is not None and not factor.is_meta:
                with torch.no_grad():
                    factor.copy_(self.given[i])

    def forward(self, batch: int) -> Tensor:
        ids = self.chosen(batch, self.tokens.device)
        return self.tokens * (self.columns[ids] @ self.rows[ids])


class MultitaskPrompt(TaskPrompts, name="multitask_prompt", family="soft prompt", paper="2303.02861", identity=False):
    """x' = [P o (U_t V_t); Emb(x)]

    P (length, d) is shared by all tasks; U_t (length, rank) and V_t (rank, d) are of the task t: length * d + tasks *
    rank * (length + d) parameters. All examples of a batch may be of different tasks: `task_ids` (batch,) in it, `task`
    for all, or `turn(model, ids)` around a call such as `generate`. U and V begin at N(rank^-1/2, 0.02^2), so that
    every task begins near P (peft: at N(0, 0.02^2), near no prompt).

    Source training has tasks=K. Target adaptation has init="prompt" and the directory of the source training as
    `source`: P, and the mean of its U and of its V. The paper's distillation from one teacher a task is not part of it.

    rank: of the factor of a task; source_task: start from U and V of this one in place of the means; shared_only: start
    from P alone, with new U and V. Source: section 3.
    """

    rank: int = 1
    source_task: int | None = None
    shared_only: bool = False

    def check(self) -> None:
        super().check()
        positive(self, "rank")
        if self.init != "prompt" and (self.source_task is not None or self.shared_only):
            raise FieldError("MultitaskPrompt: source_task and shared_only are about init='prompt'.")

    def portable(self) -> MultitaskPrompt:
        return dataclasses.replace(self, **START, source_task=None, shared_only=False)  # type: ignore[arg-type]

    def prompt(self, width: int, table: nn.Module | None) -> Prompt:
        given = self.factors(width) if self.init == "prompt" and not self.shared_only else None
        rest = self.length, width, self.start(width, table), table
        return DecomposedPrompt(self.rank, given, self.tasks, self.task, *rest)

    def factors(self, width: int) -> tuple[Tensor, Tensor]:
        """U (1, length, rank) and V (1, rank, d) of one source task, or their means."""
        if not isinstance(self.source, str):
            raise FieldError(f"MultitaskPrompt(source={self.source!r}): the factors of one directory are needed.")
        found = read_tensors(self.source)
        u, v = ([t for key, t in found.items() if key.endswith(f"/prompt.{name}")] for name in ("columns", "rows"))
        if len(u) != 1 or len(v) != 1:
            raise AdapterFileError(f"{self.source} holds no multitask_prompt; use shared_only=True for its prompt.")
        wanted = (self.length, self.rank), (self.rank, width)
        if (tuple(u[0].shape[1:]), tuple(v[0].shape[1:])) != wanted or not (self.source_task or 0) < len(u[0]):
            raise TargetError(
                f"source={self.source!r} holds factors {tuple(u[0].shape)} and {tuple(v[0].shape)}, tasks first; needed"
                f" are {wanted}, of source_task={self.source_task}."
            )
        if self.source_task is None:
            return u[0].mean(0, keepdim=True), v[0].mean(0, keepdim=True)
        return u[0][self.source_task, None], v[0][self.source_task, None]
