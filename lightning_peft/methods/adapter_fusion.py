"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., EACL 2021.
https://arxiv.org/abs/2005.00247
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.bottleneck import Bottleneck
from lightning_peft.core.fields import FieldError, not_negative
from lightning_peft.core.files import load_adapter, read_config
from lightning_peft.core.init import Draw
from lightning_peft.core.method import REGISTRY, Method, remove
from lightning_peft.core.sites import Site, Sites, TargetError, sites

Place = tuple[str, str | None]  # the name of a site and its role
Plan = dict[Place, tuple[Site, Adapter]]
Tensors = dict[Place, dict[str, Tensor]]
SOURCE = "adapter_fusion source"  # the label under which a source is on the model while it is read


class Fusion(Adapter):
    """D(u) = V sum_n p_n D_n(u), p = softmax_n((Q u + b) . K D_n(u)): Q, K, V (d, d), D_n frozen, u (..., d).

    It acts where the D_n act. A bias on K would add the same to all scores, so there is none.
    """

    def __init__(self, experts: list[Bottleneck], regularisation: float, given: list[dict[str, Tensor]] | None) -> None:
        super().__init__()
        width = experts[0].width
        self.experts = nn.ModuleList(frozen(expert) for expert in experts)
        self.query = nn.Parameter(torch.empty(width, width))
        self.query_bias = nn.Parameter(torch.empty(width))
        self.key = nn.Parameter(torch.empty(width, width))
        self.value = nn.Parameter(torch.empty(width, width))
        self.regularisation, self.given = regularisation, given

    def reset(self, draw: Draw) -> None:
        """Q, K: N(0, 0.02^2); V: 1 on the diagonal, 1e-6 elsewhere; the experts as they were trained."""
        draw.normal(self.query, std=0.02)
        draw.normal(self.key, std=0.02)
        draw.zeros(self.query_bias)
        draw.constant(self.value, 1e-6)
        if not self.value.is_meta:
            self.value.detach().fill_diagonal_(1.0)
        expert: Any
        for index, expert in enumerate(self.experts):
            if self.given is None:
                expert.reset(draw)
                continue
            for name, buffer in expert.named_buffers():
                if not buffer.is_meta:
                    buffer.copy_(self.given[index][name])

    def fused(self, u: Tensor) -> Tensor:  # (..., d) -> (..., d)
        query, bias, key, value = (t.to(u.dtype) for t in (self.query, self.query_bias, self.key, self.value))
        z = torch.stack([expert.bottleneck(u) for expert in self.experts], -2)  # type: ignore[operator]
        q = F.linear(u, query, bias) @ key  # q . K z_n = (K^T q) . z_n: one product for all n
        p = (z @ q.unsqueeze(-1)).softmax(-2)  # (..., n, 1)
        return F.linear((p.to(z.dtype) * z).sum(-2), value)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.experts[0].around(self.fused, base, *args, **kwargs)  # type: ignore[operator]

    def penalty(self) -> Tensor | None:
        if not self.regularisation:
            return None
        identity = torch.eye(len(self.value), dtype=self.value.dtype, device=self.value.device)
        return self.regularisation * (self.value - identity).pow(2).sum()


def frozen(expert: Bottleneck) -> Bottleneck:
    """Its parameters as buffers: saved, moved and cast, never trained."""
    for module in expert.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return expert


