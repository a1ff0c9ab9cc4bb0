"""Structural pruning: a smaller network of the same make out of the rows and columns that matter most.

One choice of features serves the whole residual stream; within each head, and within each feed-forward layer, another.
What an entry matters is its magnitude, or what was measured of it (`fisher`), summed over all that touches a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.architectures import features, is_conv1d, is_linear
from lightning_peft.core.calibration import CalibrationError, Run
from lightning_peft.core.gradients import squared, summed, untouched
from lightning_peft.core.projection import base_weight
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import Site

Scores = Mapping[int, Tensor]  # id of a parameter -> what its entries matter
READS = ("q", "k", "v", "up", "gate", "cross.q")
WRITES = ("o", "down", "cross.o")


def rows(site: Site, scores: Scores) -> Tensor | None:
    """What the entries of the site's weight (d_out, d_in) matter; None for one whose weight is elsewhere."""
    m: Any = site.module
    if isinstance(m, nn.MultiheadAttention):
        if m.in_proj_weight is None:
            return None
        if site.part == "o":
            return matters(m.out_proj.weight, scores)
        return matters(m.in_proj_weight, scores).chunk(3)["qkv".index(str(site.part))]
    own = m._parameters.get("weight")
    if own is not None and id(own) in scores:
        weight = scores[id(own)].T if is_conv1d(m) else scores[id(own)]
    else:
        weight = base_weight(m).abs().float()
    return weight if site.columns is None else site.columns.take(weight, 0)


def matters(parameter: Tensor, scores: Scores) -> Tensor:
    return scores[id(parameter)] if id(parameter) in scores else parameter.detach().abs().float()


def best(score: Tensor, count: int) -> Tensor:
    """(..., n) -> (..., count): the indices of the largest, in their order"""
    return score.topk(count, -1).indices.sort(-1).values


def residual(parts: Iterable[Site], width: int, scores: Scores) -> Tensor:
    """What each feature of the residual stream matters, (d,): all weights that read or write it."""
    total = torch.zeros(width)
    for site in parts:
        if site.role in READS + WRITES and (w := rows(site, scores)) is not None:
            w = w.cpu()
            total = total + (w.sum(0) if site.role in READS else w.sum(1))
    return total


