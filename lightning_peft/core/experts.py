"""LoRA on the weights of experts: stacks (experts, d_out, d_in) that one module holds as one parameter.

While the module's own forward runs, the parameter is shadowed by W_e + s B_e A_e, which is multiplied factor by factor.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.projection import STACK
from lightning_peft.core.sites import Site, TargetError, sites, tokens


# ------------------------------------------------------------------ a weight that is a sum
class Factored(Tensor):
    """W + s U V: W (..., m, n), U (..., m, r), V (..., r, n); x W^T, x W and their grouped forms never make U V.

    So is what is chosen from it along the first of three dimensions, and its transpose. Anything else that is done
    with it is done with the sum.
    """

    parts: tuple[Tensor, Tensor, Tensor, float]

    @staticmethod
    def __new__(cls, w: Tensor, u: Tensor, v: Tensor, scale: float) -> Factored:
        out = Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype, device=w.device)  # type: ignore[attr-defined]
        out.parts = (w, u, v, scale)
        return out

    __init__ = object.__init__  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """The sum itself."""
        w, u, v, scale = self.parts
        w = w.dense() if isinstance(w, Factored) else w
        return w + (scale * (u @ v)).to(w.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (rule := RULES.get(func)) is not None and (result := rule(*args, **kwargs)) is not None:
            return result
        args, kwargs = tree_map(lambda t: t.dense() if isinstance(t, Factored) else t, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} passed by what adapts the weights of experts: its result would be the base's.")


def chosen(weight: Factored, index: Any) -> Factored | None:
    """W[index] of a stack, for what chooses along the first dimension."""
    w, u, v, scale = weight.parts
    if w.dim() != 3 or not isinstance(index, (int, slice, Tensor)) or (isinstance(index, Tensor) and index.dim() > 1):
        return None
    return Factored(w[index], u[index], v[index], scale)


def transposed(weight: Factored, first: int = -2, second: int = -1) -> Factored | None:
    """The last two dimensions the other way round: (W + s U V)^T = W^T + s V^T U^T"""
    w, u, v, scale = weight.parts
    if {first % w.dim(), second % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return None
    return Factored(w.transpose(-2, -1), v.transpose(-2, -1), u.transpose(-2, -1), scale)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """x (W + s U V)^T + b"""
    if isinstance(x, Factored) or not isinstance(weight, Factored):
        return None
    w, u, v, scale = weight.parts
    return F.linear(x, w, bias) + F.linear(scale * F.linear(x, v.to(x.dtype)), u.to(x.dtype))


def product(x: Any, y: Any) -> Tensor | None:
    """x (W + s U V), or (W + s U V) y"""
    both = isinstance(x, Factored) and isinstance(y, Factored)
    if both or min(x.dim(), y.dim()) < 2:
        return None
    if isinstance(x, Factored):
        w, u, v, scale = x.parts
        return w @ y + u.to(y.dtype) @ (scale * (v.to(y.dtype) @ y))
    w, u, v, scale = y.parts
    return x @ w + (scale * (x @ u.to(x.dtype))) @ v.to(x.dtype)


def grouped(x: Tensor, y: Any, offs: Tensor | None = None, **more: Any) -> Tensor | None:
    """x[group e] (W_e + s U_e V_e); the rank is filled up to 16 bytes, which its kernels want"""
    if isinstance(x, Factored) or y.dim() != 3:
        return None
    w, u, v, scale = y.parts
    fill = -u.shape[-1] % (16 // x.element_size())
    u, v = F.pad(u.to(x.dtype), (0, fill)), F.pad(v.to(x.dtype), (0, 0, 0, fill))
    z = GROUPED[0](x, u.contiguous(), offs=offs)
    return GROUPED[0](x, w, offs=offs, **more) + GROUPED[0](scale * z, v.contiguous(), offs=offs)


NAMES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse", "is_nested")
FACTS = {getattr(Tensor, name).__get__ for name in NAMES}
FACTS |= {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
GROUPED = [getattr(place, name) for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(place, name)]
RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: chosen,
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes), transposed),
    Tensor.mT.__get__: transposed,  # type: ignore[attr-defined]
    F.linear: linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), product),
    **dict.fromkeys((torch.mm, Tensor.mm), product),
    Tensor.__rmatmul__: lambda y, x: product(x, y),  # type: ignore[attr-defined]
    **dict.fromkeys(GROUPED, grouped),
    Tensor.data_ptr: lambda weight: weight.parts[0].data_ptr(),
}


# ------------------------------------------------------------------ the adapter
class ExpertLowRank(Adapter):
    """W_e + s B_e A_e for each expert e: A (experts, rank, d_in), B (experts, d_out, rank).

    flipped: the stack is (experts, d_in, d_out), and the change of a weight is A_e^T B_e^T.
    """

    additive = True

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, init: str, flipped: bool) -> None:
        super().__init__()
        experts, d_out, d_in = (shape[0], shape[2], shape[1]) if flipped else shape
        self.scale, self.init, self.flipped = scale, init, flipped
        self.a = nn.Parameter(torch.empty(experts, rank, d_in))
        self.b = nn.Parameter(torch.empty(experts, d_out, rank))

    def reset(self, draw: Draw) -> None:
        _, rank, d_in = self.a.shape
        draw.uniform(self.a, d_in**-0.5) if self.init == "kaiming" else draw.normal(self.a, std=1 / rank)
        draw.zeros(self.b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U and V of s U V"""
        return (self.a.mT, self.b.mT) if self.flipped else (self.b, self.a)

    def forward(self, base: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]  # () -> (experts, ., .)
        weight, (u, v) = base(), self.factors()
        if torch.compiler.is_compiling():  # which knows no such weight
            return weight + (self.scale * (u @ v)).to(weight.dtype)
        return Factored(weight, u, v, self.scale)

    def delta(self, weight: Tensor) -> Tensor:  # (experts * ., .)
        u, v = self.factors()
        return self.scale * (u.to(weight) @ v.to(weight)).flatten(0, 1)


# ------------------------------------------------------------------ where
def owners(experts: str | list[str]) -> list[str]:
    """ "*.experts.gate_up_proj" -> "*.experts": the patterns of the modules that hold the stacks"""
    return list(dict.fromkeys(module for module, _ in split(experts)))


def split(experts: str | list[str]) -> list[tuple[str, str]]:
    """Each token as a pattern of modules and one of their parameters."""
    found = [token.rpartition(".")[::2] for token in tokens(experts, "experts")]
    if any(not module or module.startswith("re:") for module, _ in found):
        raise TargetError(f"experts={experts!r}: expected globs of parameters, such as '*.experts.gate_up_proj'.")
    return found


def stacks(model: nn.Module, experts: str | list[str]) -> dict[int, dict[str, nn.Parameter]]:
    """id of a module -> its parameters of three dimensions that are meant; an error where a pattern meets none."""
    out: dict[int, dict[str, nn.Parameter]] = {}
    for module_pattern, pattern in split(experts):
        for site in sites(model, module_pattern):
            there = {n: p for n, p in site.module._parameters.items() if p is not None and p.dim() == 3}
            meant = {n: p for n, p in there.items() if fnmatch.fnmatchcase(n, pattern)}
            if not meant:
                raise TargetError(
                    f"experts={experts!r}: {site.name!r} ({type(site.module).__name__}) has no parameter of three "
                    f"dimensions {pattern!r}. Known there: {', '.join(there) or 'none'}."
                )
            out.setdefault(id(site.module), {}).update(meant)
    return out


def stack_site(site: Site, name: str) -> Site:
    """The place of the stack `name` in the site's module."""
    return replace(site, role=name, part=STACK + name)
