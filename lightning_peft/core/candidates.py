"""Which tensors have entries to choose from: whole modules, slices of packed projections, each tied tensor once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.architectures import is_conv1d
from lightning_peft.core.method import owns, rows_of
from lightning_peft.core.moved import own_parameters, whole_modules
from lightning_peft.core.projection import base_weight
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.scattered import Entries, Scattered, Slice, scattered
from lightning_peft.core.sites import Site, Sites

Chosen = tuple[Site, dict[str, nn.Parameter]]  # a module, and those of its parameters that may move


@dataclass(eq=False)
class Candidate:
    """A tensor of which entries may be chosen, by the adapter that moves it and its name there."""

    adapter: Scattered
    attribute: str
    name: str  # of the module
    block: str

    @property
    def shape(self) -> torch.Size:
        return self.adapter.shapes[self.attribute]

    @property
    def codes(self) -> bool:
        """Whether it is the weight of a quantised module, of which there is no parameter."""
        return self.attribute == "weight" and is_quantised(self.adapter.place)

    @property
    def turned(self) -> bool:
        """Outputs are its columns, as in a Conv1D and in a transposed convolution."""
        place = self.adapter.place
        return self.attribute == "weight" and (is_conv1d(place) or isinstance(place, nn.modules.conv._ConvTransposeNd))

    @property
    def parameter(self) -> nn.Parameter:
        owner, leaf = self.adapter.owner(self.attribute)
        return getattr(owner, leaf)

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.adapter.place.parameters())

    @property
    def chosen(self) -> int:
        """How many of its entries train."""
        found = self.adapter.of(self.attribute)
        return 0 if found is None else len(found[1])

    def value(self) -> Tensor:
        """theta as it is now, flat, fp32."""
        if self.codes:
            weight = base_weight(self.adapter.place)
            theta = (weight.T if self.turned else weight).float()
        else:
            theta = self.parameter.detach().float()
        found = self.adapter.of(self.attribute) if self.adapter.entries.settled else None
        return self.take(theta if found is None else scattered(theta, found[0], found[1].detach()))

    @property
    def number(self) -> int:
        return self.adapter.names[self.attribute]

    @property
    def size(self) -> int:
        """How many entries may be chosen."""
        rooms = self.adapter.entries.rooms
        return rooms[self.number + 1] - rooms[self.number]

    def take(self, values: Tensor) -> Tensor:
        """Of as many values as the tensor has, those of entries that may be chosen, flat."""
        places, values = self.adapter.entries.places(self.number), values.reshape(-1)
        return values if places is None else values[places.to(values.device)]

    @property
    def groups(self) -> int:
        """Of a transposed convolution: parts of the inputs, each with outputs of its own."""
        return getattr(self.adapter.place, "groups", 1) if self.turned else 1

    @property
    def rows(self) -> int:
        """How many outputs (tokens, features of a norm) there are."""
        return self.shape[1 if self.turned else 0] * self.groups if len(self.shape) else 1

    def row_of(self) -> Tensor:
        """(size,) -> the output of each entry"""
        index = torch.arange(self.rows)
        if self.turned:
            index = index.view(self.groups, -1).repeat_interleave(self.shape[0] // self.groups, 0).flatten()
        return self.take(index.repeat_interleave(max(self.shape.numel() // max(len(index), 1), 1)))

    @property
    def outputs(self) -> tuple[str, str, int]:
        """The same for tensors whose rows make the same outputs: a weight and its bias."""
        return self.name, self.attribute.replace("weight", "").replace("bias", ""), self.rows


def candidates(
    sites: Sites, heads: dict[str, nn.Module], left_out: Iterable[nn.Module]
) -> tuple[list[Chosen], dict[int, Slice]]:
    """The modules with their tensors, and of which tensors a part alone may be chosen, by their ids."""
    slices: dict[int, Slice] = {}
    without = {id(module) for module in left_out}
    found = [*whole_modules(sites, heads), *sliced_modules(sites, slices)]
    return list(without_ties(sites.model, [pair for pair in found if id(pair[0].module) not in without])), slices


def without_ties(model: nn.Module, chosen: Sequence[Chosen]) -> Iterator[Chosen]:
    """Without tensors that a module which is not chosen holds, too: it would go on with the base's."""
    inside = {id(m) for site, _ in chosen for m in state.base_modules(site.module) if leaf_of(site.module, m)}
    others = [p for m in state.base_modules(model) if id(m) not in inside for p in m._parameters.values()]
    held = {id(p) for p in others}
    for site, named in chosen:
        if own := {name: p for name, p in named.items() if id(p) not in held}:
            yield site, own


def sliced_modules(sites: Sites, slices: dict[int, Slice]) -> Iterator[Chosen]:
    """Each packed projection of which a part is chosen, once, and no whole; notes the parts by the tensors' ids."""
    whole = {id(site.module) for site in sites if site.part is None and site.columns is None}
    packed: dict[int, list[Site]] = {}
    for site in sites:
        if id(site.module) not in whole:
            packed.setdefault(id(site.module), []).append(site)
    for members in packed.values():
        module, named = members[0].module, dict[str, nn.Parameter]()
        for name, p in own_parameters(module).items():
            path, _, leaf = name.rpartition(".")
            masks = [rows_of(site, p) for site in members if owns(site, module.get_submodule(path), leaf)]
            if masks:
                named[name] = p
                mask = torch.stack([m if isinstance(m, Tensor) else torch.ones(p.shape).bool() for m in masks]).any(0)
                if not mask.all():
                    slices[id(p)] = Slice.of(mask)
        yield dataclasses.replace(members[0], columns=None, part=None, role=None), named


def leaf_of(module: nn.Module, other: nn.Module) -> bool:
    """Whether an adapter at `module` moves the parameters of `other`."""
    return other is module or isinstance(module, nn.MultiheadAttention)


def placed(
    scatter: Callable[..., Scattered],
    chosen: Sequence[Chosen],
    tensors: dict[int, nn.Parameter],
    entries: Entries,
    chooser: Any,
) -> Iterator[tuple[Site, Adapter]]:
    """An adapter for each module, all with the same entries; a tied tensor is a candidate once."""
    numbers, seen = {key: number for number, key in enumerate(tensors)}, set[int]()
    found = []
    for site, named in chosen:
        own = {name: p for name, p in named.items() if id(p) in numbers}
        if not own:
            continue
        names = {name: numbers[id(p)] for name, p in own.items()}
        adapter = scatter(entries, names, {name: p.shape for name, p in own.items()})
        adapter.chooser = chooser
        adapter.mirrors = all(id(p) in seen for p in own.values())
        for name, p in own.items():
            if id(p) not in seen:
                seen.add(id(p))
                chooser.candidates.append(Candidate(adapter, name, site.name, site.block))
        found.append((site, adapter))
    chooser.last = found[-1][1]
    found[0][1].first = True
    yield from found
