"""AdapterDrop: On the Efficiency of Adapters in Transformers. Rücklé et al., EMNLP 2021.
https://arxiv.org/abs/2010.11918
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init, StreamBottleneck
from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import projection_widths
from lightning_peft.methods.pfeiffer import NormBottleneck, stream_place


class Depth:
    """In how many of the first blocks the adapters are left out, for all adapters of one model."""

    def __init__(self, training: int, inference: int, layers: int) -> None:
        self.training, self.inference, self.layers = training, inference, layers


class Skip(Bottleneck):
    """The bottleneck, or the base alone in the first blocks; which ones is fixed for a whole forward and backward."""

    depth: Depth
    layer: int

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        left_out = self.depth.training if self.training else self.depth.inference
        if self.layer < left_out:
            return base(*args, **kwargs)
        return super().forward(base, *args, **kwargs)


class SkipNorm(Skip, NormBottleneck):
    """The same at the norm that closes a block."""


class SkipStream(Skip, StreamBottleneck):
    """The same on what a block returns."""


KINDS: dict[type[Bottleneck], type[Skip]] = {
    Bottleneck: Skip,
    NormBottleneck: SkipNorm,
    StreamBottleneck: SkipStream,
}


class AdapterDrop(PEFT, name="adapterdrop", family="additive", paper="2010.11918"):
    """h + D(h) in blocks n, n + 1, ..., L - 1; the first n blocks are those of the base

    train="random" (robust): for each training batch n is drawn from 0 to L - 1, the same in all processes and after a
    resume, and `keep_from(model, n)` chooses any n at inference. train="fixed" (specialised): the first n blocks have
    no adapter. n counts in each stack. The adapters are Pfeiffer's, after each block (targets="block"), or Houlsby's
    with projections as targets ("o,down"). What is left out gets no gradient and costs nothing, so that DDP needs
    find_unused_parameters; without a Trainer call `draw(model, step)`. (L - n) (2md + m + d) parameters, L
    (2md + m + d) when random. Source: section 3.
    """

    targets: str | list[str] | None = "block"
    n: int = 5
    train: Literal["random", "fixed"] = "random"
    bottleneck: int = 48
    activation: Activation = "relu"
    init: Init = "zero"

    def check(self) -> None:
        not_negative(self, "n")
        positive(self, "bottleneck")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        layers = min((site.layers or 0 for site in sites), default=0)
        if not self.n < layers:
            raise TargetError(
                f"AdapterDrop(n={self.n}) leaves nothing of {layers} blocks. Choose n below {layers}, and targets "
                "inside of known blocks."
            )
        depth = Depth(0 if self.train == "random" else self.n, self.n, layers)
        for site in sites:
            if self.train == "fixed" and (site.layer or 0) < self.n:
                continue
            if site.role in ("block", "norm"):
                place, kind = stream_place(sites, site, "AdapterDrop")
            else:
                projection_widths(site, "AdapterDrop")  # or an error
                place, kind = site, Bottleneck
            adapter = KINDS[kind](place.out_features, self.bottleneck, self.activation, self.init)
            vars(adapter).update(depth=depth, layer=site.layer or 0)
            yield place, adapter

    def draw(self, model: nn.Module, step: object, label: str | None = None) -> int:
        """Draw n for one training batch, as a function of the seed and `step`; nothing where n is fixed."""
        depth = self._depth(model, label)
        if self.train == "random":
            depth.training = int(Draw(self.seed, f"adapterdrop/{step}").integers(depth.layers, 1))
        return depth.training

    def keep_from(self, model: nn.Module, n: int, label: str | None = None) -> None:
        """Leave the adapters of the first n blocks out at inference, from now on; files have the `n` of the method."""
        depth = self._depth(model, label)
        lowest = 0 if self.train == "random" else self.n
        if not lowest <= n <= depth.layers:
            raise FieldError(f"keep_from(n={n}): expected {lowest} to {depth.layers}, the blocks that have adapters.")
        depth.inference = n

    def _depth(self, model: nn.Module, label: str | None) -> Depth:
        applied = state.get_applied(model, label or self.name_on_model)
        return applied.placements[0].adapter.depth  # type: ignore[return-value]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.draw(pl_module, f"{trainer.current_epoch}/{batch_idx}")
