"""Exploring Universal Intrinsic Task Subspace via Prompt Tuning. Qin, Wang, Su, Lin, Ding, Yi, et al., 2021.
https://arxiv.org/abs/2110.07867
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.files import AdapterFileError, read_tensors
from lightning_peft.core.init import Draw
from lightning_peft.core.prompt import Prompt, Start, TaskPrompt
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.task_prompts import TaskPrompts

DECODER = ("hidden_weight", "hidden_bias", "out_weight", "out_bias")


def decoded(z: Tensor, parts: list[Tensor], length: int) -> Tensor:  # (..., d_I) -> (..., length, d)
    hidden_weight, hidden_bias, out_weight, out_bias = parts
    flat = F.linear(torch.tanh(F.linear(z, hidden_weight, hidden_bias)), out_weight, out_bias)
    return flat.unflatten(-1, (length, -1))


def shapes(dimension: int, length: int, width: int) -> dict[str, tuple[int, ...]]:
    sizes = (width, dimension), (width,), (length * width, width), (length * width,)
    return dict(zip(DECODER, sizes, strict=True))


class AutoencodedPrompt(TaskPrompt):
    """Dec(Enc(P_t)): P (tasks, length, d), Enc (d_I, length d), Dec = (d, d_I), tanh, (length d, d)."""

    def __init__(self, dimension: int, reconstruction: float, *prompt: Any) -> None:
        self.dimension, self.reconstruction = dimension, reconstruction
        super().__init__(*prompt)

    def make(self) -> None:
        self.tokens = nn.Parameter(torch.empty(self.tasks, self.length, self.width))
        self.encoder_weight = nn.Parameter(torch.empty(self.dimension, self.length * self.width))
        self.encoder_bias = nn.Parameter(torch.empty(self.dimension))
        for name, shape in shapes(self.dimension, self.length, self.width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def reset(self, draw: Draw) -> None:
        for tokens in self.tokens.detach():
            self.start.fill(tokens, self.table, draw)
        for name in ("encoder", "hidden", "out"):
            weight: Any = getattr(self, f"{name}_weight")
            draw.kaiming_uniform(weight)
            draw.uniform(getattr(self, f"{name}_bias"), bound=weight.shape[1] ** -0.5)

    def rebuilt(self, tokens: Tensor) -> Tensor:  # (n, length, d) -> (n, length, d)
        z = F.linear(tokens.flatten(1), self.encoder_weight, self.encoder_bias)
        return decoded(z, [getattr(self, name) for name in DECODER], self.length)

    def forward(self, batch: int) -> Tensor:
        ids = self.chosen(batch, self.tokens.device)
        return self.rebuilt(self.tokens[ids]) if len(ids) < self.tasks else self.rebuilt(self.tokens)[ids]

    def penalty(self) -> Tensor | None:
        return self.reconstruction * F.mse_loss(self.rebuilt(self.tokens), self.tokens) if self.reconstruction else None


class LatentPrompt(Prompt):
    """P = Dec(z): z (d_I,) is trained, Dec comes from a file and stays."""

    def __init__(self, directory: str, dimension: int, *prompt: Any) -> None:
        self.directory, self.dimension = directory, dimension
        super().__init__(*prompt)

    def make(self) -> None:
        self.z = nn.Parameter(torch.empty(self.dimension))
        for name, shape in shapes(self.dimension, self.length, self.width).items():
            self.register_buffer(name, torch.empty(shape), persistent=False)
        self.read()  # before anything is changed

    def read(self) -> dict[str, Tensor]:
        tensors = read_tensors(self.directory)
        found = {n: [t for key, t in tensors.items() if key.endswith(f"/prompt.{n}")] for n in DECODER}
        wanted = shapes(self.dimension, self.length, self.width)
        if any(len(here) != 1 for here in found.values()):
            raise AdapterFileError(f"{self.directory} holds no decoder. Give the directory of an IPT(stage=1).")
        if wrong := [(n, tuple(t.shape)) for n, (t,) in found.items() if tuple(t.shape) != wanted[n]]:
            raise TargetError(
                f"source={self.directory!r} has {wrong[0][0]} {wrong[0][1]}; {wanted[wrong[0][0]]} is needed. Use the "
                "length and the dimension of stage 1, on the same base."
            )
        return {name: tensor for name, (tensor,) in found.items()}

    @torch.no_grad()
    def reset(self, draw: Draw) -> None:
        draw.normal(self.z, std=0.02)
        for name, tensor in self.read().items():
            self._buffers[name].copy_(tensor)  # type: ignore[union-attr]

    def forward(self, batch: int) -> Tensor:
        return decoded(self.z, [getattr(self, name).to(self.z) for name in DECODER], self.length)[None]

    def collapsed(self) -> dict[str, Tensor]:
        return {"tokens": self(1)[0].detach()}


class IPT(TaskPrompts, name="ipt", family="soft prompt", paper="2110.07867", identity=False):
    """x' = [Dec(z); Emb(x)], Dec(z) = W_2 tanh(W_1 z + c) + b

    stage 1 finds a subspace of prompts: P_t of `tasks` tasks train together with Enc (d_I, length d) and Dec, through
    Dec(Enc(P_t)), with reconstruction * MSE(Dec(Enc(P)), P) over all tasks added to the loss; `task_ids` (batch,) in
    the batch say whose turn it is. Its adapter directory is the `source` of stage 2, which trains z alone, d_I =
    dimension parameters from N(0, 0.02^2), with the decoder frozen; files of stage 2 hold the prompt Dec(z), as prompt
    tuning. `source` must stay where it is while z trains. The paper smooths the labels by 0.1: the loss is yours.

    dimension: d_I; stage: 1 or 2; reconstruction: the factor of the error of the auto-encoder. Source: section 3.
    """

    dimension: int = 250
    stage: int = 1
    reconstruction: float = 200.0

    def check(self) -> None:
        positive(self, "length", "vocabulary", "dimension")
        not_negative(self, "reconstruction")
        if self.stage not in (1, 2) or (self.stage == 2) != (isinstance(self.source, str) and self.init == "uniform"):
            raise FieldError(
                f"IPT(stage={self.stage}, source={self.source!r}, init={self.init!r}): stage is 1, or 2 with source= "
                "the adapter directory of stage 1 and no init."
            )
        given = self.tasks, self.task, self.text, self.labels, self.tokenizer, self.weights
        if self.stage == 1:
            super().check()
        elif given != (1, None, None, None, None, None):
            raise FieldError("IPT(stage=2) is about one task and starts at random: leave tasks, task, text, ... away.")

    def prompt(self, width: int, table: nn.Module | None) -> Prompt:
        if self.stage == 2:
            return LatentPrompt(str(self.source), self.dimension, self.length, width, Start())
        rest = self.tasks, self.task, self.length, width, self.start(width, table), table
        return AutoencodedPrompt(self.dimension, self.reconstruction, *rest)

    def portable(self) -> PromptTuning:
        if self.stage == 1:
            return super().portable()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(PromptTuning)}
        return PromptTuning(**{**fields, "source": None})
