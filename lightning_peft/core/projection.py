"""One face for everything that projects: Linear, transformers' Conv1D, a slice of a packed one, a place in attention.

A *place* is what adapters are attached to: a module of the base, or a `Host` that stands for a part of one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Host, LabelError, NotMergeableError, Takeover, take_over, through, unlink
from lightning_peft.core.architectures import is_conv1d, is_convolution
from lightning_peft.core.attention import (
    Attend,
    MultiheadForward,
    close_attend,
    in_projection,
    open_attend,
    takeover_of,
)
from lightning_peft.core.quantised import foreign, foreign_dtype, foreign_weight
from lightning_peft.core.sites import Columns, Site


class Slice(Host):
    """Some output columns of a packed projection."""

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns


class Projected(Host):
    """The projection q, k, v or o of an `nn.MultiheadAttention`, whose weights are used without calling a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


STACK = "each_"  # before the name of a stack of weights, the name of its place


class Stack(Host):
    """A parameter of three dimensions, the weights of all experts, that the module's forward uses as it likes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class StackForward(Takeover):
    """The module's own forward, while each stack with adapters is shadowed by what these make of it."""

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        module, own = self.module, vars(self.module)
        names: list[str] = [str(host.name) for host in self.hosts().values() if isinstance(host, Stack)]
        weights = {name: self.through(STACK + name, functools.partial(getattr, module, name)) for name in names}
        own.update(weights)
        try:
            return self.base()(*args, **kwargs)
        finally:
            for name in names:
                del own[name]


