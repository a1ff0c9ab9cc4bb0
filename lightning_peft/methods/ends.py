"""Adapters at the ends of a model only, before the first block or after the last.

The bottleneck is that of Houlsby et al., ICML 2019. https://arxiv.org/abs/1902.00751
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter, NotMergeableError
from lightning_peft.core.bottleneck import Activation, Bottleneck, Init, StreamBottleneck
from lightning_peft.core.fields import positive
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.stream import edit_input, final_norm, runs_again
from lightning_peft.core.targets import projection_widths


class InputBottleneck(Bottleneck):
    """base(x + D(x)): x (..., d); folds into a projection where D is linear."""

    def around(self, change: Callable[[Tensor], Tensor], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = edit_input(lambda x: x + change(x), args, kwargs)
        return base(*args, **kwargs)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.activation != "identity" or bias is None:
            raise NotMergeableError(
                f"activation={self.activation!r} on a projection {'without' if bias is None else 'with'} a bias: only "
                "a linear adapter (activation='identity') folds, into a projection that has one. Leave it attached."
            )
        down, down_bias, up, up_bias = (tensor.to(weight) for tensor in self.weights())
        shift = self.scale * (up @ down_bias + up_bias)
        return weight + self.scale * (weight @ up) @ down, bias + weight @ shift


class EndAdapter(PEFT):
    """What adapters at either end of a model are set by."""

    unused = ("layers",)

    targets: str | list[str] | None = "block"
    bottleneck: int = 64
    activation: Activation = "gelu"
    init: Init = "zero"

    def check(self) -> None:
        positive(self, "bottleneck")

    @property
    def shape(self) -> tuple[int, Activation, Init]:
        """How each bottleneck is made, beside its width."""
        return self.bottleneck, self.activation, self.init


class InputAdapter(EndAdapter, name="input_adapter", family="additive", paper="1902.00751"):
    """e + W_up phi(W_dn e + b_dn) + b_up on what the first block reads

    e is the sum of all embeddings after its norm and dropout, once for each stack. Other targets (such as "embed") get
    the adapter on what they give. 2md + m + d parameters a stack. Gradients go through the whole backbone.
    """

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for site in sites:
            if site.role != "block":
                yield site, Bottleneck(site.out_features, *self.shape)
            elif site.layer == 0:
                check_runs_once(sites, "InputAdapter", "targets='embed'")
                yield site, InputBottleneck(site.out_features, *self.shape)


class OutputAdapter(
    EndAdapter,
    name="output_adapter",
    family="additive",
    paper="1902.00751",
    mergeable=True,
    overhead="products",
    backprop=False,
):
    """z + W_up phi(W_dn z + b_dn) + b_up on the last hidden states, before the head

    z is what the norm after the last block gives, or the last block where there is none; of the decoder in an
    encoder-decoder. Nothing of the backbone is kept for the backward pass. 2md + m + d parameters. Other targets, such
    as "head" or "lm_head", get the adapter on their input; there activation="identity" can be merged, if the head is
    not tied and has a bias.
    """

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        blocks = [site for site in sites if site.role == "block" and site.layer == (site.layers or 0) - 1]
        decoders = [site for site in blocks if site.stack.endswith("decoder")]
        for site in decoders or blocks:
            norm = final_norm(sites, site)
            if norm is not None:
                yield norm, Bottleneck(norm.out_features, *self.shape)
            else:
                check_runs_once(sites, "OutputAdapter", "targets='head'")
                yield site, StreamBottleneck(site.out_features, *self.shape)
        for site in sites:
            if site.role != "block":
                yield site, InputBottleneck(projection_widths(site, "OutputAdapter")[0], *self.shape)


def check_runs_once(sites: Sites, method: str, instead: str) -> None:
    """Raise where no block is the first or the last to run."""
    if runs_again(sites):
        raise TargetError(
            f"{method} needs a first and a last block, and this {type(sites.model).__name__} runs the same blocks "
            f"several times. Use {instead}."
        )
