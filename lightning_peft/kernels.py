"""bitsandbytes as an accelerator: its kernels compute what `core.quant` defines, bit for bit. An extra: `[quant]`.

Importing this file registers the backend "bitsandbytes" where the package is there and recent enough.
"""

from __future__ import annotations

import importlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core import quant
from lightning_peft.core.codes import KERNELS, all_finite
from lightning_peft.core.quant import Blocks, QuantisationError

log = logging.getLogger("lightning_peft")
OLDEST = (0, 50)
"""The oldest bitsandbytes that was tested."""
KNOWN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bitsandbytes_or_raise(what: str) -> Any:
    """The package; ImportError which names the way out where it is missing or too old. what: who needs it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # a kernel it would rather download
    try:
        package = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package bitsandbytes, which is not installed. Run: pip install 'lightning_peft[quant]'"
        ) from error
    found = tuple(int(part) for part in package.__version__.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        raise ImportError(
            f"{what} needs bitsandbytes {'.'.join(map(str, OLDEST))} or later; {package.__version__} is installed. "
            f"Run: "
            "pip install --upgrade 'lightning_peft[quant]'"
        )
    return package


class BitsandbytesKernels:
    """The operators that bitsandbytes registers with torch; on the CPU, on CUDA, and on fake tensors."""

    @staticmethod
    def quantise(weight: Tensor, kind: str, blocksize: int, double: bool) -> Blocks:
        """As `core.quant.quantise`; the checks are its own."""
        plain = kind in ("nf4", "fp4") and weight.dtype in KNOWN_DTYPES and weight.numel() > 0
        known = plain and weight.device.type == "cuda" and blocksize in quant.BLOCKSIZES and blocksize >= 32
        if not known or not all_finite(weight):  # torch's is the faster one on a CPU, and says what is wrong
            return quant.quantise(weight, kind, blocksize, double)
        ops = torch.ops.bitsandbytes
        codes, absmax = ops.quantize_4bit(weight.contiguous(), blocksize, kind, torch.uint8)
        nested = offset = None
        if double:
            offset = absmax.mean()
            absmax, nested = ops.quantize_blockwise(absmax - offset, quant.dynamic_map(weight.device), 256)
        return Blocks(codes, absmax, nested, offset, tuple(weight.shape), kind, blocksize, weight.dtype)

    @staticmethod
    def dequantise(blocks: Blocks, dtype: torch.dtype) -> Tensor:
        """As `core.quant.dequantise`."""
        odd = (
            blocks.codes.device.type == "cpu" and math.prod(blocks.shape) % 2
        )  # its CPU kernel falls back on a slow one
        if blocks.kind not in ("nf4", "fp4") or blocks.codes.is_meta or odd:
            return quant.dequantise(blocks, dtype)
        ops, scales = torch.ops.bitsandbytes, blocks.absmax
        if blocks.nested_absmax is not None:
            table = quant._table("dynamic", "", scales)
            scales = ops.dequantize_blockwise(scales, blocks.nested_absmax, table, 256, torch.float32)
            scales = scales.add_(blocks.offset)
        direct = dtype if dtype in KNOWN_DTYPES else torch.float32
        # flat: with rows that are no multiple of the block, its CPU kernel takes the scales of the wrong blocks
        flat = [1, math.prod(blocks.shape)]
        values = ops.dequantize_4bit(blocks.codes, scales, blocks.blocksize, blocks.kind, flat, direct)
        return values.view(blocks.shape).to(dtype)

    @staticmethod
    def int8_product(a: Tensor, b: Tensor) -> Tensor:
        """a b^T, exact"""
        return torch.ops.bitsandbytes.int8_linear_matmul(a, b)


def register() -> None:
    """Make the backend known; it does nothing where the package is missing or too old."""
    try:
        bitsandbytes_or_raise("backend='bitsandbytes'")
    except ImportError:
        return
    except Exception as error:  # of its own libraries: a broken installation
        log.warning("bitsandbytes is installed and cannot be imported (%s); torch's kernels are used.", error)
        return
    KERNELS.setdefault("bitsandbytes", BitsandbytesKernels())


def require(backend: str) -> None:
    """Raise where a backend that is asked for by name is not there."""
    if backend == "bitsandbytes":
        bitsandbytes_or_raise("backend='bitsandbytes'")
    elif backend not in ("auto", "torch"):
        raise QuantisationError(f"backend={backend!r} is unknown. Known: auto, torch, bitsandbytes.")


register()
