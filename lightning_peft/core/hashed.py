"""Random numbers as a function of their index: the same bits on every device, in any order, with nothing kept."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.basis import MARKS, Basis

Key = tuple[int, int]
FACTOR, WORD = 0x45D9F3B, 0xFFFFFFFF  # the factor is below 2^31, so that no product leaves int64
CHUNK = 2**20  # numbers that are there at a time


def key_of(seed: int | str, name: str) -> Key:
    """Two 32-bit words for a stream."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(key: Key, start: int, count: int, device: torch.device | None = None) -> Tensor:
    """The numbers `start` ... `start + count` - 1 of a stream, U[-1, 1) in steps of 2^-23, fp32: (count,)"""
    word = torch.arange(start, start + count, dtype=torch.int64, device=device)
    word = (word & WORD) ^ key[0] ^ (word >> 32)
    for mixed in (key[1], 0):
        word = ((word ^ (word >> 16)) * FACTOR) & WORD
        word = word ^ mixed
    word = ((word ^ (word >> 16)) * FACTOR) & WORD
    word = word ^ (word >> 16)
    return (word >> 8).float() * 2.0**-23 - 1


class Combination(torch.autograd.Function):
    """sum_j c_j U_j: c (k,), U_j (count,) the j-th numbers of a stream, drawn in chunks, and again in backward."""

    @staticmethod
    def forward(c: Tensor, key: Key, count: int) -> Tensor:  # type: ignore[override]
        total = c.new_zeros(count)
        for start, basis in chunks(key, len(c), count, c):
            total = total + c[start : start + len(basis)] @ basis
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.key, ctx.count, ctx.k = inputs[1], inputs[2], len(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        products = grads[0].new_empty(ctx.k)
        for start, basis in chunks(ctx.key, ctx.k, ctx.count, grads[0]):
            products[start : start + len(basis)] = basis @ grads[0]
        return products, None, None


def chunks(key: Key, k: int, count: int, like: Tensor) -> Any:
    """(first, the next few rows (rows, count)) of the k rows, in the dtype of `like`"""
    step = max(1, CHUNK // count)
    for start in range(0, k, step):
        rows = min(step, k - start)
        yield start, uniform(key, start * count, rows * count, like.device).view(rows, count).to(like.dtype)


class Hashed(Basis):
    """Streams by name, of which nothing is kept but the mark: their first numbers, compared when a file is loaded."""

    def __init__(self, seed: int | str, *names: str) -> None:
        super().__init__(seed)
        self.keys = {name: key_of(seed, f"hashed/{name}") for name in names}
        self.register_buffer("mark", torch.zeros(len(names), MARKS))

    def fill(self) -> None:
        """Note the mark."""
        if not self.mark.is_meta:
            self.mark.copy_(self.first())

    def first(self) -> Tensor:
        """The first numbers of each stream: (streams, 8)"""
        return torch.stack([uniform(key, 0, MARKS) for key in self.keys.values()])
