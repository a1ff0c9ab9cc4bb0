"""Parameter groups: what decays, and LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al., ICML 2024.
https://arxiv.org/abs/2402.12354

    def configure_optimizers(self):
        return AdamW(lora_plus_groups(self, lr=1e-4, ratio=16))     # or lora_plus=16 on the command line
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.experts import ExpertLowRank
from lightning_peft.core.low_rank import LowRank

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
"""parameter groups -> optimizer, such as `partial(AdamW, lr=1e-3)`"""
EMBEDDING_LR = 1e-6


@runtime_checkable
class Groups(Protocol):
    """What makes an optimizer for a module, with groups of its own, out of one that takes groups."""

    @property
    def optimizer(self) -> MakeOptimizer | Groups:
        """The one inside."""

    def over(self, module: nn.Module) -> Optimizer:
        """The optimizer of what trains in the module."""


def decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for biases, scales and other vectors, nor in normalisation layers."""
    return parameter.ndim > 1 and not name.endswith("bias") and "norm" not in type(owner).__name__.lower()


def kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """ "b" for the matrix B of a low-rank product, "embedding" for both factors at an embedding, else "other" """
    if isinstance(owner, ExpertLowRank):
        return "b" if name == "b" else "other"
    if not isinstance(owner, LowRank) or parameter.ndim != 2:
        return "other"
    if owner.shape.kind == "embedding":
        return "embedding"
    return "b" if name == "b" else "other"


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, each once: first those that decay, then the others with weight_decay=0."""
    return [group for group, _ in split(module, lambda *_: "other")]


def split(module: nn.Module, kind: Callable[[nn.Module, str, nn.Parameter], str]) -> list[tuple[dict[str, Any], str]]:
    """Groups of what trains, each with the kind of its parameters."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                key = kind(owner, name, parameter), decays(owner, name, parameter)
                groups.setdefault(key, []).append(parameter)
    if not seen:
        raise ValueError(
            f"No parameter of {type(module).__name__} requires a gradient, so there is nothing to train. A PEFT"
            " callback switches on what it trains; without one, call module.requires_grad_(True) on the part to train."
        )
    ordered = sorted(groups, key=lambda key: (("other", "b", "embedding").index(key[0]), not key[1]))
    return [({"params": groups[key], **({} if key[1] else {"weight_decay": 0.0})}, key[0]) for key in ordered]


def lora_plus_groups(
    module: nn.Module, lr: float, ratio: float = 16.0, embedding_lr: float | None = EMBEDDING_LR
) -> list[dict[str, Any]]:
    """Groups with lr(B) = ratio lr, lr(A) = lr; B of every product B A, those of experts too, and nothing else

    Trained biases, norms, heads, magnitudes and both factors of products whose form is another (AdaLoRA) get lr. What
    decays is as in `parameter_groups`. embedding_lr: of A and B at embeddings, where A is the one that starts at zero;
    None gives them lr. A scheduler multiplies each group's own rate, so the ratio stays. Errors: ValueError, also where
    nothing that trains is such a factor.
    """
    check_ratio(ratio, embedding_lr)
    return [{**group, "lr": rate(lr, of, ratio, embedding_lr)} for group, of in factors(module)]


def factors(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """`split` by `kind`, of a module that has what the rates are for."""
    parts = split(module, kind)
    if all(of == "other" for _, of in parts):
        raise ValueError(
            f"LoRA+ gives B of products B A a higher rate, and none trains in this {type(module).__name__}. Use it with"
            " LoRA or a method made of it, or leave lora_plus out."
        )
    return parts


def rate(lr: float, of: str, ratio: float, embedding_lr: float | None) -> float:
    """The learning rate of a kind of parameters."""
    if of == "embedding" and embedding_lr is not None:
        return embedding_lr
    return ratio * lr if of == "b" else lr


def check_ratio(ratio: float, embedding_lr: float | None) -> None:
    """Raise on rates that make no sense."""
    if not 0 < ratio < math.inf or not 0 <= (embedding_lr or 0) < math.inf:
        raise ValueError(f"LoRA+ with ratio={ratio}, embedding_lr={embedding_lr}: give numbers above 0, such as 16.")


@dataclass(frozen=True)
class LoRAPlus:
    """Any optimizer, over the groups of `lora_plus_groups`: its own learning rate is A's."""

    optimizer: MakeOptimizer
    ratio: float = 16.0
    embedding_lr: float | None = EMBEDDING_LR

    def __post_init__(self) -> None:
        check_ratio(self.ratio, self.embedding_lr)

    def over(self, module: nn.Module) -> Optimizer:
        """The optimizer of what trains in the module."""
        parts = factors(module)
        optimizer = self.optimizer([group for group, _ in parts])
        for group, (_, of) in zip(optimizer.param_groups, parts, strict=True):
            group["lr"] = rate(group["lr"], of, self.ratio, self.embedding_lr)
        return optimizer


def innermost(make: MakeOptimizer | Groups) -> MakeOptimizer:
    """What takes groups, without those who make them."""
    while isinstance(make, Groups):
        make = make.optimizer
    return make


def optimizer_of(module: nn.Module, make: MakeOptimizer | Groups) -> Optimizer:
    """The optimizer of what trains in the module."""
    return make.over(module) if isinstance(make, Groups) else make(parameter_groups(module))
