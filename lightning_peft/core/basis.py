"""Frozen random tensors that many adapters share: drawn again from a seed wherever they are needed, kept in no file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lightning_peft.core.init import Draw

Law = Callable[[Draw, Tensor], None]  # such as Draw.kaiming_uniform, or partial(Draw.uniform, bound=0.1)
MARKS = 8


class BasisError(RuntimeError):
    """A random basis came out otherwise than where the adapter was trained."""


class Basis(nn.Module):
    """name -> tensor of a shape and a law, each from a generator of (seed, name): equal on every device and rank.

    One object is a child of all adapters that use it, so that it is moved once and counts once. Files hold only the
    first numbers of each tensor, which are compared on loading. Call `fill` in the adapter's `reset`.
    """

    mark: Tensor

    def __init__(self, seed: int | str, **tensors: tuple[tuple[int, ...], Law]) -> None:
        super().__init__()
        self.seed, self.laws, self.filled = seed, {name: law for name, (_, law) in tensors.items()}, False
        for name, (shape, _) in tensors.items():
            self.register_buffer(name, torch.empty(shape), persistent=False)
        self.register_buffer("mark", torch.zeros(len(tensors), MARKS))

    @torch.no_grad()
    def fill(self) -> None:
        """Draw the tensors, once; not while they have no memory."""
        if self.filled or self.mark.is_meta:
            return
        for name, law in self.laws.items():
            law(Draw(self.seed, f"basis/{name}"), self._buffers[name])  # type: ignore[arg-type]
        self.mark.copy_(self.first())
        self.filled = True

    def first(self) -> Tensor:
        """The first numbers of each tensor: (tensors, 8), short ones filled up with zeros."""
        rows = [self._buffers[name].flatten()[:MARKS].float() for name in self.laws]  # type: ignore[union-attr]
        return torch.stack([nn.functional.pad(row, (0, MARKS - len(row))) for row in rows])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Basis:
        """Moves to other devices; stays in fp32, so that every dtype of the adapters sees the same numbers."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def verify(self) -> None:
        """Raise where the numbers of a file are not those that were drawn here."""
        if self.mark.is_meta:
            return
        if not torch.allclose(self.mark, self.first().to(self.mark), rtol=1e-5, atol=1e-7):
            raise BasisError(
                f"The random basis of seed {self.seed} begins with {self.first()[0, :3].tolist()} here, and began with "
                f"{self.mark[0, :3].tolist()} where the adapter was trained. Use the seed and the release of torch of "
                "that run."
            )


def kaiming(fan_in: int, gain: float = 1.0) -> Law:
    """U(-b, b), b = gain sqrt(3 / fan_in)"""
    return partial(Draw.uniform, bound=gain * (3 / fan_in) ** 0.5)
