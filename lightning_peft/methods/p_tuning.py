"""P-Tuning: GPT Understands, Too. Liu, Zheng, Du, Ding, Qian, Yang, Tang, AI Open 2023. https://arxiv.org/abs/2103.10385"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites, TargetError


class BiLSTM(nn.Module):
    """Two layers, both directions, d/2 each: (length, d) -> (length, d). nn.LSTM, its names kept, does not compile."""

    layers = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.side = width // 2
        for name in self.names():
            columns = (width if "_ih" in name else self.side,) if name.startswith("weight") else ()
            self.register_parameter(name, nn.Parameter(torch.empty(4 * self.side, *columns)))

    def names(self) -> list[str]:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [f"{kind}_l{i}{side}" for i in range(self.layers) for side in ("", "_reverse") for kind in kinds]

    def reset(self, draw: Draw) -> None:
        for parameter in self.parameters():
            draw.uniform(parameter, bound=self.side**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(2 * self.layers, 1, self.side, dtype=x.dtype, device=x.device)
        weights: list[Any] = [self._parameters[name] for name in self.names()]
        return torch.lstm(x[None], (start, start), weights, True, self.layers, 0.0, False, True, True)[0][0]


class Template(Adapter):
    """y = base(ids) with the k-th pseudo token of each row replaced by h_k, h = MLP(biLSTM(E)): (total, d)."""

    def __init__(self, total: int, width: int, pseudo: list[int], encoder: str) -> None:
        super().__init__()
        self.total, self.ids = total, sorted(pseudo)
        self.met = False  # any pseudo token
        self.tokens = nn.Parameter(torch.empty(total, width))
        self.lstm = BiLSTM(width) if encoder == "lstm" else None
        linear = partial(skip_init, nn.Linear, width, width)  # itself it draws from the global generator
        self.mlp = None if encoder == "none" else nn.Sequential(linear(), nn.ReLU(), linear())

    def reset(self, draw: Draw) -> None:
        draw.normal(self.tokens, std=1.0)
        if self.lstm is not None:
            self.lstm.reset(draw)
        for linear in self.mlp or ():
            if isinstance(linear, nn.Linear):
                draw.kaiming_uniform(linear.weight)
                draw.uniform(linear.bias, bound=linear.in_features**-0.5)

    def rows(self) -> Tensor:  # (total, d)
        h: Tensor = self.tokens if self.lstm is None else self.lstm(self.tokens)
        return h if self.mlp is None else self.mlp(h)

    def forward(self, base: Callable[..., Tensor], ids: Tensor) -> Tensor:  # (..., time) -> (..., time, d)
        y = base(ids)
        found = ids == self.ids[0]
        for other in self.ids[1:]:
            found = found | (ids == other)
        if torch.compiler.is_compiling():
            self.met = True  # no numbers to look at
        else:
            self.check(found.sum(-1))
        h = F.embedding((found.cumsum(-1) - 1).clamp(0, self.total - 1), self.rows().to(y.dtype))
        return torch.where(found.unsqueeze(-1), h, y)

    def check(self, counts: Tensor) -> None:
        """A row has all pseudo tokens of the template, or none (a step of generation)."""
        if counts.is_meta:
            return
        self.met = self.met or bool(counts.any())
        if bool(((counts != 0) & (counts != self.total)).any()):
            raise ValueError(
                f"Rows with {sorted(set(counts.flatten().tolist()))} pseudo tokens; the template has {self.total}. Was "
                "one cut off? `method.filled(pieces, max_length=...)` makes ids that keep them."
            )

    def collapsed(self) -> dict[str, Tensor]:
        return {"tokens": self.rows().detach()}


class PTuning(PEFT, name="p_tuning", family="soft prompt", paper="2103.10385", identity=False):
    """Emb(x)_i = h_k where x_i is the k-th pseudo token, h = MLP(biLSTM(E))

    The text holds sum(template) reserved tokens wherever the template puts them, among words (anchors) and the input:
    `filled` makes such ids. Their embeddings are replaced, in the space behind the embedding's own scaling, so that
    lengths, masks, positions and labels need nothing. E (sum(template), d); a biLSTM of two layers, d/2 a direction; an
    MLP of two layers with ReLU. Adapter files hold the rows h: sum(template) * d numbers.

    pseudo: ids that no text has, such as [unused1] of BERT; several count as one. template: how many pseudo tokens
    stand together at each place. encoder: "lstm", "mlp" (no LSTM), or "none" (the rows themselves train). An
    encoder-decoder has the template in its encoder. Source: section 3.
    """

    targets: str | list[str] | None = "embed"
    template: list[int] = dataclasses.field(default_factory=lambda: [3, 3, 3])
    pseudo: int | list[int] = dataclasses.field(default_factory=list)
    encoder: Literal["lstm", "mlp", "none"] = "lstm"

    def check(self) -> None:
        if not self.template or min(self.template) < 0 or not self.total:
            raise FieldError(f"PTuning(template={self.template!r}): expected counts of 0 or more, not all 0.")
        if any(token < 0 for token in self.tokens):
            raise FieldError(f"PTuning(pseudo={self.pseudo!r}): expected ids of 0 or more.")

    @property
    def total(self) -> int:
        return sum(self.template)

    @property
    def tokens(self) -> list[int]:
        return [self.pseudo] if isinstance(self.pseudo, int) else list(self.pseudo)

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        if not self.tokens:
            raise TargetError("PTuning has no pseudo token. Name an id that no text has: PTuning(pseudo=1).")
        for site in [s for s in sites if not s.stack.endswith("decoder")] or sites:
            table: Any = site.module
            if not isinstance(table, nn.Embedding):
                raise TargetError(
                    f"PTuning replaces embeddings of token ids, and {site.name!r} is a {type(table).__name__}. Use "
                    "prompt_tuning or vpt."
                )
            if wrong := [token for token in self.tokens if token >= len(table.weight)]:
                raise TargetError(
                    f"pseudo: {wrong[0]} is not among the {len(table.weight)} rows of {site.name!r}. Take a reserved "
                    "id of the vocabulary; it need not grow."
                )
            if self.encoder == "lstm" and table.embedding_dim % 2:
                raise TargetError(f"{site.name!r} has an odd width, {table.embedding_dim}; use encoder='mlp'.")
            yield site, Template(self.total, table.embedding_dim, self.tokens, self.encoder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if not vars(self).get("_met"):
            vars(self)["_met"] = True
            placed = state.get_applied(pl_module, self.name_on_model).placements
            if not any(x.adapter.met for x in placed if isinstance(x.adapter, Template)):
                rank_zero_warn(
                    f"PTuning: the first batch has no pseudo token {self.tokens}, so nothing of the template trained. "
                    "Put them into the ids of each text with `method.filled(pieces)`."
                )

    def portable(self) -> PTuning:
        return dataclasses.replace(self, encoder="none")

    def filled(
        self, pieces: Sequence[Sequence[int]], max_length: int | None = None, cut: int | None = None
    ) -> list[int]:
        """pieces[0] P*t0 pieces[1] P*t1 ... pieces[-1]: ids of one text with the pseudo tokens in.

        pieces: one more than the template has counts; anchors and special tokens are in them, empty ones are fine.
        max_length: the end of the piece `cut` is left out as far as needed, never a pseudo token.
        """
        if not self.tokens or len(pieces) != len(self.template) + 1:
            raise ValueError(
                f"{len(pieces)} pieces for template={self.template} and pseudo={self.pseudo!r}; give "
                f"{len(self.template) + 1} pieces, and a pseudo token."
            )
        parts = [list(piece) for piece in pieces]
        over = sum(map(len, parts)) + self.total - (max_length or 10**9)
        if over > 0:
            if cut is None or len(parts[cut]) < over:
                raise ValueError(
                    f"{over} tokens too many for max_length={max_length}. Name a piece that may be cut (cut=1), and is "
                    "that long."
                )
            parts[cut] = parts[cut][: len(parts[cut]) - over]
        counts = [*self.template, 0]
        return [i for part, n in zip(parts, counts, strict=True) for i in (*part, *self.tokens[:1] * n)]
