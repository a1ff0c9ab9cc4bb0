"""Attention Fusion: a Light yet Efficient Late Fusion Mechanism for Task Adaptation in NLU. Cao, Satya Prakash, Hamza,
Findings of NAACL 2022. https://aclanthology.org/2022.findings-naacl.64
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import side as beside
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.side import Tap, first_of, given_to, with_first
from lightning_peft.core.sites import Site, Sites, TargetError


class Fusion(Tap):
    """z = sum_i softmax_i(<q, phi(h_i)> / sqrt(d_q) + b_i) h_i, at the last of the blocks that return h_i (..., d)"""

    def __init__(
        self, taps: list[Tap], read: list[int], width: int, key: int | None, embeddings: bool, last: float | None
    ) -> None:
        super().__init__()
        self.taps, self.read, self.embeddings, self.last = taps, read, embeddings, last
        self.q = nn.Parameter(torch.empty(key or width))
        self.k = nn.Parameter(torch.empty(key, width)) if key else None
        self.b = None if last is None else nn.Parameter(torch.empty(len(read) + embeddings))

    def reset(self, draw: Draw) -> None:
        draw.zeros(self.q)
        if self.k is not None:
            draw.kaiming_uniform(self.k)
        if self.b is not None and not self.b.is_meta:
            draw.zeros(self.b)
            with torch.no_grad():
                self.b[-1] = self.last or 0.0

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = self.frozen(base, *args, **kwargs)
        last = first_of(out).detach()
        seen = [*(tap.take() for tap in self.taps), (given_to(args, kwargs).detach(), last)]
        states = [seen[0][0]] if self.embeddings else []
        states += [seen[i][1] for i in self.read]
        return with_first(out, self.fused(torch.stack(states)).to(last.dtype))

    def fused(self, h: Tensor) -> Tensor:  # (L, ..., d) -> (..., d)
        k = h if self.k is None else F.linear(h, self.k.to(h.dtype))
        scores = (k @ self.q.to(k.dtype)).to(torch.promote_types(self.q.dtype, torch.float32)) / len(self.q) ** 0.5
        if self.b is not None:
            scores = scores + self.b.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1))
        return (scores.softmax(0).to(h.dtype).unsqueeze(-1) * h).sum(0)


class AttentionFusion(PEFT, name="attention_fusion", family="additive", paper="", identity=False, backprop=False):
    """z_t = sum_i w_ti h_ti, w_t = softmax_i(<q, phi(h_ti)> / sqrt(d)): each token chooses among its layers' states

    h_i (..., d) is what the frozen block i returns; z takes the place of what the last block returns, so that a final
    norm acts on z and all h_i are of one kind. q (d,) is trained, and the head. key: phi(h) = K h with K (key, d)
    trained, q (key,); None for phi(h) = h. embeddings: h_0, the input of the first block, is chosen from, too.
    init: q = 0, and "uniform" the mean of the states, or "last" a trained b_i is added to the scores, `bias` for the
    last layer and 0 for the others: near the base at step 0, nearer for a larger bias, which learns more slowly.
    Nothing is differentiated inside of the blocks, and of an encoder-decoder the decoder's are fused. The paper has no
    code, and its abstract (0.0009 % of the parameters) does not say which form it is: `key` and `bias` are ours.
    """

    targets: str | list[str] | None = "block"
    key: int | None = None
    embeddings: bool = False
    init: Literal["uniform", "last"] = "uniform"
    bias: float = 4.0

    def check(self) -> None:
        positive(self, "bias")
        if self.key is not None and self.key < 1:
            raise FieldError(f"AttentionFusion(key={self.key}): give a number of features, or None for h itself.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        stacks = beside.grouped(sites)
        decoders = {name for name in stacks if name.endswith("decoder")}
        for name, chosen in stacks.items():
            if decoders and name not in decoders:
                continue
            blocks = beside.every_block(sites, chosen)
            beside.check_stack(sites.model, blocks)
            last = blocks[-1]
            width = last.facts.hidden if last.role == "block" else last.out_features
            if width is None:
                raise TargetError(
                    f"AttentionFusion at {last.name!r}: the width is unknown. Name modules of a known one."
                )
            taps = [Tap() for _ in blocks[:-1]]
            yield from zip(blocks, taps, strict=False)
            names = {site.name for site in chosen}
            read = [i for i, block in enumerate(blocks) if block.name in names]
            bias = self.bias if self.init == "last" else None
            yield last, Fusion(taps, read, width, self.key, self.embeddings, bias)
