"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li, Liang, ACL 2021. https://arxiv.org/abs/2101.00190"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.attention import widen_mask
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.real_text import RealText, reader, shifted
from lightning_peft.core.sites import Site, Sites, TargetError


class Trunk(nn.Module):
    """z = tanh(W E + b): E (length, d), W (mid, d), z (length, mid); one for all layers."""

    def __init__(self, length: int, width: int, middle: int, draw: Callable[[], Draw]) -> None:
        super().__init__()
        self.draw = draw
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.weight = nn.Parameter(torch.empty(middle, width))
        self.bias = nn.Parameter(torch.empty(middle))

    def reset(self) -> None:
        draw = self.draw()  # its own: it belongs to no single layer
        draw.normal(self.embedding, std=1.0)
        draw.kaiming_uniform(self.weight)
        draw.uniform(self.bias, bound=self.weight.shape[1] ** -0.5)

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class Prefix(Adapter):
    """Att(q, [P_K; k], [P_V; v]): P_K, P_V (length, kv_heads, head_dim), visible to every query."""

    def __init__(
        self, length: int, kv_heads: int, head_dim: int, dropout: float = 0.0, text: RealText | None = None
    ) -> None:
        super().__init__()
        self.length, self.kv_heads, self.head_dim, self.dropout = length, kv_heads, head_dim, dropout
        self.text = text  # where it starts
        self.make()

    def make(self) -> None:
        self.kv = nn.Parameter(torch.empty(2, self.length, self.kv_heads, self.head_dim))

    def reset(self, draw: Draw) -> None:
        if self.text is None:
            draw.normal(self.kv, std=1.0)
        elif not self.kv.is_meta:
            self.kv.data.copy_(self.text.kv(self))

    def prefix(self) -> Tensor:  # (2, length, kv_heads, head_dim)
        return self.kv

    def forward(
        self, base: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:  # query (batch, heads, time, head_dim), key and value (batch, kv_heads, source, head_dim)
        if self.text is not None and self.text.running:
            self.text.note(self, key, value)
            return base(query, key, value, mask, **options)
        kv = F.dropout(self.prefix(), self.dropout, self.training).to(key.dtype).transpose(1, 2)
        keys, values = (in_front(p, x) for p, x in zip(kv, (key, value), strict=True))
        mask, options = self.widened(query, key, mask, options)
        return base(query, keys, values, mask, **options)

    def widened(self, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> tuple[Any, Any]:
        """The mask, and the options with T5's position bias, for the prefix in front of `key`."""
        if (bias := options.get("position_bias")) is not None:
            options = {**options, "position_bias": F.pad(bias, (self.length, 0))}
        causal = options.get("is_causal", False)
        return widen_mask(mask, self.length, query, key, is_causal=causal), options

    def collapsed(self) -> dict[str, Tensor]:
        return {"kv": self.prefix().detach()}


class ReparametrisedPrefix(Prefix):
    """[P_K; P_V] = U z + c: z (length, mid) of the shared trunk, U (2 kv_heads head_dim, mid)."""

    def __init__(self, trunk: Trunk, length: int, kv_heads: int, head_dim: int, dropout: float) -> None:
        self.middle = len(trunk.bias)
        super().__init__(length, kv_heads, head_dim, dropout)
        self.trunk = trunk

    def make(self) -> None:
        self.weight = nn.Parameter(torch.empty(2 * self.kv_heads * self.head_dim, self.middle))
        self.bias = nn.Parameter(torch.empty(2 * self.kv_heads * self.head_dim))

    def reset(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.weight)
        draw.uniform(self.bias, bound=self.middle**-0.5)
        self.trunk.reset()

    def prefix(self) -> Tensor:
        flat = F.linear(self.trunk(), self.weight, self.bias)
        return flat.unflatten(1, (2, self.kv_heads, self.head_dim)).transpose(0, 1)


class PrefixTuning(PEFT, name="prefix_tuning", family="soft prompt", paper="2101.00190", identity=False):
    """Att(q, [P_K; K], [P_V; V]), [P_K; P_V] = MLP(E)

    Each attention layer gets `length` trained keys and values in front of its own, after the KV cache, without
    positions, visible to every query; a grouped-query layer gets them per key/value head. An encoder-decoder gets three
    kinds: of the encoder, of the decoder, and of its look at the encoder. L * 2 * length * kv_heads * head_dim
    parameters. bottleneck > 0 trains them through an embedding E (length, d) and an MLP whose first layer, of this
    width, all layers of a kind share; adapter files hold the prefixes themselves, checkpoints of a run the MLP.

    init: "normal" N(0, 1), or "text": what the layers have for the `length` token ids in `text`, keys with their
    positions (section 7.4; the best start where data are few). shift_positions: the text counts its positions from
    `length` on, as with the authors (and with peft), where the model has one table or rotation of positions; without,
    it keeps the positions that it was trained with. Source: section 4.
    """

    targets: str | list[str] | None = "attend,cross.attend?"
    length: int = 20
    bottleneck: int = 0
    dropout: float = 0.0
    init: Literal["normal", "text"] = "normal"
    text: list[int] | None = None
    shift_positions: bool = False

    def check(self) -> None:
        positive(self, "length")
        not_negative(self, "bottleneck")
        probability(self, "dropout")
        given = len(self.text or [])
        if given != (self.length if self.init == "text" else 0) or (given and self.middle):
            raise FieldError(
                f"{type(self).__name__}(init={self.init!r}, length={self.length}) with {given} token ids in `text` and "
                f"an MLP of width {self.middle}: init='text' takes as many ids as the prefix is long, and no MLP."
            )

    @property
    def middle(self) -> int:
        """Width of the MLP; 0 for none."""
        return self.bottleneck

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        trunks: dict[str, Trunk] = {}
        text = RealText(reader(sites), self.text or []) if self.init == "text" else None
        if self.shift_positions:
            yield from shifted(sites, self.length, text)
        for site in sites:
            kv_heads, head_dim, width = heads(site)
            if not self.middle:
                yield site, Prefix(self.length, kv_heads, head_dim, self.dropout, text)
                continue
            kind = f"{site.stack}/{site.role}"
            if kind not in trunks:
                trunks[kind] = Trunk(self.length, width, self.middle, partial(Draw, self.seed, f"{kind}/prefix trunk"))
            yield site, ReparametrisedPrefix(trunks[kind], self.length, kv_heads, head_dim, self.dropout)

    def portable(self) -> PrefixTuning:
        return dataclasses.replace(self, bottleneck=0, init="normal", text=None)


def in_front(p: Tensor, x: Tensor) -> Tensor:
    """p ([batch,] heads, length, head_dim) before x (batch, heads, source, features); features of others are zero."""
    p = p.expand(len(x), *p.shape[-3:])
    return torch.cat([p if p.shape[-1] == x.shape[-1] else F.pad(p, (0, x.shape[-1] - p.shape[-1])), x], 2)


def heads(site: Site) -> tuple[int, int, int]:
    """kv_heads, head_dim, hidden width; an error where the model does not tell."""
    facts = site.facts
    if facts.heads is None or facts.head_dim is None:
        raise TargetError(f"The numbers of heads at {site.name!r} are unknown; exclude it with exclude={site.name!r}.")
    if site.part != "attend":
        raise TargetError(
            f"Keys and values are added inside attention, and {site.name!r} (role {site.role}) is no such place. "
            "Choose the roles 'attend' and 'cross.attend', and narrow them with layers= and exclude=."
        )
    return facts.kv_heads or facts.heads, facts.head_dim, facts.hidden or facts.heads * facts.head_dim
