"""LongLoRA: Efficient Fine-Tuning of Long-Context Large Language Models. Chen et al., ICLR 2024.
https://arxiv.org/abs/2309.12307
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT, check_in_training
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.method import Info
from lightning_peft.core.sites import Site, Sites, TargetError, sites
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.lora import LoRA

Segment = tuple[int, int, int]
"""(start, end, how many equal groups)"""


def segments(time: int, size: int, first: int) -> list[Segment]:
    """[0, first), then groups of `size`, then what is left; groups of one size are one segment."""
    middle = (time - first) // size
    found = [(0, first, 1), (first, first + middle * size, middle), (first + middle * size, time, 1)]
    return [(start, end, count) for start, end, count in found if end > start]


class ShiftedSparseAttention(Adapter):
    """In training, tokens see their own group alone; in the second half of the heads, groups lie half a group further.

    wrap: the last half group and the first are one, in which first tokens see last ones (the authors' plain code);
    otherwise the two are groups of their own (their fast code), and a causal model stays causal.
    """

    training_only = True

    def __init__(self, groups: int, wrap: bool) -> None:
        super().__init__()
        self.groups, self.wrap = groups, wrap

    def forward(
        self, base: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:  # query (batch, heads, time, head_dim), key and value (batch, kv_heads, time, head_dim)
        if not self.training:
            return base(query, key, value, mask, **options)
        time, heads = query.shape[2], query.shape[1]
        if key.shape[2] != time:
            raise ValueError(
                f"Shifted sparse attention got {time} queries and {key.shape[2]} keys: in training there is no room for"
                " a cache or for added keys. Call the model with use_cache=False, and without prefixes."
            )
        size = -(-time // self.groups)
        if self.wrap and (mask is not None or options.get("position_bias") is not None):
            raise ValueError(
                "wrap=True reorders tokens, and their order under this mask is not known. Give batches without padding "
                "to a model with attn_implementation='sdpa', or use wrap=False."
            )
        if self.wrap and (time % self.groups or size % 2):
            raise ValueError(
                f"{time} tokens are not {self.groups} groups of even size, which wrap=True needs. Pad to a multiple of "
                f"{2 * self.groups}, or use wrap=False."
            )
        halves = [slice(0, heads // 2), slice(heads // 2, heads)]
        apart = heads % 2 == 0 and key.shape[1] % 2 == 0  # else both groupings of all heads, and half of each
        outputs = []
        for half, shift in zip(halves, (0, size // 2), strict=True):
            if not apart:
                outputs.append(self.in_groups(base, query, key, value, mask, size, shift, options)[:, :, half])
                continue
            mine = slice(*(h * key.shape[1] // heads for h in (half.start, half.stop)))
            own = options | {k: of_heads(v, half) for k, v in options.items() if k == "position_bias"}
            tensors = query[:, half], key[:, mine], value[:, mine]
            outputs.append(self.in_groups(base, *tensors, of_heads(mask, half), size, shift, own))
        return torch.cat(outputs, 2), None

    def in_groups(
        self, base: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, size: int,
        shift: int, options: dict[str, Any],
    ) -> Tensor:  # -> (batch, time, heads, head_dim)  # fmt: skip
        time, batch = query.shape[2], len(query)
        roll = shift if self.wrap else 0
        if roll:
            query, key, value = (x.roll(-roll, 2) for x in (query, key, value))
        out = []
        for start, end, count in segments(time, size, 0 if self.wrap else shift):
            q, k, v = (x[:, :, start:end].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
                       for x in (query, key, value))  # fmt: skip
            own = dict(options)
            if (bias := options.get("position_bias")) is not None:
                own["position_bias"] = blocks(bias, start, end, count, batch, time)
            visible = None if mask is None else blocks(mask, start, end, count, batch, time)
            y = base(q, k, v, visible, **own)[0]
            out.append(y.unflatten(0, (batch, count)).flatten(1, 2))
        whole = torch.cat(out, 1)
        return whole.roll(roll, 1) if roll else whole


def of_heads(x: Tensor | None, heads: slice) -> Tensor | None:
    """(..., heads or 1, time, source), of these heads"""
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def blocks(mask: Tensor, start: int, end: int, count: int, batch: int, time: int) -> Tensor:
    """The diagonal's blocks of (batch or 1, heads or 1, time or 1, time) -> (batch count, heads or 1, size, size)"""
    part = mask.expand(batch, -1, time, -1)[..., start:end, start:end]
    cut = part.unflatten(-1, (count, -1)).unflatten(-3, (count, -1))  # (batch, heads, count, size, count, size)
    return cut.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3).flatten(0, 1)


