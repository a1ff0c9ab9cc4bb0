"""FAR: Efficient Fine-Tuning of BERT Models on the Edge (freeze and reconfigure). Vucetic et al., ISCAS 2022.
https://arxiv.org/abs/2205.01541
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT, leader
from lightning_peft.core import state
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.method import outside_frozen_networks, put_entries_back
from lightning_peft.core.projection import transposed
from lightning_peft.core.sites import Site, TargetError, sites
from lightning_peft.methods.selective import end_of


class FAR(PEFT, name="far", family="selective", paper="2205.01541", mergeable=True):
    """f = W_down[:, L] g(W_up[L] x) + W_down[:, N] g(W_up[N] x) + b: rows and columns of the learners L train

    Priming: for the first `prime` of the run (a share of its steps below 1, or a number of steps) all nodes of the
    feed-forward layers train. Then in each layer the round(keep * d_ff) nodes that moved most are its learners: the sum
    of |w - w_0| over a node's row of W_up (and of W_gate), its bias and its column of W_down. Learners go on from
    there, the others are the base's again, bit for bit, and stay so. Masks do what the paper's two sublayers do, so
    nothing is permuted and there is nothing to undo in a merge; time and memory are those of the whole layer.
    learners: layer (stack.number) -> the nodes chosen; given from the start, there is no priming.

    What else trains is for a method beside it, such as BitFit. k (2d + 1) parameters a layer for its k learners.
    Source: section III.
    """

    targets: str | list[str] | None = "up,gate?,down"
    keep: float = 0.4
    prime: float = 0.05
    learners: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        positive(self, "keep", "prime")
        if self.keep > 1:
            raise FieldError(f"FAR(keep={self.keep}): expected the share of nodes that learn, at most 1.")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and vars(self).get("_primed") and self.name_on_model not in state.applied_to(pl_module):
            vars(self)["_primed"], self.learners = False, {}  # those of another model
        super().setup(trainer, pl_module, stage)

    def asked(self, model: nn.Module) -> Iterator[Site]:
        found = self.found(model)
        widths = {place(site): width(site) for site in found}
        if wrong := [k for k, nodes in self.learners.items() if not all(0 <= n < widths.get(k, 0) for n in nodes)]:
            raise TargetError(
                f"FAR(learners=...): {wrong[0]!r}: {self.learners[wrong[0]][:3]}... is no layer of this model, "
                f"or has fewer nodes. Known, with their widths: {widths}."
            )
        for site in found:
            vars(self)["_site"] = site  # of the questions that follow
            yield site

    def found(self, model: nn.Module) -> list[Site]:
        """The projections of the feed-forward layers."""
        found = sites(model, self.targets or "", layers=self.layers, exclude=self.exclude, roles=self.roles)
        return outside_frozen_networks(model, found)

    def select(self, name: str, parameter: nn.Parameter) -> bool | Tensor:
        site: Site = vars(self)["_site"]
        nodes = self.learners.get(place(site)) if self.learners else list(range(width(site)))
        mask = node_mask(site, name, parameter.shape, nodes or [])
        if not mask.any() or (mask.all() and not self.learners):
            return bool(mask.any())
        return mask

    # -------------------------------------------------------------- choosing
    def choose(self, model: nn.Module) -> None:
        """End the priming: note the learners, put the other nodes back."""
        chosen = state.get_applied(model, self.name_on_model).selected
        selected = {s.key: s for s in chosen if not s.head}
        scores: dict[str, Tensor] = {}
        found = self.found(model)
        for site in found:
            for name, p in site.module.named_parameters(recurse=False):
                if (known := selected.get((id(site.module), name))) is not None:
                    change = (p.detach().cpu().double() - known.original.double()).abs()  # type: ignore[union-attr]
                    scores[place(site)] = scores.get(place(site), torch.zeros(())) + by_node(site, name, change)
        self.learners = {
            block: sorted(score.argsort(descending=True, stable=True)[: round(self.keep * len(score))].tolist())
            for block, score in scores.items()
        }
        vars(self)["_primed"] = True
        self.settle(model)

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Masks of the learners; what is outside of them, and of methods beside this one, is the base's."""
        applied = state.get_applied(model, self.name_on_model)
        selected = {s.key: s for s in applied.selected if not s.head}
        masks: dict[Any, Tensor] = {}
        for site in self.found(model):
            for name, p in site.module.named_parameters(recurse=False):
                if (key := (id(site.module), name)) in selected:
                    mask = node_mask(site, name, p.shape, self.learners.get(place(site), []))
                    masks[key] = masks.get(key, torch.zeros_like(mask)) | mask  # packed gate and up are one parameter
        for key, mask in masks.items():
            selected[key].mask = mask
            put_entries_back(model, applied, selected[key], ~mask)
        for registry in state.registries(model):
            registry.held.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.learners:
            vars(self)["_end"] = end_of(f"FAR(prime={self.prime})", self.prime, trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not self.learners and trainer.global_step >= vars(self)["_end"]:
            self.choose(pl_module)
            if (first := leader(pl_module)) is not None:
                vars(first)["_masks"] = True
        super().on_train_batch_end(trainer, pl_module, *args)

    def go_on(self, config: Mapping[str, Any]) -> None:
        self.learners = dict(config.get("learners", self.learners))
        model = vars(self).get("_module", lambda: None)()
        if self.learners and model is not None and self.name_on_model in state.applied_to(model):
            self.settle(model)


def place(site: Site) -> str:
    """The layer, by stack and number, whatever the model is a part of."""
    return site.block if site.layer is None else f"{site.stack}.{site.layer}".lstrip(".")


def width(site: Site) -> int:
    """How many nodes the feed-forward layer has."""
    return site.in_features if site.role == "down" else site.out_features


def axis(site: Site, name: str, dims: int) -> int | None:
    """The axis of the nodes in a parameter of the site; None for the bias after the layer, which has none."""
    if site.role == "down":
        return None if dims == 1 else (0 if transposed(site.module) else 1)
    return 0 if dims == 1 or not transposed(site.module) else 1


def node_mask(site: Site, name: str, shape: Any, nodes: list[int]) -> Tensor:
    """True for the entries of a parameter that belong to the nodes."""
    mask, dim = torch.zeros(shape, dtype=torch.bool), axis(site, name, len(shape))
    if dim is None:
        return mask
    own = torch.zeros(width(site), dtype=torch.bool)
    own[nodes] = True
    line = own if site.columns is None else site.columns.put(torch.zeros(shape[dim], dtype=torch.bool), own)
    return mask | (line if dim == len(shape) - 1 else line[:, None])


def by_node(site: Site, name: str, change: Tensor) -> Tensor:
    """The sum of a parameter's entries for each node."""
    dim = axis(site, name, change.dim())
    if dim is None:
        return torch.zeros(width(site), dtype=change.dtype)
    line = change.movedim(dim, 0).flatten(1).sum(1) if change.dim() > 1 else change
    return line if site.columns is None else site.columns.take(line)
