"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning. Mao et al., ACL 2022.
https://arxiv.org/abs/2110.07577
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init
from lightning_peft.core.fields import not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.positions import Masks, RealTokens, takes_mask
from lightning_peft.core.representation import EditedBlock
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.stream import closing_norm, edit_output
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.loreft import puts_time_first
from lightning_peft.methods.prefix_tuning import Prefix, ReparametrisedPrefix, Trunk, heads, in_front


class Gate(nn.Module):
    """g = sigmoid(w u + b), u (batch, time, d): a number a token, or its mean over the (real) tokens of each text."""

    def __init__(self, width: int, block: Around) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(1, width)), nn.Parameter(torch.empty(1))
        self.block: Any
        vars(self)["block"] = block  # it is registered at the block

    def reset(self, draw: Draw) -> None:
        draw.normal(self.weight, std=0.02)
        draw.zeros(self.bias)

    def forward(self, u: Tensor, *, time_first: bool = False) -> Tensor:  # (batch, time, d) -> (batch, time or 1, 1)
        g = torch.sigmoid(F.linear(u, self.weight.to(u.dtype), self.bias.to(u.dtype)))
        if self.block.per_token:
            return g
        dim, masks = (0 if time_first else 1), self.block.masks
        if masks is None:
            return g.mean(dim, keepdim=True)
        real = (masks[0].T if time_first else masks[0]).unsqueeze(-1).to(g.dtype)
        return (g * real).sum(dim, keepdim=True) / real.sum(dim, keepdim=True).clamp(min=1)


class GatedDown(Bottleneck):
    """g D(u): the bottleneck with its gate."""

    def __init__(self, width: int, block: Around, *shape: Any, time_first: bool) -> None:
        super().__init__(width, *shape)
        self.gate, self.time_first = Gate(width, block), time_first

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        self.gate.reset(draw)

    def bottleneck(self, u: Tensor) -> Tensor:
        return self.gate(u, time_first=self.time_first) * super().bottleneck(u)


