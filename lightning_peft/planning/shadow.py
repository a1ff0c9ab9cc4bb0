"""A model without memory: copies whose tensors have shapes and no values, and what answers where values are asked for.

Tensors are fake ones on the CPU (`torch._subclasses.FakeTensorMode`), which need no GPU. A plan for CUDA replaces what
torch computes otherwise there: dropout keeps a mask of bytes, and attention with dropout stays one fused operator.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_peft.core import hashed
from lightning_peft.core.codes import KERNELS, Quantisation, TorchKernels
from lightning_peft.core.quant import Blocks
from lightning_peft.core.quantised import ATTRIBUTES, Quantised, foreign, quantise_module

aten = torch.ops.aten
Make = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------ copies
class Hollow(TorchFunctionMode):
    """`copy.deepcopy` in which tensors are made by `make`."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), self.make(tensor))


def empty(device: str) -> Make:
    """tensor -> one of its shape, dtype and layout on `device`; a Parameter stays one."""

    def make(tensor: Tensor) -> Tensor:
        new = torch.empty_like(tensor.detach(), device=device)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    return make


def hollow(module: nn.Module, device: str) -> nn.Module:
    """A deep copy with empty tensors; what was one tensor is one again. Trainers are left behind."""
    make = empty(device)
    memo: dict[int, Any] = {}
    for child in module.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = make(tensor)
        if (trainer := vars(child).get("_trainer")) is not None:
            memo[id(trainer)] = None
    with Hollow(make), torch.no_grad():
        made = copy.deepcopy(module, memo)
    for before, now in zip(module.modules(), made.modules(), strict=True):
        if foreign(before):
            adopt(before, now)
        if isinstance(now, Quantised):
            now.samples = None  # values, by which a base is known again
    return made


def adopt(layer: Any, twin: nn.Module) -> None:
    """Make the copy of a layer of bitsandbytes, whose weight cannot do without memory, one of ours: as many bytes."""
    kept = getattr(layer.weight, "quant_state", None)
    how = ("int8",) if kept is None else (kept.quant_type, kept.blocksize, kept.nested, layer.compute_dtype)
    dtype = torch.float16 if kept is None else kept.dtype
    plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta", dtype=dtype)
    ours = quantise_module(plain, Quantisation(*how))
    twin._parameters = {**ours._parameters, "bias": twin._parameters.get("bias")}
    twin._buffers.update(ours.constants())
    vars(twin).update({name: vars(ours)[name] for name in ATTRIBUTES})
    twin.__class__ = type(ours)


def hollow_batch(batch: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """The same nest of dicts and lists with empty tensors; floating ones in `dtype`."""

    def make(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device=device, dtype=kind)

    return tree_map_only(Tensor, make, batch)


def resized(batch: Any, size: int) -> Any:
    """The batch with `size` rows; tensors that do not have a row for each example stay. On the meta device."""
    rows = batch_size(batch)

    def make(tensor: Tensor) -> Tensor:
        shape = (size, *tensor.shape[1:]) if tensor.dim() and len(tensor) == rows else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return tree_map_only(Tensor, make, batch)


def batch_size(batch: Any) -> int:
    """Rows of the first tensor that has some."""
    return next((t.shape[0] for t in tensors(batch) if t.dim()), 1)


def tensors(batch: Any) -> list[Tensor]:
    """All tensors of a nest."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------ operators that ask for values
def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All entries of a mask are chosen, the most there can be. A number is 1, a truth value False, values are equal."""
    if func is aten._local_scalar_dense.default:
        dtype = args[0].dtype
        return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    if func is aten.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if func is aten.unique_consecutive.default:
        return args[0].new_empty(1), *(args[0].new_empty(0, dtype=torch.long) for _ in range(2))
    if func is aten.masked_select.default:
        return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
    if func is aten.index.Tensor and any(masks(index) for index in args[1]):
        return func(args[0], [place for index in args[1] for place in places(index)])
    return NotImplemented


def masks(index: Tensor | None) -> bool:
    """Whether an index chooses by truth values."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def places(index: Tensor | None) -> list[Tensor | None]:
    """A mask of n dimensions -> n long indices, one for each of its entries."""
    if index is None or not masks(index):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


@contextlib.contextmanager
def fewer_chunks() -> Iterator[None]:
    """In this block random bases are drawn in three chunks: a chunk takes what the next does, but the last."""
    before = hashed.chunks

    def few(key: hashed.Key, k: int, count: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        step = max(1, hashed.CHUNK // count)
        starts = range(0, k, step)
        for start in sorted({*starts[:2], *starts[-1:]}):
            yield start, next(chunk for _, chunk in before(key, min(step, k - start), count, like))

    hashed.chunks = few
    try:
        yield
    finally:
        hashed.chunks = before


# ------------------------------------------------------------------ as on CUDA
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of one byte an element; on the CPU it is one of the input's dtype."""
    if not isinstance(input, FakeTensor):
        return ON_CPU["dropout"](input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0] if training and p else input


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **how: Any,
) -> Tensor:
    """The fused kernel drops without a mask; the one for the CPU has no dropout."""
    drop = 0.0 if isinstance(query, FakeTensor) else dropout_p
    return ON_CPU["scaled_dot_product_attention"](query, key, value, attn_mask, drop, *args, **how)


ON_CUDA: dict[str, Callable[..., Tensor]] = {"dropout": dropout, "scaled_dot_product_attention": attention}
ON_CPU: dict[str, Callable[..., Tensor]] = {name: getattr(F, name) for name in ON_CUDA}


class PlanKernels(TorchKernels):
    """What a fused kernel takes: the weight, and the scales in fp32 where they are quantised themselves."""

    @staticmethod
    def dequantise(blocks: Blocks, dtype: torch.dtype) -> Tensor:
        """Codes and constants -> (d_out, d_in)"""
        scales = blocks.absmax if blocks.nested_absmax is None else blocks.absmax.new_empty(blocks.absmax.shape).float()
        return scales.new_empty(blocks.shape, dtype=dtype)

    @staticmethod
    def int8_product(a: Tensor, b: Tensor) -> Tensor:
        """a b^T"""
        return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@contextlib.contextmanager
def as_on(device: str, module: nn.Module) -> Iterator[None]:
    """In this block the copy `module` takes what it would on `device`."""
    if device != "cuda":
        yield
        return
    for child in module.modules():
        if isinstance(child, Quantised):
            child.quantisation = replace(child.quantisation, backend="plan")
    before = {name: getattr(F, name) for name in ON_CUDA}
    KERNELS["plan"] = PlanKernels()
    try:
        vars(F).update(ON_CUDA)
        yield
    finally:
        vars(F).update(before)
        del KERNELS["plan"]
