"""Scaled parallel adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., ICLR 2022.
https://arxiv.org/abs/2110.04366
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init
from lightning_peft.core.fields import positive
from lightning_peft.core.init import Draw
from lightning_peft.core.representation import CHECKPOINT
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.stream import norms_before, read_input


class Tap(Adapter):
    """Notes what a place reads, or tells another tap of it; changes nothing."""

    def __init__(self, other: Tap | None = None) -> None:
        super().__init__()
        self.seen: Tensor | None = None
        self.other: Any
        vars(self)["other"] = other  # it is registered at a place of its own

    def __getstate__(self) -> dict[str, Any]:
        """Without what a forward noted that never reached its end: it has a graph, and cannot be copied."""
        return {**vars(self), "seen": None}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = vars(self.place)
        checkpoint = own.get(CHECKPOINT)
        if checkpoint is None:
            return self.noted(base, *args, **kwargs)
        own[CHECKPOINT] = lambda run, *inputs: checkpoint(functools.partial(self.noted, run), *inputs)
        try:  # transformers checkpoints inside of this call, and runs that part again without it
            return self.noted(base, *args, **kwargs)
        finally:
            own[CHECKPOINT] = checkpoint

    def noted(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tap = self if self.other is None else self.other
        tap.seen = read_input(args, kwargs or getattr(run, "keywords", {}))
        return run(*args, **kwargs)

    def take(self) -> Tensor:
        """What was noted, once."""
        u, self.seen = self.seen, None
        if u is None:
            raise RuntimeError("The feed-forward layer's down projection ran without its up projection before it.")
        return u


class Parallel(Bottleneck):
    """y = base(h) + s D(u): u (..., d) is what the tap saw on the way in."""

    def __init__(
        self, tap: Tap, site: Site, bottleneck: int, activation: Activation, init: Init, scale: float | None
    ) -> None:
        super().__init__(site.out_features, bottleneck, activation, init, 1.0 if scale is None else scale)
        self.tap: Any
        vars(self)["tap"] = tap  # it is registered where it listens
        self.gain = nn.Parameter(torch.empty(1)) if scale is None else None

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        if self.gain is not None:
            draw.ones(self.gain)

    def forward(self, base: Callable[..., Tensor], h: Tensor) -> Tensor:
        d = self.bottleneck(self.tap.take())
        return base(h) + (d if self.gain is None else self.gain.to(d.dtype) * d)


class ParallelAdapter(PEFT, name="parallel", family="additive", paper="2110.04366"):
    """f(u) + s (W_up phi(W_dn u + b_dn) + b_up), u the input of the feed-forward layer f

    u is what the layer itself reads: the attention block's output in post-norm models, its norm in pre-norm models.
    input="residual" takes the residual stream instead, before that norm (as the `adapters` package does); in a
    post-norm model this is the same. targets="o" puts the adapter beside attention, u what the queries are made of, or
    the block's input. The sum is taken at the last projection, before dropout and residual. L (2md + m + d) parameters.
    scale None makes s a trained scalar that starts at 1. Source: section 4.4, table 4.
    """

    targets: str | list[str] | None = "down"
    bottleneck: int = 64
    activation: Activation = "relu"
    init: Init = "zero"
    scale: float | None = 4.0
    input: Literal["normed", "residual"] = "normed"

    def check(self) -> None:
        positive(self, "bottleneck")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            tap = Tap()
            for i, entry in enumerate(self.entries(sites, site)):
                yield entry, Tap(tap) if i else tap
            yield site, Parallel(tap, site, self.bottleneck, self.activation, self.init, self.scale)

    def entries(self, sites: Sites, site: Site) -> list[Site]:
        """Where to listen: at the layer's first projection, at its block, or at the norms of which the last counts."""
        method = type(self).__name__
        if site.role in ("o", "cross.o"):
            entry = attention_entry(sites, site, method)
            return [entry] if self.input == "normed" else [block_of(sites, site, method)]
        entry, _ = feed_forward_of(sites, site, method)
        before = norms_before(sites, block_of(sites, site, method)) if self.input == "residual" else []
        return before or [entry]


def feed_forward(sites: Sites, method: str) -> Iterator[tuple[Site, Site]]:
    """The first and the last projection of the feed-forward layers whose last ones these are."""
    for site in sites:
        yield feed_forward_of(sites, site, method)


def feed_forward_of(sites: Sites, site: Site, method: str) -> tuple[Site, Site]:
    """The first and the last projection of the feed-forward layer whose last one this is."""
    entry, down = sites.sibling(site, "up"), sites.sibling(site, "down")
    if entry is None or down is None or down.module is not site.module or entry.in_features != down.out_features:
        raise TargetError(
            f"{method} needs the feed-forward layer around {site.name!r}: an `up` projection in the same block "
            f"that reads {site.out_features} features. Use targets='down' on a model whose roles are known."
        )
    return entry, site


def attention_entry(sites: Sites, site: Site, method: str) -> Site:
    """Where the attention layer whose output projection this is reads what it asks about."""
    cross = str(site.role).removesuffix("o")
    entry = sites.sibling(site, f"{cross}q") or sites.sibling(site, f"{cross}qkv")
    if entry is None or entry.in_features != site.out_features:
        raise TargetError(
            f"{method} needs the attention layer around {site.name!r}: a `{cross}q` projection in the same block that "
            f"reads {site.out_features} features. Use targets='o' on a model whose roles are known."
        )
    return entry


def block_of(sites: Sites, site: Site, method: str) -> Site:
    """The block that a site is in, for input="residual"."""
    block = next((s for s in sites.known if s.role == "block" and s.name == site.block), None)
    if block is None or site.role == "cross.o":
        raise TargetError(
            f"{method}(input='residual') cannot see the residual stream at {site.name!r}: it is "
            f"{'in no known block' if block is None else 'after cross-attention'}. Use input='normed' there."
        )
    return block