class AdapterFusion(PEFT, name="adapter_fusion", family="additive", paper="2005.00247", identity=False):
    """D(u) = V sum_n p_n D_n(u), p = softmax_n((Q u + b) . K D_n(u))

    u is what the adapters D_n read and D(u) is added where theirs would be: after the feed-forward layer for
    `pfeiffer`, at the projections for `houlsby`. V starts at the identity (1e-6 off the diagonal), Q and K at
    N(0, 0.02^2); (3 d^2 + d) parameters a site. The D_n are frozen, and go into the file of the fusion.

    sources: directories of adapters that were trained on this base at the same sites, any methods made of bottlenecks
    in series. members: their methods and settings, in place of `sources`, as files of a fusion have them; without a
    file the D_n are then initial ones. regularisation: of |V - I|^2, added to the loss. Source: section 4.1, equation
    3; the initial values and the regulariser are those of the authors' code.
    """

    unused = ("targets", "layers", "exclude")

    sources: list[str] = dataclasses.field(default_factory=list)
    members: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    regularisation: float = 0.01

    def check(self) -> None:
        not_negative(self, "regularisation")
        if self.sources and self.members:
            raise FieldError("AdapterFusion takes `sources` or `members`; files of a fusion hold the latter.")
        for member in self.members:
            if set(member) != {"method", "config"} or member["method"] not in REGISTRY:
                raise FieldError(
                    f"AdapterFusion(members=[{member!r}, ...]): expected 'method' (a registered name) and 'config'."
                )

    @property
    def places(self) -> str | list[str] | None:
        return "*"  # the sources say where

    def described(self) -> list[dict[str, Any]]:
        """Methods and settings of the sources."""
        if self.members or "_members" in vars(self):
            return self.members or vars(self)["_members"]
        configs = [read_config(directory) for directory in self.sources]
        return [{"method": c["method"], "config": {**c["config"], "heads": None}} for c in configs]

    def portable(self) -> AdapterFusion:
        return dataclasses.replace(self, sources=[], members=self.described())

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        vars(self)["_members"] = members = self.described()
        if not members:
            raise TargetError("AdapterFusion has nothing to fuse: give the directories of trained adapters as sources.")
        methods = [REGISTRY[m["method"]](**m["config"]) for m in members]
        check_adapters_alone(methods)
        tensors = [source_tensors(sites.model, directory) for directory in self.sources]
        plans = [plan_of(sites.model, method) for method in methods]
        check_alike(plans, members)
        for place, (site, _) in plans[0].items():
            experts: Any = [plan[place][1] for plan in plans]
            given = [t[place] for t in tensors] if tensors else None
            yield site, Fusion(experts, self.regularisation, given)


def plan_of(model: nn.Module, method: Method) -> Plan:
    """The adapters that a method would put on the model, by place."""
    found = sites(model, method.places or "*", layers=method.layers, exclude=method.exclude, roles=method.roles)
    return {(site.name, site.role): (site, adapter) for site, adapter in method.adapters(found)}


def source_tensors(model: nn.Module, directory: str) -> Tensors:
    """The tensors of an adapter directory by place; loaded onto the model, with all checks, and taken off again."""
    if any(p.is_meta for p in model.parameters()):
        raise TargetError("AdapterFusion reads its sources onto the model: give it memory and weights first.")
    load_adapter(model, directory, label=SOURCE)
    placements = state.get_applied(model, SOURCE).placements
    found = {(p.site, p.role): {k: state.on_cpu(t) for k, t in p.adapter.state_dict().items()} for p in placements}
    remove(model, SOURCE)
    return found


def check_adapters_alone(methods: list[Method]) -> None:
    """Raise on sources that are more than adapters, or none: a fusion would leave the rest out without a word."""
    for method in methods:
        name, parts = method.info.name, method.parts()
        if parts or type(method).select is not Method.select:
            also = f" ({', '.join(part.info.name for part in parts)})" if parts else ""
            raise TargetError(
                f"AdapterFusion cannot fuse {name!r}, which is more than bottlenecks{also}: it trained weights of the "
                "base, or several methods, of which a model has one set only. Train sources of adapters alone "
                "(norms=False)."
            )


def check_alike(plans: list[Plan], members: list[dict[str, Any]]) -> None:
    """Raise unless all sources are bottlenecks in series, at the same places, acting in the same way."""
    names = [member["method"] for member in members]
    for name, plan in zip(names, plans, strict=True):
        for place, (_, adapter) in plan.items():
            if not isinstance(adapter, Bottleneck) or type(adapter).forward is not Bottleneck.forward:
                raise TargetError(
                    f"AdapterFusion cannot fuse {name!r} ({type(adapter).__name__} at {place[0]!r}): it needs "
                    "bottlenecks in series, such as those of 'pfeiffer' and 'houlsby'."
                )
    kinds: list[Any] = [{place: type(adapter).around for place, (_, adapter) in plan.items()} for plan in plans]  # type: ignore[attr-defined]
    for kind in kinds:
        if odd := sorted({place[0] for place, _ in set(kind.items()) ^ set(kinds[0].items())}):
            raise TargetError(
                f"AdapterFusion needs all sources ({', '.join(names)}) at the same places of the same kind; "
                f"{odd[0]!r} is one where they differ. Train them with the same targets, layers and placement."
            )