class Cut:
    """Which rows and columns of the parameters of one block stay: parameter name -> index of each axis."""

    def __init__(
        self,
        block: Site,
        parts: Iterable[Site],
        small: nn.Module,
        stream: Tensor,
        memory: Tensor | None,
        paired: bool,
        scores: Scores,
    ) -> None:
        self.block, self.small, self.paired, self.scores = block, small, paired, scores
        self.parts = {str(site.role): site for site in parts if site.block == block.name}
        self.axes: dict[str, list[Tensor | None]] = {}
        self.stream = stream
        self._attention("", stream)
        if memory is not None:
            self._attention("cross.", memory)
        self._feed_forward()

    def _side(self, site: Site) -> tuple[str, nn.Module]:
        name = site.name.removeprefix(self.block.name).lstrip(".")
        return name, self.small.get_submodule(name)

    def _attention(self, prefix: str, read: Tensor) -> None:
        """The same features of a head in q and k, and in v and o; those of a key/value head for all its queries."""
        if not {prefix + role for role in "qkvo"} <= set(self.parts):
            return
        q, k, v, o = (self.parts[prefix + role] for role in "qkvo")
        size, side = q.facts.head_dim, self._side(o)[1]
        inside = side.embed_dim if isinstance(side, nn.MultiheadAttention) else (features(side) or (0, 0))[0]
        if not size or any(w is None for w in map(self.score, (q, k, v, o))):
            return
        heads, kv = q.out_features // size, k.out_features // size
        keep = int(inside) // heads
        by_key = self.score(q).sum(1).view(kv, -1, size).sum(1) + self.score(k).sum(1).view(kv, size)
        by_value = self.score(o).sum(0).view(kv, -1, size).sum(1) + self.score(v).sum(1).view(kv, size)
        keys, values = self.pick(by_key, keep), best(by_value, keep)
        self.put(q, spread(keys, heads, size), self.stream)
        self.put(k, spread(keys, kv, size), read)
        self.put(v, spread(values, kv, size), read)
        self.put(o, self.stream, spread(values, heads, size))

    def score(self, site: Site) -> Any:
        w = rows(site, self.scores)
        return None if w is None else w.cpu()

    def pick(self, score: Tensor, keep: int) -> Tensor:
        """Rotations turn feature i with feature i + half: both stay, or none."""
        if not self.paired or keep % 2:
            return best(score, keep)
        half = score.shape[-1] // 2
        first = best(score[..., :half] + score[..., half:], keep // 2)
        return torch.cat([first, first + half], -1)

    def _feed_forward(self) -> None:
        if not {"up", "down"} <= set(self.parts):
            return
        down = self.parts["down"]
        ups = [self.parts[role] for role in ("up", "gate") if role in self.parts]
        score = self.score(down).sum(0) + sum(self.score(up).sum(1) for up in ups)
        inner = best(score, (features(self._side(down)[1]) or (0, 0))[0])
        for up in ups:
            self.put(up, inner, self.stream)
        self.put(down, self.stream, inner)

    def put(self, site: Site, out: Tensor, into: Tensor) -> None:
        """Rows `out` of the site, columns `into`; rows of several sites in one packed weight come together."""
        name, module = self._side(site)
        weight, bias = f"{name}.weight", f"{name}.bias"
        if isinstance(module, nn.MultiheadAttention):
            own = "out_proj." if site.part == "o" else "in_proj_"
            weight, bias = f"{name}.{own}weight", f"{name}.{own}bias"
            out = out if site.part == "o" else out + "qkv".index(str(site.part)) * site.out_features
        elif site.columns is not None:
            out = site.columns.take(torch.arange((features(site.module) or (0, 0))[1]))[out]
        before = self.axes.get(bias, [None])[0]
        out = out if before is None else torch.cat([before, out]).sort().values
        self.axes[weight] = [into, out] if is_conv1d(module) else [out, into]
        self.axes[bias] = [out]


def spread(index: Tensor, heads: int, size: int) -> Tensor:
    """Indices within heads (kv, n) -> in the features of all heads (heads n,); each serves heads / kv of them."""
    each = index.repeat_interleave(heads // len(index), 0)
    return (each + torch.arange(heads)[:, None] * size).flatten()


@torch.no_grad()
def carry(base: nn.Module, small: nn.Module, axes: Mapping[str, list[Tensor | None]], stream: Tensor) -> None:
    """Copy what stays. Axes that nothing is known of: all of one that has its size, the stream's of one as wide as it.

    Parameters of other shapes are left as they are.
    """
    wide = None
    for name, parameter in small.named_parameters():
        full = whole(base, name)
        if full is None or parameter.is_meta or full.is_meta or full.dim() != parameter.dim():
            continue
        known = axes.get(name, [None] * full.dim())
        wide = full
        for axis, index in enumerate(known):
            wide = wide if wide is None else narrowed(wide, axis, index, parameter.shape[axis], stream)
        if wide is not None and wide.shape == parameter.shape:
            parameter.copy_(wide)


def narrowed(full: Tensor, axis: int, index: Tensor | None, size: int, stream: Tensor) -> Tensor | None:
    if index is None:
        index = None if full.shape[axis] == size else stream if len(stream) == size else torch.zeros(0)
    if index is None:
        return full
    if len(index) != size or (size and int(index.max()) >= full.shape[axis]):
        return None
    return full.index_select(axis, index.to(full.device))


def whole(base: nn.Module, name: str) -> Tensor | None:
    """The base's parameter of this name, dequantised if it is in codes."""
    path, _, attribute = name.rpartition(".")
    try:
        module = base.get_submodule(path)
    except AttributeError:
        return None
    if attribute == "weight" and is_linear(module) and not isinstance(module, nn.MultiheadAttention):
        weight = base_weight(module)
        return weight.T if is_conv1d(module) else weight
    return module._parameters.get(attribute)


# ------------------------------------------------------------------ what entries matter, from data
def fisher(
    model: nn.Module, modules: Iterable[nn.Module], batches: Iterable[Any], run: Run
) -> tuple[dict[int, Tensor], int]:
    """id of a parameter -> the sum over batches of its squared gradient (d loss / d w)^2, and how many batches.

    Weights in codes have no gradient, which is an error. The model stays as it is; everything is in eval mode.
    """
    modules = list(modules)
    if coded := sum(is_quantised(m) for m in {m for module in modules for m in module.modules()}):
        raise CalibrationError(
            f"{coded} of the modules hold their weights in codes, which have no gradient to take a score from. "
            "Calibrate before the base is quantised, or take the scores from magnitudes (the default)."
        )
    chosen = {id(p): p for m in modules for p in m.parameters() if p.is_floating_point()}
    with untouched(model):
        totals, count = summed(run, batches, [p.requires_grad_(True) for p in chosen.values()], squared)
    if not any(bool(total.any()) for total in totals):
        raise CalibrationError(f"{count} batches gave no gradient to the blocks. Give batches with labels.")
    return dict(zip(chosen, totals, strict=True)), count
