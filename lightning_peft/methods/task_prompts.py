"""Prompts of several tasks that train together: each example says whose turn it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.prompt import TaskPrompt
from lightning_peft.methods.prompt_tuning import PromptTuning


class TaskPrompts(PromptTuning):
    """P_t for the task t of an example: `task_ids` (batch,) in the batch, or `task` for all, or `turn` around a call.

    `task_ids` are taken out where the outermost module takes `input_ids` or `pixel_values`; elsewhere use `turn`.

    tasks: how many; task: whose turn it is where nothing is said.
    """

    tasks: int = 1
    task: int | None = None

    def check(self) -> None:
        super().check()
        positive(self, "tasks")
        if self.task is not None and not 0 <= self.task < self.tasks:
            raise FieldError(f"{type(self).__name__}(task={self.task}): expected one of 0 to {self.tasks - 1}.")

    @contextlib.contextmanager
    def turn(self, model: nn.Module, task_ids: Tensor | list[int] | int) -> Iterator[None]:
        """Inside: the task of each example, or of all, such as in `generate`, which takes no names that it does not
        know.
        """
        ids = torch.as_tensor(task_ids).reshape(-1)
        placed = state.get_applied(model, self.label or self.info.name).placements
        prompts = [p for x in placed for p in x.adapter.modules() if isinstance(p, TaskPrompt)]
        before = [prompt.held for prompt in prompts]
        try:
            for prompt in prompts:
                prompt.ids, prompt.held = None, ids
            yield
        finally:
            for prompt, held in zip(prompts, before, strict=True):
                prompt.held = held
