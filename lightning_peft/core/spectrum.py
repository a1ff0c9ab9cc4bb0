"""Changes that are sparse in another basis, and applied there: y = synthesis(F analysis(x)), F with n entries.

Tokens are the last dimension, so that an entry of F is one pass over a row.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.basis import Basis
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import Site, TargetError


def scatter(rows: Tensor, source: Tensor, target: Tensor, entries: Tensor, height: int) -> Tensor:
    """out[target[k]] += entries[k] rows[source[k]]: rows (width, m), entries (n,) -> (height, m), nothing of (n, m)"""
    order = torch.argsort(target)
    bounds = torch.searchsorted(target[order], torch.arange(height, device=target.device))
    entries = entries.to(rows.dtype)[order]
    return nn.functional.embedding_bag(source[order], rows, bounds, mode="sum", per_sample_weights=entries)


def dots(left: Tensor, right: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """<left[i[k]], right[j[k]]> (n,): rows (height, m) and (width, m), nothing of (n, m)"""
    bounds = torch.zeros(len(left), dtype=i.dtype, device=i.device)  # not looked at, as every entry names its row
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, j, bounds, i, 0)  # type: ignore[no-any-return]


# ------------------------------------------------------------------ where the entries are
def distinct(seed: int, d_out: int, d_in: int, draw: Draw, tensor: Tensor) -> None:
    """Rows and columns (2, n) of n distinct entries of (d_out, d_in), by the law that peft uses."""
    order = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(seed))[: tensor.shape[1]]
    tensor.copy_(torch.stack([order // d_in, order % d_in]))


def entries(shapes: dict[tuple[int, int, int], Basis], seed: int, d_out: int, d_in: int, count: int) -> Basis:
    """The positions for one shape, shared by all sites that have it."""
    key = (d_out, d_in, count)
    if key not in shapes:
        shapes[key] = Basis(seed, positions=((2, count), partial(distinct, seed, d_out, d_in)))
    return shapes[key]


def check_count(site: Site, method: str, count: int, d_out: int, d_in: int) -> None:
    if count > d_out * d_in:
        raise TargetError(
            f"{method}(count={count}) is more than the {d_out} x {d_in} entries of {site.name!r}. Lower it, give that "
            "site its own number (counts=...), or exclude it."
        )


# ------------------------------------------------------------------ Fourier
def half(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where a frequency is in the half spectrum of a real signal, and whether it is there as its conjugate."""
    over = position > width // 2
    return torch.where(over, width - position, position), over


def spectrum(x: Tensor) -> Tensor:  # (tokens, d) -> (d // 2 + 1, 2 tokens)
    return torch.view_as_real(torch.fft.rfft(x.T, dim=0)).flatten(1)


