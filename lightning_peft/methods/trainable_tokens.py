"""Rows of an embedding that train alone: new tokens, or the meaning of some that are there. Hugging Face peft, 2025.
https://huggingface.co/docs/peft/package_reference/trainable_tokens
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import sites as places
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw
from lightning_peft.core.projection import base_weight
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import Shape, matrix_shape


class Rows(nn.Module):
    """The rows R (n, width) of the tokens t (n,), ascending; tied modules hold the same one."""

    tokens: Tensor

    def __init__(self, tokens: list[int], width: int) -> None:
        super().__init__()
        self.chosen = sorted(tokens)
        self.rows = nn.Parameter(torch.empty(len(tokens), width))
        self.register_buffer("tokens", torch.tensor(self.chosen), persistent=False)  # the method's field says them

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """R = W[t]: weight (V, width)"""
        if not weight.is_meta and not self.rows.is_meta:
            self.tokens.copy_(torch.tensor(self.chosen))
            self.rows.copy_(weight[self.tokens])

    def change(self, weight: Tensor) -> Tensor:
        """R - W[t] (n, width), whatever the base holds there: a vocabulary made longer is random there each time"""
        return self.rows - weight[self.tokens].to(self.rows.dtype)


class EmbeddedRows(Adapter):
    """y[i] = base(x)[i], and R[k] where x[i] = t[k], times the factor that the model puts on its embeddings.

    More exactly R[k] - W[t[k]] on top of it, so that what lies inside stays.
    """

    additive = True
    reads_weight = True

    def __init__(self, shared: Rows, first: bool) -> None:
        super().__init__()
        self.shared, self.mirrors = shared, not first

    def reset(self, draw: Draw) -> None:
        self.shared.start(base_weight(self.place).T)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (...) -> (..., width)
        y, tokens, count = base(x), self.shared.tokens, len(self.shared.rows)
        found = torch.searchsorted(tokens, x).clamp(max=count - 1)
        found = torch.where(tokens[found] == x, found, count)  # the row after the last is zero, and stays so
        table = F.pad(self.shared.change(base_weight(self.place).T), (0, 0, 0, 1)).to(y.dtype)
        more = F.embedding(found, table, padding_idx=count)
        gain = getattr(self.place, "embed_scale", None)
        return y + (more if gain is None else more * (gain.to(y.dtype) if isinstance(gain, Tensor) else gain))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(1, self.shared.tokens, self.shared.rows.T.to(weight)), bias


class ScoredRows(EmbeddedRows):
    """y[..., t] = R x + b[t] and y elsewhere as it is: the rows of a projection, such as the head that is tied."""

    def reset(self, draw: Draw) -> None:
        self.shared.start(base_weight(self.place))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (..., width) -> (..., V)
        y = base(x)
        more = F.linear(x, self.shared.change(base_weight(self.place)).to(x.dtype))
        return y.index_add(-1, self.shared.tokens, more.to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.shared.tokens, self.shared.rows.to(weight)), bias


class TrainableTokens(PEFT, name="trainable_tokens", family="selective", mergeable=True):
    """E[t] = r_t for the chosen tokens t; all other rows of E stay

    The rows r_t start at the base's: the base at step 0. Where the embedding is tied to a head (or to another
    embedding), the rows of that are the same ones, and stay tied after a merge. len(tokens) * width parameters. No
    gradient of the size of the vocabulary is made. targets may name projections too: the rows of their weight train,
    such as those of an untied head ("embed,lm_head"). Files hold the rows themselves, not their change: they are right
    on a base whose vocabulary was made longer anew. Same as peft's `trainable_token_indices`, without its copy of the
    weight in every forward.

    tokens: their ids, in any order; the rows are kept by ascending id. embed: the role, which in some models holds
    positions too; then name the module, such as "*.word_embeddings".
    """

    targets: str | list[str] | None = "embed"
    tokens: list[int] = dataclasses.field(default_factory=list)

    def check(self) -> None:
        if len(set(self.tokens)) < len(self.tokens) or any(token < 0 for token in self.tokens):
            raise FieldError(f"TrainableTokens(tokens={self.tokens!r}): expected different ids of 0 or more.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        if not self.tokens:
            raise TargetError("TrainableTokens has no tokens. Name their ids: TrainableTokens(tokens=[32000, 32001]).")
        done: set[int] = set()
        for site in sites:
            if id(site.module) in done:
                continue  # tied to one before
            shared: Rows | None = None
            for tied in together(site, sites.model):
                shape = self.shape(tied)
                embedding = shape.kind == "embedding"
                first = shared is None
                shared = shared or Rows(self.tokens, shape.d_out if embedding else shape.d_in)
                yield tied, (EmbeddedRows if embedding else ScoredRows)(shared, first)
                done.add(id(tied.module))

    def shape(self, site: Site) -> Shape:
        """That of an embedding or a projection which has the tokens."""
        shape, padding = matrix_shape(site, "TrainableTokens"), getattr(site.module, "padding_idx", None)
        if shape.kind == "convolution" or site.columns is not None or site.part is not None:
            raise TargetError(
                f"TrainableTokens trains rows of embeddings and of whole projections, and {site.name!r} "
                f"({type(site.module).__name__}, role {site.role}) is neither. Name others in targets."
            )
        size = shape.d_in if shape.kind == "embedding" else shape.d_out
        if wrong := [token for token in self.tokens if token >= size or token == padding]:
            why = "its padding token, which gets no gradient" if wrong[0] == padding else f"not among its {size} rows"
            raise TargetError(f"tokens: {wrong[0]} at {site.name!r} is {why}. Leave it out, or name other targets.")
        return shape


def together(site: Site, model: nn.Module) -> list[Site]:
    """The site, and those of the modules of the model that hold the very same weight."""
    weight = site.module._parameters.get("weight")
    names = [
        name
        for name, module in model.named_modules()
        if module is not site.module and weight is not None and module._parameters.get("weight") is weight
    ]
    return [site, *(places.sites(model, f"re:{re.escape(name)}")[0] for name in names)]
