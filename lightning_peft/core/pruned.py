"""Adapters of which only some entries take part: those with the largest scores of all, chosen at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calibration import CalibrationError, Run, reduced
from lightning_peft.core.gradients import loss_of
from lightning_peft.core.init import Draw


class Pruned(Adapter):
    """adapter(base, x; W o M): M of zeros and ones for each of its tensors with two dimensions or more.

    Where M is zero the gradient is zero, and the entry starts at zero: no momentum and no weight decay move it.
    """

    def __init__(self, inner: Adapter, group: Group, widths: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.kept, self.group, self.widths = inner, nn.Module(), group, widths
        self.additive, self.reads_weight = inner.additive, inner.reads_weight
        for name, parameter in self.matrices():
            self.kept.register_buffer(flat(name), torch.ones(parameter.shape, dtype=torch.bool))
        group.members.append(self)

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is pruned; biases and gains are left alone."""
        return ((name, p) for name, p in self.inner.named_parameters() if p.dim() > 1)

    def masked(self) -> dict[str, Tensor]:
        """name -> W o M"""
        zero = torch.zeros((), device=next(self.inner.parameters()).device)
        return {n: torch.where(getattr(self.kept, flat(n)), p, zero.to(p.dtype)) for n, p in self.matrices()}

    def called_with(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """What the inner adapter gives with these in place of its parameters.

        Not by torch's own search for tied ones: it swaps those of a module that is there under two names (the rules of
        Compacter) twice, and leaves the values where the parameter was.
        """
        return functional_call(self.inner, values, args, kwargs, tie_weights=False)

    def reset(self, draw: Draw) -> None:
        vars(self.inner)["place"] = self.place
        self.inner.reset(draw)
        for mask in self.kept.buffers():
            mask.fill_(True)
        self.group.drawn(self, draw)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.called_with(self.masked(), base, *args, **kwargs)

    def cast_(self, dtype: torch.dtype) -> Pruned:
        super().cast_(dtype)
        self.inner.cast_(dtype)
        return self

    def penalty(self) -> Tensor | None:
        return self.inner.penalty()

    def collapsed(self) -> dict[str, Tensor]:
        """The masks, and the tensors with zeros where these are zero."""
        return {**self.state_dict(), **{f"inner.{name}": t.detach() for name, t in self.masked().items()}}

    def counted(self) -> Iterable[tuple[nn.Parameter, int]]:
        return [(p, int(getattr(self.kept, flat(name)).sum())) for name, p in self.matrices() if not p.is_meta]


def flat(name: str) -> str:
    """A name that a buffer can have."""
    return name.replace(".", "_")


Scores = dict[int, Tensor]  # id of a parameter -> its scores; the larger, the more it is worth


class Group:
    """The adapters that are pruned together: `share` of their entries goes, those with the smallest scores."""

    def __init__(self, score: str, share: float) -> None:
        self.score, self.share = score, share
        self.members: list[Pruned] = []
        self.random: Scores = {}

    def parameters(self) -> dict[int, nn.Parameter]:
        """Each once, by its id, in the order of the adapters."""
        return {id(p): p for member in self.members for _, p in member.matrices()}

    @property
    def settled(self) -> bool:
        """Whether something is pruned already."""
        return any(not mask.all() for member in self.members for mask in member.kept.buffers())

    def drawn(self, member: Pruned, draw: Draw) -> None:
        """A member has its initial tensors; with the last one, prune by what needs no data."""
        if any(p.is_meta for p in member.inner.parameters()):
            return
        if self.score == "random":
            for _, p in member.matrices():
                scores = torch.empty(p.shape)
                draw.uniform(scores, 1.0)
                self.random[id(p)] = scores.add_(2.0).to(p.device)  # above 0, which stands for no score at all
        if member is self.members[-1] and self.score in WITHOUT_DATA:
            self.prune(WITHOUT_DATA[self.score](self))
            self.random = {}

    @torch.no_grad()
    def prune(self, scores: Scores) -> None:
        """Keep round((1 - share) count) entries of all tensors together; ties go to the first."""
        parameters = self.parameters()
        check_scores(self, scores)
        every = torch.cat([scores[key].flatten().float() for key in parameters])
        count = round((1 - self.share) * len(every))
        kept = torch.zeros(len(every), dtype=torch.bool, device=every.device)
        kept[every.sort(descending=True, stable=True).indices[:count]] = True
        pieces = kept.split([p.numel() for p in parameters.values()])
        masks = {key: piece.view(p.shape) for piece, (key, p) in zip(pieces, parameters.items(), strict=True)}
        for member in self.members:
            for name, p in member.matrices():
                getattr(member.kept, flat(name)).copy_(masks[id(p)])
                p.mul_(masks[id(p)])


def check_scores(group: Group, scores: Scores) -> None:
    """Raise where a tensor would go as a whole because of where it starts."""
    dead = [n for member in group.members for n, p in member.matrices() if not scores[id(p)].any()]
    if group.share and dead:
        raise CalibrationError(
            f"score={group.score!r} gives {len(dead)} tensors ({', '.join(sorted(set(dead)))}) nothing but zeros: "
            "they, or those that they are multiplied with, start at zero, and would be pruned as a whole. Let the "
            "adapter start elsewhere (init='normal'), or choose score='random'."
        )


# ------------------------------------------------------------------ scores
def magnitude(group: Group) -> Scores:
    """|W|"""
    return {key: p.detach().abs() for key, p in group.parameters().items()}


def synflow(group: Group) -> Scores:
    """|W dR/dW|, R the mean of what each adapter gives for ones in place of what the base gives, with |W|."""
    parameters = group.parameters()
    absolute = [p.detach().abs().requires_grad_() for p in parameters.values()]
    of = dict(zip(parameters, absolute, strict=True))
    with torch.enable_grad():
        total = torch.stack([flow(member, of) for member in group.members]).sum()
        grads = torch.autograd.grad(total, absolute, allow_unused=True)
    found = zip(parameters, absolute, grads, strict=True)
    return {key: torch.zeros_like(p) if g is None else (p * g).detach().abs() for key, p, g in found}


def flow(member: Pruned, of: dict[int, Tensor]) -> Tensor:
    """R of one adapter: what comes out for ones."""
    values = {name: of.get(id(p), p.detach().abs()) for name, p in member.inner.named_parameters()}
    like = next(iter(values.values()))
    x, y = (torch.ones(1, width, device=like.device, dtype=like.dtype) for width in member.widths)
    if (tap := getattr(member.inner, "tap", None)) is not None:
        tap.seen = y
    was = member.inner.training
    member.inner.eval()
    out = member.called_with(values, lambda _: y, x)
    member.inner.train(was)
    return out.mean()


WITHOUT_DATA: dict[str, Callable[[Group], Scores]] = {
    "random": lambda group: dict(group.random),
    "magnitude": magnitude,
    "synflow": synflow,
}


def gradients(group: Group, batches: list[Any], run: Run) -> Sequence[Tensor]:
    """The sum over batches (and ranks) of the gradient of the loss, in eval mode."""
    parameters = list(group.parameters().values())
    total = tuple(torch.zeros_like(p) for p in parameters)
    for index, batch in enumerate(batches):
        grads = torch.autograd.grad(loss_of(run, batch, index), parameters, allow_unused=True)
        total = tuple(t if g is None else t + g for t, g in zip(total, grads, strict=True))
    return reduced(total)


def snip(group: Group, batches: list[Any], run: Run) -> Scores:
    """|g W|"""
    found = zip(group.parameters().items(), gradients(group, batches, run), strict=True)
    return {key: (g * p).detach().abs() for (key, p), g in found}


def grasp(group: Group, batches: list[Any], run: Run) -> Scores:
    """W (H g): without the entry, |g|^2 would be less by twice that. Attention is computed by plain products."""
    parameters = group.parameters()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        g = gradients(group, batches, run)
        total = tuple(torch.zeros_like(p) for p in parameters.values())
        for index, batch in enumerate(batches):
            loss = loss_of(run, batch, index)
            own = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            product = torch.stack([(a * b).sum() for a, b in zip(own, g, strict=True) if a is not None]).sum()
            second = torch.autograd.grad(product, list(parameters.values()), allow_unused=True)
            total = tuple(t if h is None else t + h for t, h in zip(total, second, strict=True))
    found = zip(parameters.items(), reduced(total), strict=True)
    return {key: (p * h).detach() for (key, p), h in found}


WITH_DATA: dict[str, Callable[[Group, list[Any], Run], Scores]] = {"snip": snip, "grasp": grasp}


def score_and_prune(model: nn.Module, group: Group, batches: Iterable[Any], run: Run) -> int:
    """Prune by a score that needs data, in eval mode; how many batches there were."""
    held, modes = list(batches), {module: module.training for module in model.modules()}
    try:
        model.eval()
        group.prune(WITH_DATA[group.score](group, held, run))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return len(held)
