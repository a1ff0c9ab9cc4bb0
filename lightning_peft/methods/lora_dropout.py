"""LoRA Dropout as a Sparsity Regularizer for Overfitting Control. Lin et al., 2024. https://arxiv.org/abs/2404.09610"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT, check_in_training
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.fields import not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.method import common
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import Shape, matrix_shape


class Member:
    """Which of the ensemble's masks apply at this moment; None for none. One object for all adapters of a method."""

    now: int | None = None


class Dropped(LowRank):
    """y = base(x) + s diag(m_B) B A diag(m_A) x: m_A (d_in,), m_B (d_out,) of zeros and ones, drawn once a forward"""

    columns: Tensor
    rows: Tensor

    def __init__(self, shape: Shape, rank: int, scale: float, p: float, rescale: bool, ensemble: int) -> None:
        super().__init__(shape, rank, scale)
        self.p, self.rescale, self.member = p, rescale, Member()
        self.register_buffer("columns", torch.ones(ensemble, shape.d_in, dtype=torch.bool), persistent=False)
        self.register_buffer("rows", torch.ones(ensemble, shape.d_out, dtype=torch.bool), persistent=False)

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        if not self.rows.is_meta:
            for masks in (self.columns, self.rows):
                masks.copy_(torch.rand(masks.shape, generator=draw.generator) >= self.p)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.training:
            kept = 1 / (1 - self.p) if self.rescale else 1.0
            columns = kept * (torch.rand(self.a.shape[1], device=self.a.device) >= self.p).to(self.a.dtype)
            rows = kept * (torch.rand(len(self.b), device=self.b.device) >= self.p).to(self.b.dtype)
        elif self.member.now is not None:
            columns, rows = self.columns[self.member.now], self.rows[self.member.now]
        else:
            return self.expected * self.a, self.expected * self.b
        return self.a * columns, self.b * rows[:, None]

    @property
    def expected(self) -> float:
        """The share of a factor that a mask leaves, on average."""
        return 1.0 if self.rescale else 1 - self.p

    def delta(self, weight: Tensor) -> Tensor:  # (d_out, d_in)
        return self.scale * self.expected**2 * (self.b.to(weight) @ self.a.to(weight))


class Ensemble(Adapter):
    """o(x) = 1 / N sum_n M(x; m_n), around the network; in eval mode only."""

    def __init__(self, count: int, member: Member) -> None:
        super().__init__()
        self.count, self.member = count, member

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.training or self.member.now is not None:
            return base(*args, **kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise ValueError(
                "An ensemble of masks has a cache for each of them, which is not kept. Generate with use_cache=False, "
                "or use LoRADropout(ensemble=0)."
            )
        outputs = []
        try:
            for index in range(self.count):
                self.member.now = index
                outputs.append(base(*args, **kwargs))
        finally:
            self.member.now = None
        return mean(outputs)

    def check_fold(self) -> None:
        raise NotMergeableError(
            f"The outputs of {self.count} masks are averaged, which no weight does. Leave it attached, or put "
            "the expectation in its place, which merges: LoRADropout(ensemble=0)."
        )


def mean(values: list[Any]) -> Any:
    """Of tensors of floats, in whatever holds them; anything else as the first has it. A cache is left out."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values).mean(0) if first.is_floating_point() else first
    if isinstance(first, Mapping):
        out = {k: mean([v[k] for v in values]) for k in first if k != "past_key_values"}
        return type(first)(**out)
    if type(first) in (tuple, list):
        return type(first)(mean(list(column)) for column in zip(*values, strict=True))
    return first


class LoRADropout(PEFT, name="lora_dropout", family="reparametrisation", paper="2404.09610", mergeable=True):
    """y = W x + (alpha / rank) diag(m_B) B A diag(m_A) x, m_A and m_B drawn anew for each batch

    A (rank, d_in) starts Kaiming-uniform, B (d_out, rank) at zero: the base at step 0. rank * (d_in + d_out) parameters
    a site. Columns of A and rows of B are dropped with probability p, the same for all tokens of a batch, and nothing
    is rescaled.

    ensemble: in eval mode the outputs of this many masks (of `seed`) are averaged, with as many forwards; it cannot be
    merged. 0: one forward with the expectation (1 - p)^2 B A, which can. rescale: kept entries are divided by 1 - p in
    training instead, as `nn.Dropout` does, so that the expectation is B A itself. The paper averages the loss over
    several masks too: accumulate_grad_batches over the same batch.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 16.0
    p: float = 0.5
    ensemble: int = 4
    rescale: bool = False

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "alpha", "ensemble")
        probability(self, "p")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_in_training(pl_module, self)

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        member = Member()
        for site in sites:
            shape = matrix_shape(site, "LoRADropout")
            adapter = Dropped(shape, self.rank, self.alpha / self.rank, self.p, self.rescale, self.ensemble)
            adapter.member = member
            yield site, adapter
        if self.ensemble and sites:
            name, network = network_of(sites.model, [site.name for site in sites])
            yield Site(name, network, None), Ensemble(self.ensemble, member)


def network_of(model: nn.Module, sites: list[str]) -> tuple[str, nn.Module]:
    """What is called as a whole: the model, or the network that a LightningModule holds, or itself by its `forward`."""
    name = common(sites).partition(".")[0] if isinstance(model, pl.LightningModule) else ""
    name = "" if name in sites else name  # a projection is no network
    if not name and isinstance(model, pl.LightningModule) and type(model).forward is pl.LightningModule.forward:
        raise TargetError(
            f"LoRADropout's ensemble goes around one network that this {type(model).__name__} holds, and there is none "
            f"that holds {sites[0]!r} and {sites[-1]!r}; the module itself has no forward. Write one and call it, give "
            "each network a LoRADropout with a label of its own, or use ensemble=0."
        )
    return name, model.get_submodule(name)