class GatedNorm(GatedDown):
    """y = LN(s + g D(LN(s))), at the norm that closes a post-norm block."""

    def around(self, change: Callable[[Tensor], Tensor], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return base(args[0] + change(base(args[0])))


class Around(EditedBlock):
    """Around a block: tells the gates inside which tokens are real; y + g D(y) on what a pre-norm block returns."""

    def __init__(self, positions: RealTokens | None, per_token: bool, time_first: bool) -> None:
        super().__init__(positions, 0, 0, [], time_first=time_first)  # type: ignore[arg-type]
        self.per_token = per_token
        self.asked = True  # by the gates
        self.after: GatedDown | None = None

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Masks | None:
        return None if self.positions is None else super().of(args, kwargs)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.positions is not None:
            return super().forward(base, *args, **kwargs)
        return edit_output(lambda y: self.edited(y, None), base(*args, **kwargs))

    def edited(self, h: Tensor, masks: Masks | None) -> Tensor:
        if self.after is None:
            return h
        self.masks = masks
        try:
            return h + self.after.bottleneck(h)
        finally:
            self.masks = None

    def reset(self, draw: Draw) -> None:
        if self.after is not None:
            self.after.reset(draw)

    def collapsed(self) -> dict[str, Tensor]:
        return dict(self.state_dict())


class GatedPrefix(Prefix):
    """Att(q, [g P_K; k], [g P_V; v]): g from the input of the attention layer, which the query projection reads."""

    gate: Gate

    def gated(self, width: int, block: Around) -> GatedPrefix:
        """The prefix with its gate."""
        self.gate = Gate(width, block)
        self.value: Tensor | None = None
        return self

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        self.gate.reset(draw)

    def read(self, x: Tensor) -> None:
        """Note the gate of this call."""
        self.value = self.gate(x)

    def forward(
        self, base: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:  # query (batch, heads, time, head_dim), key and value (batch, kv_heads, source, head_dim)
        g, self.value = self.value, None
        kv = [p.expand(len(key), -1, -1, -1) for p in self.prefix().to(key.dtype).transpose(1, 2)]
        mask, options = self.widened(query, key, mask, options)
        g = g.to(key.dtype)[:, None]  # type: ignore[union-attr]  # (batch, 1, time or 1, 1)
        if not self.gate.block.per_token:
            keys, values = (in_front(g * p, x) for p, x in zip(kv, (key, value), strict=True))
            return base(query, keys, values, mask, **options)
        return self.token_by_token(base, (query, key, value), kv, g, mask, options)

    def token_by_token(
        self, base: Callable[..., Any], qkv: tuple[Tensor, ...], kv: list[Tensor], g: Tensor, mask: Any, options: Any
    ) -> Any:
        """Each query has a gate of its own: twice the features, [q; g q] against [0; P_K] and [k; 0]."""
        query, width, own = qkv[0], qkv[0].shape[-1], self.head_dim  # more features, where there are two such prefixes
        if options.get("scaling") is None:  # by the features that there are
            query = math.sqrt(1 + own / width) * query
        pairs = zip(kv, qkv[1:], strict=True)
        keys, values = (torch.cat([F.pad(p, (width, 0)), F.pad(x, (0, own))], 2) for p, x in pairs)
        out, weights = base(torch.cat([query, g * query[..., :own]], -1), keys, values, mask, **options)
        return out[..., :width] + F.pad(g.transpose(1, 2) * out[..., width:], (0, width - own)), weights

    def collapsed(self) -> dict[str, Tensor]:
        return {**super().collapsed(), **{f"gate.{name}": t for name, t in self.gate.state_dict().items()}}


class GatedReparametrisedPrefix(GatedPrefix, ReparametrisedPrefix):
    """The same, with the prefix out of an MLP."""


class Read(Adapter):
    """base(x), x (batch, time, d): the prefix beside it reads x."""

    def __init__(self, prefix: GatedPrefix | None) -> None:
        super().__init__()
        self.prefix: Any
        vars(self)["prefix"] = prefix  # it is registered where keys and values are

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.prefix is not None:
            self.prefix.read(x)
        return base(x)


class GatedLowRank(Read):
    """y = base(x) + g B A x: A (rank, d_in), B (d_out, rank), the gate in place of alpha / rank."""

    def __init__(self, widths: tuple[int, int], rank: int, block: Around, prefix: GatedPrefix | None) -> None:
        super().__init__(prefix)
        self.a, self.b = nn.Parameter(torch.empty(rank, widths[0])), nn.Parameter(torch.empty(widths[1], rank))
        self.gate = Gate(widths[0], block)

    def reset(self, draw: Draw) -> None:
        draw.kaiming_uniform(self.a)
        draw.zeros(self.b)
        self.gate.reset(draw)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (batch, time, d_in) -> (batch, time, d_out)
        z = self.gate(x) * F.linear(x, self.a.to(x.dtype))
        y = super().forward(base, x)
        return y + F.linear(z, self.b.to(x.dtype)).to(y.dtype)


class UniPELT(PEFT, name="unipelt", family="hybrid", paper="2110.07577", identity=False, overhead="tokens"):
    """W x + g B A x, [g P_K; K], [g P_V; V], h + g D(h), each g = mean over tokens of sigmoid(w u + b)

    LoRA at queries and values (the gate in place of alpha / rank), a prefix in every attention layer and a Pfeiffer
    adapter after every feed-forward layer, each with a gate of its own, one number a text, from what the part reads:
    the input of attention, the states after the feed-forward layer. A gate of the prefix scales keys as well, so zero
    does not take the prefix away. The gates start at about 1/2.

    mask_padding: the mean is over real tokens; False is the authors' code, where padding counts, so that a text depends
    on those beside it. gate: "sequence" as in the paper; "token" leaves the mean out; "auto" is token where attention
    is causal: a mean would see later tokens, and be another one with a KV cache than without.
    L (2 l d + 2 r 2d + 2md + m + d + 4 (d + 1)) parameters. prefix_bottleneck > 0 trains the prefix through an MLP of
    this width (the paper: 512). Source: section 3.
    """

    unused = ("targets",)

    length: int = 10
    prefix_bottleneck: int = 0
    rank: int = 8
    bottleneck: int = 48
    activation: Activation = "relu"
    init: Init = "bert"
    gate: Literal["auto", "sequence", "token"] = "auto"
    mask_padding: bool = True

    @property
    def places(self) -> str:
        return "attend,cross.attend?,q,v,block"

    def check(self) -> None:
        positive(self, "length", "rank", "bottleneck")
        not_negative(self, "prefix_bottleneck")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        blocks: dict[str, Around] = {}
        listeners: dict[str, RealTokens] = {}
        for block in (site for site in sites if site.role == "block"):
            yield from self._block(sites, block, blocks, listeners)
        trunks: dict[str, Trunk] = {}
        prefixes: dict[str, GatedPrefix] = {}
        for site in sites:
            if site.part == "attend":
                query = sites.sibling(site, site.role.replace("attend", "q") if site.role else "q")
                if query is None or site.block not in blocks:
                    raise TargetError(
                        f"UniPELT needs the queries' projection and the block around {site.name!r}, which are unknown. "
                        "Name them: roles={'q': ..., 'block': ...}, or leave the layer out by `exclude`."
                    )
                prefixes[key(query)] = prefix = self._prefix(site, blocks[site.block], trunks)
                yield site, prefix
                if site.role == "cross.attend":
                    yield query, Read(prefix)
        for site in sites:
            if site.role in ("q", "v"):
                widths = projection_widths(site, "UniPELT")
                yield site, GatedLowRank(widths, self.rank, blocks[site.block], prefixes.get(key(site)))

    def _block(
        self, sites: Sites, block: Site, blocks: dict[str, Around], listeners: dict[str, RealTokens]
    ) -> Iterator[tuple[Site, Adapter]]:
        """The adapter of a block, and what tells its gates which tokens are real."""
        attend = sites.sibling(block, "attend")
        causal = block.stack.endswith("decoder") or (attend is not None and attend.facts.causal is True)
        per_token = self.gate == "token" or (self.gate == "auto" and causal)
        positions = None
        if self.mask_padding and not per_token:
            positions = yield from listening(sites, block, listeners)
        time_first = puts_time_first(block.module)
        blocks[block.name] = around = Around(positions, per_token, time_first)
        norm = closing_norm(sites, block)
        kind = GatedDown if norm is None else GatedNorm
        shape = self.bottleneck, self.activation, self.init
        adapter = kind(block.out_features, around, *shape, time_first=time_first)
        if norm is None:
            around.after = adapter
        else:
            yield norm, adapter
        yield block, around

    def _prefix(self, site: Site, around: Around, trunks: dict[str, Trunk]) -> GatedPrefix:
        kv_heads, head_dim, width = heads(site)
        if not self.prefix_bottleneck:
            return GatedPrefix(self.length, kv_heads, head_dim).gated(width, around)
        kind = f"{site.stack}/{site.role}"
        if kind not in trunks:
            draw = partial(Draw, self.seed, f"{kind}/prefix trunk")
            trunks[kind] = Trunk(self.length, width, self.prefix_bottleneck, draw)
        return GatedReparametrisedPrefix(trunks[kind], self.length, kv_heads, head_dim, 0.0).gated(width, around)

    def portable(self) -> UniPELT:
        return dataclasses.replace(self, prefix_bottleneck=0)


def key(site: Site) -> str:
    """A projection's name and role."""
    return f"{site.name}/{site.role}"


def listening(
    sites: Sites, block: Site, known: dict[str, RealTokens]
) -> Generator[tuple[Site, Adapter], None, RealTokens | None]:
    """What sees the padding mask on its way to a block; -> the nearest. A decoder's own only, where there are two."""
    names = [".".join(block.name.split(".")[:i]) for i in range(block.name.count(".") + 1)]
    nearest: RealTokens | None = None
    for name in names:
        module = sites.model.get_submodule(name)
        other = block.stack.endswith("decoder") and "decoder" not in name
        if other or hasattr(module, "training_step") or not takes_mask(module):
            continue
        if name not in known:
            known[name] = RealTokens(module, nearest)
            yield Site(name, module, "model"), known[name]
        nearest = known[name]
    return nearest
