"""Learn-to-Share: A Hardware-friendly Transfer Learning Framework Exploiting Computation and Parameter Sharing.
Fu et al., ICML 2021. https://proceedings.mlr.press/v139/fu21a.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calibration import Run, plain_run
from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.projection import base_weight
from lightning_peft.core.pruning import fisher, rows
from lightning_peft.core.side import first_of
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import matrix_shape, projection_widths
from lightning_peft.methods.shira import SparseUpdate


class Choice(nn.Module):
    """p = softmax(t / T)_1 of t (2,): 0 shares the frozen projection, 1 adds its change; one for a block."""

    def __init__(self, gumbel: bool, temperature: float, hard: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(2))
        self.gumbel, self.temperature, self.hard = gumbel, temperature, hard

    def forward(self) -> Tensor:  # ()
        """While training with gumbel a sample; else p, or where it is hard whether p > 1/2."""
        if self.gumbel and self.training:
            return F.gumbel_softmax(self.logits, self.temperature, hard=self.hard)[1]
        p = (self.logits / self.temperature).softmax(0)[1]
        return p if not self.hard else (p > 0.5).to(p.dtype) - p.detach() + p


class Chosen(Adapter):
    """What both forms of the change share: the choice, held by all sites of a block, and its cost."""

    choice: Choice
    weight: float

    def choose(self, choice: Choice, start: float, weight: float) -> None:
        self.choice, self.start, self.weight = choice, start, weight

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        draw.zeros(self.choice.logits)
        if not self.choice.logits.is_meta:
            with torch.no_grad():
                self.choice.logits[1] = self.start

    def penalty(self) -> Tensor | None:
        """weight * p, the share of this site in what the search pays for."""
        return None if not self.weight else self.weight * (self.choice.logits / self.choice.temperature).softmax(0)[1]


class ChosenLowRank(Chosen, LowRank):
    """y = W x + p B A x"""

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.choice().to(self.b.dtype) * self.b


class ChosenSparse(Chosen, SparseUpdate):
    """y = W x + p S x: S has values at the places of W that matter most, by |w| or by |w dL/dw| (`calibrate`)"""

    def reset(self, draw: Draw) -> None:
        super().reset(draw)
        if not self.columns.is_meta and not (w := base_weight(self.place)).is_meta:
            self.place_at(w.abs())

    def place_at(self, score: Tensor) -> None:  # (d_out, d_in)
        best = score.flatten().float().topk(len(self.v)).indices.sort().values
        self.place_values(best.to(self.columns.device))

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = base(x)
        return y + self.choice().to(y.dtype) * super().forward(lambda z: torch.zeros_like(y), x)

    def delta(self, weight: Tensor) -> Tensor:
        return self.choice().to(weight) * super().delta(weight)


class Pooled(Adapter):
    """Notes the mean over time of what a block returns, (batch, d)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what a forward noted that never reached its end: it has a graph, and cannot be copied."""
        return {**vars(self), "seen": None}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        h = first_of(out)
        self.seen = h if h.dim() < 3 else h.mean(1)
        return out


class Aggregator(Adapter):
    """y = head(x + P [LSTM(f_1 ... f_L); LSTM(f_L ... f_1)]): f_i (batch, d) pooled of layer i, P (d, 2 w) from zero"""

    def __init__(self, taps: list[Pooled], width: int, hidden: int) -> None:
        super().__init__()
        self.taps = taps
        with torch.random.fork_rng(devices=[]):
            self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Parameter(torch.empty(width, 2 * hidden))

    def reset(self, draw: Draw) -> None:
        for parameter in self.lstm.parameters():
            draw.uniform(parameter, bound=self.lstm.hidden_size**-0.5)
        draw.zeros(self.out)

    def forward(self, base: Callable[..., Tensor], x: Tensor) -> Tensor:  # (batch, d) or (batch, time, d)
        features = [tap.seen for tap in self.taps if tap.seen is not None]
        for tap in self.taps:
            tap.seen = None
        if len(features) != len(self.taps):
            raise RuntimeError(f"{len(self.taps)} layers are aggregated, and {len(features)} ran before the head.")
        with torch.autocast(x.device.type, enabled=False):
            _, (last, _) = self.lstm(torch.stack(features, 1).to(self.out.dtype))
            change = F.linear(torch.cat([last[0], last[1]], -1), self.out).to(x.dtype)
        return base(x + (change if x.dim() < 3 else change[:, None]))


class LeTS(PEFT, name="lets", family="hybrid", paper="", mergeable=True):
    """y = W x + p D x, D low-rank or sparse, p in {share, change} searched a block; a bi-LSTM over layers at the head

    W x is the frozen model's, and tasks that read the same x can share it. D = B A (`rank`, B = 0 at first), or with
    form="sparse" as many values at the places where |w| is largest, or after `calibrate` |w dL/dw| (SNIP). p is a
    softmax over two logits at `temperature`; search "gumbel" draws it in training, and hard=True takes 0 or 1 in
    evaluation. `penalty` times p, over the sites, is added to the loss. `aggregator` > 0: the means over time of
    what the blocks return go through a bi-LSTM of that width, whose last states are added to what the task head reads,
    through a projection that starts at zero (4 w (d + w + 2) 2 + 2 w d parameters); it cannot be merged, D can, with
    the p of evaluation. The base at step 0.

    There is no code, and what the paper leaves open is decided here: the pooling (mean, padding too), the way of the
    LSTM's states into the head (added, where the paper's classifier reads them alone), one choice a block (the cost of
    each is that of its sites), D low-rank beside sparse. Gradients go through the blocks, as D is inside of them.
    """

    targets: str | list[str] | None = "q,v,up,down"
    form: Literal["low_rank", "sparse"] = "low_rank"
    rank: int = 8
    search: Literal["softmax", "gumbel"] = "softmax"
    temperature: float = 1.0
    hard: bool = False
    start: float = 1.0
    penalty: float = 0.0
    aggregator: int = 0

    def check(self) -> None:
        positive(self, "rank", "temperature")
        not_negative(self, "penalty", "aggregator")
        if self.hard and self.start <= 0:
            raise FieldError(f"LeTS(hard=True, start={self.start}) shares everything from the start; give start > 0.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        choices: dict[str, Choice] = {}
        for site in sites:
            choice = choices.setdefault(
                site.block or site.name, Choice(self.search == "gumbel", self.temperature, self.hard)
            )
            adapter = self.change(site)
            adapter.choose(choice, self.start, self.penalty / len(sites))
            yield site, adapter
        if self.aggregator:
            yield from self.aggregated(sites)

    def change(self, site: Site) -> Any:
        if self.form == "low_rank":
            return ChosenLowRank(matrix_shape(site, "LeTS"), self.rank, 1.0)
        d_in, d_out = projection_widths(site, "LeTS(form='sparse')")
        adapter = ChosenSparse(d_in, d_out, min(self.rank * (d_in + d_out), d_in * d_out))
        vars(adapter)["site"] = site
        return adapter

    def calibrate(self, model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> int:
        """With form="sparse": put the values where |w| (sum over these batches of (dL/dw)^2)^1/2 is largest.

        Of one batch that is SNIP's |w dL/dw|. Before training: the values that are there begin at zero. run(batch,
        index) -> loss; by default the model's own call with the batch.
        """
        placements = state.get_applied(model, self.name_on_model).placements
        sparse = [x.adapter for x in placements if isinstance(x.adapter, ChosenSparse)]
        if not sparse:
            raise FieldError(f"LeTS(form={self.form!r}) has no places to choose; calibrate is for form='sparse'.")
        with self.enabled(model, False, self.name_on_model):
            scores, count = fisher(model, {vars(a)["site"].module for a in sparse}, batches, run or plain_run(model))
        for adapter in sparse:
            if (squares := rows(vars(adapter)["site"], scores)) is not None:
                adapter.place_at(base_weight(adapter.place).abs() * squares.sqrt())
        return count

    def aggregated(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        heads = [s for s in sites.known if s.role == "head"]
        blocks = [s for s in sites.known if s.role == "block"]
        stack = "decoder" if any(b.stack.endswith("decoder") for b in blocks) else ""
        blocks = [b for b in blocks if b.stack.endswith(stack)]
        if len(heads) != 1 or not blocks or blocks[0].facts.hidden is None:
            raise TargetError(
                f"LeTS(aggregator={self.aggregator}) stands before a task head, behind blocks of a known width: here "
                f"are {len(heads)} heads and {len(blocks)} blocks. Leave it out with aggregator=0."
            )
        taps = [Pooled() for _ in blocks]
        yield from zip(blocks, taps, strict=True)
        yield heads[0], Aggregator(taps, blocks[0].facts.hidden, self.aggregator)
