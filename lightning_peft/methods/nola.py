"""NOLA: Compressing LoRA using Linear Combination of Random Basis. Koohpayegani et al., ICLR 2024.
https://arxiv.org/abs/2310.02556
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.derived import Derived
from lightning_peft.core.fields import FieldError, not_negative, positive, probability
from lightning_peft.core.hashed import Combination, Hashed, uniform
from lightning_peft.core.init import Draw
from lightning_peft.core.low_rank import LowRank
from lightning_peft.core.quant import Blocks, dequantise, quantise
from lightning_peft.core.sites import Site, Sites
from lightning_peft.core.targets import Shape, matrix_shape

BLOCK = 64


class Combined(LowRank):
    """y = base(x) + s B A drop(x): A = (1/sqrt k) sum_j alpha_j A_j [+ A_0], B = (1/sqrt k) sum_j beta_j B_j.

    The A_j (rank, d_in) and B_j (d_out, rank) are drawn when they are needed and never kept. bits: of alpha (k,) and
    beta (k,) in files; coded: they are codes here, too.
    """

    def __init__(
        self, shape: Shape, rank: int, scale: float, dropout: float, k: int, basis: Hashed, offset: bool, bits: int
    ) -> None:
        super().__init__(shape, rank, scale, dropout)
        self.rank, self.k, self.basis, self.offset, self.bits = rank, k, basis, offset, bits
        self.coded = False
        self.alpha, self.beta = (nn.Parameter(torch.empty(k)) for _ in range(2))
        self.made = Derived(), Derived()

    def make(self, shape: Shape, rank: int) -> None:
        """What there is does not depend on the shape."""

    def reset(self, draw: Draw) -> None:
        self.basis.fill()
        if self.coded:
            return
        draw.zeros(self.beta)
        if self.offset:
            draw.zeros(self.alpha)
        else:
            draw.normal(self.alpha, std=self.shape.d_in**-0.5)  # A of the variance of a Kaiming-uniform one

    def factors(self) -> tuple[Tensor, Tensor]:
        shapes = (self.rank, self.shape.d_in), (self.shape.d_out, self.rank)
        kept = not (self.training or torch.is_grad_enabled())
        out = []
        for name, shape, made in zip(("alpha", "beta"), shapes, self.made, strict=True):
            source = getattr(self, f"{name}_codes" if self.coded else name)
            if not kept:
                made.clear()
            make = functools.partial(self.combined, name, shape)
            out.append(made([source], make, trained=True) if kept else make())
        return out[0], out[1]

    def combined(self, name: str, shape: tuple[int, int]) -> Tensor:
        """One of the factors."""
        key, count = self.basis.keys[name], shape[0] * shape[1]
        total = Combination.apply(self.coefficients(name), key, count) * self.k**-0.5
        if self.offset and name == "alpha":
            total = total + uniform(key, self.k * count, count, total.device).to(total.dtype) * self.shape.d_in**-0.5
        return total.view(shape)

    # -------------------------------------------------------------- coefficients in codes
    def coefficients(self, name: str) -> Tensor:
        """alpha or beta, (k,)"""
        if not self.coded:
            return getattr(self, name)  # type: ignore[no-any-return]
        codes, absmax = getattr(self, f"{name}_codes"), getattr(self, f"{name}_absmax")
        blocks = Blocks(codes, absmax.float(), None, None, (self.k,), f"nf{self.bits}", BLOCK, torch.float32)
        return dequantise(blocks, torch.float32)

    def encoded(self) -> dict[str, Tensor]:
        """The codes and scales of alpha and beta."""
        out: dict[str, Tensor] = {}
        for name in ("alpha", "beta"):
            blocks = quantise(getattr(self, name).detach().float(), f"nf{self.bits}", BLOCK, double=False)
            out |= {f"{name}_codes": blocks.codes, f"{name}_absmax": blocks.absmax}
        return out

    def encode(self) -> Combined:
        """Hold codes in place of parameters."""
        with torch.no_grad():
            for name in ("alpha", "beta"):
                getattr(self, name).zero_()
        codes = self.encoded()
        del self.alpha, self.beta
        for name, tensor in codes.items():
            self.register_buffer(name, tensor)
        self.coded = True
        return self

    def collapsed(self) -> dict[str, Tensor]:
        """alpha and beta as codes, where that is asked for."""
        whole = super().collapsed()
        if self.coded or self.bits == 32:
            return whole
        return {n: t for n, t in whole.items() if n not in ("alpha", "beta")} | self.encoded()


class NOLA(PEFT, name="nola", family="reparametrisation", paper="2310.02556", mergeable=True, batched=True):
    """y = W x + (alpha / rank) B A x, A = sum_j alpha_j A_j, B = sum_j beta_j B_j, A_j and B_j frozen and random

    The bases of U(-1, 1) / sqrt(coefficients) are a function of seed, site and index: never stored, drawn in chunks
    forward and backward, bit-equal on every device. The alpha_j start Gaussian, such that A has the variance of
    LoRA's, the beta_j at zero: the base at step 0. 2 coefficients parameters a site, whatever its shape and rank.
    Source: section 3.1.

    frozen_offset: alpha starts at zero too, and A = A_0 + sum_j alpha_j A_j with a random A_0, as in the authors' code
    for language models. bits: of the coefficients in adapter files; a file of 8 or 4 bits cannot be trained further.
    coded: the coefficients are codes; what a file of 8 or 4 bits is loaded as.
    """

    targets: str | list[str] | None = "q,v"
    rank: int = 8
    alpha: float = 8.0
    coefficients: int = 1000
    dropout: float = 0.0
    frozen_offset: bool = False
    bits: Literal[32, 8, 4] = 32
    coded: bool = False

    def check(self) -> None:
        positive(self, "rank", "coefficients")
        not_negative(self, "alpha")
        probability(self, "dropout")
        if self.coded and self.bits == 32:
            raise FieldError("NOLA(coded=True, bits=32): codes have 8 or 4 bits. It is meant for files; leave it out.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        for index, site in enumerate(sites):
            basis = Hashed(f"{self.seed}/{index}", "alpha", "beta")
            given = matrix_shape(site, "NOLA"), self.rank, self.alpha / self.rank, self.dropout
            adapter = Combined(*given, self.coefficients, basis, self.frozen_offset, self.bits)
            yield site, adapter.encode() if self.coded else adapter

    def portable(self) -> NOLA:
        """As files hold it."""
        return self if self.bits == 32 else dataclasses.replace(self, coded=True)
