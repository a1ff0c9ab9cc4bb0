"""ReFT: Representation Finetuning for Language Models. Wu et al., NeurIPS 2024. https://arxiv.org/abs/2404.03592"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.init import Draw
from lightning_peft.core.positions import Positions, mask_owner
from lightning_peft.core.representation import Edit, EditedBlock, EditedInput, EditedOutput
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.core.targets import projection_widths


class ReFT(PEFT):
    """h' = h + e(h) at chosen positions; `edit` says what e is."""

    targets: str | list[str] | None = "block"
    rank: int = 4
    first: int = 7
    last: int = 7
    tied: bool = True
    dropout: float = 0.0
    identity: bool = False

    def check(self) -> None:
        positive(self, "rank")
        not_negative(self, "first", "last")
        probability(self, "dropout")
        if not self.first + self.last:
            raise FieldError(f"{type(self).__name__}(first=0, last=0) edits no position; give at least one.")

    def edit(self, width: int) -> Edit:
        raise NotImplementedError(f"{type(self).__name__} defines no edit(width).")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        chosen = [site for site in sites if not site.stack.endswith("decoder")] or list(sites)
        around = {id(site): site if site.role == "block" else self._block(sites, site) for site in chosen}
        edited = {id(site.module) for site in chosen if site.role == "block"}
        listeners: dict[int, Positions] = {}
        blocks: dict[int, EditedBlock] = {}
        for site in chosen:
            block = around[id(site)]
            if id(block.module) not in blocks:
                positions, found = self._listener(sites, block, listeners)
                yield from found
                edits = self._edits(block, block.facts.hidden) if id(block.module) in edited else ([],)
                time_first = puts_time_first(block.module)
                blocks[id(block.module)] = EditedBlock(positions, self.first, self.last, *edits, time_first=time_first)
                yield block, blocks[id(block.module)]
            if site.role != "block":
                yield site, self._inside(site, blocks[id(block.module)])

    def _inside(self, site: Site, block: EditedBlock) -> Adapter:
        """Of a projection what it reads, of a whole module what it returns."""
        if site.role is None and next(site.module.children(), None) is not None:
            return EditedOutput(block, *self._edits(site, site.facts.hidden), time_first=block.time_first)
        width = projection_widths(site, type(self).__name__)[0]
        time_first = block.time_first and site.part is None  # torch's attention, written out, is batch first
        return EditedInput(block, *self._edits(site, width), time_first=time_first)

    def _block(self, sites: Sites, site: Site) -> Site:
        block = sites.sibling(site, "block")
        if block is None:
            raise TargetError(
                f"{type(self).__name__} edits at positions that the block around a place knows, and {site.name!r} "
                f"(role {site.role}) is in none. Choose targets such as 'block', 'o', 'down', or name the blocks with "
                "roles={'block': ...}."
            )
        return block

    def _edits(self, site: Site, width: int | None) -> tuple[list[Edit], float, bool]:
        if width is None or width < self.rank:
            raise TargetError(
                f"{type(self).__name__}(rank={self.rank}) at {site.name!r}: the hidden width is {width or 'unknown'}. "
                "Choose a rank up to the width, on blocks of a known one."
            )
        return [self.edit(width) for _ in range(1 if self.tied else 2)], self.dropout, self.identity

    def _listener(
        self, sites: Sites, block: Site, listeners: dict[int, Positions]
    ) -> tuple[Positions, list[tuple[Site, Adapter]]]:
        """What sees the padding mask that goes to the whole model, and where it is put if it is new."""
        names = [".".join(block.name.split(".")[:i]) for i in range(block.name.count(".") + 1)]
        owner = mask_owner([m for m in map(sites.model.get_submodule, names) if not hasattr(m, "training_step")])
        if id(owner) in listeners:
            return listeners[id(owner)], []
        listeners[id(owner)] = positions = Positions(owner or block.module, block.facts.causal is True)
        if owner is None:
            return positions, []
        name = next(n for n in names if sites.model.get_submodule(n) is owner)
        return positions, [(Site(name, owner, "model"), positions)]


def puts_time_first(block: nn.Module) -> bool:
    """Whether a block of torch's own reads (time, batch, d)."""
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in block.modules())


class LowRankEdit(Edit):
    """e(h) = R^T (W h + b - R h): R (r, d) with R R^T = I, W (r, d), b (r,)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.empty(rank, width))
        self.w = nn.Parameter(torch.empty(rank, width))
        self.b = nn.Parameter(torch.empty(rank))

    def reset(self, draw: Draw, identity: bool) -> None:
        self.start(draw)
        if identity:
            with torch.no_grad():
                self.w.copy_(self.r)
            draw.zeros(self.b)
        else:
            draw.kaiming_uniform(self.w)
            draw.uniform(self.b, bound=self.w.shape[1] ** -0.5)

    def start(self, draw: Draw) -> None:
        draw.orthonormal_rows(self.r)

    def rotation(self) -> Tensor:  # (r, d)
        """The orthonormal rows that `r` stands for: Q of its QR decomposition, signs fixed.

        An orthonormal r is its own.
        """
        with torch.autocast(self.r.device.type, enabled=False):
            r = self.r if self.r.dtype == torch.float64 else self.r.float()
            q, upper = torch.linalg.qr(r.T)
            return (q * torch.sign(torch.diagonal(upper))).T

    def forward(self, h: Tensor) -> Tensor:  # (batch, time, d) -> (batch, time, d)
        r = self.rotation().to(h.dtype)
        return (F.linear(h, self.w.to(h.dtype), self.b.to(h.dtype)) - F.linear(h, r)) @ r

    def collapsed(self) -> dict[str, Tensor]:
        return {**self.state_dict(), "r": self.rotation().detach()}


class LoReFT(ReFT, name="loreft", family="representation", paper="2404.03592", identity=False, overhead="prompt"):
    """h' = h + R^T (W h + b - R h), R R^T = I

    h (d,) is what a block returns at the first `first` and the last `last` tokens of the prompt: real tokens by the
    padding mask, before the first counted label where there are labels a token, at most half of them each (rounded down
    as in the authors' code; the paper rounds up at the end); none while a KV cache is extended. targets may name
    projections, too: there h is what the projection reads ("o": what attention gives before its output projection;
    "down": the activation of the feed-forward layer), or whole modules inside a block ("*.mlp"): there h is what they
    return. tied: one (R, W, b) a place for both ends, else two (as pyreft; the paper's untied has one a position). L (2
    r d + r) parameters when tied. identity=True starts with W = R, b = 0, the base at step 0 (not in the paper). R
    stays orthonormal by a QR decomposition. `dropout` acts on the edit (the authors' code drops the whole h'). In an
    encoder-decoder the encoder is edited. Source: section 3.2, equation 2. Generation needs its KV cache (the default)
    and the whole prompt, without guesses behind it, in one forward: no prefill in chunks, no assisted decoding.
    """

    def edit(self, width: int) -> Edit:
        return LowRankEdit(width, self.rank)
