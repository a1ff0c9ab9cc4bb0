"""Adapters: modules that are computed *around* another module, which keeps its class, its name and its parameters."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LabelError(ValueError):
    """A label that is taken, unknown, or cannot be the name of a module."""


class NotMergeableError(TypeError):
    """The adapter's change is no change of one weight, so nothing can be folded."""


class Cell:
    """One switch shared by all adapters of a label: flipping it is O(1), whatever the size of the model."""

    def __init__(self) -> None:
        self.enabled = True
        self.merged = False
        self.on = True

    def set(self, *, enabled: bool | None = None, merged: bool | None = None) -> None:
        self.enabled = self.enabled if enabled is None else enabled
        self.merged = self.merged if merged is None else merged
        self.on = self.enabled and not self.merged


class Adapter(nn.Module):
    """y = adapter(base, x): computed in place of y = base(x).

    `forward(base, *args, **kwargs)` decides when `base` runs, on what, and what becomes of its result. `delta(weight)`
    is the same change written as an update of the weight (d_out, d_in); only adapters for which that is exact have it.
    """

    additive = False  # y = base(x) + something that does not look at base(x): merging in any order is exact
    reads_weight = False  # computes with the base's weight, which nobody else may change meanwhile
    training_only = False  # does nothing in eval mode, and to weights: merging passes it over
    follows_dtype = False  # dtype="base": cast with the model
    mirrors = False  # its weight is tied to that of another adapter of the label, which folds the change of both
    absorbed = False  # the base's codes were made for it (`compensate`), and are not the base's without it
    apart = False  # what it is attached to runs without gradients: there is nothing to compute again in backward
    folds_norms = False  # `fold` takes the gain and bias of a norm, too, as one row (1, d) and (d,)
    beyond: Iterable[str] = ()  # parameters other than weight and bias that `fold_parameters` changes
    cell: Cell
    place: nn.Module  # what it is attached to; there while it is attached, and no child

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward(base, *args, **kwargs); define one.")

    def twice(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """`run`, which gradient checkpointing calls now and once more in backward, told the same both times.

        For adapters that are told something from outside of the block for each call (positions, whose turn it is): by
        the time of the second run somebody may have said something else.
        """
        return run

    def delta(self, weight: Tensor) -> Tensor:
        """The change of `weight` (d_out, d_in) that has the same effect, in the dtype of `weight`."""
        raise NotMergeableError(
            f"{type(self).__name__} cannot be folded into a weight. Keep it attached, or `remove` it to get the "
            f"base back."
        )

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (d_out, d_in) and bias (d_out,) of a plain projection that computes what the adapted one does."""
        return weight + self.delta(weight), bias

    def fold_parameters(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Of an adapter with parameters `beyond`: all that it changes, and their change."""
        return ()

    def check_fold(self) -> None:
        """Raise `NotMergeableError` where there is no weight at all that could take the change."""

    def grouped(self, group: int) -> Tensor | None:
        """The change of the weight as (d_out, d_in / group), where it is one number for all inputs of a group.

        The zeros of a base in groups of integers take it exactly; None where the change is not of that kind.
        """
        return None

    def compensate(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """What to quantise in place of `weight` (d_out, d_in), when the base is quantised around this adapter.

        Initialisers that make up for the error (LoftQ) or take a part of the weight over (QPiSSA) set their own tensors
        here. rounded(w): w as it comes back from its codes.
        """
        return weight

    def rebased(self) -> None:
        """The weight at the place has just been put into codes: what follows from the base may follow again."""

    def reset(self, draw: Any) -> None:
        """Initialise every own tensor through `draw` (`core.init.Draw`), never from the global generator.

        It is attached by then: `core.projection.base_weight(self.place)` is there for initialisers that look at it.
        """

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss of each optimizer step; None for none."""
        return None

    def counted(self) -> Iterable[tuple[nn.Parameter, int]]:
        """Parameters of which only some entries take part, and how many."""
        return ()

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """These are about to be loaded: take their sizes, where training decides them."""

    def collapsed(self) -> dict[str, Tensor]:
        """The tensors that go into an adapter file; a reparametrised adapter gives what it stands for."""
        return dict(self.state_dict())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Follow the base to another device, but keep the dtype: adapters are masters in fp32 unless asked
        otherwise.
        """

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if self.follows_dtype or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def cast_(self, dtype: torch.dtype) -> Adapter:
        """Change the dtype of the adapter's own tensors; `.to(dtype)` on the model leaves them alone on purpose."""
        for module in self.modules():
            if isinstance(module, Adapter):  # those inside of it keep theirs, too
                nn.Module._apply(module, lambda t: t.to(dtype) if t.is_floating_point() else t)
        return self


class Adapters(nn.Module):
    """The adapters of one module by label, in the order in which they wrap it. Any label without a dot will do."""

    def train(self, mode: bool = True) -> Adapters:
        vars(self)["training"] = mode  # past nn.Module.__setattr__: an adapter may be called `training` too
        for adapter in self._modules.values():
            adapter.train(mode)  # type: ignore[union-attr]
        return self

    def add(self, label: str, adapter: Adapter) -> None:
        self._modules[label] = adapter

    def drop(self, label: str) -> Adapter:
        return self._modules.pop(label)  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, label: str) -> bool:
        return label in self._modules

    def __getitem__(self, label: str) -> Adapter:
        return self._modules[label]  # type: ignore[return-value]

    def running(self) -> list[Adapter]:
        return [adapter for adapter in self._modules.values() if adapter.cell.on]  # type: ignore[union-attr, misc]


class Host(nn.Module):
    """A place inside a module that is no module of its own (a slice, the attention product); it holds adapters only."""

    is_host = True
    adapters: Any


def adapters_of(place: nn.Module) -> list[Adapter]:
    """The adapters at a place, the innermost first."""
    container = place._modules.get("adapters")
    return list(container._modules.values()) if isinstance(container, Adapters) else []  # type: ignore[arg-type]


def inside(adapter: Adapter) -> list[Adapter]:
    """The running adapters inside of an attached one: at its place before it, and at the parts of its module."""
    place = adapter.place
    own = place._modules["adapters"]._modules.values()  # type: ignore[union-attr]
    found: list[Any] = list(itertools.takewhile(lambda other: other is not adapter, own))
    for child in place.children():
        if isinstance(child, Host):
            found += child.adapters._modules.values()
    return [other for other in found if other.cell.on]


def through(module: nn.Module | None, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Nest the running adapters of `module` (if any) around `base`, the last one outermost, and call the result."""
    adapters = None if module is None else module._modules.get("adapters")
    if adapters is not None:
        for adapter in adapters._modules.values():
            if adapter.cell.on:  # type: ignore[union-attr]
                base = functools.partial(adapter, base)  # type: ignore[arg-type, misc]
    return base(*args, **kwargs)


class Route:
    """Stands in for `module.forward`; what was there before (the class's own, or another library's) runs innermost."""

    outermost = False  # stays around what is put on the module later

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.inner: Callable[..., Any] | None = vars(module).get("forward")

    def base(self) -> Callable[..., Any]:
        return self.inner or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return through(self.module, self.base(), *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.base())


class Takeover(Route):
    """A forward rewritten so that places inside the module become visible; without running adapters, the original."""

    def hosts(self) -> dict[str, Host]:
        return {name: child for name, child in self.module.named_children() if isinstance(child, Host)}

    def busy(self) -> bool:
        return any(a.cell.on for host in self.hosts().values() for a in host.adapters._modules.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewritten(*args, **kwargs) if self.busy() else self.base()(*args, **kwargs)

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no rewritten forward.")

    def through(self, name: str, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `base` through the adapters of the place called `name`, where there are any."""
        return through(self.module._modules.get(name), base, *args, **kwargs)


def check_label(label: str) -> str:
    if not isinstance(label, str) or not label or "." in label:
        raise LabelError(f"label={label!r} cannot name an adapter: give a non-empty string without dots.")
    return label


def attach(module: nn.Module, label: str, adapter: Adapter) -> None:
    """Put `adapter` around `module` as `module.adapters.<label>`.

    Class and parameter names of the base stay as they are.
    """
    check_label(label)
    if not isinstance(module._modules.get("adapters"), Adapters):
        _open(module)
    container: Adapters = module.adapters  # type: ignore[assignment]
    if label in container:
        raise LabelError(
            f"label={label!r} is taken on this {type(module).__name__}; known: {list(container._modules)}."
        )
    container.add(label, adapter.train(module.training))
    vars(adapter)["place"] = module


def _open(module: nn.Module) -> None:
    if hasattr(module, "adapters"):
        raise LabelError(
            f"{type(module).__name__} has an attribute `adapters` of its own ({type(module.adapters).__name__}), "
            "which is where adapters are kept. Exclude it with exclude=..., or rename the attribute."
        )
    module.add_module("adapters", Adapters().train(module.training))
    if not isinstance(module, Host):
        insert(module, Route(module), below(module, lambda link: link.outermost))


def detach(module: nn.Module, label: str) -> Adapter:
    """Take the adapter off again; the last one leaves the module exactly as it was found."""
    container = module._modules.get("adapters")
    if not isinstance(container, Adapters) or label not in container:
        known = list(container._modules) if isinstance(container, Adapters) else []
        raise LabelError(f"No adapter labelled {label!r} on this {type(module).__name__}; known: {known}.")
    adapter = container.drop(label)
    vars(adapter).pop("place", None)
    if not len(container):
        del module._modules["adapters"]
        unlink(module, Route)
    return adapter


def unlink(module: nn.Module, kind: type[Route]) -> None:
    """Take the link of exactly this kind out of the chain of forwards on `module`."""
    above, link = None, vars(module).get("forward")
    while isinstance(link, Route) and type(link) is not kind:
        above, link = link, link.inner
    if not isinstance(link, Route):
        return  # another library wrapped the chain after us: our link passes everything through and stays
    if above is not None:
        above.inner = link.inner
    elif link.inner is not None:
        module.forward = link.inner  # type: ignore[method-assign]
    else:
        del vars(module)["forward"]


def take_over(module: nn.Module, kind: type[Takeover]) -> None:
    """Install `kind` under any adapters that are around the whole module already; once."""
    above = below(module, lambda link: link.outermost or type(link) is Route)
    if not isinstance(vars(module).get("forward") if above is None else above.inner, kind):
        insert(module, kind(module), above)


def below(module: nn.Module, over: Callable[[Route], bool]) -> Route | None:
    """The last of the first links in the chain of forwards for which `over` holds."""
    above, link = None, vars(module).get("forward")
    while isinstance(link, Route) and over(link):
        above, link = link, link.inner
    return above


def insert(module: nn.Module, link: Route, above: Route | None) -> None:
    """Put a link into the chain of forwards, below `above`, or on top."""
    if above is None:
        module.forward = link  # type: ignore[method-assign]
    else:
        link.inner, above.inner = above.inner, link
