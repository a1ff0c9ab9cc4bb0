"""S4: Parameter-Efficient Fine-Tuning Design Spaces. Chen et al., ICLR 2023. https://arxiv.org/abs/2301.01821"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError
from lightning_peft.core.sites import Site, TargetError, roles, tokens
from lightning_peft.methods.bitfit import BitFit, has_bias
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.pfeiffer import Pfeiffer
from lightning_peft.methods.prefix_tuning import PrefixTuning

NAMES = ("adapter", "lora", "prefix", "bitfit")
ASSIGNMENT = ("adapter,lora", "adapter,prefix", "adapter,prefix,bitfit", "prefix,bitfit,lora")


class S4(PEFT, name="s4", family="hybrid", paper="2301.01821", identity=False, overhead="tokens"):
    """groups of blocks, few at the ends and many in the middle: {A, L}, {A, P}, {A, P, B}, {P, B, L}

    A: Pfeiffer adapter, L: LoRA at queries and values, P: prefix, B: BitFit. Each block gets the same share of `budget`
    (of all parameters but heads); B takes what it needs of it, the others the same each, which gives ranks, widths and
    lengths, rounded down. An encoder and a decoder are grouped apart. LoRA has a scale of alpha / rank.

    budget: the share of the base's parameters that trains.
    groups: the methods of each group. sizes: how many blocks each has; empty: as a spindle, 2, 4, 4, 2 of 12 and 4, 8,
    8, 4 of 24 (our choice, the paper's sizes are not known; fewer blocks than groups leave the middle out). Another
    grouping is another experiment: lists of `sizes` and `groups` in a sweep. Source: section 4.
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
        if bad := [name for group in self.groups for name in group.split(",") if name.strip() not in NAMES]:
            raise FieldError(f"S4(groups={self.groups!r}): {bad[0]!r} is no method here. Known: {', '.join(NAMES)}.")
        if not self.groups or (self.sizes and (len(self.sizes) != len(self.groups) or min(self.sizes) < 0)):
            raise FieldError(
                f"S4(groups={self.groups!r}, sizes={self.sizes!r}): give a size of 0 or more for each group."
            )

    def parts_on(self, model: nn.Module) -> tuple[PEFT, ...]:
        known = roles(model)
        if not known.get("block"):
            raise TargetError(
                f"S4 groups the blocks of a model, and none are known in this {type(model).__name__}. Name them with "
                "roles={'block': ...}."
            )
        share = self.budget * base_size(model, known) / len(known["block"])
        return tuple(part for stack in stacks(known["block"]) for part in self._stack(known, stack, share))

    def _stack(self, known: dict[str, list[Site]], blocks: list[Site], share: float) -> Iterator[PEFT]:
        """The methods of one stack."""
        others = [site.name for site in known["block"] if site.stack != blocks[0].stack]
        away = [f"re:{re.escape(name)}(\\..*)?" for name in others]
        exclude = [*away, *(tokens(self.exclude, "exclude") if self.exclude is not None else [])] or None
        sizes = self.sizes or spindle(len(blocks), len(self.groups))
        if sum(sizes) != len(blocks):
            raise TargetError(f"S4(sizes={sizes}): {sum(sizes)} blocks in groups, and there are {len(blocks)}.")
        first = 0
        for names, size in zip(self.groups, sizes, strict=True):
            if size:
                layers = list(range(first, first + size))
                yield from self._group(
                    [n.strip() for n in names.split(",")], known, blocks[first], share, layers, exclude
                )
            first += size

    def _group(
        self, names: list[str], known: dict[str, list[Site]], block: Site, share: float, layers: list[int], exclude: Any
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
            number = math.floor((share / len(rest) - fixed) / each) if each else 0
            if number < 1:
                raise TargetError(
                    f"S4(budget={self.budget}): the share of {block.name!r} leaves {max(share, 0) / len(rest):.0f} "
                    f"parameters for {name}, which needs {fixed + each} at least. Raise the budget, or change groups."
                )
            yield make[name](number)


def base_size(model: nn.Module, known: dict[str, list[Site]]) -> int:
    """How many parameters the base has, without heads."""
    heads = {id(p): p.numel() for site in known.get("head", []) for p in site.module.parameters()}
    return state.describe(model)["base"] - sum(heads.values())


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
    there = sum(p.numel() for name, p in block.module.named_parameters() if name.rpartition(".")[2].endswith("bias"))
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
