"""Visual Prompt Tuning. Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim, ECCV 2022. https://arxiv.org/abs/2203.12119"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.embedding import EncoderTokens
from lightning_peft.core.fields import positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.prompt import Prompt, Start
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.methods.prompt_tuning import around, class_tokens, nearest


class VisualPrompt(Prompt):
    """P (length, d), U(-b, b) with b = sqrt(6 / (numbers in a patch + d))."""

    def __init__(self, length: int, width: int, patch: int, dropout: float) -> None:
        self.bound, self.dropout = (6 / (patch + width)) ** 0.5, dropout
        super().__init__(length, width, Start())

    def reset(self, draw: Draw) -> None:
        draw.uniform(self.tokens, bound=self.bound)

    def forward(self, batch: int) -> Tensor:
        return F.dropout(self.tokens[None], self.dropout, self.training)


class LayerTokens(EncoderTokens):
    """[P; x] into one `nn.TransformerEncoderLayer`, with its two masks, and out again."""

    def forward(  # type: ignore[override]
        self,
        base: Callable[..., Tensor],
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return super().forward(base, src, src_mask, src_key_padding_mask, is_causal)


class VPT(PEFT, name="vpt", family="soft prompt", paper="2203.12119", identity=False):
    """[x_cls; _; x]_i = B_i([x_cls; P_i; x]_(i-1))

    Each block gets fresh prompts P_i (length, d) behind the class token, and what it makes of them is dropped: L *
    length * d parameters. They have no positions. For images: vision transformers with a class token or without
    (registers are kept in front, an average over patches does not see the prompts), and stacks of
    `nn.TransformerEncoderLayer`, with their masks. Initial values U(-b, b), b = sqrt(6 / (numbers in a patch + d)).

    deep: False puts P_0 before the first block of a tower alone, and it goes through all: length * d parameters;
    dropout: of the prompts. Source: section 3.2.
    """

    targets: str | list[str] | None = "block"
    length: int = 10
    deep: bool = True
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "length")
        probability(self, "dropout")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        patches = {site.name: patch_of(sites, site) for site in sites}
        chosen = [site for site in sites if patches[site.name] and site.facts.hidden]
        if not chosen:
            raise TargetError(
                f"VPT finds no block that reads images among {[site.name for site in sites][:3]}... Use prompt_tuning "
                "or prefix_tuning for text, or target the blocks of the vision tower."
            )
        for tower in towers(sites, chosen):
            for site in tower if self.deep else tower[:1]:
                prompt = VisualPrompt(self.length, site.facts.hidden or 0, patches[site.name], self.dropout)
                if isinstance(site.module, nn.TransformerEncoderLayer):
                    yield self._layer(sites.model, site, prompt)
                else:
                    last = site if self.deep else tower[-1]
                    yield from around(site, last, class_tokens(sites.model, site), prompt)

    def _layer(self, model: nn.Module, site: Site, prompt: Prompt) -> tuple[Site, Adapter]:
        layer: Any = site.module
        if self.deep:
            return site, LayerTokens(layer.self_attn.batch_first, prompt)
        name = ".".join(site.name.split(".")[:-2])  # the encoder of "encoder.layers.0"
        whole = dataclasses.replace(site, name=name, module=model.get_submodule(name))
        return whole, EncoderTokens(layer.self_attn.batch_first, prompt)


def towers(sites: Sites, blocks: list[Site]) -> list[list[Site]]:
    """The blocks that images pass one after the other: of one `nn.TransformerEncoder`, or behind the same patches."""
    embeddings = [s for s in sites.known if s.role == "embed"]
    found: dict[tuple[str, ...], list[Site]] = {}
    for block in blocks:
        own = isinstance(block.module, nn.TransformerEncoderLayer)
        near = (block.name.rpartition(".")[0],) if own else tuple(s.name for s in nearest(block, embeddings))
        found.setdefault(near, []).append(block)
    return list(found.values())


def patch_of(sites: Sites, site: Site) -> int:
    """How many numbers a patch of the images has that a block reads; 0 where it reads text."""
    embeddings = [s for s in sites.known if s.role == "embed"]
    near = nearest(site, embeddings)
    kernels = [m for s in near for m in s.module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    if kernels:
        return kernels[0].weight[0].numel()
    known = isinstance(site.module, nn.TransformerEncoderLayer) or not near
    return site.facts.hidden or 0 if known else 0
