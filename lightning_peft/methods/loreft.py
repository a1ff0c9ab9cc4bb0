"""ReFT: Representation Finetuning for Language Models. Wu et al., NeurIPS 2024. https://arxiv.org/abs/2404.03592"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.positions import Positions, mask_owner
from lightning_peft.core.sites import Site, Sites, TargetError


class LowRankEdit(nn.Module):
    """e(h) = R^T (W h + b - R h): R (r, d) with R R^T = I, W (r, d), b (r,)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.empty(rank, width))
        self.w = nn.Parameter(torch.empty(rank, width))
        self.b = nn.Parameter(torch.empty(rank))

    def reset(self, draw: Draw, identity: bool) -> None:
        draw.orthonormal_rows(self.r)
        if identity:
            with torch.no_grad():
                self.w.copy_(self.r)
            draw.zeros(self.b)
        else:
            draw.kaiming_uniform(self.w)
            draw.uniform(self.b, bound=self.w.shape[1] ** -0.5)

    def rotation(self) -> Tensor:  # (r, d)
        """The orthonormal rows that `r` stands for: Q of its QR decomposition, signs fixed.

        An orthonormal r is its own.
        """
        with torch.autocast(self.r.device.type, enabled=False):
            r = self.r if self.r.dtype == torch.float64 else self.r.float()
            q, upper = torch.linalg.qr(r.T)
            return (q * torch.sign(torch.diagonal(upper))).T

    def forward(self, h: Tensor) -> Tensor:  # (batch, time, d) -> (batch, time, d)
        r = self.rotation().to(h.dtype)
        return (F.linear(h, self.w.to(h.dtype), self.b.to(h.dtype)) - F.linear(h, r)) @ r


class LoReFTBlock(Adapter):
    """h + m_first * e_first(h) + m_last * e_last(h) on what a block returns; tied: one e for both."""

    def __init__(
        self,
        positions: Positions,
        width: int,
        rank: int,
        first: int,
        last: int,
        tied: bool,
        dropout: float,
        identity: bool,
    ) -> None:
        super().__init__()
        self.positions: Any
        vars(self)["positions"] = positions  # it is registered where it listens
        self.first, self.last, self.dropout, self.identity = first, last, dropout, identity
        self.edit = LowRankEdit(width, rank)
        self.edit_last = None if tied else LowRankEdit(width, rank)

    def reset(self, draw: Draw) -> None:
        for edit in (self.edit, self.edit_last):
            if edit is not None:
                edit.reset(draw, self.identity)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        given = args[0] if args else next(iter(kwargs.values()))
        masks = self.positions.mask(given, self.first, self.last)
        if isinstance(out, tuple):
            return (self.edited(out[0], masks), *out[1:])
        return self.edited(out, masks)

    def edited(self, h: Tensor, masks: tuple[Tensor, Tensor] | None) -> Tensor:
        if masks is None:
            return h
        first, last = (mask.unsqueeze(-1).to(h.dtype) for mask in masks)
        if self.edit_last is None:
            return h + (first + last) * self._dropped(self.edit(h))
        return h + first * self._dropped(self.edit(h)) + last * self._dropped(self.edit_last(h))

    def _dropped(self, e: Tensor) -> Tensor:
        return F.dropout(e, self.dropout, self.training)

    def collapsed(self) -> dict[str, Tensor]:
        state = dict(self.state_dict())
        for name, edit in (("edit", self.edit), ("edit_last", self.edit_last)):
            if edit is not None:
                state[f"{name}.r"] = edit.rotation().detach()
        return state


class LoReFT(PEFT, name="loreft", family="representation", paper="2404.03592", identity=False):
    """h' = h + R^T (W h + b - R h), R R^T = I

    h (d,) is what a block returns at the first `first` and the last `last` tokens of the prompt: real tokens by the
    padding mask, before the first counted label where there are labels a token, at most half of them each; none while
    a KV cache is extended. tied: one (R, W, b) a block for both ends, else two. L (2 r d + r) parameters when tied.
    identity=True starts with W = R, b = 0, the base at step 0 (not in the paper). R stays orthonormal by a QR
    decomposition.
    `dropout` acts on
    the edit (the authors' code drops the whole h'). In an encoder-decoder the encoder is edited. Source: section 3.2,
    equation 2. Generation needs its KV cache (the default).
    """

    targets: str | list[str] | None = "block"
    rank: int = 4
    first: int = 7
    last: int = 7
    tied: bool = True
    dropout: float = 0.0
    identity: bool = False

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "first", "last")
        probability(self, "dropout")
        if not self.first + self.last:
            raise FieldError("LoReFT(first=0, last=0) edits no position; give at least one.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        chosen = [site for site in sites if not site.stack.endswith("decoder")] or list(sites)
        listeners: dict[int, Positions] = {}
        for site in chosen:
            if site.facts.hidden is None or site.facts.hidden < self.rank:
                raise TargetError(
                    f"LoReFT(rank={self.rank}) at {site.name!r}: the hidden width is {site.facts.hidden or 'unknown'}. "
                    "Choose a rank up to the width, on blocks of a known one."
                )
            names = [".".join(site.name.split(".")[:i]) for i in range(site.name.count(".") + 1)]
            owner = mask_owner([m for m in map(sites.model.get_submodule, names) if not hasattr(m, "training_step")])
            if id(owner) not in listeners:
                listeners[id(owner)] = positions = Positions(owner or site.module, site.facts.causal is True)
                name = next((n for n in names if sites.model.get_submodule(n) is owner), None)
                if owner is not None:
                    yield Site(name or "", owner, "model"), positions
            shape = site.facts.hidden, self.rank, self.first, self.last, self.tied, self.dropout, self.identity
            yield site, LoReFTBlock(listeners[id(owner)], *shape)
