"""Chosen entries of many tensors that train, as one vector: gradients and moments are of the chosen entries only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, inside
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.init import Draw
from lightning_peft.core.moved import Moved
from lightning_peft.core.quantised import is_quantised


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a tensor of this shape that some of its outputs are made with: `lines` along `dim`"""

    shape: torch.Size
    dim: int
    lines: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Slice:
        """mask: True for all entries of the outputs, which are rows or columns"""
        rows = mask.reshape(len(mask), -1)
        dim = 0 if torch.equal(rows.all(1), rows.any(1)) else 1
        return cls(mask.shape, dim, rows.any(1 - dim).nonzero().flatten())

    @property
    def size(self) -> int:
        return self.shape.numel() // self.shape[self.dim] * len(self.lines)

    def places(self, device: torch.device) -> Tensor:
        """(size,) ascending: where they are in the flat tensor"""
        everything = torch.arange(self.shape.numel(), device=device).view(self.shape)
        return everything.index_select(self.dim, self.lines.to(device)).flatten()


class Entries(nn.Module):
    """v (K,): the change of K entries of all tensors, laid one after the other; index (K,): which, ascending

    An empty index says that nothing is chosen yet, and v is of no effect; unless `dense`, where v holds all entries
    that there are to choose from. slices: number of a tensor -> the part of it that they are.
    """

    index: Tensor

    def __init__(self, sizes: list[int], count: int, slices: dict[int, Slice] | None = None) -> None:
        super().__init__()
        self.slices = slices or {}
        self.ends = list(itertools.accumulate(sizes))
        self.starts = [end - size for end, size in zip(self.ends, sizes, strict=True)]
        rooms = (self.slices[n].size if n in self.slices else size for n, size in enumerate(sizes))
        self.rooms = [0, *itertools.accumulate(rooms)]  # where the candidates of each tensor begin among all
        self.v = nn.Parameter(torch.empty(count))
        self.register_buffer("index", torch.zeros(0, dtype=place_dtype(self.ends[-1])))
        self.cuts = [0] * (len(sizes) + 1)  # where the entries of each tensor begin in v
        self.dense, self.l1 = False, 0.0

    @property
    def total(self) -> int:
        """How many entries there are to choose from."""
        return self.rooms[-1]

    def places(self, number: int) -> Tensor | None:
        """Where the candidates of a tensor are within it; None where all of it is."""
        part = self.slices.get(number)
        return None if part is None else part.places(self.v.device)

    def among_all(self, index: Tensor) -> Tensor:
        """Numbers among the candidates -> among all entries of the tensors."""
        cuts = torch.searchsorted(index.contiguous(), torch.tensor(self.rooms)).tolist()
        out = []
        for number, start in enumerate(self.starts):
            own, places = index[cuts[number] : cuts[number + 1]] - self.rooms[number], self.places(number)
            out.append(start + (own if places is None else places.cpu()[own]))
        return torch.cat(out)

    @property
    def settled(self) -> bool:
        """Whether it is known which entries train."""
        return not self.dense and len(self.index) > 0

    def of(self, number: int) -> tuple[Tensor | None, Tensor] | None:
        """Places within the tensor of this number (None for all of them) and their change; None for no change."""
        if self.dense:
            return self.places(number), self.v[self.rooms[number] : self.rooms[number + 1]]
        first, last = self.cuts[number], self.cuts[number + 1]
        if first == last:
            return None
        return self.index[first:last] - self.starts[number], self.v[first:last]

    def begin(self, draw: Draw) -> None:
        draw.zeros(self.v)

    def still(self) -> AbstractContextManager[Any]:
        """Within it, `of` draws nothing."""
        return nullcontext()

    def penalty(self) -> Tensor | None:
        """What is added to the loss of each optimizer step."""
        return self.l1 * self.v.abs().mean() if self.l1 and self.dense else None

    @torch.no_grad()
    def choose(self, index: Tensor, values: Tensor | None = None) -> None:
        """These entries (K,), ascending, from a change of zero or of `values`; the parameter stays the same object."""
        self.dense = False
        self.take(index, torch.zeros(len(index)) if values is None else values)

    @torch.no_grad()
    def take(self, index: Tensor, values: Tensor) -> None:
        index = index.to(self.index)
        if len(values) == len(self.v) and self.v.device == self.index.device:
            self.v.copy_(values)
        else:
            self.v.data = values.to(self.v)
            self.v.grad = None
        self.index = index.clone()
        self.note(index)

    def spread(self) -> None:
        """As if the same share of every tensor were chosen: what sizes and plans need of a model without numbers."""
        count = len(self.v)
        self.index = self.index.new_empty(count, device="meta")
        self.cuts = [0, *(count * end // self.ends[-1] for end in self.ends)]

    def expect(self, index: Tensor | None, values: Tensor | None) -> None:
        """Take the sizes and the choice of what is about to be loaded, where it fits these tensors."""
        if values is None or index is None or values.dim() != 1 or index.dim() != 1 or self.v.is_meta:
            return
        fits = len(index) == len(values) and (not len(index) or int(index.max()) < self.ends[-1])
        if fits or not len(index):
            self.dense = not len(index) and len(values) == self.total
            self.take(index, torch.zeros(len(values)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """By torch's own `load_state_dict`: the numbers that follow from the index follow it."""
        self.expect(state_dict.get(f"{prefix}index"), state_dict.get(f"{prefix}v"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def note(self, index: Tensor) -> None:
        """Where the entries of each tensor are, as numbers: what is compiled or run later looks at no value."""
        bounds = torch.tensor([*self.starts, self.ends[-1]], dtype=torch.int64)
        self.cuts = torch.searchsorted(index.detach().cpu().long().contiguous(), bounds).tolist()


def place_dtype(size: int) -> torch.dtype:
    """Of a number below this one."""
    return torch.int32 if size < 2**31 else torch.int64


class Scattered(Moved):
    """theta = theta_0, and theta_0 + v at the chosen entries, for every parameter of one module while it runs."""

    def __init__(self, entries: Entries, names: dict[str, int], shapes: dict[str, torch.Size]) -> None:
        super().__init__(names)
        self.entries, self.shapes = entries, shapes
        self.chooser: Any = None  # who chooses (`core.scores.Chooser`), when the last of the adapters is drawn
        self.probes: dict[str, Tensor] = {}  # zeros added to weights in codes, to see their gradient
        self.first = False  # of the adapters that share the entries, the one that speaks for them

    def reset(self, draw: Draw) -> None:
        self.entries.begin(draw)
        if self.chooser is not None:
            self.chooser.drawn(self, draw)

    def penalty(self) -> Tensor | None:
        return self.entries.penalty() if self.first else None

    # -------------------------------------------------------------- the moved tensors
    def of(self, name: str) -> tuple[Tensor | None, Tensor] | None:
        return self.entries.of(self.names[name])

    def change(self, name: str) -> Tensor | None:
        if (found := self.of(name)) is None:
            return self.probes.get(name)
        index, v = found
        shape = self.shapes[name]
        flat = v if index is None else v.new_zeros(shape.numel()).index_add(0, index, v)
        return flat.view(shape) if name not in self.probes else flat.view(shape) + self.probes[name]

    def shifted(self, thetas: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: self.of(name) for name in thetas}
        return {name: scattered(thetas[name], *pair) for name, pair in found.items() if pair is not None}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (len(args) == 1 and not kwargs and "weight" in self.names and is_plain(self, base)):
            return super().forward(base, *args, **kwargs)
        if (found := self.of("weight")) is None or found[0] is None:
            return super().forward(base, *args, **kwargs)
        place: Any = self.place
        biases = {} if place.bias is None else {"bias": place.bias}
        bias = (self.shifted(biases) if "bias" in self.names else {}).get("bias", place.bias)
        return product(args[0], place.weight, bias, *found, is_conv1d(place))  # type: ignore[arg-type]

    def collapsed(self) -> dict[str, Tensor]:
        """Index and values, once."""
        return super().collapsed() if self.first else {}

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sizes and the choice of what is about to be loaded."""
        self.entries.expect(tensors.get("entries.index"), tensors.get("entries.v"))


def scattered(theta: Tensor, index: Tensor | None, v: Tensor) -> Tensor:
    """theta with v added at the entries `index` of it, or at all of them"""
    if index is None:
        return theta + v.view(theta.shape).to(theta.dtype)
    return theta.reshape(-1).index_add(0, index, v.to(theta.dtype)).view(theta.shape)


def is_plain(adapter: Adapter, base: Callable[..., Any]) -> bool:
    """Whether `base` is the forward of a projection, with nothing around it."""
    place = adapter.place
    own = type(place) is nn.Linear or (is_conv1d(place) and not is_quantised(place))
    return own and isinstance(base, partial) and base.func is type(place).forward and not inside(adapter)


def product(x: Tensor, w: Tensor, bias: Tensor | None, index: Tensor, v: Tensor, turned: bool) -> Tensor:
    """(W + v at the index) x + b, without keeping the sum for backward; in the dtype of autocast, where that is on"""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return Product.apply(x, w, bias, index, v, turned)  # type: ignore[no-any-return]


class Product(torch.autograd.Function):
    """y = W' x + b, W' made again in backward; the gradient of W' lives while its chosen entries are taken from it."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, w: Tensor, bias: Tensor | None, index: Tensor, v: Tensor, turned: bool
    ) -> Tensor:
        moved = scattered(w, index, v).to(x.dtype)
        if not turned:
            return F.linear(x, moved, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ moved if bias is None else torch.addmm(bias, flat, moved)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, bias, index, v, ctx.turned = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(x, w, index, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w, index, v = ctx.saved_tensors
        g = grads[0]
        out: list[Tensor | None] = [None] * 6
        if ctx.needs_input_grad[0]:
            moved = scattered(w, index, v).to(g.dtype)
            out[0] = g @ (moved.T if ctx.turned else moved)
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            full = inputs.T @ rows if ctx.turned else rows.T @ inputs
            if ctx.needs_input_grad[4]:
                out[4] = full.reshape(-1)[index].to(v.dtype)
            if ctx.needs_input_grad[1]:
                out[1] = full.to(w.dtype)
        if ctx.biased and ctx.needs_input_grad[2]:
            out[2] = rows.sum(0)
        return tuple(out)


@torch.no_grad()
def rechosen(entries: Entries, index: Tensor, optimizers: Iterable[Any] = ()) -> None:
    """Another choice: what stays keeps its change and its moments, what comes begins at zero.

    An optimizer that keeps moments in codes begins anew: their scales are of blocks of what stood side by side.
    """
    old, index = entries.index.long(), index.to(entries.index.device)
    at = torch.searchsorted(old, index).clamp(max=max(len(old) - 1, 0))
    stays = old[at] == index if len(old) else torch.zeros_like(index, dtype=torch.bool)

    def carried(values: Tensor) -> Tensor:
        return torch.where(stays, values[at], 0).to(values.dtype)

    for optimizer in optimizers:
        kept = optimizer.state.get(entries.v, {})
        moments = {n: m for n, m in kept.items() if isinstance(m, Tensor) and m.dim() and m.shape == entries.v.shape}
        if all(moment.is_floating_point() for moment in moments.values()):
            kept.update({name: carried(moment) for name, moment in moments.items()})
        else:
            forget([entries.v], [optimizer])
    grad = None if entries.v.grad is None else carried(entries.v.grad)
    entries.choose(index, carried(entries.v))
    entries.v.grad = grad


def forget(parameters: Collection[Tensor], optimizers: Iterable[Any]) -> None:
    """The optimizers begin anew with these; LBFGS, which knows all of its parameters as one vector, as a whole."""
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
            optimizer._numel_cache = None