class Interpolation(Adapter):
    """Rotations by the positions m / factor"""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, base: Callable[..., Any], x: Tensor, position_ids: Tensor, **options: Any) -> Any:
        return base(x, position_ids / self.factor, **options)

    def check_fold(self) -> None:
        raise NotMergeableError(
            f"Positions are divided by {self.factor}, which is in no weight. Leave LongLoRA attached, or load the base "
            'with rope_type="linear" and that factor, and LongLoRA with interpolation=1 on it.'
        )


class Sparse(PEFT):
    """The part of LongLoRA at attention and at rotary embeddings; it has no parameters."""

    info = Info("attention", "reparametrisation", "2309.12307", True, True, "")

    targets: str | list[str] | None = "attend"
    groups: int = 4
    wrap: bool = False
    interpolation: float = 1.0

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            yield site, ShiftedSparseAttention(self.groups, self.wrap)
        if self.interpolation != 1:
            yield from self.rotations(sites.model)

    def rotations(self, model: nn.Module) -> Iterator[tuple[Site, Adapter]]:
        """The modules that rotate, by what they hold."""
        found = [(name, m) for name, m in model.named_modules() if "inv_freq" in m._buffers]
        if not found:
            raise TargetError(
                f"LongLoRA(interpolation={self.interpolation}): this {type(model).__name__} has no rotary embedding of "
                "its own module, so its positions cannot be interpolated. Leave interpolation at 1."
            )
        for name, module in found:
            yield Site(name, module, None), Interpolation(self.interpolation)


class LongLoRA(PEFT, name="longlora", family="reparametrisation", paper="2309.12307", mergeable=True):
    """LoRA on attention, embeddings and norms trained as they are; in training, attention within shifted groups

    The sequence is cut into `groups` of equal length (the last may be shorter); a token sees its own group, and in the
    second half of the heads the groups lie half a group further. In eval mode attention is the model's own, in full:
    the base at step 0. LoRA has rank * (d_in + d_out) parameters a site.

    wrap: the last half group sees the first one and the other way round, as in the authors' plain code; tokens then
    see later ones. trained: what trains in place beside LoRA; embeddings that the head is tied to are refused.
    interpolation: positions of rotary embeddings are divided by it (Chen et al., 2306.15595), in training and after:
    new length / old, rounded up. Such a model is not merged; a plain one has rope_type="linear" for it.
    """

    targets: str | list[str] | None = "q,k,v,o"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    groups: int = 4
    wrap: bool = False
    trained: str | None = "embed,norm"
    interpolation: float = 1.0
    keep_base: bool = True

    def check(self) -> None:
        positive(self, "rank", "groups")
        not_negative(self, "alpha")
        probability(self, "dropout")
        if not self.interpolation >= 1:
            raise FieldError(f"LongLoRA(interpolation={self.interpolation}): expected 1 (none) or more.")

    @property
    def keeps_original(self) -> bool:
        return self.keep_base

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_in_training(pl_module, self)

    def parts(self) -> tuple[PEFT, ...]:
        where: dict[str, Any] = {"layers": self.layers, "exclude": self.exclude, "roles": self.roles}
        common: dict[str, Any] = {"seed": self.seed, "dtype": self.dtype}
        found: list[PEFT] = [
            LoRA(targets=self.targets, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **where, **common),
            Sparse(groups=self.groups, wrap=self.wrap, interpolation=self.interpolation, **where),
        ]
        if self.trained:
            found.append(FullFineTuning(targets=self.trained, keep_base=self.keep_base, roles=self.roles))
        return tuple(found)

    def apply(self, model: nn.Module, *, trainable: bool = True) -> nn.Module:
        check_untied(model, self.trained, self.roles)
        return super().apply(model, trainable=trainable)


def check_untied(model: nn.Module, trained: str | None, roles: dict[str, str]) -> None:
    """Raise where what trains in place is another module's weight too."""
    found = sites(model, trained, roles=roles) if trained else []
    inside = {id(m) for site in found for m in site.module.modules()}
    others = {id(p) for m in state.base_modules(model) if id(m) not in inside for p in m._parameters.values()}
    for site in found:
        if any(id(p) in others for p in site.module.parameters()):
            raise TargetError(
                f"{site.name!r} is tied to another module (the head, most often), which would train along. Untie it "
                "first (a copy as its own nn.Parameter), or leave it out: LongLoRA(trained='norm')."
            )
