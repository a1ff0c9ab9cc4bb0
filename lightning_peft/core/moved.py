"""Every parameter of a module moved while the module runs: the weights themselves stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import projection, state
from lightning_peft.core.adapter import Adapter, Takeover, inside
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import Site, Sites


class Moved(Adapter):
    """theta = theta_0 + change for every parameter of one module, while the module runs.

    A subclass says by `change` what is added to each of `names`, None for nothing, or how by `shift`.
    """

    additive = True
    folds_norms = True

    def __init__(self, names: dict[str, int]) -> None:
        super().__init__()
        self.names = names

    @property
    def beyond(self) -> list[str]:  # type: ignore[override]
        """Of a module without a weight (a bias beside tied embeddings) all of them."""
        own = set() if getattr(getattr(self, "place", None), "weight", None) is None else {"weight", "bias"}
        return sorted(set(self.names) - own)

    def change(self, name: str) -> Tensor | None:
        """What is added, of the parameter's shape."""
        raise NotImplementedError

    def changes(self) -> dict[str, Tensor]:
        """name -> what is added, of those that move"""
        found = ((name, self.change(name)) for name in self.names)
        return {name: change for name, change in found if change is not None}

    def shifted(self, thetas: dict[str, Tensor]) -> dict[str, Tensor]:
        """The moved parameters, of those that move."""
        return {name: thetas[name] + change.to(thetas[name].dtype) for name, change in self.changes().items()}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_quantised(self.place):
            return beside(base, args[0], self.changes(), flipped(self.place))
        plain = self.plain(base)
        if plain is base:
            with self.moved():
                return base(*args, **kwargs)
        y = base(*args, **kwargs)  # others scale or turn what is inside of them: the change is added after that
        with self.moved():
            moved = plain(*args, **kwargs)
        return y + (moved - plain(*args, **kwargs))

    def plain(self, base: Callable[..., Any]) -> Callable[..., Any]:
        """The module without adapters, if those in `base` do more than add to it."""
        if self.beyond or all(adapter.additive for adapter in inside(self)):
            return base
        while isinstance(base, partial) and isinstance(base.func, Adapter):
            base = base.args[0]
        return base.base() if isinstance(base, Takeover) else base

    @contextmanager
    def moved(self) -> Iterator[None]:
        """The module sees the moved parameters, in front of those of that name."""
        owners = {name: self.owner(name) for name in self.names}
        shifted = self.shifted({name: getattr(owner, leaf) for name, (owner, leaf) in owners.items()})
        before = [(*owners[name], vars(owners[name][0]).get(owners[name][1])) for name in shifted]
        try:
            for (owner, leaf, _), theta in zip(before, shifted.values(), strict=True):
                vars(owner)[leaf] = theta
            yield
        finally:
            for owner, leaf, old in reversed(before):
                if old is None:
                    del vars(owner)[leaf]
                else:
                    vars(owner)[leaf] = old

    def owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return (self.place.get_submodule(path) if path else self.place), leaf

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changes = {name: change.to(weight) for name, change in self.changes().items()}
        if "bias" in changes and bias is not None:
            bias = bias + changes["bias"]
        if "weight" not in changes:
            return weight, bias
        change = changes["weight"].T if flipped(self.place) else changes["weight"]
        return weight + change.reshape(weight.shape), bias

    def fold_parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for name, change in self.changes().items():
            owner, leaf = self.owner(name)
            yield getattr(owner, leaf), change


def flipped(place: nn.Module) -> bool:
    """Whether the weight is kept as (d_in, d_out), as transformers' Conv1D and embeddings do."""
    weight = place.weight
    return isinstance(weight, Tensor) and projection.views(place)[0].stride() != weight.stride()


def beside(base: Callable[..., Any], x: Tensor, changes: dict[str, Tensor], turned: bool) -> Tensor:
    """Of a weight in codes: y = W_0 x + b_0 + dW x + db"""
    y, bias = base(x), changes.get("bias")
    if bias is not None:
        y = y + bias.to(y.dtype)
    if "weight" not in changes:
        return y
    change = changes["weight"].T if turned else changes["weight"]
    return y + F.linear(x.to(y.dtype), change.to(y.dtype))


def whole_modules(sites: Sites, heads: dict[str, nn.Module]) -> Iterator[tuple[Site, dict[str, nn.Parameter]]]:
    """Each module once, with its parameters; nn.MultiheadAttention with those of its output projection."""
    seen = {id(m) for head in heads.values() for m in head.modules()}
    attentions = [m for m in sites.model.modules() if isinstance(m, nn.MultiheadAttention)]
    seen |= {id(m.out_proj) for m in attentions}
    for site in sites:
        module = site.module
        if site.part is not None or site.columns is not None or id(module) in seen:
            continue
        seen.add(id(module))
        if named := own_parameters(module):
            yield site, named


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Of one module; of nn.MultiheadAttention with those of its output projection. A weight in codes is a shape."""
    inside = isinstance(module, nn.MultiheadAttention)
    named = {n: p for n, p in module.named_parameters(recurse=inside) if ".adapters." not in f".{n}"}
    for name in [name for name in named if state.is_codes(module, name)]:
        whole = state.asked_about(module, name, named.pop(name))
        named = {"weight": whole, **named}
    return named