class PackedForward(Takeover):
    """A packed projection computed once; each slice goes through its own adapters and back to its columns."""

    def rewritten(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base()
        whole = out = base(x, *args, **kwargs)
        for host in self.hosts().values():
            columns: Columns = host.columns  # type: ignore[assignment]

            def part(
                z: Tensor, columns: Columns = columns
            ) -> Tensor:  # an adapter may turn the input: then compute anew
                return columns.take(whole if z is x else base(z, *args, **kwargs))

            out = columns.put(out, through(host, part, x))
        return out


# ------------------------------------------------------------------ opening and closing places
def open_place(site: Site) -> nn.Module:
    """What to attach to for this site.

    Makes the host (and the written-out forward it needs) where there is none yet.
    """
    if site.part is None and site.columns is None:
        return site.module
    name = str(site.part or site.role).rpartition(".")[2]
    found = site.module._modules.get(name)
    return found if isinstance(found, Host) else _add_host(site, name)


def _add_host(site: Site, name: str) -> Host:
    module = site.module
    if hasattr(module, name):
        raise LabelError(
            f"{type(module).__name__} has an attribute `{name}` of its own; adapters inside it cannot be kept there."
        )
    host, takeover = _make_host(site, name)
    vars(host)["owner"] = module  # not registered: the owner already holds the host
    module.add_module(name, host.train(module.training))
    if takeover is not None:
        take_over(module, takeover)
    return host


def _make_host(site: Site, name: str) -> tuple[Host, type[Takeover] | None]:
    if site.columns is not None:
        return Slice(site.columns), PackedForward
    if name.startswith(STACK):
        return Stack(name.removeprefix(STACK)), StackForward
    if name == "attend":
        return open_attend(site.module), takeover_of(site.module)
    takeover_of(site.module)
    return Projected(name), MultiheadForward


def close_place(place: nn.Module) -> None:
    """Take an empty host away, and with the last one the written-out forward."""
    if not isinstance(place, Host) or "adapters" in place._modules:
        return
    owner: nn.Module = vars(place)["owner"]
    name = next(name for name, child in owner._modules.items() if child is place)
    del owner._modules[name]
    if isinstance(place, Attend):
        close_attend(owner, place)
    if not any(isinstance(child, Host) for child in owner.children()):
        for kind in Takeover.__subclasses__():
            unlink(owner, kind)


# ------------------------------------------------------------------ reading and writing weights
def views(place: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias (...) of the place, as views of the base's parameters; `matrix` makes it (d_out, d_in).

    An embedding (V, d) is seen as the projection (d, V) of one-hot vectors, a convolution (d_out, ...) as that of the
    patches under its kernel.
    """
    if isinstance(place, Slice):
        return _slice_views(place)
    if isinstance(place, Projected):
        owner = vars(place)["owner"]
        return (owner.out_proj.weight, owner.out_proj.bias) if place.name == "o" else in_projection(owner, place.name)
    if isinstance(place, Stack):
        return getattr(vars(place)["owner"], place.name), None
    weight = getattr(place, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        if isinstance(place, nn.Linear) or is_convolution(place):
            return weight, place.bias  # type: ignore[return-value]
        if is_conv1d(place) or isinstance(place, nn.Embedding):
            return weight.T, getattr(place, "bias", None)
        if weight.dim() == 1:  # a norm: one row
            return weight, getattr(place, "bias", None)
    raise NotMergeableError(
        f"{type(place).__name__} has no floating-point weight (d_out, d_in) to fold into. Known: Linear, Conv1D, "
        "Embedding, Conv1d, Conv2d, Conv3d, slices of projections, nn.MultiheadAttention. Leave the adapter attached."
    )


def matrix(place: nn.Module, weight: Tensor) -> Tensor:
    """What `views` gave -> (d_out, d_in), a view where that is possible"""
    return weight.flatten(1) if is_convolution(place) else weight.reshape(-1, weight.shape[-1])


def transposed(module: nn.Module) -> bool:
    """Whether its weight is (in, out), as Hugging Face's Conv1D keeps it."""
    return is_conv1d(module)


def base_weight(place: nn.Module) -> Tensor:
    """The weight (d_out, d_in) that the place has at this moment, without a gradient; dequantised if it is in codes."""
    if foreign(place):
        return foreign_weight(place, foreign_dtype(place._parameters["weight"]))
    return matrix(place, views(place)[0]).detach()


def base_bias(place: nn.Module) -> Tensor | None:
    """The bias (d_out,) of the place, if it has one; never looks at the weight, which may be in codes."""
    if isinstance(place, Slice):
        bias = base_bias(vars(place)["owner"])
        return None if bias is None else place.columns.take(bias)
    if isinstance(place, Projected):
        owner: Any = vars(place)["owner"]
        return owner.out_proj.bias if place.name == "o" else in_projection(owner, place.name)[1]
    return getattr(place, "bias", None)


def project(site: Site, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
    """What the projection at a site makes of x, through the adapters that run there."""
    if isinstance(site.module, nn.MultiheadAttention) and site.part in ("q", "k", "v"):
        weight, bias = in_projection(site.module, site.part)
        return through(site.module._modules.get(site.part), functools.partial(F.linear, weight=weight, bias=bias), x)
    y = site.module(x)
    return site.columns.take(y) if site.columns else y


def _slice_views(place: Slice) -> tuple[Tensor, Tensor | None]:
    columns = place.columns
    weight, bias = views(vars(place)["owner"])
    rows = slice(columns.start, columns.stop)
    grouped = weight.unflatten(0, (columns.groups, -1))[:, rows]
    return grouped, None if bias is None else bias.unflatten(0, (columns.groups, -1))[:, rows]


def read(place: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Copies of weight (d_out, d_in) and bias (d_out,), in fp32 or better."""
    weight, bias = views(place)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (
        matrix(place, weight.detach().to(dtype, copy=True)),
        None if bias is None else bias.detach().to(dtype, copy=True).reshape(-1),
    )


@torch.no_grad()
def write(place: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Cast once and store; shapes as `read` gave them."""
    old_weight, old_bias = views(place)
    old_weight.copy_(weight.reshape(old_weight.shape))
    if old_bias is not None and bias is not None:
        old_bias.copy_(bias.reshape(old_bias.shape))


def region(place: nn.Module) -> tuple[int, object]:
    """The module whose weight this is, and which part of it; None for all."""
    if isinstance(place, Slice):
        return id(vars(place)["owner"]), place.columns
    if isinstance(place, (Projected, Stack)):
        return id(vars(place)["owner"]), place.name
    return id(place), None


def snapshot(place: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Exact copies, to be written back bit for bit."""
    weight, bias = views(place)
    return weight.detach().clone(), None if bias is None else bias.detach().clone()


def owner_of(place: nn.Module) -> nn.Module:
    """The module of the base that holds the weight."""
    return place if not isinstance(place, (Slice, Projected, Stack)) else vars(place)["owner"]


def parameters_of(place: nn.Module) -> list[nn.Parameter]:
    """The base's parameters that `write` would change."""
    if isinstance(place, Projected):
        owner: Any = vars(place)["owner"]
        if place.name == "o":
            return list(owner.out_proj.parameters())
        packed = owner.in_proj_weight
        own = [packed if packed is not None else getattr(owner, f"{place.name}_proj_weight"), owner.in_proj_bias]
        return [p for p in own if p is not None]
    if isinstance(place, Stack):
        return [getattr(vars(place)["owner"], place.name)]
    module = vars(place)["owner"] if isinstance(place, Slice) else place
    return list(module.parameters(recurse=False))
