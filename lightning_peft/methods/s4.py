"""S4: Parameter-Efficient Fine-Tuning Design Spaces. Chen et al., ICLR 2023. https://arxiv.org/abs/2301.01821"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError
from lightning_peft.core.method import common, outside_frozen_networks
from lightning_peft.core.sites import Site, TargetError, roles, tokens
from lightning_peft.methods.bitfit import BitFit, has_bias
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.pfeiffer import Pfeiffer
from lightning_peft.methods.prefix_tuning import PrefixTuning

NAMES = ("adapter", "lora", "prefix", "bitfit")
NONE = "none"
ASSIGNMENT = ("adapter,lora", "adapter,prefix", "adapter,prefix,bitfit", "prefix,bitfit,lora")


class S4(PEFT, name="s4", family="hybrid", paper="2301.01821", identity=False, overhead="tokens"):
    """groups of blocks, few at the ends and many in the middle: {A, L}, {A, P}, {A, P, B}, {P, B, L}

    A: Pfeiffer adapter, L: LoRA at queries and values, P: prefix, B: BitFit. Each block gets the same share of `budget`
    (of all parameters but heads); B takes what it needs of it, the others the same each, which gives ranks, widths and
    lengths, rounded down. An encoder and a decoder are grouped apart. LoRA has a scale of alpha / rank.

    budget: the share of the parameters that trains, of those of the network that the blocks and their embeddings are
    in. groups: the methods of each group, or "none" for one that is left alone, whose share goes to the others. sizes:
    how many blocks each has; empty: as a spindle, 2, 4, 4, 2 of 12 and 4, 8, 8, 4 of 24 (our choice, the paper's sizes
    are not known; fewer blocks than groups leave the middle out). Another grouping is another experiment: lists of
    `sizes` and `groups` in a sweep. Source: section 4.
    """

    unused = ("targets", "layers")

    budget: float = 0.005
    groups: list[str] = dataclasses.field(default_factory=lambda: list(ASSIGNMENT))
    sizes: list[int] = dataclasses.field(default_factory=list)
    alpha: float = 16.0
    create: bool = True

    def check(self) -> None:
        if not 0 < self.budget < 1:
            raise FieldError(f"S4(budget={self.budget!r}): expected a share above 0 and below 1, such as 0.005.")
        if bad := [name for group in self.groups for name in methods(group) if name not in NAMES]:
            known = f"{', '.join(NAMES)}, or {NONE} alone"
            raise FieldError(f"S4(groups={self.groups!r}): {bad[0]!r} is no method here. Known: {known}.")
        if twice := [group for group in self.groups if len(set(methods(group))) < len(methods(group))]:
            raise FieldError(f"S4(groups={self.groups!r}): {twice[0]!r} names a method twice. Name each once.")
        sized = [g for g, n in zip(self.groups, self.sizes or [1] * len(self.groups), strict=False) if n]
        if (self.sizes and (len(self.sizes) != len(self.groups) or min(self.sizes) < 0)) or not any(
            map(methods, sized)
        ):
            raise FieldError(
                f"S4(groups={self.groups!r}, sizes={self.sizes!r}): give a size of 0 or more for each group, and at "
                "least one group with blocks and methods."
            )

    def parts_on(self, model: nn.Module) -> tuple[PEFT, ...]:
        known = roles(model, self.roles)
        blocks = outside_frozen_networks(model, known.get("block", []))
        if not blocks:
            raise TargetError(
                f"S4 groups the blocks of a model, and none are known in this {type(model).__name__}. Name them with "
                "roles={'block': ...}."
            )
        grouped = [self._grouped(stack) for stack in stacks(blocks)]
        count = sum(len(inside) for groups in grouped for names, inside in groups if names)
        share = self.budget * base_size(model, known, blocks) / max(count, 1)
        parts = (self._stack(known, groups, share) for groups in grouped)
        return tuple(part for stack in parts for part in stack)

    def _grouped(self, blocks: list[Site]) -> list[tuple[list[str], list[Site]]]:
        """The blocks of a stack by group, with the methods of each."""
        sizes = self.sizes or spindle(len(blocks), len(self.groups))
        if sum(sizes) != len(blocks):
            of = f" in {blocks[0].stack!r}" if blocks[0].stack else ""
            raise TargetError(
                f"S4(sizes={sizes}): {sum(sizes)} blocks in groups, and there are {len(blocks)}{of}. Give sizes of "
                "this sum, or none for a spindle of each stack."
            )
        ends = list(itertools.accumulate(sizes))
        return [(methods(g), blocks[e - n : e]) for g, n, e in zip(self.groups, sizes, ends, strict=True)]

    def _stack(
        self, known: dict[str, list[Site]], groups: list[tuple[list[str], list[Site]]], share: float
    ) -> Iterator[PEFT]:
        """The methods of one stack."""
        stack = next(inside[0].stack for _, inside in groups if inside)
        away = [f"re:{re.escape(site.name)}(\\..*)?" for site in known["block"] if site.stack != stack]
        exclude = [*away, *(tokens(self.exclude, "exclude") if self.exclude is not None else [])] or None
        for names, inside in groups:
            if names and inside:
                layers = [site.layer for site in inside]
                yield from self._group(names, known, inside[0], share, layers, exclude)

    def _group(
        self, names: list[str], known: dict[str, list[Site]], block: Site, share: float, layers: list[Any], exclude: Any
    ) -> Iterator[PEFT]:
        """The methods of one group, with the sizes that its share of the budget gives them."""
        common: dict[str, Any] = {"layers": layers, "exclude": exclude, "roles": self.roles}
        common |= {"seed": self.seed, "dtype": self.dtype}
        inside = [site for sites in known.values() for site in sites if site.block == block.name]
        if "bitfit" in names:
            share -= bias_size(block, inside, self.create)
            yield BitFit(create=self.create, **common)
        rest = [name for name in names if name != "bitfit"]
        make: dict[str, Callable[[int], PEFT]] = {
            "adapter": lambda m: Pfeiffer(bottleneck=m, **common),
            "lora": lambda r: LoRA(rank=r, alpha=self.alpha, **common),
            "prefix": lambda n: PrefixTuning(length=n, **common),
        }
        for name in rest:
            fixed, each = cost(name, block, inside)
            if not each:
                raise TargetError(
                    f"S4 puts {name} into {block.name!r}, where it finds no place: "
                    f"{sorted({str(site.role) for site in inside})} are known there. Name what is missing "
                    "(roles={'q': ..., 'v': ...}), or leave the method out of `groups`."
                )
            number = math.floor((share / len(rest) - fixed) / each)
            if number < 1:
                raise TargetError(
                    f"S4(budget={self.budget}): the share of {block.name!r} leaves {max(share, 0) / len(rest):.0f} "
                    f"parameters for {name}, which needs {fixed + each} at least. Raise the budget, or change groups."
                )
            yield make[name](number)


def methods(group: str) -> list[str]:
    """The names in "adapter, lora"; of "none" no name."""
    return [] if group.strip() == NONE else [name.strip() for name in group.split(",")]


def base_size(model: nn.Module, known: dict[str, list[Site]], blocks: list[Site]) -> int:
    """How many parameters the smallest part with the blocks and their embeddings has, without heads."""
    embeddings = outside_frozen_networks(model, known.get("embed", []))
    names = [*(site.name.rpartition(".")[0] for site in blocks), *(site.name for site in embeddings)]
    part = model.get_submodule(common(names) if embeddings else "")
    heads = {id(p) for site in known.get("head", []) for p in site.module.parameters()}
    inside = {id(p): p.numel() for p in part.parameters() if id(p) in heads}
    return state.describe(part)["base"] - sum(inside.values())


def stacks(blocks: list[Site]) -> list[list[Site]]:
    """The blocks of the encoder, of the decoder, or of the one stack."""
    return [[site for site in blocks if site.stack == stack] for stack in dict.fromkeys(s.stack for s in blocks)]


def spindle(blocks: int, groups: int = 4) -> list[int]:
    """Sizes of groups: a sixth of the blocks at each end, the rest as evenly as it goes between them."""
    if groups < 3 or blocks < 2:
        return [blocks // groups + (i < blocks % groups) for i in range(groups)]
    end = max(1, round(blocks / 6))
    middle, count = blocks - 2 * end, groups - 2
    return [end, *(middle // count + (i < middle % count) for i in range(count)), end]


def bias_size(block: Site, inside: list[Site], create: bool) -> int:
    """What BitFit trains in a block."""
    own = [pair for module in state.base_modules(block.module) for pair in module.named_parameters(recurse=False)]
    there = sum(p.numel() for name, p in own if name.endswith("bias"))
    projected = {"q", "k", "v", "o", "qkv", "up", "gate", "down"}
    made = (
        [s for s in inside if (s.role or "").removeprefix("cross.") in projected and not has_bias(s)] if create else []
    )
    return there + sum(site.out_features for site in made)


def cost(name: str, block: Site, inside: list[Site]) -> tuple[int, int]:
    """Parameters of a method in a block: fixed ones, and those that each unit of its size adds."""
    if name == "adapter":
        return block.out_features, 2 * block.out_features + 1
    if name == "lora":
        return 0, sum(site.in_features + site.out_features for site in inside if site.role in ("q", "v"))
    attends = [site.facts for site in inside if site.role in ("attend", "cross.attend")]
    return 0, sum(2 * (facts.kv_heads or facts.heads or 0) * (facts.head_dim or 0) for facts in attends)