def conjugate(rows: Tensor) -> Tensor:
    return rows * torch.tensor([1.0, -1.0], dtype=rows.dtype, device=rows.device).repeat(rows.shape[1] // 2)


class FourierChange(torch.autograd.Function):
    """y[p] = s / (d_out d_in) sum_k c_k sum_q cos(2 pi (u_k p / d_out + v_k q / d_in)) x[q]: x (tokens, d_in)

    Keeps x and c alone; its spectrum is taken again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, positions: Tensor, d_out: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, c, positions)
        ctx.d_out, ctx.scale = d_out, scale
        if not len(x):  # an expert without a token: there is no transform of nothing
            return x.new_zeros(0, d_out)
        return turned(spectrum(x), c, positions, (d_out, x.shape[1]), scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, c, positions = ctx.saved_tensors
        d_in, d_out = x.shape[1], ctx.d_out
        if not len(x):
            return torch.zeros_like(x), torch.zeros_like(c), None, None, None
        g = spectrum(gradient)
        dx = turned(g, c, positions.flip(0), (d_in, d_out), ctx.scale) if ctx.needs_input_grad[0] else None
        (u, over_u), (v, over_v) = half(positions[0], d_out), half(positions[1], d_in)
        both = torch.cat([g, conjugate(g)])
        dc = dots(both, spectrum(x), u + len(g) * (over_u == over_v), v) * (ctx.scale / (d_in * d_out))
        return dx, dc.to(c.dtype), None, None, None


def turned(rows: Tensor, c: Tensor, positions: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """The half spectrum of x -> y (tokens, d_out)

    e^(+2 pi i) on both axes: where u and v are on the same side of their middle, it is the conjugate of x that counts.
    """
    d_out, d_in = shape
    (u, over_u), (v, over_v) = half(positions[0], d_out), half(positions[1], d_in)
    height = d_out // 2 + 1
    own = (u == 0) | (2 * u == d_out)  # is its own conjugate; of the others both halves are meant
    weights = torch.where(own, c, c / 2)
    plain, other = scatter(rows, v, u + height * (over_u == over_v), weights, 2 * height).chunk(2)
    h = plain.add_(conjugate(other)).unflatten(1, (-1, 2))
    h[:: max(d_out // 2, 1) if d_out % 2 == 0 else height, :, 1] = 0  # of rows that are their own conjugates
    h = torch.view_as_complex(h)
    return (torch.fft.irfft(h, d_out, 0) * (scale / d_in)).T


# ------------------------------------------------------------------ wavelets
@lru_cache
def daubechies(order: int) -> tuple[float, ...]:
    """The low-pass filter (2 order) of synthesis: of minimal phase, and with `order` vanishing moments.

    (1 + z)^order times the factors of sum_k C(order - 1 + k, k) y^k, y = (2 - z - 1 / z) / 4, whose roots lie in the
    unit circle; its sum is sqrt(2).
    """
    taps = torch.ones(1, dtype=torch.complex128)
    for root in [torch.tensor(-1.0 + 0j)] * order + inner_roots(order):
        taps = nn.functional.pad(taps, (0, 1)) - root * nn.functional.pad(taps, (1, 0))
    return tuple((taps.real * (2**0.5 / taps.real.sum())).tolist())


def inner_roots(order: int) -> list[Tensor]:
    powers = torch.tensor([math.comb(order - 1 + k, k) for k in range(order)], dtype=torch.float64)
    if order == 1:
        return []
    companion = torch.diag(torch.ones(order - 2, dtype=torch.float64), -1)
    companion[:, -1] = -powers[:-1] / powers[-1]
    b = 1 - 2 * torch.linalg.eigvals(companion)  # z + 1 / z = 2 b
    root = torch.sqrt(b * b - 1)
    return list(torch.where((b - root).abs() < 1, b - root, b + root))


def padded(width: int, taps: int) -> int:
    """Coefficients of one axis of `width`: even, and enough for the ends."""
    return (width + taps - 1) // 2 * 2 if taps else width


def quadrants(positions: Tensor, d_out: int, d_in: int, taps: int) -> Tensor:
    """Where peft puts the entries of (d_out, d_in) among the coefficients: in the middle of what is padded.

    Its upper right quarter is high-pass along the rows' axis, the lower left along the columns'.
    """
    height, width = padded(d_out, taps), padded(d_in, taps)
    u, v = positions[0] + (height - d_out) // 2, positions[1] + (width - d_in) // 2
    if not taps:
        return positions
    low, right = u >= height // 2, v >= width // 2
    return torch.stack([u % (height // 2) + right * (height // 2), v % (width // 2) + low * (width // 2)])


def analysis(rows: Tensor, taps: tuple[float, ...]) -> Tensor:  # (d, tokens) -> (padded, tokens)
    """The adjoint of `synthesis`: low[h] = sum_t taps[t] rows[2 h + t - len(taps) + 2], then high in the same way."""
    if not taps:
        return rows
    count = padded(len(rows), len(taps)) // 2
    ends = (0, 0, len(taps) - 2, 2 * count - len(rows))
    x = nn.functional.pad(rows, ends) if any(ends) else rows
    steps = [x[t : t + 2 * count - 1 : 2] for t in range(len(taps))]
    low, high = (step_sum(steps, filtered) for filtered in (taps, mirror(taps)))
    return torch.cat([low, high])


def step_sum(steps: list[Tensor], taps: tuple[float, ...]) -> Tensor:
    total = taps[0] * steps[0]
    for tap, step in zip(taps[1:], steps[1:], strict=True):
        total.add_(step, alpha=tap)
    return total


def mirror(taps: tuple[float, ...]) -> tuple[float, ...]:
    """The high-pass filter of synthesis."""
    return tuple((-1) ** t * tap for t, tap in enumerate(reversed(taps)))


def synthesis(z: Tensor, taps: tuple[float, ...], width: int) -> Tensor:  # (padded, tokens) -> (width, tokens)
    if not taps:
        return z
    count = len(z) // 2
    out = z.new_zeros(2 * count + len(taps) - 2, z.shape[1])
    for t, (low, high) in enumerate(zip(taps, mirror(taps), strict=True)):
        out[t : t + 2 * count - 1 : 2].add_(z[:count], alpha=low).add_(z[count:], alpha=high)
    return out[len(taps) - 2 : len(taps) - 2 + width]


class WaveletChange(torch.autograd.Function):
    """y = s S_out F S_in^T x: S the synthesis of one axis, F with the entries c at the positions; keeps x and c."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor, positions: Tensor, d_out: int, scale: float, taps: tuple[float, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, c, positions)
        ctx.d_out, ctx.scale, ctx.taps = d_out, scale, taps
        return waved(analysis(x.T, taps), scale * c, positions, d_out, taps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, c, positions = ctx.saved_tensors
        g, d_in = analysis(gradient.T, ctx.taps), x.shape[1]
        dx = waved(g, ctx.scale * c, positions.flip(0), d_in, ctx.taps) if ctx.needs_input_grad[0] else None
        dc = ctx.scale * dots(g, analysis(x.T, ctx.taps), positions[0], positions[1])
        return dx, dc.to(c.dtype), None, None, None, None


def waved(rows: Tensor, c: Tensor, positions: Tensor, width: int, taps: tuple[float, ...]) -> Tensor:
    """The coefficients of x -> y (tokens, width)"""
    z = scatter(rows, positions[1], positions[0], c, padded(width, len(taps)))
    return synthesis(z, taps, width).T
